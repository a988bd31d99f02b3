// Compiled with -mavx2 -mfma: 12 of 16 registers hold sums.
namespace {
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
}
#include "tree_attention/tree_attention_float32.inl"
#include "tree_attention/tree_attention_kernel.inl"

namespace mmdpo::avx2 {

bool tree_attention_forward(const TreeAttentionTask& task) { return Task<Float32>(task).forward(); }
bool tree_attention_backward(const TreeAttentionTask& task) { return Task<Float32>(task).backward(); }

}  // namespace mmdpo::avx2
