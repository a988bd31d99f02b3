// Compiled with -mavx2 -mfma: 12 of 16 registers hold sums.
namespace {
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
}
#include "attention_mass/attention_mass_backward.inl"
#include "attention_mass/attention_mass_forward.inl"

namespace mmdpo::avx2 {

bool forward_float32(const AttentionMassTask& task) { return Forward<float>(task).run(); }
bool backward_float32(const AttentionMassTask& task) { return Backward<float>(task).run(); }

}  // namespace mmdpo::avx2
