// attention_mass: which share of each row's attention probability falls on each segment of keys. Here on the CPU, attention_mass_cuda.h on GPUs.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmdpo {

enum class Reduce : int { none, mean, tokens };

// Sizes: B batch, Hq query heads, Hkv key heads, R rows, S keys, D head size, N segments. Strides count elements; the last dimension is dense.
// A float64 query computes, reads lse and writes out in float64; every other dtype in float32.
struct AttentionMassArgs {
  int64_t B, Hq, Hkv, R, S, D, N;
  DType dtype;
  const void* query;             // (B, Hq, R, D)
  int64_t query_strides[3];      // of B, Hq, R
  const void* key;               // (B, Hkv, S, D)
  int64_t key_strides[3];        // of B, Hkv, S
  const int32_t* segments;       // (B, S), -1 = none
  const int32_t* row_positions;  // (B, R), -1 = unused row
  const int32_t* tree_end;       // (B, S), or null = causal
  const int32_t* reach;          // (B, S) by packed index of the query: it sees keys before it; null = up to itself
  const int32_t* depth;          // (B, S) position of each token on its path; read where there is a window, null = packed index
  const void* lse;               // (B, Hq, R), or null = computed here
  double scale;
  double softcap;                // 0 = none
  int64_t window;                // 0 = none
  Reduce reduce;
  int num_threads;
  void* out;                     // none (B, Hq, R, N), mean (B, N), tokens (B, S)
};

// Writes every element of out. Throws std::invalid_argument that names the argument; leaves memory outside the arrays alone whatever
// their values are.
void attention_mass(const AttentionMassArgs& args);

// In float64 where args.dtype is, else in float32; dense.
struct AttentionMassGradients {
  const void* grad;  // in the shape of out
  void* grad_query;  // (B, Hq, R, D)
  void* grad_key;    // (B, Hkv, S, D)
};

// Writes every element of grad_query and grad_key; args.out is not read. The result does not depend on the number of threads.
void attention_mass_backward(const AttentionMassArgs& args, const AttentionMassGradients& gradients);

}  // namespace mmdpo
