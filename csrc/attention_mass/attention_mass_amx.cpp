// Compiled for AVX-512 and AMX: 32 x 32 scores at a time from the matrix units, all else as in attention_mass_avx512.cpp.
namespace {
constexpr int kVectorBytes = 64, kTileRows = 32, kTileVectors = 2;
constexpr int kKeyBlock = 96;  // of 2 bytes
}
#include "common/amx.inl"
#include "attention_mass/attention_mass_bfloat16.inl"

namespace mmdpo::amx {

bool forward_bfloat16(const AttentionMassTask& task) { return run_forward_bfloat16(task, avx512::forward_float32); }
bool backward_bfloat16(const AttentionMassTask& task) { return run_backward_bfloat16(task, avx512::backward_float32); }

}  // namespace mmdpo::amx
