// From the scan's partial sums to results, in a fixed order.
#pragma once

#include "attention_mass/attention_mass_problem.cuh"
#include "common/ptx.cuh"

namespace mmdpo::cuda {

// Heads times used rows of a batch entry, at least 1. Called by all threads of a block; `counts` is kWarps ints of shared memory.
__device__ inline double row_weight(const Problem& p, int64_t batch, int* counts) {
  int count = 0;
  for (int r = threadIdx.x; r < p.a.R; r += kThreads) count += row_position(p.a, batch, r) >= 0;
  count = __reduce_add_sync(kAllLanes, count);
  if (threadIdx.x % 32 == 0) counts[threadIdx.x / 32] = count;
  __syncthreads();
  int64_t all = 0;
  for (int warp = 0; warp < kWarps; ++warp) all += counts[warp];
  return static_cast<double>(all == 0 ? 1 : all * p.a.Hq);
}

// One thread a row. Grid: (slices of kThreads rows of a batch entry, B). none: writes each row's masses. mean: sums them over the rows of the
// slice, and the last block of a batch entry to get there sums the slices.
__global__ void __launch_bounds__(kThreads) finish_masses(const Problem p) {
  double* warp_sums = reinterpret_cast<double*>(shared_memory());  // (kWarps, N)
  int* counts = reinterpret_cast<int*>(warp_sums + kWarps * p.a.N);  // kWarps, then whether this block is the last
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, N = static_cast<int>(p.a.N);
  const int64_t batch = blockIdx.y, index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, rows = p.a.Hkv * p.rows;
  const bool real = index < rows;
  const bool none = p.a.reduce == Reduce::none;
  const int64_t stride = p.a.N + 2, chunk_stride = p.all_rows() * stride;
  const float* partial = p.partials + (batch * rows + (real ? index : 0)) * stride;
  const RowTotal found = row_total(p, partial, chunk_stride);
  const int64_t key_head = index / p.rows;
  const int m = static_cast<int>(index % p.rows);
  float* out = static_cast<float*>(p.a.out) + ((batch * p.a.Hq + p.head(key_head, m)) * p.a.R + m / p.group) * N;
  for (int n = 0; n < N; ++n) {
    double mass = 0;
    for (int c = 0; c < p.chunks; ++c) {
      const float* from = partial + c * chunk_stride;
      mass += static_cast<double>(from[2 + n]) * exp2f(from[0] - found.shift);
    }
    mass = !real || found.total == 0.0f ? 0.0 : mass / found.total;
    if (none) {
      if (real) out[n] = static_cast<float>(mass);
    } else {
      for (int step = 16; step > 0; step /= 2) mass += __shfl_xor_sync(kAllLanes, mass, step);
      if (lane == 0) warp_sums[warp * N + n] = mass;
    }
  }
  if (none) return;

  __syncthreads();
  double* slices = p.slices + batch * gridDim.x * N;
  for (int n = threadIdx.x; n < N; n += kThreads) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * N + n];
    slices[blockIdx.x * N + n] = sum;
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) counts[kWarps] = atomicAdd(p.counters + batch, 1) == static_cast<int>(gridDim.x) - 1;
  __syncthreads();
  if (counts[kWarps] == 0) return;
  __threadfence();
  const double weight = row_weight(p, batch, counts);
  for (int n = threadIdx.x; n < N; n += kThreads) {
    double sum = 0;
    for (unsigned slice = 0; slice < gridDim.x; ++slice) sum += __ldcg(slices + slice * N + n);
    static_cast<float*>(p.a.out)[batch * N + n] = static_cast<float>(sum / weight);
  }
}

// One thread a key. Grid: (ceil(S / kThreads), B).
__global__ void __launch_bounds__(kThreads) finish_columns(const Problem p) {
  const int64_t batch = blockIdx.y, key = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const double weight = row_weight(p, batch, reinterpret_cast<int*>(shared_memory()));
  if (key >= p.a.S) return;
  const int64_t parts = p.a.Hkv * p.row_tiles;
  const float* from = p.columns + batch * parts * p.a.S + key;
  double sum = 0;
  for (int64_t part = 0; part < parts; ++part) sum += from[part * p.a.S];
  static_cast<float*>(p.a.out)[batch * p.a.S + key] = static_cast<float>(sum / weight);
}

}  // namespace mmdpo::cuda
