// Scores of attention_mass as products of bfloat16, which are exact, with sums in float32. Included after amx.inl or amx_emulated.inl.

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

  // Whether these products carry everything that was packed.
  bool carried_all() const { return packer_.carried_all(); }

  // strip: (kTileRows, width)
  void pack_query(int64_t offset, int64_t r, uint16_t* strip) { copy(a_.query, offset, strip + r * width_); }

  void pack_keys(int64_t first_offset, int64_t count, uint16_t* to) {
    for (int64_t j = 0; j < count; ++j) copy(a_.key, first_offset + j * a_.key_strides[2], rows_ + j * width_);
    memset(rows_ + count * width_, 0, (kKeyBlock - count) * width_ * sizeof(*rows_));
    pair_across(rows_, kKeyBlock, width_, to);
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
  uint16_t* rows_;
};

// A task in bfloat16, or where that does not carry its numbers, in float32.
inline bool run_bfloat16(const AttentionMassTask& task, bool (*in_float32)(const AttentionMassTask&)) {
  const AttentionMassArgs& a = *task.args;
  if (mmdpo::multiplies_exactly_enough(a.scale, a.D)) {
    Forward<float, PairProducts> forward(task);
    if (!forward.run()) return false;
    if (forward.products().carried_all()) return true;
    if (task.partial != nullptr) memset(task.partial, 0, (a.reduce == mmdpo::Reduce::mean ? a.N : a.S) * sizeof(*task.partial));
  }
  return in_float32(task);
}

}  // namespace
