// Launching a kernel, and what the CUDA runtime says as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace mmdpo::cuda {

inline void require_success(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Blocks in clusters of `cluster_blocks` consecutive ones, which needs compute capability 9.0 where these are several.
template <class... Parameters, class... Arguments>
void launch_clusters(const char* name, void (*kernel)(Parameters...), int cluster_blocks, dim3 blocks, dim3 threads, size_t shared_bytes,
                     void* stream, const Arguments&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (shared_bytes > kWithoutAsking) {
    // As much as there can be: another thread's launch of the same kernel may want more than this one.
    int device = 0, most = 0;
    require_success(cudaGetDevice(&device), name);
    require_success(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), name);
    const void* function = reinterpret_cast<const void*>(kernel);
    require_success(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most), name);
  }
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(cluster_blocks);
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = cluster_blocks > 1 ? 1 : 0;
  require_success(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  launch_clusters(name, kernel, 1, blocks, threads, shared_bytes, stream, arguments...);
}

// Of what the first-level cache and shared memory have together, all to shared memory: as many blocks as that holds run at once.
template <class... Parameters>
void prefer_shared_memory(const char* name, void (*kernel)(Parameters...)) {
  const void* function = reinterpret_cast<const void*>(kernel);
  require_success(cudaFuncSetAttribute(function, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared), name);
}

}  // namespace mmdpo::cuda
