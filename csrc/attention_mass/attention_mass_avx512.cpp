// Compiled for AVX-512: 24 of 32 registers hold sums.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 3;
}
#include "attention_mass/attention_mass_backward.inl"
#include "attention_mass/attention_mass_forward.inl"

namespace mmdpo::avx512 {

bool forward_float32(const AttentionMassTask& task) { return Forward<float>(task).run(); }
bool backward_float32(const AttentionMassTask& task) { return Backward<float>(task).run(); }

}  // namespace mmdpo::avx512
