// Any CPU: 16-byte vectors, which every x86-64 and aarch64 has. float64 runs here only.
namespace {
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
constexpr int kKeyBlock = 48;  // 48 x 128 floats stay in a 32 KiB L1 cache
}
#include "attention_mass/attention_mass_backward.inl"
#include "attention_mass/attention_mass_forward.inl"

namespace mmdpo::generic {

bool forward_float32(const AttentionMassTask& task) { return Forward<float>(task).run(); }
bool backward_float32(const AttentionMassTask& task) { return Backward<float>(task).run(); }
bool forward_float64(const AttentionMassTask& task) { return Forward<double>(task).run(); }
bool backward_float64(const AttentionMassTask& task) { return Backward<double>(task).run(); }

}  // namespace mmdpo::generic
