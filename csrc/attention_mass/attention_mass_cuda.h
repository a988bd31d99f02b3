// attention_mass on NVIDIA GPUs (compute capability 8.0 and newer). Contract and argument names: attention_mass.h; arrays lie in the
// memory of one device. Three differences: out-of-range segments count as -1 and out-of-range rows as unused, since nobody on the host can see
// them; num_threads is not read; and what unserved() names.
#pragma once

#include <cstdint>
#include <string>

#include "attention_mass/attention_mass.h"

namespace mmdpo::cuda {

constexpr int kMaxSegments = 32;
constexpr int kMaxHeadSize = 256;

struct Place {
  int device;
  int multiprocessors;  // of the device: the work is cut into enough blocks for them
  void* stream;         // cudaStream_t
  void* workspace;      // workspace_bytes() of device memory, 16-byte aligned; its contents do not matter before or after
};

// Why these kernels cannot serve such arrays, or an empty string.
std::string attention_mass_unserved(DType dtype, int64_t D, int64_t N);

int64_t attention_mass_workspace_bytes(const AttentionMassArgs& args, int multiprocessors);

// Enqueues the work, and writes every element of out. query, key and their strides are multiples of 16 bytes. The result is the same whenever
// the same call is made on the same model of GPU. Throws std::invalid_argument that names the argument, std::runtime_error for CUDA's errors.
void attention_mass(const AttentionMassArgs& args, const Place& place);

// Why kernels cannot run on a device (no driver, a driver older than the toolkit that built this, no code for the device), or an empty string.
std::string unavailable(int device);

}  // namespace mmdpo::cuda
