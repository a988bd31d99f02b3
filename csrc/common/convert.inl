#pragma once

// Head vectors of any dtype, read as float or double. Included by kernels; nothing here may call an inline function of the standard library.

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

namespace {

using mmdpo::DType;

inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float from_half(uint16_t half) {
  // A power of two moves the exponent from half's bias to float's and brings subnormals along; infinity and NaN need theirs filled.
  const float scaled = from_bits(static_cast<uint32_t>(half & 0x7FFF) << 13) * 0x1p112f;
  const float special = from_bits((static_cast<uint32_t>(half & 0x3FF) << 13) | 0x7F800000u);
  const float value = (half & 0x7C00) == 0x7C00 ? special : scaled;
  return half & 0x8000 ? -value : value;
}

// Head vector `offset` elements into `data`, as T.
template <class T>
void convert(const void* data, DType dtype, int64_t offset, int64_t D, T* out) {
  switch (dtype) {
    case DType::float32:
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<const float*>(data)[offset + d];
      break;
    case DType::bfloat16:
      for (int64_t d = 0; d < D; ++d) out[d] = from_bits(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[offset + d]) << 16);
      break;
    case DType::float16:
      for (int64_t d = 0; d < D; ++d) out[d] = from_half(static_cast<const uint16_t*>(data)[offset + d]);
      break;
    case DType::float64:
      for (int64_t d = 0; d < D; ++d) out[d] = static_cast<T>(static_cast<const double*>(data)[offset + d]);
      break;
  }
}

}  // namespace
