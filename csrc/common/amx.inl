// Products of bfloat16 with AMX: tiles of 16 rows of 64 bytes. amx_emulated.inl has the same functions in plain C++. Included by kernels.
//
// The right factor of a product is kept in pairs: its rows 2k and 2k + 1 are interleaved, so that an element is a pair of 4 bytes.

#if defined(__GNUC__) && !defined(__clang__)
// GCC's header uses uninitialized vectors for what an instruction does not read.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

#include <cstdint>

#include "common/simd.inl"

namespace {

// All eight tile registers are 16 x 64 bytes, on this thread, while the object lives. The operating system has allowed them, cpu_level.cpp.
class Tiles {
 public:
  Tiles() {
    // Constant, as GCC takes the instruction for one that reads 8 bytes, and might not write the others of a local.
    static constexpr Configuration kConfiguration;
    _tile_loadconfig(&kConfiguration);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
};

// C (32, 32) = or += A (32, depth) B (depth, 32), B in pairs; depth is a multiple of 32. a_row, b_row: elements from row to row, of B from
// pair of rows to pair of rows.
template <bool kAdd>
inline void multiply_pairs(int64_t depth, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, float* c, int64_t c_row) {
  const int64_t a_bytes = a_row * 2, b_bytes = b_row * 2, c_bytes = c_row * 4;
  // GCC's loads of tiles do not say that they read memory.
  asm volatile("" ::: "memory");
  if (kAdd) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 16 * c_row, c_bytes);
    _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    const uint16_t* pairs = b + k / 2 * b_row;
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, pairs, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, pairs + 32, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row + k, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + 16, c_bytes);
  _tile_stored(2, c + 16 * c_row, c_bytes);
  _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

// Rounds to nearest, ties to even. to: bfloat16, as many as a vector of float has.
inline void store_rounded(uint16_t* to, Vec<float> value) {
  const auto rounded = _mm512_cvtneps_pbh((__m512)value);
  memcpy(to, &rounded, sizeof(rounded));
}

// to (16, 16) = from' (16, 16), elements of 4 bytes; from_row, to_row: elements from row to row.
inline void transpose16(const void* from, int64_t from_row, void* to, int64_t to_row) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * from_row * 4);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  // Afterwards quarter q of a[4 g + c] holds column 4 q + c of rows 4 g to 4 g + 3.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    constexpr int kEven = 0x88, kOdd = 0xDD;  // quarters
    const __m512i even_top = _mm512_shuffle_i32x4(a[c], a[4 + c], kEven), even_low = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], kEven);
    const __m512i odd_top = _mm512_shuffle_i32x4(a[c], a[4 + c], kOdd), odd_low = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], kOdd);
    _mm512_storeu_si512(out + c * to_row * 4, _mm512_shuffle_i32x4(even_top, even_low, kEven));
    _mm512_storeu_si512(out + (4 + c) * to_row * 4, _mm512_shuffle_i32x4(odd_top, odd_low, kEven));
    _mm512_storeu_si512(out + (8 + c) * to_row * 4, _mm512_shuffle_i32x4(even_top, even_low, kOdd));
    _mm512_storeu_si512(out + (12 + c) * to_row * 4, _mm512_shuffle_i32x4(odd_top, odd_low, kOdd));
  }
}

}  // namespace
