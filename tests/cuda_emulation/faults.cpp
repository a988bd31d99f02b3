// Kernels with one fault each, and what the emulation says of them.
#include <cuda_runtime.h>

#include <string>

#include "cuda/ptx.cuh"
#include "guarded.h"

namespace {

constexpr size_t kBytes = 256;

void none(int*) { __syncthreads(); }

void read_past_the_end(int* global) {
  if (global[kBytes / sizeof(int) + threadIdx.x] == 1) __syncthreads();
}

void write_past_shared_memory(int*) { mmdpo::cuda::shared_memory()[kBytes + threadIdx.x] = 0; }

void copy_without_waiting(int* global) {
  mmdpo::cuda::copy_async(mmdpo::cuda::shared_memory(), global, true);
  mmdpo::cuda::commit_copies();
}

void wait_alone(int*) {
  if (threadIdx.x == 0) __syncthreads();
}

void part_of_a_warp(int*) {
  if (threadIdx.x % 32 < 16) __ballot_sync(0xFFFFFFFFu, 1);
}

void different_instructions(int*) {
  if (threadIdx.x % 32 < 16) {
    __ballot_sync(0xFFFFFFFFu, 1);
  } else {
    __any_sync(0xFFFFFFFFu, 1);
  }
}

}  // namespace

// -> what the launch of a kernel ended with, empty where well.
extern "C" __attribute__((visibility("default"))) const char* emulated_fault(const char* name) {
  struct {
    const char* name;
    void (*kernel)(int*);
  } kernels[] = {{"none", none},
                 {"read_past_the_end", read_past_the_end},
                 {"write_past_shared_memory", write_past_shared_memory},
                 {"copy_without_waiting", copy_without_waiting},
                 {"wait_alone", wait_alone},
                 {"part_of_a_warp", part_of_a_warp},
                 {"different_instructions", different_instructions}};
  emulation::Guarded global(kBytes);
  cudaLaunchConfig_t config;
  config.blockDim = {64};
  config.dynamicSmemBytes = kBytes;
  for (const auto& [known, kernel] : kernels) {
    if (std::string(known) != name) continue;
    return cudaLaunchKernelEx(&config, kernel, reinterpret_cast<int*>(global.data())) == cudaSuccess ? "" : emulation::error_message();
  }
  return "no such kernel";
}
