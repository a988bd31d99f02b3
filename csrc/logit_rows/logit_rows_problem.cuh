// What the kernels over rows of logits share: a call and how it is cut up, and 16 bytes of logits as numbers.
#pragma once

#include <cuda_runtime.h>

#include "common/ptx.cuh"
#include "logit_rows/logit_rows_cuda.h"

namespace mmdpo::cuda {

constexpr int kMaxRanks = 8;  // the largest cluster that every GPU with clusters has

// Scores are kept as t = logit * inner, or tanh(logit * inner) with a softcap; a probability is proportional to 2^(factor t), factor > 0.
struct LogitProblem {
  LogitRowsArgs a;
  int ranks;          // blocks that share a row: consecutive ones, which form a cluster where there are several
  int slice;          // vectors of 16 bytes of the row that a block takes
  bool moments;       // entropy or mean_logit is asked for
  float inner, factor;
  double score;       // s = score * t
  float coefficient;  // coefficient_scale * ds/dlogit, without the softcap's 1 - t^2
};

template <DType kDType>
constexpr int kLogitBytes = kDType == DType::float32 ? 4 : 2;
template <DType kDType>
constexpr int kVectorLogits = 16 / kLogitBytes<kDType>;

template <DType kDType>
__device__ inline void unpack(const uint4& vector, float (&to)[kVectorLogits<kDType>]) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDType == DType::float32) {
      to[i] = __uint_as_float(words[i]);
    } else if constexpr (kDType == DType::bfloat16) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    } else {
      unpack_float16(words[i], to[2 * i], to[2 * i + 1]);
    }
  }
}

template <DType kDType>
__device__ inline uint4 pack(const float (&from)[kVectorLogits<kDType>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kDType == DType::float32) {
      words[i] = __float_as_uint(from[i]);
    } else {
      words[i] = pack_halves<kDType == DType::bfloat16>(from[2 * i], from[2 * i + 1]);
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

template <DType kDType>
__device__ inline float load_logit(const void* row, int64_t index) {
  if constexpr (kDType == DType::float32) {
    return static_cast<const float*>(row)[index];
  } else {
    const uint32_t bits = static_cast<const uint16_t*>(row)[index];
    if constexpr (kDType == DType::bfloat16) return __uint_as_float(bits << 16);
    float low, high;
    unpack_float16(bits, low, high);
    return low;
  }
}

template <DType kDType>
__device__ inline void store_logit(void* row, int64_t index, float value) {
  if constexpr (kDType == DType::float32) {
    static_cast<float*>(row)[index] = value;
  } else {
    static_cast<uint16_t*>(row)[index] = static_cast<uint16_t>(pack_halves<kDType == DType::bfloat16>(value, 0.0f));
  }
}

}  // namespace mmdpo::cuda
