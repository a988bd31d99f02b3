// tree_attention for one task, written with the compiler's vector extensions. Each tree_attention_<level>.cpp defines kVectorBytes and the
// tile shape, and includes this file once. Nothing here may call an inline function of the standard library, see simd.inl.
//
// Queries and keys are cut into blocks of kTreeBlock. For each pair of blocks of which something is visible, all products are made of
// kTileRows x kTileKeys tiles that stay in registers. Whether tree_end or reach hide anything of a pair of blocks is known from the smallest and
// largest end of its keys and the smallest and largest reach of its queries. Where no query looks ahead, half of the tiles of a block on the
// diagonal are left out.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/simd.inl"
#include "common/tile.inl"
#include "tree_attention/tree_attention_task.h"

namespace {

using mmdpo::Heads;
using mmdpo::TreeAttentionArgs;
using mmdpo::TreeAttentionTask;
using V = Vec<float>;

constexpr int64_t kBlock = mmdpo::kTreeBlock;
constexpr int64_t kWidth = kLanes<float>;
constexpr int64_t kTileKeys = kTileColumns<float>;
static_assert(kBlock % kTileRows == 0 && kBlock % kTileKeys == 0, "blocks are whole tiles");

// What a block of queries sees of a block of keys.
struct Sight {
  bool some;        // else nothing
  bool some_end;    // tree_end hides keys from some queries
  bool some_reach;  // some queries do not reach all keys
  bool diagonal;    // one block, whose queries each reach up to themselves
  bool masked() const { return some_end || some_reach; }
};

class Task {
 public:
  explicit Task(const TreeAttentionTask& task)
      : task_(task),
        a_(*task.args),
        D_(up_to(a_.D, kTileKeys)),
        S_(up_to(task.last_key, kBlock)),
        group_(a_.Hq / a_.Hkv),
        scale_(static_cast<float>(a_.scale)) {}

  bool forward() {
    return with_workspace(&Task::lay_out_forward, [this] { compute_forward(); });
  }
  bool backward() {
    return with_workspace(&Task::lay_out_backward, [this] { compute_backward(); });
  }

 private:
  template <class Compute>
  bool with_workspace(void (Task::*lay_out)(Arena&), const Compute& compute) {
    Arena measure{nullptr};
    (this->*lay_out)(measure);
    void* memory = aligned_alloc(64, measure.used + 64);
    if (memory == nullptr) return false;
    Arena arena{static_cast<char*>(memory)};
    (this->*lay_out)(arena);
    find_ends();
    find_reach();
    compute();
    free(memory);
    return true;
  }

  void lay_out_common(Arena& arena) {
    keys_across_ = arena.take<float>(S_ * a_.D);
    query_ = arena.take<float>(S_ * D_);
    p_ = arena.take<float>(kBlock * kBlock);
    ends_ = arena.take<int32_t>(S_);
    min_end_ = arena.take<int32_t>(S_ / kBlock);
    max_end_ = arena.take<int32_t>(S_ / kBlock);
    reach_ = arena.take<int32_t>(S_);
    min_reach_ = arena.take<int32_t>(S_ / kBlock);
    max_reach_ = arena.take<int32_t>(S_ / kBlock);
    causal_ = arena.take<bool>(S_ / kBlock);
    shift_ = arena.take<float>(S_);
    total_ = arena.take<float>(S_);
  }

  void lay_out_forward(Arena& arena) {
    lay_out_common(arena);
    value_ = arena.take<float>(S_ * D_);
    output_ = arena.take<float>(kBlock * D_);
  }

  void lay_out_backward(Arena& arena) {
    lay_out_common(arena);
    values_across_ = arena.take<float>(S_ * a_.D);
    key_ = arena.take<float>(S_ * D_);
    grad_output_ = arena.take<float>(S_ * D_);
    grad_query_ = arena.take<float>(S_ * D_);
    grad_key_ = arena.take<float>(S_ * D_);
    grad_value_ = arena.take<float>(S_ * D_);
    grad_p_ = arena.take<float>(kBlock * kBlock);
  }

  // ends_: tree_end of each key, and its extremes over blocks. Keys past the last one are seen by none.
  void find_ends() {
    for (int64_t j = 0; j < S_; ++j) {
      const bool real = j < task_.last_key;
      ends_[j] = !real ? 0 : a_.tree_end == nullptr ? static_cast<int32_t>(a_.S) : a_.tree_end[task_.batch * a_.S + j];
      const int64_t block = j / kBlock;
      if (j % kBlock == 0) min_end_[block] = max_end_[block] = ends_[j];
      if (real && ends_[j] < min_end_[block]) min_end_[block] = ends_[j];
      if (ends_[j] > max_end_[block]) max_end_[block] = ends_[j];
    }
  }

  // reach_: of each query, its extremes over blocks, and in which blocks each query reaches up to itself. Rows past the last one count for none.
  void find_reach() {
    for (int64_t i = 0; i < S_; ++i) {
      const bool real = i < task_.last_row;
      const int32_t itself = static_cast<int32_t>(i + 1), end = static_cast<int32_t>(a_.S);
      const int32_t given = a_.reach == nullptr || !real ? itself : a_.reach[task_.batch * a_.S + i];
      reach_[i] = given < end ? given : end;
      const int64_t block = i / kBlock;
      if (i % kBlock == 0) {
        min_reach_[block] = max_reach_[block] = real ? reach_[i] : 0;
        causal_[block] = true;
      }
      if (!real) continue;
      if (reach_[i] < min_reach_[block]) min_reach_[block] = reach_[i];
      if (reach_[i] > max_reach_[block]) max_reach_[block] = reach_[i];
      causal_[block] &= reach_[i] == itself;
    }
  }

  // Queries [i, i + kBlock) and keys [j, j + kBlock).
  Sight look(int64_t i, int64_t j) const {
    const int64_t last = (i + kBlock < task_.last_row ? i + kBlock : task_.last_row) - 1, rows = i / kBlock, keys = j / kBlock;
    Sight sight;
    sight.some = i < max_end_[keys] && j < max_reach_[rows];
    sight.some_end = last >= min_end_[keys];
    sight.some_reach = j + kBlock > min_reach_[rows];
    sight.diagonal = i == j && causal_[rows];
    return sight;
  }

  // to: (rows up to S_, D_), zero where there is nothing.
  void pack_rows(const Heads& from, int64_t head, int64_t first, int64_t last, float* to) const {
    for (int64_t i = first; i < up_to(last, kBlock); ++i) {
      float* row = to + (i - first) * D_;
      const float* source = from.at(task_.batch, head, i);
      for (int64_t d = 0; d < D_; ++d) row[d] = i < last && d < a_.D ? source[d] : 0.0f;
    }
  }

  // to: (S_ / kTileKeys, D, kTileKeys), zero past the last key.
  void pack_across(const Heads& from, float* to) const {
    for (int64_t panel = 0; panel < S_ / kTileKeys; ++panel) {
      for (int64_t k = 0; k < kTileKeys; ++k) {
        const int64_t j = panel * kTileKeys + k;
        const float* source = from.at(task_.batch, task_.key_head, j);
        float* column = to + panel * a_.D * kTileKeys + k;
        for (int64_t d = 0; d < a_.D; ++d) column[d * kTileKeys] = j < task_.last_key ? source[d] : 0.0f;
      }
    }
  }

  void unpack(const float* from, const Heads& to, int64_t head, float scale) const {
    for (int64_t i = 0; i < a_.S; ++i) {
      float* row = to.at(task_.batch, head, i);
      for (int64_t d = 0; d < a_.D; ++d) row[d] = from[i * D_ + d] * scale;
    }
  }

  // Rows of the block that starts at i, whole tiles.
  int64_t rows_of(int64_t i) const {
    const int64_t left = task_.last_row - i;
    return left < kBlock ? up_to(left, kTileRows) : kBlock;
  }

  // Keys of the block at which a strip of kTileRows queries ends: on the diagonal it sees none past its own.
  static int64_t limit(bool diagonal, int64_t strip) { return diagonal ? strip + kTileRows : kBlock; }

  // to (kBlock, kBlock) = rows x columns of the panels that start at key j; on the diagonal only tiles of which something is visible.
  void products(const float* rows, int64_t count, const float* panels, int64_t j, bool diagonal, float* to) const {
    for (int64_t k = 0; k < kBlock; k += kTileKeys) {
      const float* panel = panels + (j + k) * a_.D;
      for (int64_t r = 0; r < count; r += kTileRows) {
        if (k < limit(diagonal, r)) multiply<false>(a_.D, rows + r * D_, D_, 1, panel, kTileKeys, to + r * kBlock + k, kBlock);
      }
    }
  }

  // to (rows, D_) += P (count, kBlock) x columns (kBlock, D_).
  void add_products(const float* p, int64_t count, const float* columns, bool diagonal, float* to) const {
    for (int64_t r = 0; r < count; r += kTileRows) {
      for (int64_t d = 0; d < D_; d += kTileKeys) {
        multiply<true>(limit(diagonal, r), p + r * kBlock, kBlock, 1, columns + d, D_, to + r * D_ + d, D_);
      }
    }
  }

  // to (kBlock, D_) += P' (kBlock, count) x rows (count, D_).
  void add_transposed(const float* p, int64_t count, const float* rows, bool diagonal, float* to) const {
    for (int64_t k = 0; k < (diagonal ? count : kBlock); k += kTileRows) {
      const int64_t first = diagonal ? k : 0;
      for (int64_t d = 0; d < D_; d += kTileKeys) {
        multiply<true>(count - first, p + first * kBlock + k, 1, kBlock, rows + first * D_ + d, D_, to + k * D_ + d, D_);
      }
    }
  }

  // Whether query i, which reaches `stop`, sees keys j and those after it: all ones in the lanes that it sees.
  Vec<int32_t> visible(int64_t i, int64_t j, int64_t stop, bool some_reach) const {
    Vec<int32_t> seen = load(ends_ + j) > static_cast<int32_t>(i);
    if (some_reach) {
      Vec<int32_t> index;
      for (int lane = 0; lane < kWidth; ++lane) index[lane] = lane;
      seen &= index < static_cast<int32_t>(stop - j);
    }
    return seen;
  }

  void compute_forward() {
    pack_across(a_.key, keys_across_);
    pack_rows(a_.value, task_.key_head, 0, task_.last_key, value_);
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = task_.key_head * group_ + g;
      for (int64_t i = task_.first_row; i < task_.last_row; i += kBlock) {
        const int64_t count = rows_of(i), last = i + kBlock < task_.last_row ? i + kBlock : task_.last_row;
        pack_rows(a_.query, head, i, last, query_);
        for (int64_t r = 0; r < kBlock; ++r) {
          shift_[r] = -INFINITY;
          total_[r] = 0;
        }
        memset(output_, 0, kBlock * D_ * sizeof(float));
        for (int64_t j = 0; j < max_reach_[i / kBlock]; j += kBlock) {
          const Sight sight = look(i, j);
          if (!sight.some) continue;
          products(query_, count, keys_across_, j, sight.diagonal, p_);
          for (int64_t r = 0; r < count; ++r) absorb(i, j, r, sight);
          add_products(p_, count, value_ + j * D_, sight.diagonal, output_);
        }
        write_rows(head, i, last);
      }
    }
  }

  // Turns row r of p_ from scores to exponentials, with the row's running maximum and total.
  void absorb(int64_t i, int64_t j, int64_t r, const Sight& sight) {
    float* p = p_ + r * kBlock;
    const int64_t end = up_to(limit(sight.diagonal, r / kTileRows * kTileRows), kWidth);
    const bool masked = sight.masked(), some_reach = sight.some_reach;
    const int64_t stop = reach_[i + r];
    V peaks = broadcast(-INFINITY);
    for (int64_t k = 0; k < end; k += kWidth) {
      V s = load(p + k) * scale_;
      if (masked) s = visible(i + r, j + k, stop, some_reach) ? s : broadcast(-INFINITY);
      store<float>(p + k, s);
      // NaN counts as largest, so that it is not lost.
      peaks = (s > peaks) | (s != s) ? s : peaks;
    }
    float peak = shift_[r];
    for (int lane = 0; lane < kWidth; ++lane) peak = peaks[lane] > peak || peaks[lane] != peaks[lane] ? peaks[lane] : peak;
    if (peak == -INFINITY) {
      for (int64_t k = 0; k < end; k += kWidth) store<float>(p + k, V{});
      return;
    }
    if (peak != shift_[r]) {
      const float factor = exp_(broadcast(shift_[r] - peak))[0];
      shift_[r] = peak;
      total_[r] *= factor;
      float* out = output_ + r * D_;
      for (int64_t d = 0; d < D_; d += kWidth) store<float>(out + d, load(out + d) * factor);
    }
    V sums = {};
    for (int64_t k = 0; k < end; k += kWidth) {
      const V e = exp_(load(p + k) - peak);
      store<float>(p + k, e);
      sums += e;
    }
    total_[r] += sum_of<float>(sums);
  }

  void write_rows(int64_t head, int64_t first, int64_t last) const {
    float* lse = a_.lse + (task_.batch * a_.Hq + head) * a_.S;
    for (int64_t i = first; i < last; ++i) {
      const float total = total_[i - first], weight = total == 0 ? 0.0f : 1.0f / total;
      float* row = a_.output.at(task_.batch, head, i);
      for (int64_t d = 0; d < a_.D; ++d) row[d] = output_[(i - first) * D_ + d] * weight;
      lse[i] = shift_[i - first] + ::logf(total);
    }
  }

  void compute_backward() {
    pack_across(a_.key, keys_across_);
    pack_across(a_.value, values_across_);
    pack_rows(a_.key, task_.key_head, 0, a_.S, key_);
    memset(grad_key_, 0, S_ * D_ * sizeof(float));
    memset(grad_value_, 0, S_ * D_ * sizeof(float));
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = task_.key_head * group_ + g;
      pack_rows(a_.query, head, 0, a_.S, query_);
      pack_rows(a_.grad_output, head, 0, a_.S, grad_output_);
      memset(grad_query_, 0, S_ * D_ * sizeof(float));
      start_rows(head);
      for (int64_t j = 0; j < a_.S; j += kBlock) {
        for (int64_t i = 0; i < a_.S; i += kBlock) {
          const Sight sight = look(i, j);
          if (!sight.some) continue;
          const int64_t count = rows_of(i);
          products(query_ + i * D_, count, keys_across_, j, sight.diagonal, p_);
          products(grad_output_ + i * D_, count, values_across_, j, sight.diagonal, grad_p_);
          for (int64_t r = 0; r < count; ++r) differentiate(i, j, r, sight);
          add_transposed(p_, count, grad_output_ + i * D_, sight.diagonal, grad_value_ + j * D_);
          add_transposed(grad_p_, count, query_ + i * D_, sight.diagonal, grad_key_ + j * D_);
          add_products(grad_p_, count, key_ + j * D_, sight.diagonal, grad_query_ + i * D_);
        }
      }
      unpack(grad_query_, a_.grad_query, head, scale_);
    }
    unpack(grad_key_, a_.grad_key, task_.key_head, scale_);
    unpack(grad_value_, a_.grad_value, task_.key_head, 1.0f);
  }

  // shift_: lse, +inf where a row sees nothing; total_: what is taken off the gradient of each of its probabilities.
  void start_rows(int64_t head) {
    const int64_t flat = (task_.batch * a_.Hq + head) * a_.S;
    for (int64_t i = 0; i < S_; ++i) {
      shift_[i] = INFINITY;
      total_[i] = 0;
      if (i >= a_.S || a_.lse[flat + i] == -INFINITY) continue;
      shift_[i] = a_.lse[flat + i];
      const float* output = a_.output.at(task_.batch, head, i);
      float dot = 0;
      for (int64_t d = 0; d < a_.D; ++d) dot += output[d] * grad_output_[i * D_ + d];
      total_[i] = a_.grad_lse == nullptr ? dot : dot - a_.grad_lse[flat + i];
    }
  }

  // Row r of p_: scores to probabilities. Of grad_p_: gradients of probabilities to gradients of scores.
  void differentiate(int64_t i, int64_t j, int64_t r, const Sight& sight) {
    float *p = p_ + r * kBlock, *grad = grad_p_ + r * kBlock;
    const int64_t end = up_to(limit(sight.diagonal, r / kTileRows * kTileRows), kWidth);
    const float shift = shift_[i + r], taken = total_[i + r];
    const bool masked = sight.masked(), some_reach = sight.some_reach;
    const int64_t stop = reach_[i + r];
    for (int64_t k = 0; k < end; k += kWidth) {
      V e = exp_(load(p + k) * scale_ - shift), change = e * (load(grad + k) - taken);
      if (masked) {
        const Vec<int32_t> seen = visible(i + r, j + k, stop, some_reach);
        e = seen ? e : V{};
        change = seen ? change : V{};
      }
      store<float>(p + k, e);
      store<float>(grad + k, change);
    }
  }

  const TreeAttentionTask& task_;
  const TreeAttentionArgs& a_;
  const int64_t D_, S_, group_;  // D_, S_: head size and keys of the task, padded to whole tiles and blocks
  const float scale_;
  float *keys_across_, *values_across_ = nullptr;
  float *query_, *key_ = nullptr, *value_ = nullptr, *output_ = nullptr;
  float *grad_output_ = nullptr, *grad_query_ = nullptr, *grad_key_ = nullptr, *grad_value_ = nullptr;
  float *p_, *grad_p_ = nullptr, *shift_, *total_;
  int32_t *ends_, *min_end_, *max_end_, *reach_, *min_reach_, *max_reach_;
  bool* causal_;
};

}  // namespace
