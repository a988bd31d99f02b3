// For tests: what tree_attention_amx.cpp does, on any CPU.
namespace {
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
}
#include "common/amx_emulated.inl"
#include "tree_attention/tree_attention_bfloat16.inl"
#include "tree_attention/tree_attention_float32.inl"
#include "tree_attention/tree_attention_kernel.inl"

namespace mmdpo::emulated {

namespace {
bool forward_float32(const TreeAttentionTask& task) { return Task<Float32>(task).forward(); }
bool backward_float32(const TreeAttentionTask& task) { return Task<Float32>(task).backward(); }
}  // namespace

bool tree_attention_forward(const TreeAttentionTask& task) { return run_bfloat16(task, &Task<Bfloat16>::forward, forward_float32); }
bool tree_attention_backward(const TreeAttentionTask& task) { return run_bfloat16(task, &Task<Bfloat16>::backward, backward_float32); }

}  // namespace mmdpo::emulated
