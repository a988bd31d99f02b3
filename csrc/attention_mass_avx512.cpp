// Compiled for AVX-512: 24 of 32 registers hold sums.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 3;
}
#include "attention_mass_kernel.inl"

namespace mmdpo::avx512 {

bool run_float32(const AttentionMassTask& task) { return Task<float>(task).run(); }

}  // namespace mmdpo::avx512
