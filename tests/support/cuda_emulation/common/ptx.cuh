// The instructions of csrc/common/ptx.cuh on the CPU; that file says what they do.
#pragma once

#include <cuda_runtime.h>

namespace mmdpo::cuda {

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline void copy_async(void* shared, const void* global, bool valid) {
  const uintptr_t to = reinterpret_cast<uintptr_t>(shared), from = reinterpret_cast<uintptr_t>(global);
  if (to % 16 != 0 || (valid && from % 16 != 0)) emulation::fail("copy_async: addresses must be multiples of 16");
  static constexpr unsigned char kZeros[16] = {};
  emulation::start_copy(shared, valid ? global : kZeros, 16);
}

inline void commit_copies() { emulation::commit_copies(); }

template <int kPending>
void wait_for_copies() {
  emulation::wait_for_copies(kPending);
}

inline void load_matrices(uint32_t (&to)[4], const void* shared_row) {
  if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) emulation::fail("load_matrices: rows must start at multiples of 16 bytes");
  const auto rows = emulation::meet("load_matrices", static_cast<const unsigned char*>(shared_row));
  const int lane = emulation::current_lane();
  for (int i = 0; i < 4; ++i) std::memcpy(&to[i], rows[8 * i + lane / 4] + lane % 4 * 4, 4);
}

inline double from_bits(bool bfloat16, uint32_t bits) {
  if (bfloat16) {
    bits <<= 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
  const int exponent = bits >> 10 & 0x1F, fraction = bits & 0x3FF;
  double value = exponent == 0x1F ? (fraction != 0 ? NAN : INFINITY)
                 : exponent == 0  ? std::ldexp(fraction, -24)
                                  : std::ldexp(1024 + fraction, exponent - 25);
  return bits & 0x8000 ? -value : value;
}

template <bool kBfloat16>
void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto all = emulation::meet("multiply_matrices", Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int group = emulation::current_lane() / 4, column = emulation::current_lane() % 4 * 2;
  double left[2][16], right[2][16];  // rows group and group + 8 of A, columns `column` and the next of B
  for (int k = 0; k < 16; ++k) {
    const int shift = k % 2 * 16, half = k / 8, owner = k % 8 / 2;
    for (int i = 0; i < 2; ++i) {
      left[i][k] = from_bits(kBfloat16, all[group * 4 + owner].a[2 * half + i] >> shift & 0xFFFF);
      right[i][k] = from_bits(kBfloat16, all[(column + i) * 4 + owner].b[half] >> shift & 0xFFFF);
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += left[i / 2][k] * right[i % 2][k];
    c[i] = static_cast<float>(sum);
  }
}

// The last bit is lost, as an instruction of 22 bits may lose it.
inline float exp2_fast(float x) {
  const float exact = std::exp2(x);
  return exact < 0x1p-126f ? 0.0f : __uint_as_float(__float_as_uint(exact) & ~1u);
}

// Nearest, ties to even.
inline uint32_t float16_bits(float value) {
  const uint32_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7FFF;
  const double size = std::fabs(static_cast<double>(value));
  if (size >= 65520) return sign | 0x7C00;
  if (size < std::ldexp(1, -14)) return sign | static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 24)));
  int exponent;
  const double fraction = std::frexp(size, &exponent);  // in [1/2, 1)
  // A fraction that rounds up to 1 carries into the exponent, as it should.
  return sign | ((static_cast<uint32_t>(exponent + 13) << 10) + static_cast<uint32_t>(std::nearbyint(std::ldexp(fraction, 11))));
}

inline uint32_t bfloat16_bits(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isnan(value) ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

template <bool kBfloat16>
uint32_t pack_halves(float low, float high) {
  return kBfloat16 ? bfloat16_bits(low) | bfloat16_bits(high) << 16 : float16_bits(low) | float16_bits(high) << 16;
}

inline void unpack_float16(uint32_t halves, float& low, float& high) {
  low = static_cast<float>(from_bits(false, halves & 0xFFFF));
  high = static_cast<float>(from_bits(false, halves >> 16));
}

inline void cluster_arrive() { emulation::arrive_at_cluster(); }
inline void cluster_wait() { emulation::wait_for_cluster(); }

inline void cluster_store(void* shared, int rank, float4 value) {
  unsigned char* to = emulation::shared_of_rank(shared, rank);
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulation::fail("cluster_store: addresses must be multiples of 16");
  std::memcpy(to, &value, sizeof(value));
}

}  // namespace mmdpo::cuda
