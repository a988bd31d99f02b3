// amx.inl in plain C++, so that the layouts around it can be tested on any CPU.

#include <cstdint>
#include <cstring>

#include "common/simd.inl"

namespace {

// Nothing to configure.
class Tiles {
 public:
  Tiles() {}
  ~Tiles() {}
};

inline float widened(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <bool kAdd>
inline void multiply_pairs(int64_t depth, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t b_row, float* c, int64_t c_row) {
  for (int r = 0; r < 32; ++r) {
    for (int n = 0; n < 32; ++n) {
      float sum = kAdd ? c[r * c_row + n] : 0.0f;
      for (int64_t k = 0; k < depth; ++k) sum += widened(a[r * a_row + k]) * widened(b[k / 2 * b_row + n * 2 + k % 2]);
      c[r * c_row + n] = sum;
    }
  }
}

inline void store_rounded(uint16_t* to, Vec<float> value) {
  for (int i = 0; i < kLanes<float>; ++i) {
    const float number = value[i];
    uint32_t bits;
    memcpy(&bits, &number, sizeof(bits));
    // Infinity keeps its bits, and what is close to it becomes infinity. NaN keeps a bit of its payload that no rounding carries away.
    to[i] = static_cast<uint16_t>(number == number ? (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40);
  }
}

inline void transpose16(const void* from, int64_t from_row, void* to, int64_t to_row) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) memcpy(out + (j * to_row + i) * 4, in + (i * from_row + j) * 4, 4);
  }
}

}  // namespace
