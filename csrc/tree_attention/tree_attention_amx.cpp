// Compiled for AVX-512 and AMX: products of bfloat16 in the matrix units, all else as in tree_attention_avx512.cpp.
namespace {
constexpr int kVectorBytes = 64;
}
#include "common/amx.inl"
#include "tree_attention/tree_attention_bfloat16.inl"
#include "tree_attention/tree_attention_kernel.inl"

namespace mmdpo::amx {

bool tree_attention_forward(const TreeAttentionTask& task) {
  return run_bfloat16(task, &Task<Bfloat16>::forward, avx512::tree_attention_forward);
}
bool tree_attention_backward(const TreeAttentionTask& task) {
  return run_bfloat16(task, &Task<Bfloat16>::backward, avx512::tree_attention_backward);
}

}  // namespace mmdpo::amx
