// Kernels with one fault each, and what the emulation says of them. Each runs as one cluster of two blocks.
#include <cuda_runtime.h>

#include <string>

#include "common/ptx.cuh"
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

void write_to_a_rank_that_may_not_run(int*) {
  mmdpo::cuda::cluster_store(mmdpo::cuda::shared_memory(), 0, {});
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
}

void write_to_a_rank_that_is_not_there(int*) {
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
  mmdpo::cuda::cluster_store(mmdpo::cuda::shared_memory(), 2, {});
}

// In rough weather the second block runs first, and has ended.
void write_to_a_rank_that_has_ended(int*) {
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
  if (blockIdx.x == 0) mmdpo::cuda::cluster_store(mmdpo::cuda::shared_memory(), 1, {});
}

void write_past_shared_memory_of_a_rank(int*) {
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
  mmdpo::cuda::cluster_store(mmdpo::cuda::shared_memory() + kBytes, 1 - blockIdx.x, {});
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
}

void arrive_alone(int*) {
  if (blockIdx.x == 1) return;
  mmdpo::cuda::cluster_arrive();
  mmdpo::cuda::cluster_wait();
}

void wait_without_arriving(int*) { mmdpo::cuda::cluster_wait(); }

void end_without_waiting(int*) { mmdpo::cuda::cluster_arrive(); }

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
                 {"different_instructions", different_instructions},
                 {"write_to_a_rank_that_may_not_run", write_to_a_rank_that_may_not_run},
                 {"write_to_a_rank_that_is_not_there", write_to_a_rank_that_is_not_there},
                 {"write_to_a_rank_that_has_ended", write_to_a_rank_that_has_ended},
                 {"write_past_shared_memory_of_a_rank", write_past_shared_memory_of_a_rank},
                 {"arrive_alone", arrive_alone},
                 {"wait_without_arriving", wait_without_arriving},
                 {"end_without_waiting", end_without_waiting}};
  emulation::Guarded global(kBytes);
  cudaLaunchConfig_t config;
  cudaLaunchAttribute cluster{cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
  config.gridDim = {2};
  config.attrs = &cluster;
  config.numAttrs = 1;
  config.blockDim = {64};
  config.dynamicSmemBytes = kBytes;
  for (const auto& [known, kernel] : kernels) {
    if (std::string(known) != name) continue;
    return cudaLaunchKernelEx(&config, kernel, reinterpret_cast<int*>(global.data())) == cudaSuccess ? "" : emulation::error_message();
  }
  return "no such kernel";
}
