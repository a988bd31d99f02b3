// One task of tree_attention: the heads that share one key head of one batch entry. Implemented once per instruction set.
#pragma once

#include "tree_attention/tree_attention.h"

namespace mmdpo {

struct TreeAttentionTask {
  const TreeAttentionArgs* args;
  int64_t batch;
  int64_t key_head;
  int64_t first_row, last_row;  // forward: query rows [first, last), the first a multiple of the kernel's block
  int64_t last_key;             // no row of the task sees one from here on; at least last_row
};

// Rows of a block: forward tasks start at multiples of it.
constexpr int64_t kTreeBlock = 96;

// Each returns false where its workspace could not be allocated.
#if defined(__x86_64__)
namespace avx2 {
bool tree_attention_forward(const TreeAttentionTask& task);
bool tree_attention_backward(const TreeAttentionTask& task);
}  // namespace avx2
namespace avx512 {
bool tree_attention_forward(const TreeAttentionTask& task);
bool tree_attention_backward(const TreeAttentionTask& task);
}  // namespace avx512
namespace amx {
bool tree_attention_forward(const TreeAttentionTask& task);
bool tree_attention_backward(const TreeAttentionTask& task);
}  // namespace amx
#endif
namespace emulated {
bool tree_attention_forward(const TreeAttentionTask& task);
bool tree_attention_backward(const TreeAttentionTask& task);
}  // namespace emulated

}  // namespace mmdpo
