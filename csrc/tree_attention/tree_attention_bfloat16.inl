// Operands and products of tree_attention in bfloat16, with sums in float32. Probabilities and their gradients are rounded for the products.

#include "common/bfloat16.h"
#include "common/pairs.inl"
#include "tree_attention/tree_attention_task.h"

namespace {

// Rows are packed as they are. Of them are made, a block of kBlock at a time: pairs across, the right factor of scores; pairs down, that of
// sums of rows; and turned rows, the left factor of sums of rows over queries, which therefore come out turned.
class Bfloat16 {
 public:
  using Part = uint16_t;
  static constexpr int64_t kStrip = kSide, kColumns = kSide, kBlock = mmdpo::kTreeBlock;
  static constexpr bool kOneLayout = false;

  explicit Bfloat16(const mmdpo::TreeAttentionArgs& args) : D_(up_to(args.D, kColumns)), count_(args.D) {}

  int64_t width() const { return D_; }
  int64_t depth() const { return D_; }

  void lay_out(Arena& arena) { pairs_ = arena.take<uint16_t>(kBlock * (D_ > kBlock ? D_ : kBlock)); }

  // Whether these products carry everything that was packed.
  bool carried_all() const { return packer_.carried_all(); }

  void pack_row(const mmdpo::Heads& from, int64_t offset, uint16_t* to) {
    packer_.copy(static_cast<const uint16_t*>(from.data) + offset, count_, D_, to);
  }

  void pack_across(const uint16_t* rows, uint16_t* to) const { pair_across(rows, kBlock, D_, to); }
  void pack_down(const uint16_t* rows, uint16_t* to) const { pair_down(rows, kBlock, D_, to); }

  // to: (width, kBlock)
  void pack_turned(const uint16_t* rows, uint16_t* to) const {
    pair_down(rows, kBlock, D_, pairs_);
    transpose(pairs_, kBlock / 2, D_, to);
  }

  // from (width, kBlock) -> to (kBlock, width)
  void turn_back(const float* from, float* to) const { transpose(from, D_, kBlock, to); }

  static void put(uint16_t* to, Vec<float> value) { store_rounded(to, value); }

  template <class Limit>
  void products(const uint16_t* rows, int64_t count, const uint16_t* across, const Limit& limit, float* to) const {
    for (int64_t k = 0; k < kBlock; k += kSide) {
      for (int64_t r = 0; r < count; r += kStrip) {
        if (k < limit(r)) multiply_pairs<false>(D_, rows + r * D_, D_, across + k * D_, kSide * 2, to + r * kBlock + k, kBlock);
      }
    }
  }

  template <class Limit>
  void add_products(const uint16_t* p, int64_t count, const uint16_t* down, const Limit& limit, float* to) const {
    for (int64_t r = 0; r < count; r += kStrip) {
      for (int64_t d = 0; d < D_; d += kSide) {
        multiply_pairs<true>(limit(r), p + r * kBlock, kBlock, down + d * 2, D_ * 2, to + r * D_ + d, D_);
      }
    }
  }

  // to (width, kBlock) += turned (width, kBlock) x P (count, kBlock)
  void add_transposed(const uint16_t* p, int64_t count, const uint16_t* turned, bool diagonal, float* to) const {
    pair_down(p, count, kBlock, pairs_);
    for (int64_t k = 0; k < (diagonal ? count : kBlock); k += kSide) {
      const int64_t first = diagonal ? k : 0;
      for (int64_t d = 0; d < D_; d += kSide) {
        multiply_pairs<true>(count - first, turned + d * kBlock + first, kBlock, pairs_ + first * kBlock + k * 2, kBlock * 2,
                             to + d * kBlock + k, kBlock);
      }
    }
  }

 private:
  // Of elements of 4 bytes.
  static void transpose(const void* from, int64_t rows, int64_t columns, void* to) {
    for (int64_t i = 0; i < rows; i += 16) {
      for (int64_t j = 0; j < columns; j += 16) {
        transpose16(static_cast<const char*>(from) + (i * columns + j) * 4, columns, static_cast<char*>(to) + (j * rows + i) * 4, rows);
      }
    }
  }

  const int64_t D_, count_;
  const Tiles tiles_;
  Packer packer_;
  uint16_t* pairs_ = nullptr;
};

// A task in bfloat16, or where that does not carry its numbers, in float32.
template <class Task>
bool run_bfloat16(const mmdpo::TreeAttentionTask& task, bool (Task::*run)(), bool (*in_float32)(const mmdpo::TreeAttentionTask&)) {
  const mmdpo::TreeAttentionArgs& args = *task.args;
  if (args.dtype == mmdpo::DType::bfloat16 && mmdpo::multiplies_exactly_enough(args.scale, args.D)) {
    Task made(task);
    if (!(made.*run)()) return false;
    if (made.products().carried_all()) return true;
  }
  return in_float32(task);
}

}  // namespace
