// Scores of attention_mass as products of bfloat16, which are exact, with sums in float32. Gradients of scores are rounded for theirs. Included
// after amx.inl or amx_emulated.inl.

#include "attention_mass/attention_mass_backward.inl"
#include "attention_mass/attention_mass_forward.inl"
#include "common/bfloat16.h"
#include "common/pairs.inl"

namespace {

class PairProducts {
 public:
  using Part = uint16_t;

  explicit PairProducts(const mmdpo::AttentionMassArgs& args) : a_(args), width_(up_to(args.D, kSide)) {
    static_assert(kTileRows == kSide && kKeyBlock % kSide == 0, "strips and blocks of keys are whole products");
  }

  int64_t width() const { return width_; }

  void lay_out(Arena& arena) { rows_ = arena.take<uint16_t>(kKeyBlock * width_); }

  // pairs_: of a matrix of `rows` or kKeyBlock rows, as wide as a block of keys or a head. turned_: (kKeyBlock, rows).
  void lay_out_sums(Arena& arena, int64_t rows) {
    pairs_ = arena.take<uint16_t>((rows > kKeyBlock ? rows : kKeyBlock) * (width_ > kKeyBlock ? width_ : kKeyBlock));
    turned_ = arena.take<uint16_t>(rows * kKeyBlock);
  }

  int64_t columns() const { return width_; }

  // Whether these products carry everything that was packed.
  bool carried_all() const { return packer_.carried_all(); }

  // strip: (kTileRows, width)
  void pack_query(int64_t offset, int64_t r, uint16_t* strip) { copy(a_.query, offset, strip + r * width_); }

  void pack_keys(int64_t first_offset, int64_t count, uint16_t* to) {
    for (int64_t j = 0; j < count; ++j) copy(a_.key, first_offset + j * a_.key_strides[2], rows_ + j * width_);
    memset(rows_ + count * width_, 0, (kKeyBlock - count) * width_ * sizeof(*rows_));
    pair_across(rows_, kKeyBlock, width_, to);
  }

  void pack_row(const void* from, int64_t offset, uint16_t* to) { copy(from, offset, to); }
  static void put(uint16_t* to, Vec<float> value) { store_rounded(to, value); }

  void finish_rows(int64_t count, uint16_t* rows) const {
    pair_down(rows, count, width_, pairs_);
    memcpy(rows, pairs_, count * width_ * sizeof(*rows));
  }

  void add_keys(int64_t count, const uint16_t* changes, const uint16_t* keys, float* sums) const {
    for (int64_t m = 0; m < count; m += kSide) {
      for (int64_t d = 0; d < width_; d += kSide) {
        multiply_pairs<true>(kKeyBlock, changes + m * kKeyBlock, kKeyBlock, keys + d * 2, width_ * 2, sums + m * width_ + d, width_);
      }
    }
  }

  void sum_queries(int64_t count, const uint16_t* changes, const uint16_t* queries, float* sums) const {
    pair_down(changes, count, kKeyBlock, pairs_);
    for (int64_t i = 0; i < count / 2; i += 16) {
      for (int64_t j = 0; j < kKeyBlock; j += 16) {
        transpose16(pairs_ + (i * kKeyBlock + j) * 2, kKeyBlock, turned_ + (j * count / 2 + i) * 2, count / 2);
      }
    }
    for (int64_t j = 0; j < kKeyBlock; j += kSide) {
      for (int64_t d = 0; d < width_; d += kSide) {
        multiply_pairs<false>(count, turned_ + j * count, count, queries + d * 2, width_ * 2, sums + j * width_ + d, width_);
      }
    }
  }

  void score(const uint16_t* query, const uint16_t* keys, float* scores) const {
    for (int64_t j = 0; j < kKeyBlock; j += kSide) {
      multiply_pairs<false>(width_, query, width_, keys + j * width_, kSide * 2, scores + j, kKeyBlock);
    }
  }

 private:
  void copy(const void* from, int64_t offset, uint16_t* to) {
    packer_.copy(static_cast<const uint16_t*>(from) + offset, a_.D, width_, to);
  }

  const mmdpo::AttentionMassArgs& a_;
  const int64_t width_;
  const Tiles tiles_;
  Packer packer_;
  uint16_t *rows_, *pairs_ = nullptr, *turned_ = nullptr;
};

// A task in bfloat16, or where that does not carry its numbers, in float32.
inline bool run_forward_bfloat16(const AttentionMassTask& task, bool (*in_float32)(const AttentionMassTask&)) {
  const AttentionMassArgs& a = *task.args;
  if (mmdpo::multiplies_exactly_enough(a.scale, a.D)) {
    Forward<float, PairProducts> forward(task);
    if (!forward.run()) return false;
    if (forward.products().carried_all()) return true;
    if (task.partial != nullptr) memset(task.partial, 0, (a.reduce == mmdpo::Reduce::mean ? a.N : a.S) * sizeof(*task.partial));
  }
  return in_float32(task);
}

// Likewise; what float32 writes takes the place of all that was written.
inline bool run_backward_bfloat16(const AttentionMassTask& task, bool (*in_float32)(const AttentionMassTask&)) {
  const AttentionMassArgs& a = *task.args;
  if (mmdpo::multiplies_exactly_enough(a.scale, a.D)) {
    Backward<float, PairProducts> backward(task);
    if (!backward.run()) return false;
    if (backward.products().carried_all()) return true;
  }
  return in_float32(task);
}

}  // namespace
