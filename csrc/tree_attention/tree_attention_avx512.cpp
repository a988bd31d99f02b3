// Compiled for AVX-512: 24 of 32 registers hold sums.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 12, kTileVectors = 2;
}
#include "tree_attention/tree_attention_float32.inl"
#include "tree_attention/tree_attention_kernel.inl"

namespace mmdpo::avx512 {

bool tree_attention_forward(const TreeAttentionTask& task) { return Task<Float32>(task).forward(); }
bool tree_attention_backward(const TreeAttentionTask& task) { return Task<Float32>(task).backward(); }

}  // namespace mmdpo::avx512
