// Sums over a row's logits: of a thread, of a block, of a cluster of blocks.
#pragma once

#include "logit_rows/logit_rows_problem.cuh"

namespace mmdpo::cuda {

// Of some of a row's scores t, without the target's: near p(target) = 1 the rest would be lost beside it.
struct RowSums {
  float largest;   // score
  float total;     // of 2^d with d = factor (t - base()): exactly 1 for the largest
  float weighted;  // of 2^d d; where moments are asked for
  float scores;    // of t, the target's too; where moments are asked for

  __device__ static RowSums none() { return {-INFINITY, 0.0f, 0.0f, 0.0f}; }

  __device__ float base() const { return largest == -INFINITY ? 0.0f : largest; }

  // Takes a larger score as the largest; what was summed up relative to the old one shrinks.
  __device__ void raise(float to, float factor) {
    const float change = factor * (largest - to), shrink = exp2_fast(change);
    largest = to;
    // Of what shrinks by 2^-infinity, as a first score makes it, nothing is left.
    weighted = shrink == 0.0f ? 0.0f : shrink * fmaf(change, total, weighted);
    total *= shrink;
  }

  // Adds sums over other scores.
  __device__ void merge(RowSums other, float factor) {
    if (other.largest > largest) {
      raise(other.largest, factor);
    } else if (largest > other.largest) {
      other.raise(largest, factor);
    }
    total += other.total;
    weighted += other.weighted;
    scores += other.scores;
  }
};

// Adds kCount scores. `target` is the index of the target's among them, or any other number.
template <int kCount>
__device__ inline void absorb(RowSums& sums, float (&t)[kCount], int target, float factor, bool moments) {
  if (moments) {
    float scores = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) scores += t[i];
    sums.scores += scores;
  }
  if (static_cast<unsigned>(target) < static_cast<unsigned>(kCount)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = i == target ? -INFINITY : t[i];
  }
  float largest = t[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, t[i]);
  if (largest > sums.largest) sums.raise(largest, factor);
  const float base = sums.base();
  float total = 0;
  if (moments) {
    float weighted = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float d = factor * (t[i] - base), exponential = exp2_fast(d);
      total += exponential;
      // A token that cannot come (d = -inf) adds nothing.
      weighted += exponential > 0.0f ? exponential * d : 0.0f;
    }
    sums.weighted += weighted;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) total += exp2_fast(factor * (t[i] - base));
  }
  sums.total += total;
}

__device__ inline RowSums warp_sums(RowSums sums, float factor, bool moments) {
  constexpr unsigned kLanes = 0xFFFFFFFFu;
  float largest = sums.largest;
  for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kLanes, largest, step));
  if (largest > sums.largest) sums.raise(largest, factor);
  for (int step = 16; step > 0; step /= 2) sums.total += __shfl_xor_sync(kLanes, sums.total, step);
  if (!moments) return sums;
  for (int step = 16; step > 0; step /= 2) {
    sums.weighted += __shfl_xor_sync(kLanes, sums.weighted, step);
    sums.scores += __shfl_xor_sync(kLanes, sums.scores, step);
  }
  return sums;
}

// Shared memory that row_sums uses: the sums of kMaxRanks blocks, and of each warp.
template <int kThreads>
constexpr int kSumsBytes = (kMaxRanks + kThreads / 32) * static_cast<int>(sizeof(RowSums));

// Sums over all threads of the blocks that share the row; every thread gets them, added up in one order everywhere. Called by all; where
// several blocks share the row, every thread has called cluster_arrive() before.
template <int kThreads>
__device__ inline RowSums row_sums(RowSums sums, unsigned char* shared, const LogitProblem& p) {
  RowSums* by_rank = reinterpret_cast<RowSums*>(shared);
  RowSums* by_warp = by_rank + kMaxRanks;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = blockIdx.x % p.ranks;
  sums = warp_sums(sums, p.factor, p.moments);
  if (lane == 0) by_warp[warp] = sums;
  // The shared memory of another block may be written to once that block runs.
  if (p.ranks > 1) cluster_wait();
  __syncthreads();
  if (warp == 0) {
    sums = warp_sums(lane < kThreads / 32 ? by_warp[lane] : RowSums::none(), p.factor, p.moments);
    if (p.ranks > 1) {
      if (lane < p.ranks) cluster_store(by_rank + rank, lane, {sums.largest, sums.total, sums.weighted, sums.scores});
    } else if (lane == 0) {
      by_rank[0] = sums;
    }
  }
  if (p.ranks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  sums = by_rank[0];
#pragma unroll 1
  for (int r = 1; r < p.ranks; ++r) sums.merge(by_rank[r], p.factor);
  return sums;
}

}  // namespace mmdpo::cuda
