// tree_attention for one task, written with the compiler's vector extensions. Each tree_attention_<level>.cpp defines kVectorBytes, includes
// what makes products (Float32 or Bfloat16) and this file once. Nothing here may call an inline function of the standard library, see simd.inl.
//
// Queries and keys are cut into blocks of kTreeBlock. For each pair of blocks of which something is visible, all products are made of
// tiles. Whether tree_end or reach hide anything of a pair of blocks is known from the smallest and largest end of its keys and the smallest and
// largest reach of its queries. Where no query looks ahead, half of the tiles of a block on the diagonal are left out.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "common/convert.inl"
#include "tree_attention/tree_attention_sight.inl"

namespace {

using mmdpo::Heads;
using V = Vec<float>;

template <class Products>
class Task {
  using Part = typename Products::Part;
  static constexpr int64_t kStrip = Products::kStrip;
  static_assert(kBlock % kStrip == 0 && kBlock % Products::kColumns == 0, "blocks are whole tiles");

 public:
  explicit Task(const TreeAttentionTask& task)
      : task_(task),
        a_(*task.args),
        products_(a_),
        D_(products_.width()),
        S_(up_to(task.last_key, kBlock)),
        group_(a_.Hq / a_.Hkv),
        scale_(static_cast<float>(a_.scale)),
        tree_(task, S_) {}

  bool forward() {
    return with_workspace(&Task::lay_out_forward, [this] { compute_forward(); });
  }
  bool backward() {
    return with_workspace(&Task::lay_out_backward, [this] { compute_backward(); });
  }

  const Products& products() const { return products_; }

 private:
  template <class Compute>
  bool with_workspace(void (Task::*lay_out)(Arena&), const Compute& compute) {
    Arena measure{nullptr};
    (this->*lay_out)(measure);
    void* memory = aligned_alloc(64, measure.used + 64);
    if (memory == nullptr) return false;
    Arena arena{static_cast<char*>(memory)};
    (this->*lay_out)(arena);
    tree_.find();
    compute();
    free(memory);
    return true;
  }

  void lay_out_common(Arena& arena) {
    tree_.lay_out(arena);
    keys_across_ = arena.take<Part>(S_ * products_.depth());
    scores_ = arena.take<float>(kBlock * kBlock);
    p_ = beside(arena, scores_);
    rows_ = arena.take<Part>(kBlock * D_);
    shift_ = arena.take<float>(S_);
    total_ = arena.take<float>(S_);
    if constexpr (!Products::kOneLayout) products_.lay_out(arena);
  }

  void lay_out_forward(Arena& arena) {
    lay_out_common(arena);
    values_ = arena.take<Part>(S_ * D_);
    output_ = arena.take<float>(kBlock * D_);
  }

  void lay_out_backward(Arena& arena) {
    lay_out_common(arena);
    values_across_ = arena.take<Part>(S_ * products_.depth());
    keys_ = arena.take<Part>(S_ * D_);
    query_ = arena.take<Part>(S_ * D_);
    grad_output_ = arena.take<Part>(S_ * D_);
    query_turned_ = turned(arena, query_);
    grad_output_turned_ = turned(arena, grad_output_);
    grad_query_ = arena.take<float>(S_ * D_);
    grad_key_ = arena.take<float>(S_ * D_);
    grad_value_ = arena.take<float>(S_ * D_);
    grad_scores_ = arena.take<float>(kBlock * kBlock);
    grad_p_ = beside(arena, grad_scores_);
    row_ = arena.take<float>(2 * a_.D);
  }

  // What becomes of scores: in their place where one layout serves for both.
  static Part* beside(Arena& arena, float* scores) {
    if constexpr (Products::kOneLayout) return scores;
    else return arena.take<Part>(kBlock * kBlock);
  }

  Part* turned(Arena& arena, Part* rows) const {
    if constexpr (Products::kOneLayout) return rows;
    else return arena.take<Part>(S_ * D_);
  }

  // to: (rows up to whole blocks, D_), zero where there is nothing.
  void pack_rows(const Heads& from, int64_t head, int64_t first, int64_t last, Part* to) {
    for (int64_t i = first; i < up_to(last, kBlock); ++i, to += D_) {
      if (i < last) products_.pack_row(from, from.offset(task_.batch, head, i), to);
      else memset(to, 0, D_ * sizeof(Part));
    }
  }

  // across: panels for `products`; down: rows for `add_products`, or null.
  void pack_keys(const Heads& from, Part* across, Part* down) {
    for (int64_t j = 0; j < S_; j += kBlock) {
      const int64_t last = j + kBlock < task_.last_key ? j + kBlock : task_.last_key;
      Part* rows = Products::kOneLayout && down != nullptr ? down + j * D_ : rows_;
      pack_rows(from, task_.key_head, j, last, rows);
      if (across != nullptr) products_.pack_across(rows, across + j * products_.depth());
      if constexpr (!Products::kOneLayout) {
        if (down != nullptr) products_.pack_down(rows, down + j * D_);
      }
    }
  }

  // rows: (S_, D_); turned: for `add_transposed`.
  void pack_queries(const Heads& from, int64_t head, Part* rows, Part* turned) {
    pack_rows(from, head, 0, a_.S, rows);
    if constexpr (!Products::kOneLayout) {
      for (int64_t i = 0; i < S_; i += kBlock) products_.pack_turned(rows + i * D_, turned + i * D_);
    }
  }

  // from: (S_, D_)
  void unpack(const float* from, const Heads& to, int64_t head, float scale) const {
    for (int64_t i = 0; i < a_.S; ++i) {
      float* row = to.floats(task_.batch, head, i);
      for (int64_t d = 0; d < a_.D; ++d) row[d] = from[i * D_ + d] * scale;
    }
  }

  // from: as `add_transposed` leaves it. grad_query_ is free by then.
  void unpack_sums(const float* from, const Heads& to, float scale) {
    if constexpr (!Products::kOneLayout) {
      for (int64_t j = 0; j < S_; j += kBlock) products_.turn_back(from + j * D_, grad_query_ + j * D_);
      from = grad_query_;
    }
    unpack(from, to, task_.key_head, scale);
  }

  // Rows of the block that starts at i, whole strips.
  int64_t rows_of(int64_t i) const {
    const int64_t left = task_.last_row - i;
    return left < kBlock ? up_to(left, kStrip) : kBlock;
  }

  // Keys of the block at which a strip of queries ends: on the diagonal it sees none past its own.
  static auto limit(bool diagonal) {
    return [diagonal](int64_t strip) { return diagonal ? strip + kStrip : kBlock; };
  }

  // Likewise for a row, in whole vectors.
  static int64_t end_of_row(bool diagonal, int64_t r) { return up_to(limit(diagonal)(r / kStrip * kStrip), kWidth); }

  void compute_forward() {
    pack_keys(a_.key, keys_across_, nullptr);
    pack_keys(a_.value, nullptr, values_);
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = task_.key_head * group_ + g;
      for (int64_t i = task_.first_row; i < task_.last_row; i += kBlock) {
        const int64_t count = rows_of(i), last = i + kBlock < task_.last_row ? i + kBlock : task_.last_row;
        pack_rows(a_.query, head, i, last, rows_);
        for (int64_t r = 0; r < kBlock; ++r) {
          shift_[r] = -INFINITY;
          total_[r] = 0;
        }
        memset(output_, 0, kBlock * D_ * sizeof(float));
        for (int64_t j = 0; j < tree_.max_reach(i); j += kBlock) {
          const Sight sight = tree_.look(i, j);
          if (!sight.some) continue;
          products_.products(rows_, count, keys_across_ + j * products_.depth(), limit(sight.diagonal), scores_);
          for (int64_t r = 0; r < count; ++r) absorb(i, j, r, sight);
          products_.add_products(p_, count, values_ + j * D_, limit(sight.diagonal), output_);
        }
        write_rows(head, i, last);
      }
    }
  }

  // Turns row r from scores to exponentials, in p_, with the row's running maximum and total.
  void absorb(int64_t i, int64_t j, int64_t r, const Sight& sight) {
    float* scores = scores_ + r * kBlock;
    Part* p = p_ + r * kBlock;
    const int64_t end = end_of_row(sight.diagonal, r);
    const bool masked = sight.masked(), some_reach = sight.some_reach;
    const int64_t stop = tree_.reach(i + r);
    V peaks = broadcast(-INFINITY);
    for (int64_t k = 0; k < end; k += kWidth) {
      V s = load(scores + k) * scale_;
      if (masked) s = tree_.visible(i + r, j + k, stop, some_reach) ? s : broadcast(-INFINITY);
      store<float>(scores + k, s);
      // NaN counts as largest, so that it is not lost.
      peaks = (s > peaks) | (s != s) ? s : peaks;
    }
    float peak = shift_[r];
    for (int lane = 0; lane < kWidth; ++lane) peak = peaks[lane] > peak || peaks[lane] != peaks[lane] ? peaks[lane] : peak;
    if (peak == -INFINITY) {
      for (int64_t k = 0; k < end; k += kWidth) Products::put(p + k, V{});
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
      const V e = exp_(load(scores + k) - peak);
      Products::put(p + k, e);
      sums += e;
    }
    total_[r] += sum_of<float>(sums);
  }

  void write_rows(int64_t head, int64_t first, int64_t last) const {
    float* lse = a_.lse + (task_.batch * a_.Hq + head) * a_.S;
    for (int64_t i = first; i < last; ++i) {
      const float total = total_[i - first], weight = total == 0 ? 0.0f : 1.0f / total;
      float* row = a_.output.floats(task_.batch, head, i);
      for (int64_t d = 0; d < a_.D; ++d) row[d] = output_[(i - first) * D_ + d] * weight;
      lse[i] = shift_[i - first] + ::logf(total);
    }
  }

  void compute_backward() {
    pack_keys(a_.key, keys_across_, keys_);
    pack_keys(a_.value, values_across_, nullptr);
    memset(grad_key_, 0, S_ * D_ * sizeof(float));
    memset(grad_value_, 0, S_ * D_ * sizeof(float));
    for (int64_t g = 0; g < group_; ++g) {
      const int64_t head = task_.key_head * group_ + g;
      pack_queries(a_.query, head, query_, query_turned_);
      pack_queries(a_.grad_output, head, grad_output_, grad_output_turned_);
      memset(grad_query_, 0, S_ * D_ * sizeof(float));
      start_rows(head);
      for (int64_t j = 0; j < a_.S; j += kBlock) {
        for (int64_t i = 0; i < a_.S; i += kBlock) {
          const Sight sight = tree_.look(i, j);
          if (!sight.some) continue;
          const int64_t count = rows_of(i);
          products_.products(query_ + i * D_, count, keys_across_ + j * products_.depth(), limit(sight.diagonal), scores_);
          products_.products(grad_output_ + i * D_, count, values_across_ + j * products_.depth(), limit(sight.diagonal), grad_scores_);
          for (int64_t r = 0; r < count; ++r) differentiate(i, j, r, sight);
          products_.add_transposed(p_, count, grad_output_turned_ + i * D_, sight.diagonal, grad_value_ + j * D_);
          products_.add_transposed(grad_p_, count, query_turned_ + i * D_, sight.diagonal, grad_key_ + j * D_);
          products_.add_products(grad_p_, count, keys_ + j * D_, limit(sight.diagonal), grad_query_ + i * D_);
        }
      }
      unpack(grad_query_, a_.grad_query, head, scale_);
    }
    unpack_sums(grad_key_, a_.grad_key, scale_);
    unpack_sums(grad_value_, a_.grad_value, 1.0f);
  }

  // shift_: lse, +inf where a row sees nothing; total_: what is taken off the gradient of each of its probabilities.
  void start_rows(int64_t head) {
    float *output = row_, *grad_output = row_ + a_.D;
    const int64_t flat = (task_.batch * a_.Hq + head) * a_.S;
    for (int64_t i = 0; i < S_; ++i) {
      shift_[i] = INFINITY;
      total_[i] = 0;
      if (i >= a_.S || a_.lse[flat + i] == -INFINITY) continue;
      shift_[i] = a_.lse[flat + i];
      convert(a_.output.data, a_.dtype, a_.output.offset(task_.batch, head, i), a_.D, output);
      convert(a_.grad_output.data, a_.dtype, a_.grad_output.offset(task_.batch, head, i), a_.D, grad_output);
      float dot = 0;
      for (int64_t d = 0; d < a_.D; ++d) dot += output[d] * grad_output[d];
      total_[i] = a_.grad_lse == nullptr ? dot : dot - a_.grad_lse[flat + i];
    }
  }

  // Row r: scores to probabilities, in p_, and gradients of probabilities to gradients of scores, in grad_p_.
  void differentiate(int64_t i, int64_t j, int64_t r, const Sight& sight) {
    const float *scores = scores_ + r * kBlock, *grads = grad_scores_ + r * kBlock;
    Part *p = p_ + r * kBlock, *grad_p = grad_p_ + r * kBlock;
    const int64_t end = end_of_row(sight.diagonal, r);
    const float shift = shift_[i + r], taken = total_[i + r];
    const bool masked = sight.masked(), some_reach = sight.some_reach;
    const int64_t stop = tree_.reach(i + r);
    for (int64_t k = 0; k < end; k += kWidth) {
      V e = exp_(load(scores + k) * scale_ - shift), change = e * (load(grads + k) - taken);
      if (masked) {
        const Vec<int32_t> seen = tree_.visible(i + r, j + k, stop, some_reach);
        e = seen ? e : V{};
        change = seen ? change : V{};
      }
      Products::put(p + k, e);
      Products::put(grad_p + k, change);
    }
  }

  const TreeAttentionTask& task_;
  const TreeAttentionArgs& a_;
  Products products_;
  const int64_t D_, S_, group_;  // D_, S_: head size and keys of the task, padded to whole tiles and blocks
  const float scale_;
  Tree tree_;
  Part *keys_across_, *values_across_ = nullptr, *rows_, *keys_ = nullptr, *values_ = nullptr;
  Part *query_ = nullptr, *query_turned_ = nullptr, *grad_output_ = nullptr, *grad_output_turned_ = nullptr;
  Part *p_, *grad_p_ = nullptr;
  float *scores_, *grad_scores_ = nullptr, *output_ = nullptr, *row_ = nullptr;
  float *grad_query_ = nullptr, *grad_key_ = nullptr, *grad_value_ = nullptr, *shift_, *total_;
};

}  // namespace
