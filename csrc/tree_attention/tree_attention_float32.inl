// Operands and products of tree_attention in float32, with tiles that stay in registers.

#include "common/convert.inl"
#include "common/tile.inl"
#include "tree_attention/tree_attention_task.h"

namespace {

// Packed rows serve every product but that with keys or values across.
class Float32 {
 public:
  using Part = float;  // of an operand
  static constexpr int64_t kStrip = kTileRows, kColumns = kTileColumns<float>, kBlock = mmdpo::kTreeBlock;
  static constexpr bool kOneLayout = true;  // for scores and what becomes of them, and for rows in every place

  explicit Float32(const mmdpo::TreeAttentionArgs& args) : D_(up_to(args.D, kColumns)), depth_(args.D), dtype_(args.dtype) {}

  // Elements that a row takes, and those of them that products go over.
  int64_t width() const { return D_; }
  int64_t depth() const { return depth_; }

  void pack_row(const mmdpo::Heads& from, int64_t offset, float* to) {
    convert(from.data, dtype_, offset, depth_, to);
    memset(to + depth_, 0, (D_ - depth_) * sizeof(float));
  }

  // rows: (kBlock, width) -> (kBlock / kColumns, depth, kColumns)
  void pack_across(const float* rows, float* to) const {
    for (int64_t k = 0; k < kBlock; ++k) {
      float* column = to + k / kColumns * kColumns * depth_ + k % kColumns;
      for (int64_t d = 0; d < depth_; ++d) column[d * kColumns] = rows[k * D_ + d];
    }
  }

  static void put(float* to, Vec<float> value) { store<float>(to, value); }

  // to (kBlock, kBlock) = rows (count, width) x keys across; `limit` says where the keys end that a strip of rows needs.
  template <class Limit>
  void products(const float* rows, int64_t count, const float* across, const Limit& limit, float* to) const {
    for (int64_t k = 0; k < kBlock; k += kColumns) {
      for (int64_t r = 0; r < count; r += kStrip) {
        if (k < limit(r)) multiply<false>(depth_, rows + r * D_, D_, 1, across + k * depth_, kColumns, to + r * kBlock + k, kBlock);
      }
    }
  }

  // to (count, width) += P (count, kBlock) x rows (kBlock, width)
  template <class Limit>
  void add_products(const float* p, int64_t count, const float* rows, const Limit& limit, float* to) const {
    for (int64_t r = 0; r < count; r += kStrip) {
      for (int64_t d = 0; d < D_; d += kColumns) {
        multiply<true>(limit(r), p + r * kBlock, kBlock, 1, rows + d, D_, to + r * D_ + d, D_);
      }
    }
  }

  // to (kBlock, width) += P' (kBlock, count) x rows (count, width)
  void add_transposed(const float* p, int64_t count, const float* rows, bool diagonal, float* to) const {
    for (int64_t k = 0; k < (diagonal ? count : kBlock); k += kStrip) {
      const int64_t first = diagonal ? k : 0;
      for (int64_t d = 0; d < D_; d += kColumns) {
        multiply<true>(count - first, p + first * kBlock + k, 1, kBlock, rows + first * D_ + d, D_, to + k * D_ + d, D_);
      }
    }
  }

 private:
  const int64_t D_, depth_;
  const mmdpo::DType dtype_;
};

}  // namespace
