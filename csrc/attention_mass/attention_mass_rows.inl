#pragma once

// What forward and backward of attention_mass share: the rows of a task, packed; blocks of keys, packed and described; scores of rows on a
// block. Each attention_mass_<level>.cpp first defines kVectorBytes, the tile shape and kKeyBlock, the keys that are packed together: whole
// tiles, and a multiple of their rows. Written with the compiler's vector extensions; nothing here may call an inline function of the standard
// library, see simd.inl.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "attention_mass/attention_mass_products.inl"
#include "attention_mass/attention_mass_task.h"
#include "common/simd.inl"
#include "common/tanh.inl"

namespace {

using mmdpo::AttentionMassArgs;
using mmdpo::AttentionMassTask;

inline Vec<double> exp_(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

inline Vec<double> tanh_(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::tanh(x[i]);
  return x;
}

// What the rows of a task need to know of kKeyBlock consecutive keys. Lanes past the last key are never visible.
template <class T>
struct KeyBlock {
  alignas(64) Int<T> index[kKeyBlock];
  alignas(64) Int<T> end[kKeyBlock];
  alignas(64) Int<T> depth[kKeyBlock];
  alignas(64) Int<T> segment[kKeyBlock];
  Int<T> min_end, max_end, min_depth, max_depth;
  bool one_segment, any_segment;
  int64_t first, count;
};

enum class Sight { none, part, all };

// Products: how queries and keys are packed, and the scores made of them.
template <class T, class Products = VectorProducts<T>>
class Rows {
 protected:
  using V = Vec<T>;
  using Part = typename Products::Part;
  static constexpr int kTileKeys = kTileColumns<T>;
  static constexpr int kBlockVectors = kKeyBlock / kLanes<T>;
  static_assert(kKeyBlock % kTileKeys == 0 && kKeyBlock % kTileRows == 0, "blocks are whole tiles");

  explicit Rows(const AttentionMassTask& task)
      : task_(task),
        a_(*task.args),
        products_(a_),
        group_(a_.Hq / a_.Hkv),
        M_(task.num_rows * group_),
        num_strips_((M_ + kTileRows - 1) / kTileRows) {}

  // Runs `compute` on a workspace that `lay_out` divides -> false where there is no memory for it.
  template <class LayOut, class Compute>
  static bool with_workspace(const LayOut& lay_out, const Compute& compute) {
    Arena measure{nullptr};
    lay_out(measure);
    void* memory = aligned_alloc(64, measure.used + 64);
    if (memory == nullptr) return false;
    Arena arena{static_cast<char*>(memory)};
    lay_out(arena);
    compute();
    free(memory);
    return true;
  }

  void lay_out(Arena& arena) {
    query_ = arena.take<Part>(num_strips_ * kTileRows * products_.width());
    keys_ = arena.take<Part>(kKeyBlock * products_.width());
    products_.lay_out(arena);
    position_ = arena.take<Int<T>>(M_);
    stop_ = arena.take<Int<T>>(M_);
    depth_ = arena.take<Int<T>>(M_);
    shift_ = arena.take<T>(M_);
    total_ = arena.take<double>(M_);
  }

  int64_t row_of(int64_t m) const { return task_.rows[m / group_]; }
  int64_t head_of(int64_t m) const { return task_.key_head * group_ + m % group_; }
  int64_t flat_row(int64_t m) const { return (task_.batch * a_.Hq + head_of(m)) * a_.R + row_of(m); }

  int64_t query_offset(int64_t m) const {
    return task_.batch * a_.query_strides[0] + head_of(m) * a_.query_strides[1] + row_of(m) * a_.query_strides[2];
  }
  int64_t key_offset(int64_t j) const {
    return task_.batch * a_.key_strides[0] + task_.key_head * a_.key_strides[1] + j * a_.key_strides[2];
  }

  // query_: strips, zero in the rows that fill up the last one.
  void pack_query() {
    const int64_t strip = kTileRows * products_.width();
    memset(query_, 0, num_strips_ * strip * sizeof(Part));
    for (int64_t m = 0; m < M_; ++m) products_.pack_query(query_offset(m), m % kTileRows, query_ + m / kTileRows * strip);
  }

  // Where lse is known, exponentials are probabilities: their total is 1.
  void start_rows() {
    const bool known = a_.lse != nullptr;
    const T* lse = static_cast<const T*>(a_.lse);
    for (int64_t m = 0; m < M_; ++m) {
      const int32_t position = a_.row_positions[task_.batch * a_.R + row_of(m)];
      position_[m] = position;
      const int64_t reach = a_.reach == nullptr ? position + 1 : a_.reach[task_.batch * a_.S + position];
      stop_[m] = static_cast<Int<T>>(reach < a_.S ? reach : a_.S);
      depth_[m] = a_.depth == nullptr ? position : a_.depth[task_.batch * a_.S + position];
      shift_[m] = known ? lse[flat_row(m)] : -T(INFINITY);
      if (known && shift_[m] == -T(INFINITY)) shift_[m] = 0;
      total_[m] = known ? 1.0 : 0.0;
    }
  }

  // Calls on_block(block) for each block of keys that some row may see, up to where the rows' reach ends.
  template <class OnBlock>
  void for_blocks(const OnBlock& on_block) {
    KeyBlock<T> block;
    Int<T> last = 0;
    for (int64_t m = 0; m < M_; ++m) last = stop_[m] > last ? stop_[m] : last;
    for (int64_t first = 0; first < last; first += kKeyBlock) {
      describe(block, first);
      on_block(block);
    }
  }

  // Calls on_row(m, scores, peak) for each row that may see a key of the block: its scaled, capped and masked scores, and what
  // finish_scores found -> whether there was such a row.
  template <class OnRow>
  bool for_rows(const KeyBlock<T>& block, const OnRow& on_row) {
    alignas(64) T scores[kTileRows * kKeyBlock];
    Sight sights[kTileRows];
    bool packed = false;
    for (int64_t strip = 0; strip < num_strips_; ++strip) {
      if (!look(block, strip, sights)) continue;
      if (!packed) products_.pack_keys(key_offset(block.first), block.count, keys_);
      packed = true;
      products_.score(query_ + strip * kTileRows * products_.width(), keys_, scores);
      for (int64_t r = 0; r < kTileRows && strip * kTileRows + r < M_; ++r) {
        if (sights[r] == Sight::none) continue;
        const int64_t m = strip * kTileRows + r;
        const T peak = finish_scores(block, m, scores + r * kKeyBlock, sights[r] == Sight::part);
        on_row(m, scores + r * kKeyBlock, peak);
      }
    }
    return packed;
  }

  void describe(KeyBlock<T>& block, int64_t first) {
    block.first = first;
    block.count = a_.S - first < kKeyBlock ? a_.S - first : kKeyBlock;
    block.any_segment = false;
    block.one_segment = true;
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      const bool real = j < block.count;
      const int64_t flat = task_.batch * a_.S + first + j;
      block.index[j] = static_cast<Int<T>>(first + j);
      block.end[j] = !real ? 0 : a_.tree_end == nullptr ? static_cast<Int<T>>(a_.S) : a_.tree_end[flat];
      block.depth[j] = !real ? block.depth[0] : a_.depth == nullptr ? block.index[j] : a_.depth[flat];
      block.segment[j] = real ? a_.segments[flat] : -1;
      block.any_segment |= block.segment[j] >= 0;
      block.one_segment &= block.segment[j] == block.segment[0] || !real;
      if (j == 0 || block.end[j] < block.min_end) block.min_end = block.end[j];
      if (j == 0 || block.end[j] > block.max_end) block.max_end = block.end[j];
      if (j == 0 || block.depth[j] < block.min_depth) block.min_depth = block.depth[j];
      if (j == 0 || block.depth[j] > block.max_depth) block.max_depth = block.depth[j];
    }
  }

  // -> whether any row of the strip may see a key of the block.
  bool look(const KeyBlock<T>& block, int64_t strip, Sight* sights) const {
    bool any = false;
    for (int64_t r = 0; r < kTileRows && strip * kTileRows + r < M_; ++r) {
      const int64_t m = strip * kTileRows + r;
      const Int<T> i = position_[m], stop = stop_[m], depth = depth_[m];
      const bool none = stop <= block.index[0] || i >= block.max_end || (a_.window > 0 && depth - block.max_depth >= a_.window);
      const bool all = stop > block.index[kKeyBlock - 1] && i < block.min_end && (a_.window == 0 || depth - block.min_depth < a_.window);
      sights[r] = none ? Sight::none : all ? Sight::all : Sight::part;
      any |= !none;
    }
    return any;
  }

  // Scale, softcap and visibility -> the largest visible score, NaN where all visible ones are.
  T finish_scores(const KeyBlock<T>& block, int64_t m, T* scores, bool part) const {
    const T scale = static_cast<T>(a_.scale), cap = static_cast<T>(a_.softcap);
    V peaks = broadcast(-T(INFINITY));
    for (int v = 0; v < kBlockVectors; ++v) {
      V s = load(scores + v * kLanes<T>) * scale;
      if (cap > 0) s = cap * tanh_(s / cap);
      if (part) s = visible(block, m, v) ? s : broadcast(-T(INFINITY));
      peaks = s > peaks ? s : peaks;
      store<T>(scores + v * kLanes<T>, s);
    }
    const T peak = fold<T>(peaks, [](T a, T b) { return a > b ? a : b; });
    // No comparison finds NaN. Beside finite scores it spoils the row's total; alone it must not pass for nothing.
    for (int j = 0; peak == -T(INFINITY) && j < kKeyBlock; ++j) {
      if (scores[j] != scores[j]) return scores[j];
    }
    return peak;
  }

  Vec<Int<T>> visible(const KeyBlock<T>& block, int64_t m, int v) const {
    const Int<T> i = position_[m];
    const int64_t at = v * kLanes<T>;
    Vec<Int<T>> seen = (load(block.index + at) < stop_[m]) & (load(block.end + at) > i);
    if (a_.window > 0) seen &= depth_[m] - load(block.depth + at) < static_cast<Int<T>>(a_.window);
    return seen;
  }

  // Raises the row's shift to `peak` -> the factor that everything summed up so far shrinks by.
  double raise_shift(int64_t m, T peak) {
    if (!(peak > shift_[m])) return 1.0;
    const double factor = ::exp(static_cast<double>(shift_[m]) - static_cast<double>(peak));
    shift_[m] = peak;
    total_[m] *= factor;
    return factor;
  }

  // scores: (kKeyBlock) become exp(score - shift) -> their sum.
  T exponentials(T* scores, T shift) const {
    V sums = {};
    for (int v = 0; v < kBlockVectors; ++v) {
      const V p = exp_(load(scores + v * kLanes<T>) - shift);
      store<T>(scores + v * kLanes<T>, p);
      sums += p;
    }
    return sum_of<T>(sums);
  }

  const AttentionMassTask& task_;
  const AttentionMassArgs& a_;
  Products products_;
  const int64_t group_, M_, num_strips_;  // M_: rows times heads of the group, row-major
  Part *query_, *keys_;
  T* shift_;
  Int<T> *position_, *stop_, *depth_;  // stop_: the row sees keys before it
  double* total_;  // (M) of exponentials relative to shift_
};

}  // namespace
