// One task of attention_mass: the rows of one batch entry that share one key head. Implemented once per instruction set.
#pragma once

#include "attention_mass/attention_mass.h"

namespace mmdpo {

struct AttentionMassTask {
  const AttentionMassArgs* args;
  int64_t batch;
  int64_t key_head;
  const int32_t* rows;  // indices into R of the used rows of this task
  int64_t num_rows;
  double* partial;      // forward. mean: N, tokens: S sums over this task's rows and heads; null for none, which writes args->out
  const AttentionMassGradients* gradients;  // backward, whose task holds all used rows
  double row_weight;                        // heads times used rows of the batch entry, at least 1
};

// Each returns false where its workspace could not be allocated.
namespace generic {
bool forward_float32(const AttentionMassTask& task);
bool forward_float64(const AttentionMassTask& task);
bool backward_float32(const AttentionMassTask& task);
bool backward_float64(const AttentionMassTask& task);
}  // namespace generic

#if defined(__x86_64__)
namespace avx2 {
bool forward_float32(const AttentionMassTask& task);
bool backward_float32(const AttentionMassTask& task);
}  // namespace avx2
namespace avx512 {
bool forward_float32(const AttentionMassTask& task);
bool backward_float32(const AttentionMassTask& task);
}  // namespace avx512
namespace amx {
bool forward_bfloat16(const AttentionMassTask& task);
bool backward_bfloat16(const AttentionMassTask& task);
}  // namespace amx
#endif
namespace emulated {
bool forward_bfloat16(const AttentionMassTask& task);
bool backward_bfloat16(const AttentionMassTask& task);
}  // namespace emulated

}  // namespace mmdpo
