// The pass over the keys. A block takes kTileRows rows of one key head against one chunk of keys, tile by tile; a warp owns 16 rows.
//
// Scores have one layout for all dtypes, that of the tensor cores' result: with g = lane / 4 and t = lane % 4, a thread holds of each 8 keys
// 2t and 2t + 1, for the rows g and g + 8 of its warp. The four threads with one g are a quad.
#pragma once

#include <climits>

#include "attention_mass/attention_mass_problem.cuh"
#include "common/ptx.cuh"

namespace mmdpo::cuda {

// Keys pass through shared memory in slabs of 256 bytes of the head vector. Rows are 16 bytes longer, so that 8 rows lie in different banks.
constexpr int kSlabBytes = 256, kPadBytes = 16, kStages = 2;

template <DType kDType>
constexpr int kElementBytes = kDType == DType::float32 ? 4 : 2;
template <DType kDType>
constexpr int kTileKeys = kDType == DType::float32 ? 32 : 64;

// Offsets in shared memory.
struct ScanLayout {
  int query_row, query, keys, stage, mass, columns, ends, depths, segments, row_positions, row_lasts, row_depths, tiles, bytes;

  __host__ __device__ ScanLayout(int element_bytes, int tile_keys, int chunk_tiles, int D, int N) {
    const int padded = (D + 15) / 16 * 16 * element_bytes;
    query_row = padded + kPadBytes;
    stage = tile_keys * ((padded < kSlabBytes ? padded : kSlabBytes) + kPadBytes);
    query = 0;
    keys = query + kTileRows * query_row;
    mass = keys + kStages * stage;
    columns = mass + kTileRows * N * 4;
    ends = columns + kWarps * tile_keys * 4;
    depths = ends + chunk_tiles * tile_keys * 4;
    segments = depths + chunk_tiles * tile_keys * 4;
    row_positions = segments + chunk_tiles * tile_keys * 4;
    row_lasts = row_positions + kTileRows * 4;
    row_depths = row_lasts + kTileRows * 4;
    tiles = row_depths + kTileRows * 4;
    bytes = tiles + chunk_tiles * 8;
  }
};

template <DType kDType>
class Scan {
 public:
  __device__ Scan(const Problem& problem, Pass pass)
      : p_(problem),
        pass_(pass),
        layout_(kElementBytes<kDType>, kKeys, p_.chunk_tiles, static_cast<int>(p_.a.D), static_cast<int>(p_.a.N)),
        shared_(shared_memory()),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32) {
    int64_t block = blockIdx.x;
    row_tile_ = block % p_.row_tiles;
    block /= p_.row_tiles;
    chunk_ = block % p_.chunks;
    block /= p_.chunks;
    key_head_ = block % p_.a.Hkv;
    batch_ = block / p_.a.Hkv;
    first_key_ = static_cast<int64_t>(chunk_) * p_.chunk_tiles * kKeys;
  }

  __device__ void run() {
    if (blockIdx.x == 0) {
      for (int64_t b = threadIdx.x; b < p_.a.B; b += kThreads) p_.counters[b] = 0;
    }
    read_rows();
    __syncthreads();
    describe_tiles();
    __syncthreads();
    start_rows();
    scan_tiles(active_tiles());
    if (pass_ != Pass::columns) write_partials();
  }

 private:
  static constexpr int kKeys = kTileKeys<kDType>;
  static constexpr int kEights = kKeys / 8;
  static constexpr int kSlab = kSlabBytes / kElementBytes<kDType>;

  // What a tile of keys holds: whether any row of the block sees any of it, or all see all; its segments.
  enum Sight : int { kNone, kPart, kAll };
  struct Tile {
    int sight;       // plus kPure where every key is in one and the same segment
    unsigned found;  // bit n: some key is in segment n
  };
  static constexpr int kPure = 4;

  template <class T>
  __device__ T* shared(int offset) const {
    return reinterpret_cast<T*>(shared_ + offset);
  }

  // The row g + 8 half of this thread, within the block.
  __device__ int own_row(int half) const { return warp_ * 16 + lane_ / 4 + 8 * half; }
  // The key 2t + c of eight `e` of a tile.
  __device__ int own_key(int e, int c) const { return e * 8 + lane_ % 4 * 2 + c; }

  // The first 64 threads: positions of the block's rows, the last keys within their reach, and depths; -1 where a row is unused.
  __device__ void read_rows() {
    const int row = threadIdx.x, m = row_tile_ * kTileRows + row;
    if (row >= kTileRows) return;
    const int position = m < p_.rows ? row_position(p_.a, batch_, m / p_.group) : -1;
    shared<int>(layout_.row_positions)[row] = position;
    shared<int>(layout_.row_lasts)[row] = position < 0 || p_.a.reach == nullptr ? position : p_.a.reach[batch_ * p_.a.S + position] - 1;
    shared<int>(layout_.row_depths)[row] =
        position < 0 || p_.a.depth == nullptr ? position : p_.a.depth[batch_ * p_.a.S + position];
  }

  // One warp a tile: reads ends, depths and segments of its keys, and sums them up.
  __device__ void describe_tiles() {
    int min_row = INT_MAX, max_row = -1, min_last = INT_MAX, max_last = -1, min_row_depth = INT_MAX, max_row_depth = INT_MIN;
    for (int row = lane_; row < kTileRows; row += 32) {
      const int position = shared<int>(layout_.row_positions)[row], depth = shared<int>(layout_.row_depths)[row];
      if (position < 0) continue;
      const int last = shared<int>(layout_.row_lasts)[row];
      min_row = min(min_row, position);
      max_row = max(max_row, position);
      min_last = min(min_last, last);
      max_last = max(max_last, last);
      min_row_depth = min(min_row_depth, depth);
      max_row_depth = max(max_row_depth, depth);
    }
    min_row = __reduce_min_sync(kAllLanes, min_row);
    max_row = __reduce_max_sync(kAllLanes, max_row);
    min_last = __reduce_min_sync(kAllLanes, min_last);
    max_last = __reduce_max_sync(kAllLanes, max_last);
    min_row_depth = __reduce_min_sync(kAllLanes, min_row_depth);
    max_row_depth = __reduce_max_sync(kAllLanes, max_row_depth);
    const int64_t window = p_.a.window;
    const bool known = p_.a.lse != nullptr;

    for (int tile = warp_; tile < p_.chunk_tiles; tile += kWarps) {
      const int64_t first = first_key_ + tile * kKeys;
      int min_end = INT_MAX, max_end = INT_MIN, min_depth = INT_MAX, max_depth = INT_MIN;
      unsigned found = 0;
      bool outside = false;  // some key is in no segment
      for (int j = lane_; j < kKeys; j += 32) {
        const int64_t key = first + j, flat = batch_ * p_.a.S + key;
        const bool real = key < p_.a.S;
        const int end = !real ? 0 : p_.a.tree_end == nullptr ? static_cast<int>(p_.a.S) : p_.a.tree_end[flat];
        const int depth = !real ? 0 : p_.a.depth == nullptr ? static_cast<int>(key) : p_.a.depth[flat];
        const int segment = real ? p_.a.segments[flat] : -1;
        shared<int>(layout_.ends)[tile * kKeys + j] = end;
        shared<int>(layout_.depths)[tile * kKeys + j] = depth;
        shared<int>(layout_.segments)[tile * kKeys + j] = segment;
        min_end = min(min_end, end);
        max_end = max(max_end, end);
        min_depth = min(min_depth, depth);
        max_depth = real ? max(max_depth, depth) : max_depth;
        if (segment >= 0 && segment < p_.a.N) {
          found |= 1u << segment;
        } else {
          outside = true;
        }
      }
      min_end = __reduce_min_sync(kAllLanes, min_end);
      max_end = __reduce_max_sync(kAllLanes, max_end);
      min_depth = __reduce_min_sync(kAllLanes, min_depth);
      max_depth = __reduce_max_sync(kAllLanes, max_depth);
      found = __reduce_or_sync(kAllLanes, found);
      outside = __any_sync(kAllLanes, outside);

      bool none = max_last < first || min_row >= max_end;
      bool all = min_last >= first + kKeys - 1 && max_row < min_end;
      if (window > 0 && !none) {
        none = static_cast<int64_t>(min_row_depth) - max_depth >= window;
        all = all && static_cast<int64_t>(max_row_depth) - min_depth < window;
      }
      // Rows whose total is known gain nothing from keys without a segment.
      if (pass_ == Pass::masses && known && found == 0) none = true;
      const bool pure = !outside && (found & (found - 1)) == 0;
      if (lane_ == 0) shared<Tile>(layout_.tiles)[tile] = {(none ? kNone : all ? kAll : kPart) + (pure ? kPure : 0), found};
      if (none && pass_ == Pass::columns) {
        for (int j = lane_; j < kKeys && first + j < p_.a.S; j += 32) column(first + j) = 0;
      }
    }
  }

  __device__ float& column(int64_t key) const {
    return p_.columns[((batch_ * p_.a.Hkv + key_head_) * p_.row_tiles + row_tile_) * p_.a.S + key];
  }

  // Bit i: tile i of the chunk is computed. The same in all threads.
  __device__ unsigned active_tiles() const {
    const bool active = lane_ < p_.chunk_tiles && shared<Tile>(layout_.tiles)[lane_].sight % kPure != kNone;
    return __ballot_sync(kAllLanes, active);
  }

  __device__ void start_rows() {
    for (int half = 0; half < 2; ++half) {
      const int row = own_row(half), m = row_tile_ * kTileRows + row;
      position_[half] = shared<int>(layout_.row_positions)[row];
      depth_[half] = shared<int>(layout_.row_depths)[row];
      shift_[half] = -INFINITY;
      shift_rest_[half] = 0;
      total_[half] = 0;
      weight_[half] = 1;
      if (position_[half] < 0) continue;
      if (p_.a.lse != nullptr) {
        constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596303e-8f;
        const int64_t flat = (batch_ * p_.a.Hq + p_.head(key_head_, m)) * p_.a.R + m / p_.group;
        const float lse = static_cast<const float*>(p_.a.lse)[flat];
        const bool empty = lse == -INFINITY;  // the reference's rule: scores of such a row are left as they are
        shift_[half] = empty ? 0.0f : lse * kLog2e;
        shift_rest_[half] = empty || isinf(lse) ? 0.0f : fmaf(lse, kLog2e, -shift_[half]) + lse * kLog2eRest;
      } else if (pass_ == Pass::columns) {
        const int64_t stride = p_.a.N + 2;
        const RowTotal found = row_total(p_, p_.partials + p_.row_index(batch_, key_head_, m) * stride, p_.all_rows() * stride);
        shift_[half] = found.shift;
        weight_[half] = found.total == 0.0f ? 0.0f : 1.0f / found.total;
      }
    }
    if (pass_ != Pass::masses) return;
    // Lane t of a quad owns the masses of segments t, t + 4, ...: nobody else reads or writes them.
    for (int half = 0; half < 2; ++half) {
      float* mass = row_mass(half);
      for (int n = lane_ % 4; n < p_.a.N; n += 4) mass[n] = 0;
    }
  }

  __device__ float* row_mass(int half) const { return shared<float>(layout_.mass) + own_row(half) * p_.a.N; }

  // A slab of a tile: bit positions of tiles that are left, and the slab of the first.
  struct Cursor {
    unsigned tiles;
    int slab;

    __device__ int tile() const { return __ffs(tiles) - 1; }
    __device__ void advance(int slabs) {
      if (++slab < slabs) return;
      slab = 0;
      tiles &= tiles - 1;
    }
  };

  __device__ void scan_tiles(unsigned active) {
    if (active == 0) return;
    const int padded = (static_cast<int>(p_.a.D) + 15) / 16 * 16, slabs = (padded + kSlab - 1) / kSlab;
    Cursor now{active, 0}, ahead{active, 0};
    load_query();
    load_keys(ahead, 0);
    commit_copies();
    ahead.advance(slabs);
    for (int stage = 0; now.tiles != 0; stage ^= 1, now.advance(slabs)) {
      if (ahead.tiles != 0) {
        load_keys(ahead, stage ^ 1);
        ahead.advance(slabs);
      }
      commit_copies();
      wait_for_copies<1>();
      __syncthreads();
      if (now.slab == 0) clear_scores();
      add_products(stage, now.slab * kSlab, min(kSlab, padded - now.slab * kSlab));
      if (now.slab == slabs - 1) absorb(now.tile());
      __syncthreads();  // before the stage is filled again
    }
  }

  // Half a warp a slab row: 16 copies of 16 bytes. What lies past D, the last row or the last key becomes zero.
  __device__ void load_query() {
    const int units = (layout_.query_row - kPadBytes) / 16, unit_elements = 16 / kElementBytes<kDType>;
    for (int row = warp_; row < kTileRows; row += kWarps) {
      const int m = row_tile_ * kTileRows + row;
      const int64_t* strides = p_.a.query_strides;
      const int64_t start = batch_ * strides[0] + p_.head(key_head_, m) * strides[1] + m / p_.group * strides[2];
      for (int unit = lane_; unit < units; unit += 32) {
        const bool valid = m < p_.rows && unit * unit_elements < p_.a.D;
        copy(shared_ + layout_.query + row * layout_.query_row + unit * 16, p_.a.query, start + unit * unit_elements, valid);
      }
    }
  }

  __device__ void load_keys(const Cursor& cursor, int stage) {
    const int unit = threadIdx.x % 16, element = cursor.slab * kSlab + unit * (16 / kElementBytes<kDType>);
    if (unit * 16 >= key_row() - kPadBytes) return;
    const int64_t first = first_key_ + cursor.tile() * kKeys;
    unsigned char* to = shared_ + layout_.keys + stage * layout_.stage + unit * 16;
    for (int j = threadIdx.x / 16; j < kKeys; j += kThreads / 16) {
      const int64_t start = batch_ * p_.a.key_strides[0] + key_head_ * p_.a.key_strides[1] + (first + j) * p_.a.key_strides[2];
      copy(to + j * key_row(), p_.a.key, start + element, first + j < p_.a.S && element < p_.a.D);
    }
  }

  __device__ int key_row() const { return layout_.stage / kKeys; }

  __device__ static void copy(void* to, const void* from, int64_t element, bool valid) {
    copy_async(to, static_cast<const unsigned char*>(from) + (valid ? element * kElementBytes<kDType> : 0), valid);
  }

  __device__ void clear_scores() {
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores_[e][i] = 0;
    }
  }

  // Adds the products over `width` elements from `first` on, of which the keys are in a stage.
  __device__ void add_products(int stage, int first, int width) {
    const unsigned char* keys = shared_ + layout_.keys + stage * layout_.stage;
    const unsigned char* query = shared_ + layout_.query + warp_ * 16 * layout_.query_row + first * kElementBytes<kDType>;
    if constexpr (kDType == DType::float32) {
      add_products_float(reinterpret_cast<const float*>(keys), reinterpret_cast<const float*>(query), width);
    } else {
      // Each lane names one row of the 8 x 8 matrices that a load takes.
      query += lane_ % 16 * layout_.query_row + lane_ / 16 * 16;
      keys += (lane_ % 8 + lane_ / 16 * 8) * key_row() + lane_ / 8 % 2 * 16;
#pragma unroll 2
      for (int d = 0; d < width; d += 16) {
        uint32_t a[4];
        load_matrices(a, query + d * 2);
#pragma unroll
        for (int e = 0; e < kEights; e += 2) {
          uint32_t b[4];
          load_matrices(b, keys + e * 8 * key_row() + d * 2);
          multiply_matrices<kDType == DType::bfloat16>(scores_[e], a, b[0], b[1]);
          multiply_matrices<kDType == DType::bfloat16>(scores_[e + 1], a, b[2], b[3]);
        }
      }
    }
  }

  __device__ void add_products_float(const float* keys, const float* query, int width) {
    const int key_floats = key_row() / 4, query_floats = layout_.query_row / 4;
    query += lane_ / 4 * query_floats;
    keys += lane_ % 4 * 2 * key_floats;
    // Sums of kDotChunk products are added up: shorter chains of rounding than one sum over the head.
    constexpr int kDotChunk = 16;
#pragma unroll 1
    for (int first = 0; first < width; first += kDotChunk) {
      float sums[kEights][4] = {};
#pragma unroll 1
      for (int d = 0; d < kDotChunk; d += 4) {
        const float4 top = *reinterpret_cast<const float4*>(query + first + d);
        const float4 low = *reinterpret_cast<const float4*>(query + 8 * query_floats + first + d);
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const float4 k = *reinterpret_cast<const float4*>(keys + (e * 8 + c) * key_floats + first + d);
            sums[e][c] = fmaf(top.x, k.x, fmaf(top.y, k.y, fmaf(top.z, k.z, fmaf(top.w, k.w, sums[e][c]))));
            sums[e][2 + c] = fmaf(low.x, k.x, fmaf(low.y, k.y, fmaf(low.z, k.z, fmaf(low.w, k.w, sums[e][2 + c]))));
          }
        }
      }
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[e][i] += sums[e][i];
      }
    }
  }

  // Turns the scores of a tile into exponentials and adds them up.
  __device__ void absorb(int index) {
    const Tile tile = shared<Tile>(layout_.tiles)[index];
    if (p_.inner_scale != 0.0f) {
#pragma unroll
      for (int e = 0; e < kEights; ++e) {
#pragma unroll
        for (int i = 0; i < 4; ++i) scores_[e][i] = tanhf(scores_[e][i] * p_.inner_scale);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned seen = tile.sight % kPure == kAll ? ~0u : visible(index, half);
      if (p_.a.lse == nullptr && pass_ != Pass::columns) raise_shift(half, seen);
      const float sum = exponentials(half, seen);
      if (pass_ != Pass::columns) total_[half] += sum;
      if (pass_ == Pass::masses) add_mass(tile, index, half, sum);
    }
    if (pass_ == Pass::columns) add_columns(index);
  }

  // Bit 2e + c: the row sees key (e, c).
  __device__ unsigned visible(int index, int half) const {
    const int *ends = shared<int>(layout_.ends) + index * kKeys, *depths = shared<int>(layout_.depths) + index * kKeys;
    const int64_t first = first_key_ + index * kKeys;
    const int last = shared<int>(layout_.row_lasts)[own_row(half)];
    unsigned seen = 0;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int j = own_key(e, c), i = position_[half];
        bool sees = first + j <= last && i < ends[j];
        if (p_.a.window > 0) sees = sees && static_cast<int64_t>(depth_[half]) - depths[j] < p_.a.window;
        seen |= static_cast<unsigned>(sees) << (2 * e + c);
      }
    }
    return seen;
  }

  // Raises the row's largest score to this tile's; what was summed up relative to the old one shrinks.
  __device__ void raise_shift(int half, unsigned seen) {
    float largest = shift_[half];
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (seen >> (2 * e + c) & 1) largest = fmaxf(largest, scores_[e][2 * half + c] * p_.factor);
      }
    }
    for (int step = 1; step < 4; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    if (largest == shift_[half]) return;
    const float shrink = exp2f(shift_[half] - largest);
    shift_[half] = largest;
    total_[half] *= shrink;
    if (pass_ != Pass::masses) return;
    float* mass = row_mass(half);
    for (int n = lane_ % 4; n < p_.a.N; n += 4) mass[n] *= shrink;
  }

  // scores_ becomes 2^(score - shift), zero where not seen -> their sum over this thread's keys.
  __device__ float exponentials(int half, unsigned seen) {
    const float shift = shift_[half] == -INFINITY ? 0.0f : shift_[half];
    float sum = 0;
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& score = scores_[e][2 * half + c];
        float x = fmaf(score, p_.factor, -shift);
        // Of an infinite score the rest would be the opposite infinity.
        if (!isinf(x)) x += fmaf(score, p_.factor_rest, -shift_rest_[half]);
        score = seen >> (2 * e + c) & 1 ? exp2f(x) : 0.0f;
        sum += score;
      }
    }
    return sum;
  }

  __device__ void add_mass(const Tile& tile, int index, int half, float sum) {
    const int* segments = shared<int>(layout_.segments) + index * kKeys;
    float* mass = row_mass(half);
    for (unsigned left = tile.found; left != 0; left &= left - 1) {
      const int n = __ffs(left) - 1;
      float part = sum;
      if (tile.sight < kPure) {
        part = 0;
#pragma unroll
        for (int e = 0; e < kEights; ++e) {
#pragma unroll
          for (int c = 0; c < 2; ++c) part += segments[own_key(e, c)] == n ? scores_[e][2 * half + c] : 0.0f;
        }
      }
      part = quad_sum(part);
      if (lane_ % 4 == n % 4) mass[n] += part;
    }
  }

  __device__ static float quad_sum(float value) {
    value += __shfl_xor_sync(kAllLanes, value, 1);
    return value + __shfl_xor_sync(kAllLanes, value, 2);
  }

  // Sums over the block's rows: the two of each thread, the eight quads of a warp, the warps.
  __device__ void add_columns(int index) {
    float* sums = shared<float>(layout_.columns);
#pragma unroll
    for (int e = 0; e < kEights; ++e) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float sum = 0;
        for (int half = 0; half < 2; ++half) {
          if (position_[half] >= 0) sum += scores_[e][2 * half + c] * weight_[half];
        }
        for (int step = 4; step < 32; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
        if (lane_ < 4) sums[warp_ * kKeys + own_key(e, c)] = sum;
      }
    }
    __syncthreads();
    const int j = threadIdx.x;
    const int64_t key = first_key_ + index * kKeys + j;
    if (j >= kKeys || key >= p_.a.S) return;
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp * kKeys + j];
    column(key) = sum;
  }

  __device__ void write_partials() {
    for (int half = 0; half < 2; ++half) {
      const int m = row_tile_ * kTileRows + own_row(half);
      const bool used = position_[half] >= 0, known = p_.a.lse != nullptr;
      const float total = quad_sum(total_[half]);
      if (m >= p_.rows) continue;
      float* to = p_.partials + (chunk_ * p_.all_rows() + p_.row_index(batch_, key_head_, m)) * (p_.a.N + 2);
      if (lane_ % 4 == 0) {
        // Where lse is known, exponentials are probabilities: their total is 1, in the first chunk's keeping.
        to[0] = known ? 0.0f : used ? shift_[half] : -INFINITY;
        to[1] = !used ? 0.0f : !known ? total : chunk_ == 0 ? 1.0f : 0.0f;
      }
      if (pass_ != Pass::masses) continue;
      for (int n = lane_ % 4; n < p_.a.N; n += 4) to[2 + n] = used ? row_mass(half)[n] : 0.0f;
    }
  }

  const Problem& p_;
  const Pass pass_;
  const ScanLayout layout_;
  unsigned char* const shared_;
  const int lane_, warp_;
  int row_tile_, chunk_;
  int64_t key_head_, batch_, first_key_;
  int position_[2], depth_[2];
  float shift_[2], shift_rest_[2], total_[2], weight_[2];  // total_: of this thread's keys
  float scores_[kEights][4];                               // keys 2t, 2t + 1 of row g, then of row g + 8
};

// Blocks on a multiprocessor: as many as leave the registers that are needed.
template <DType kDType>
constexpr int kBlocks = kDType == DType::float32 ? 3 : 4;

template <DType kDType>
__global__ void __launch_bounds__(kThreads, kBlocks<kDType>) scan_keys(const Problem problem, const Pass pass) {
  Scan<kDType>(problem, pass).run();
}

}  // namespace mmdpo::cuda
