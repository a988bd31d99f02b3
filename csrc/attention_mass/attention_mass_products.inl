// Scores of attention_mass from queries and keys of any dtype, in vectors of T. Included by attention_mass_rows.inl.

#include "attention_mass/attention_mass.h"
#include "common/convert.inl"
#include "common/tile.inl"

namespace {

template <class T>
class VectorProducts {
 public:
  using Part = T;  // of what is packed

  explicit VectorProducts(const mmdpo::AttentionMassArgs& args) : a_(args) {}

  // Parts that a packed head vector takes.
  int64_t width() const { return a_.D; }

  void lay_out(Arena& arena) { head_ = arena.take<T>(a_.D); }
  void lay_out_sums(Arena&, int64_t) {}

  // Columns of the gradients: D up to whole tiles.
  int64_t columns() const { return up_to(a_.D, kTileKeys); }

  // The query `offset` elements into the array becomes row r of a strip: (D, kTileRows).
  void pack_query(int64_t offset, int64_t r, T* strip) {
    convert(a_.query, a_.dtype, offset, a_.D, head_);
    for (int64_t d = 0; d < a_.D; ++d) strip[d * kTileRows + r] = head_[d];
  }

  // to: (kKeyBlock / kTileKeys, D, kTileKeys), zero past the last key.
  void pack_keys(int64_t first_offset, int64_t count, T* to) {
    if (count < kKeyBlock) memset(to, 0, kKeyBlock * a_.D * sizeof(T));
    for (int64_t j = 0; j < count; ++j) {
      convert(a_.key, a_.dtype, first_offset + j * a_.key_strides[2], a_.D, head_);
      T* column = to + j / kTileKeys * kTileKeys * a_.D + j % kTileKeys;
      for (int64_t d = 0; d < a_.D; ++d) column[d * kTileKeys] = head_[d];
    }
  }

  // The head vector `offset` elements into an array. to: (columns) zeros.
  void pack_row(const void* from, int64_t offset, T* to) { convert(from, a_.dtype, offset, a_.D, to); }

  static void put(T* to, Vec<T> value) { store<T>(to, value); }

  // rows (count, columns), as `pack_row` made them, become a right factor.
  void finish_rows(int64_t, T*) const {}

  // sums (count, columns) += changes (count, kKeyBlock) x keys (kKeyBlock, columns)
  void add_keys(int64_t count, const T* changes, const T* keys, T* sums) const {
    const int64_t width = columns();
    for (int64_t d = 0; d < width; d += kTileKeys) {
      for (int64_t m = 0; m < count; m += kTileRows) {
        multiply<true>(kKeyBlock, changes + m * kKeyBlock, kKeyBlock, 1, keys + d, width, sums + m * width + d, width);
      }
    }
  }

  // sums (kKeyBlock, columns) = transposed changes (count, kKeyBlock) x queries (count, columns)
  void sum_queries(int64_t count, const T* changes, const T* queries, T* sums) const {
    const int64_t width = columns();
    for (int64_t d = 0; d < width; d += kTileKeys) {
      for (int64_t j = 0; j < kKeyBlock; j += kTileRows) {
        multiply<false>(count, changes + j, 1, kKeyBlock, queries + d, width, sums + j * width + d, width);
      }
    }
  }

  // scores: (kTileRows, kKeyBlock) products of one strip with the packed keys.
  void score(const T* query, const T* packed_keys, T* scores) const {
    // Sums of kDotChunk products are formed in registers and added up: shorter chains of rounding than one sum over D.
    constexpr int64_t kDotChunk = 32;
    for (int64_t tile = 0; tile < kKeyBlock; tile += kTileKeys) {
      const T* keys = packed_keys + tile * a_.D;
      multiply<false>(a_.D < kDotChunk ? a_.D : kDotChunk, query, 1, kTileRows, keys, kTileKeys, scores + tile, kKeyBlock);
      for (int64_t d = kDotChunk; d < a_.D; d += kDotChunk) {
        const int64_t rest = a_.D - d < kDotChunk ? a_.D - d : kDotChunk;
        multiply<true>(rest, query + d * kTileRows, 1, kTileRows, keys + d * kTileKeys, kTileKeys, scores + tile, kKeyBlock);
      }
    }
  }

 private:
  static constexpr int kTileKeys = kTileColumns<T>;

  const mmdpo::AttentionMassArgs& a_;
  T* head_;
};

}  // namespace
