// Compiled for AVX-512: 24 of 32 registers hold sums.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 3;
constexpr int kKeyBlock = 48;  // 48 x 128 floats stay in a 32 KiB L1 cache
}
#include "attention_mass/attention_mass_backward.inl"
#include "attention_mass/attention_mass_forward.inl"

namespace mmdpo::avx512 {

bool forward_float32(const AttentionMassTask& task) { return Forward<float>(task).run(); }
bool backward_float32(const AttentionMassTask& task) { return Backward<float>(task).run(); }

}  // namespace mmdpo::avx512
