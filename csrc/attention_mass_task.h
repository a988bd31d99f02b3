// One task of attention_mass: the rows of one batch entry that share one key head. Implemented once per instruction set.
#pragma once

#include "attention_mass.h"

namespace mmdpo {

struct AttentionMassTask {
  const AttentionMassArgs* args;
  int64_t batch;
  int64_t key_head;
  const int32_t* rows;  // indices into R of the used rows of this task
  int64_t num_rows;
  double* partial;      // mean: N, tokens: S sums over this task's rows and heads; null for none, which writes args->out
};

// Each returns false where its workspace could not be allocated.
namespace generic {
bool run_float32(const AttentionMassTask& task);
bool run_float64(const AttentionMassTask& task);
}  // namespace generic

#if defined(__x86_64__)
namespace avx2 {
bool run_float32(const AttentionMassTask& task);
}
namespace avx512 {
bool run_float32(const AttentionMassTask& task);
}
#endif

}  // namespace mmdpo
