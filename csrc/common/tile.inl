// The matrix product at the bottom of the kernels: one tile of the result, which stays in registers. Included by kernels.

#include "common/simd.inl"

namespace {

template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;

// C (kTileRows, kTileColumns) = or += A B over `depth` terms. A's element (i, k) is a[i * a_row + k * a_step].
template <bool kAdd, class T>
inline void multiply(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_row, T* c, int64_t c_row) {
  // The sum starts at zero even where C does not: a shorter chain of rounding.
  Vec<T> sum[kTileRows][kTileVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec<T> left = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += left * right[v];
    }
    a += a_step;
    b += b_row;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      T* to = c + r * c_row + v * kLanes<T>;
      store<T>(to, kAdd ? load(to) + sum[r][v] : sum[r][v]);
    }
  }
}

}  // namespace
