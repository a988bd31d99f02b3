// Compiled with -mavx2 -mfma: 12 of 16 registers hold sums.
namespace {
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;
}
#include "attention_mass_kernel.inl"

namespace mmdpo::avx2 {

bool run_float32(const AttentionMassTask& task) { return Task<float>(task).run(); }

}  // namespace mmdpo::avx2
