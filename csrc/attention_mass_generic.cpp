// Any CPU: 16-byte vectors, which every x86-64 and aarch64 has. float64 runs here only.
namespace {
constexpr int kVectorBytes = 16, kTileRows = 6, kTileVectors = 2;
}
#include "attention_mass_kernel.inl"

namespace mmdpo::generic {

bool run_float32(const AttentionMassTask& task) { return Task<float>(task).run(); }
bool run_float64(const AttentionMassTask& task) { return Task<double>(task).run(); }

}  // namespace mmdpo::generic
