// The fold of one tile for some of its rows. Each logit_rows_<level>.cpp defines kVectorBytes first. Nothing here may call an inline
// function of the standard library, see simd.inl.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "logit_rows/logit_rows_task.h"
#include "common/simd.inl"
#include "common/tanh.inl"

namespace {

using mmdpo::LogitRowsArgs;
using mmdpo::LogitRowsTask;
using mmdpo::LogitTile;

using V = Vec<float>;
constexpr int kWidth = kLanes<float>;

// Rows of a tile may start anywhere and end within a vector.
inline V load_any(const float* from) {
  V value;
  memcpy(&value, from, sizeof(value));
  return value;
}

inline void store_any(float* to, V value) { memcpy(to, &value, sizeof(value)); }

inline V load_first(const float* from, int64_t count, float fill) {
  V value = broadcast(fill);
  memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store_first(float* to, V value, int64_t count) { memcpy(to, &value, count * sizeof(float)); }

class Fold {
 public:
  explicit Fold(const LogitRowsTask& task)
      : task_(task),
        a_(*task.args),
        tile_(*task.tile),
        factor_(static_cast<float>(a_.softcap > 0 ? a_.logit_scale / a_.softcap : a_.logit_scale / a_.temperature)),
        cap_(static_cast<float>(a_.softcap / a_.temperature)),
        uncap_(static_cast<float>(a_.softcap > 0 ? a_.temperature / a_.softcap : 0.0)) {}

  void run() {
    for (int64_t row = task_.first_row; row < task_.last_row; ++row) {
      if (a_.targets[row] == a_.ignore_index) {
        if (row < a_.coefficient_rows) memset(logits(row), 0, tile_.count * sizeof(float));
      } else {
        fold_row(row);
      }
    }
  }

 private:
  struct Sums {
    double exponentials, deviation;
  };

  float* logits(int64_t row) const { return tile_.logits + row * tile_.stride; }
  double& state(mmdpo::LogitState which, int64_t row) const { return a_.state[which * a_.rows + row]; }

  void fold_row(int64_t row) {
    float* x = logits(row);
    const float peak = a_.softcap > 0 ? finish<true>(x, state(mmdpo::kSum, row)) : finish<false>(x, state(mmdpo::kSum, row));
    raise_peak(row, peak);
    // The target is kept out of the exponentials, and in at the end.
    const int64_t target = a_.targets[row] - tile_.first;
    const bool here = target >= 0 && target < tile_.count;
    if (here) {
      state(mmdpo::kTarget, row) = x[target];
      x[target] = -INFINITY;
    }
    const bool wanted = row < a_.coefficient_rows;
    const float top = static_cast<float>(state(mmdpo::kPeak, row));
    const float shift = top == -INFINITY ? 0.0f : top;  // the row has nothing but -inf or NaN so far
    const Sums sums = a_.entropy ? exponentials<true>(x, shift, wanted) : exponentials<false>(x, shift, wanted);
    state(mmdpo::kOthers, row) += sums.exponentials;
    state(mmdpo::kDeviation, row) += sums.deviation;
    if (here && wanted) x[target] = 0;
  }

  // x: logits, which become s -> the largest; their sum is added to `sum`. NaN is not found largest, but spoils what comes after.
  template <bool kSoftcap>
  float finish(float* x, double& sum) const {
    const int64_t whole = tile_.count - tile_.count % kWidth, rest = tile_.count - whole;
    const float* bias = a_.bias == nullptr ? nullptr : a_.bias + tile_.first;
    V peaks = broadcast(-INFINITY), sums = {};
    for (int64_t i = 0; i < whole; i += kWidth) {
      V s = load_any(x + i);
      if (bias != nullptr) s += load_any(bias + i);
      s = scaled<kSoftcap>(s);
      peaks = s > peaks ? s : peaks;
      sums += s;
      store_any(x + i, s);
    }
    if (rest > 0) {
      V s = load_first(x + whole, rest, 0.0f);
      if (bias != nullptr) s += load_first(bias + whole, rest, 0.0f);
      store_first(x + whole, scaled<kSoftcap>(s), rest);
      s = load_first(x + whole, rest, -INFINITY);
      peaks = s > peaks ? s : peaks;
      sums += load_first(x + whole, rest, 0.0f);
    }
    sum += sum_of<float>(sums);
    return fold<float>(peaks, [](float a, float b) { return a > b ? a : b; });
  }

  template <bool kSoftcap>
  V scaled(V logit) const {
    return kSoftcap ? cap_ * tanh_(logit * factor_) : logit * factor_;
  }

  // What was summed relative to the old peak becomes relative to the new one.
  void raise_peak(int64_t row, float peak) {
    double& old = state(mmdpo::kPeak, row);
    if (!(peak > old)) return;
    const double factor = ::exp(old - peak);
    if (old > -INFINITY) {
      double& deviation = state(mmdpo::kDeviation, row);
      deviation = factor * (deviation + (old - peak) * state(mmdpo::kOthers, row));
    }
    state(mmdpo::kOthers, row) *= factor;
    old = peak;
    if (row >= a_.coefficient_rows) return;
    float* sums = a_.accumulator + row * a_.hidden_size;
    for (int64_t h = 0; h < a_.hidden_size; ++h) sums[h] *= static_cast<float>(factor);
  }

  // x: s, which become coefficients where `wanted`.
  template <bool kEntropy>
  Sums exponentials(float* x, float shift, bool wanted) const {
    const int64_t whole = tile_.count - tile_.count % kWidth, rest = tile_.count - whole;
    V sums = {}, deviations = {};
    for (int64_t i = 0; i < whole; i += kWidth) {
      const V s = load_any(x + i);
      const V e = exp_(s - shift);
      sums += e;
      if (kEntropy) deviations += e > 0.0f ? e * (s - shift) : V{};
      if (wanted) store_any(x + i, coefficient(s, e));
    }
    if (rest > 0) {
      const V s = load_first(x + whole, rest, -INFINITY);
      const V e = exp_(s - shift);
      sums += e;
      if (kEntropy) deviations += e > 0.0f ? e * (s - shift) : V{};
      if (wanted) store_first(x + whole, coefficient(s, e), rest);
    }
    return {sum_of<float>(sums), sum_of<float>(deviations)};
  }

  V coefficient(V s, V e) const {
    const float scale = static_cast<float>(a_.coefficient_scale);
    const V tanh = s * uncap_;
    return a_.softcap > 0 ? e * (scale - scale * tanh * tanh) : e * scale;
  }

  const LogitRowsTask& task_;
  const LogitRowsArgs& a_;
  const LogitTile& tile_;
  const float factor_;  // on a logit, up to s or to the argument of tanh
  const float cap_;     // on tanh, up to s
  const float uncap_;   // on s, back to tanh
};

}  // namespace
