// csrc/attention_mass/attention_mass_cuda.cu on the CPU, its arrays copied to guarded memory for the call.
#include "attention_mass/attention_mass_cuda.cu"

#include "guarded.h"

namespace {

using emulation::Arrays;
using mmdpo::AttentionMassArgs;

std::string error;

// Bytes from the first to the last element of a (B, H, rows, D) array.
size_t extent(const AttentionMassArgs& a, int64_t heads, int64_t rows, const int64_t* strides) {
  if (a.B * heads * rows == 0) return 0;
  const int64_t elements = (a.B - 1) * strides[0] + (heads - 1) * strides[1] + (rows - 1) * strides[2] + a.D;
  return static_cast<size_t>(elements) * (a.dtype == mmdpo::DType::float32 ? 4 : 2);
}

}  // namespace

// -> an empty string, or the error.
extern "C" __attribute__((visibility("default"))) const char* emulated_attention_mass(const AttentionMassArgs* given, int multiprocessors) {
  AttentionMassArgs a = *given;
  const size_t tokens = a.B * a.S * sizeof(int32_t), rows = a.B * a.R;
  const size_t out_size = sizeof(float) * (a.reduce == mmdpo::Reduce::none   ? rows * a.Hq * a.N
                                           : a.reduce == mmdpo::Reduce::mean ? a.B * a.N
                                                                             : a.B * a.S);
  Arrays arrays;
  a.query = arrays.add(a.query, extent(a, a.Hq, a.R, a.query_strides));
  a.key = arrays.add(a.key, extent(a, a.Hkv, a.S, a.key_strides));
  a.segments = static_cast<int32_t*>(arrays.add(a.segments, tokens));
  a.row_positions = static_cast<int32_t*>(arrays.add(a.row_positions, rows * sizeof(int32_t)));
  a.tree_end = static_cast<int32_t*>(arrays.add(a.tree_end, tokens));
  a.reach = static_cast<int32_t*>(arrays.add(a.reach, tokens));
  a.depth = static_cast<int32_t*>(arrays.add(a.depth, tokens));
  a.lse = arrays.add(a.lse, rows * a.Hq * sizeof(float));
  a.out = arrays.add_unset(out_size);
  try {
    mmdpo::cuda::Place place{0, multiprocessors, nullptr, nullptr};
    place.workspace = arrays.add_unset(mmdpo::cuda::attention_mass_workspace_bytes(a, multiprocessors));
    mmdpo::cuda::attention_mass(a, place);
    error.clear();
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  std::memcpy(given->out, a.out, out_size);
  if (!arrays.intact()) error = "a write outside of the arrays";
  return error.c_str();
}
