// CUDA C++ on the CPU, for tests: a kernel compiled as plain C++ with this file in place of the toolkit's runs one block after another.
//
// The threads of a block, or of all blocks of a cluster, are fibers that take turns. A thread runs until it waits for others: at __syncthreads
// for its block, at every warp instruction for its 32 lanes, at the cluster's barrier for all. So what a program computes is what the hardware
// computes, as long as the program waits where it must; where it does not, the order in which fibers run decides, and tests run two (see
// Weather).
//
// Found and reported as errors of the launch, as on a GPU:
//   - an access outside of guarded memory (guarded.h) or of the block's shared memory, which ends at a page that nobody may touch;
//   - threads that wait for each other forever, lanes of one warp that meet in different instructions or with part of their warp;
//   - addresses that an instruction may not have, and copies under way when a thread ends;
//   - another block's shared memory written to before the cluster's first barrier or after that block's end; halves of that barrier out of
//     turn.
// Shared memory starts as NaN in every block, and so shows what was never written.
//
// Not the hardware's: speed; the order and rounding inside a matrix product (here in double, rounded once); the last bits of exp2f, tanhf and log.
// Covered: what the kernels in csrc/ use. A new kernel's instruction goes here or, where CUDA C++ has no name for it, into common/ptx.cuh.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

// One order of things that the hardware is free to choose.
enum class Weather : int {
  calm,   // first warps first; asynchronous copies happen at once
  rough,  // last warps first; asynchronous copies happen as late as they may
};

int current_lane();
unsigned char* shared_memory();

// Ends the launch with an error.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void synchronize_block();

// The two halves of the cluster's barrier.
void arrive_at_cluster();
void wait_for_cluster();

// Where block `rank` of the cluster has what this block has at `shared`.
unsigned char* shared_of_rank(void* shared, int rank);

// Brings the lanes of a warp together: each leaves `size` bytes, and finds all lanes' behind the pointers returned.
constexpr size_t kMaxMessage = 64;
const unsigned char* meet(const char* instruction, const void* message, size_t size);

template <class T>
struct Messages {
  const unsigned char* bytes;

  T operator[](int lane) const {
    T value;
    std::memcpy(&value, bytes + lane * kMaxMessage, sizeof(T));
    return value;
  }
};

template <class T>
Messages<T> meet(const char* instruction, const T& message) {
  static_assert(sizeof(T) <= kMaxMessage);
  return {meet(instruction, &message, sizeof(T))};
}

template <class T, class Combine>
T reduce(const char* instruction, unsigned lanes, T value, Combine combine) {
  if (lanes != 0xFFFFFFFFu) fail("%s: only whole warps are covered", instruction);
  const Messages<T> all = meet(instruction, value);
  T result = all[0];
  for (int lane = 1; lane < 32; ++lane) result = combine(result, all[lane]);
  return result;
}

// Copies of this thread that are under way.
void start_copy(void* to, const void* from, size_t size);
void commit_copies();
void wait_for_copies(size_t pending);

// Runs a kernel -> whether it ended well; error_message() says what happened otherwise.
bool run(dim3 grid, dim3 block, unsigned cluster_blocks, size_t shared_bytes, const std::function<void()>& kernel);
const char* error_message();

}  // namespace emulation

// Those of the thread whose turn it is.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using std::isinf;
using std::max;
using std::min;

inline void __syncthreads() { emulation::synchronize_block(); }
inline void __threadfence() {}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

template <class T>
T __ldcg(const T* from) {
  return *from;
}

inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to += value;
  return old;
}

template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int distance) {
  if (lanes != 0xFFFFFFFFu) emulation::fail("__shfl_xor_sync: only whole warps are covered");
  return emulation::meet("__shfl_xor_sync", value)[emulation::current_lane() ^ distance];
}

inline unsigned __ballot_sync(unsigned lanes, int predicate) {
  const unsigned bit = static_cast<unsigned>(predicate != 0) << emulation::current_lane();
  return emulation::reduce("__ballot_sync", lanes, bit, [](unsigned a, unsigned b) { return a | b; });
}

inline int __any_sync(unsigned lanes, int predicate) {
  return emulation::reduce("__any_sync", lanes, predicate != 0 ? 1 : 0, [](int a, int b) { return a | b; });
}

inline int __reduce_min_sync(unsigned lanes, int value) {
  return emulation::reduce("__reduce_min_sync", lanes, value, [](int a, int b) { return std::min(a, b); });
}

inline int __reduce_max_sync(unsigned lanes, int value) {
  return emulation::reduce("__reduce_max_sync", lanes, value, [](int a, int b) { return std::max(a, b); });
}

inline int __reduce_add_sync(unsigned lanes, int value) {
  return emulation::reduce("__reduce_add_sync", lanes, value, [](int a, int b) { return a + b; });
}

inline unsigned __reduce_or_sync(unsigned lanes, unsigned value) {
  return emulation::reduce("__reduce_or_sync", lanes, value, [](unsigned a, unsigned b) { return a | b; });
}

// The runtime, as far as csrc/ calls it. Everything is done when a call returns.
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  const cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t) { return emulation::error_message(); }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 227 * 1024;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t) {
  std::memset(to, value, size);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
  // Clusters along x are all there are.
  const unsigned cluster_blocks = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  const bool well =
      emulation::run(config->gridDim, config->blockDim, cluster_blocks, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return well ? cudaSuccess : cudaErrorLaunchFailure;
}
