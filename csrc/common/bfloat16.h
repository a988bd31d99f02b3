// Which products of bfloat16 the matrix units (AMX) may make in place of float32 ones.
#pragma once

#include <cstdint>

namespace mmdpo {

// The units take and give zero for numbers below 2^-126. Beside numbers under 2^64 that is an error of 2^-62 in a product, and a scale
// under this bound keeps the error of a score over the whole head below 2^-32. Larger numbers are left to float32; infinity and NaN come
// out as they should.
constexpr int16_t kTooLarge = (127 + 64) << 7;  // 2^64 as bfloat16
constexpr double kLargestScale = 0x1p30;         // of |scale| times head size

inline bool multiplies_exactly_enough(double scale, int64_t head_size) {
  const double size = static_cast<double>(head_size);
  return scale * size <= kLargestScale && scale * size >= -kLargestScale;
}

}  // namespace mmdpo
