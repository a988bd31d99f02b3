// What the kernels of attention_mass share: a call and how it is cut up.
#pragma once

#include <cuda_runtime.h>

#include "attention_mass/attention_mass_cuda.h"

namespace mmdpo::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kTileRows = 16 * kWarps;
constexpr int kMaxChunkTiles = 16;

// masses: exponentials by row and segment, with each row's largest score and total; totals: only those two; columns: probabilities by key.
enum class Pass { masses, totals, columns };

// Rows are numbered within a key head, the heads of its group fastest: row m is query row m / group of head key_head * group + m % group.
// Keys are cut into chunks of tiles; a block takes one tile of rows and one chunk.
struct Problem {
  AttentionMassArgs a;
  int group, rows;                                // rows: R * group
  int row_tiles, tile_keys, chunk_tiles, chunks;  // tiles of kTileRows rows, of tile_keys keys; tiles in a chunk
  float factor, factor_rest;                      // of a score in the exponent of 2, in two parts, so that the constant costs no accuracy
  float inner_scale;                              // softcap: factor tanh(inner_scale score); 0 = none
  // Workspace, in units of 2^x: a probability is 2^(score - largest) / total.
  float* partials;  // (chunks, B, Hkv, rows, N + 2): largest score, total, exponentials by segment
  float* columns;   // (B, Hkv, row_tiles, S) sums of probabilities
  double* slices;   // (B, slices, N) sums over finished rows
  int* counters;    // (B) slices that are done; the first kernel clears it

  __host__ __device__ int64_t all_rows() const { return a.B * a.Hkv * rows; }
  __host__ __device__ int64_t row_index(int64_t batch, int64_t key_head, int m) const { return (batch * a.Hkv + key_head) * rows + m; }
  __host__ __device__ int64_t head(int64_t key_head, int m) const { return key_head * group + m % group; }
};

// Position of a row among the keys, -1 where it is unused.
__device__ inline int row_position(const AttentionMassArgs& a, int64_t batch, int row) {
  const int position = a.row_positions[batch * a.R + row];
  return position >= 0 && position < a.S ? position : -1;
}

// The largest score and the total of a row over all chunks.
struct RowTotal {
  float shift, total;
};

__device__ inline RowTotal row_total(const Problem& p, const float* partial, int64_t chunk_stride) {
  float largest = -INFINITY;
  for (int c = 0; c < p.chunks; ++c) largest = fmaxf(largest, partial[c * chunk_stride]);
  // A row that sees nothing has no largest score.
  const float shift = largest == -INFINITY ? 0.0f : largest;
  double total = 0;
  for (int c = 0; c < p.chunks; ++c) total += static_cast<double>(partial[c * chunk_stride + 1]) * exp2f(partial[c * chunk_stride] - shift);
  return {shift, static_cast<float>(total)};
}

}  // namespace mmdpo::cuda
