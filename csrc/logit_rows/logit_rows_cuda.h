// What linear_logprobs does with rows of logits, on NVIDIA GPUs (compute capability 8.0 and newer): each row's log-probability of its target,
// statistics of the row, and where asked for the coefficients of the gradient in place of the logits. All arrays lie in one device's memory.
//
//   x = logit * logit_scale;  x = softcap tanh(x / softcap) where there is a softcap;  s = x / temperature;  logp = s[target] - logsumexp(s)
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmdpo::cuda {

struct LogitRowsArgs {
  int64_t rows, vocabulary;
  int64_t row_stride;      // elements from a row's first logit to the next row's; a row itself is dense and may start at any element
  DType dtype;             // float32, bfloat16 or float16
  void* logits;            // (rows, vocabulary)
  const int64_t* targets;  // (rows); out of range counts as a NaN logit: nobody on the host can see it
  double softcap;          // 0 = none
  double logit_scale, temperature;
  int64_t ignore_index;
  // Each (rows) in float32, 0 where the target is ignored. Statistics that are null are not computed.
  float* logps;
  float* entropy;     // nats
  float* max_logp;    // log-probability of the likeliest token
  float* is_top1;     // 1 where the target is as likely as that
  float* mean_logit;  // of s
  // The logits become coefficient_scale * d logp / d logit, rounded to their dtype; 0 where the target is ignored.
  bool gradient;
  double coefficient_scale;
};

// The GPU: what decides how many blocks share a row, and whether they keep it.
struct LogitRowsPlace {
  int device;
  int multiprocessors;
  int capability;    // major number of the compute capability: from 9 on blocks can form clusters
  int shared_bytes;  // shared memory of a multiprocessor
  void* stream;      // cudaStream_t
};

// Enqueues the work. The result is the same whenever the same call is made on the same model of GPU. Throws std::invalid_argument that names
// the argument, std::runtime_error for CUDA's errors.
void logit_rows(const LogitRowsArgs& args, const LogitRowsPlace& place);

}  // namespace mmdpo::cuda
