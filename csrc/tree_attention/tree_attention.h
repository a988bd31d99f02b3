// Attention in which query i sees key j iff j < reach[i] and i < tree_end[j], with its gradients, on the CPU.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmdpo {

// A (B, H, S, D) array; strides count elements, the last dimension is dense.
struct Heads {
  void* data;
  int64_t strides[3];  // of B, H, S

  int64_t offset(int64_t batch, int64_t head, int64_t row) const { return batch * strides[0] + head * strides[1] + row * strides[2]; }
  float* floats(int64_t batch, int64_t head, int64_t row) const { return static_cast<float*>(data) + offset(batch, head, row); }
};

// What is read is of `dtype`: float32, bfloat16 or float16. What is written is float32, in which sums are, too; bfloat16 may be multiplied
// as such where the CPU does that fast, and probabilities are rounded to it then.
// Sizes: B batch, Hq query heads, Hkv key heads, S tokens, D head size. lse and its gradient are (B, Hq, S), dense.
struct TreeAttentionArgs {
  int64_t B, Hq, Hkv, S, D;
  DType dtype;
  Heads query, key, value;
  const int32_t* tree_end;  // (B, S), or null = causal
  const int32_t* reach;     // (B, S), or null = up to the query itself
  double scale;
  int num_threads;
  Heads output;  // forward writes it, backward reads it
  float* lse;    // likewise, float32; -inf where a row sees no key
  // backward only
  Heads grad_output;
  const float* grad_lse;  // null = none
  Heads grad_query, grad_key, grad_value;
};

// Both write every element of their results, which do not depend on the number of threads.
// They throw std::invalid_argument that names the argument.
void tree_attention_forward(const TreeAttentionArgs& args);
void tree_attention_backward(const TreeAttentionArgs& args);

// Why this CPU is not served, or null.
const char* tree_attention_unavailable();

}  // namespace mmdpo
