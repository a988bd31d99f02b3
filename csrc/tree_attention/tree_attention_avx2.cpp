// Compiled with -mavx2 -mfma: 12 of 16 registers hold sums.
namespace {
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
}
#include "tree_attention/tree_attention_kernel.inl"

namespace mmdpo::avx2 {

bool tree_attention_forward(const TreeAttentionTask& task) { return Task(task).forward(); }
bool tree_attention_backward(const TreeAttentionTask& task) { return Task(task).backward(); }

}  // namespace mmdpo::avx2
