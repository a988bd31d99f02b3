// For tests: what attention_mass_amx.cpp does, on any CPU.
namespace {
constexpr int kVectorBytes = 16, kTileRows = 32, kTileVectors = 8;
constexpr int kKeyBlock = 96;
}
#include "common/amx_emulated.inl"
#include "attention_mass/attention_mass_bfloat16.inl"

namespace mmdpo::emulated {

bool forward_bfloat16(const AttentionMassTask& task) { return run_forward_bfloat16(task, generic::forward_float32); }
bool backward_bfloat16(const AttentionMassTask& task) { return run_backward_bfloat16(task, generic::backward_float32); }

}  // namespace mmdpo::emulated
