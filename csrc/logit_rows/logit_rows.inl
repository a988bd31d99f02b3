// The fold of one tile for some of its rows. Each logit_rows_<level>.cpp defines kVectorBytes first. Nothing here may call an inline
// function of the standard library, see simd.inl.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "logit_rows/logit_rows_task.h"
#include "common/simd.inl"
#include "common/tanh.inl"

namespace {

using mmdpo::DType;
using mmdpo::LogitRowsArgs;
using mmdpo::LogitRowsTask;
using mmdpo::LogitTile;

using V = Vec<float>;
constexpr int kWidth = kLanes<float>;

// How a tile keeps numbers, and how they come into vectors of float32. Rows may start anywhere and end within a vector.
template <DType kDType>
struct Stored;

template <>
struct Stored<DType::float32> {
  using Element = float;
  using Part = V;
  static V widen(Part part) { return part; }
  static Part narrow(V value) { return value; }
};

template <>
struct Stored<DType::bfloat16> {
  using Element = uint16_t;
  typedef uint16_t Part __attribute__((vector_size(kVectorBytes / 2), may_alias));
  using Bits = Vec<int32_t>;

  static V widen(Part part) { return reinterpret_float(__builtin_convertvector(part, Bits) << 16); }

  // To nearest, ties to even. NaN keeps a bit of its payload that no rounding carries away.
  static Part narrow(V value) {
    const Bits bits = reinterpret_int(value);
    const Bits even = (bits >> 16) & 1;
    const Bits rounded = (bits + 0x7FFF + even) >> 16;
    const Bits found = value == value ? rounded : (bits >> 16) | 0x40;
    return __builtin_convertvector(found & 0xFFFF, Part);
  }
};

template <DType kDType>
V load_any(const typename Stored<kDType>::Element* from) {
  typename Stored<kDType>::Part part;
  memcpy(&part, from, sizeof(part));
  return Stored<kDType>::widen(part);
}

template <DType kDType>
void store_any(typename Stored<kDType>::Element* to, V value) {
  const typename Stored<kDType>::Part part = Stored<kDType>::narrow(value);
  memcpy(to, &part, sizeof(part));
}

template <DType kDType>
V load_first(const typename Stored<kDType>::Element* from, int64_t count, float fill) {
  typename Stored<kDType>::Part part = Stored<kDType>::narrow(broadcast(fill));
  memcpy(&part, from, count * sizeof(*from));
  return Stored<kDType>::widen(part);
}

template <DType kDType>
void store_first(typename Stored<kDType>::Element* to, V value, int64_t count) {
  const typename Stored<kDType>::Part part = Stored<kDType>::narrow(value);
  memcpy(to, &part, count * sizeof(*to));
}

constexpr DType kWide = DType::float32;

template <DType kDType>
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
        if (row < a_.coefficient_rows) memset(logits(row), 0, tile_.count * sizeof(Element));
      } else {
        fold_row(row);
      }
    }
  }

 private:
  using Element = typename Stored<kDType>::Element;
  struct Sums {
    double exponentials, deviation;
  };

  Element* logits(int64_t row) const { return static_cast<Element*>(tile_.logits) + row * tile_.stride; }

  // Where s is kept until its exponential is known: in the place of the logits themselves where they are float32.
  float* wide(Element* stored) const {
    if constexpr (kDType == kWide) return stored;
    return task_.row;
  }

  double& state(mmdpo::LogitState which, int64_t row) const { return a_.state[which * a_.rows + row]; }

  void fold_row(int64_t row) {
    Element* stored = logits(row);
    float* x = wide(stored);
    const float peak = a_.softcap > 0 ? finish<true>(stored, x, state(mmdpo::kSum, row)) : finish<false>(stored, x, state(mmdpo::kSum, row));
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
    const Sums sums = a_.entropy ? exponentials<true>(x, stored, shift, wanted) : exponentials<false>(x, stored, shift, wanted);
    state(mmdpo::kOthers, row) += sums.exponentials;
    state(mmdpo::kDeviation, row) += sums.deviation;
    if (here && wanted) stored[target] = 0;
  }

  // logits -> s, in x, and the largest of them; their sum is added to `sum`. NaN is not found largest, but spoils what comes after.
  template <bool kSoftcap>
  float finish(const Element* logits, float* x, double& sum) const {
    const int64_t whole = tile_.count - tile_.count % kWidth, rest = tile_.count - whole;
    const float* bias = a_.bias == nullptr ? nullptr : a_.bias + tile_.first;
    V peaks = broadcast(-INFINITY), sums = {};
    for (int64_t i = 0; i < whole; i += kWidth) {
      V s = load_any<kDType>(logits + i);
      if (bias != nullptr) s += load_any<kWide>(bias + i);
      s = scaled<kSoftcap>(s);
      peaks = s > peaks ? s : peaks;
      sums += s;
      store_any<kWide>(x + i, s);
    }
    if (rest > 0) {
      V s = load_first<kDType>(logits + whole, rest, 0.0f);
      if (bias != nullptr) s += load_first<kWide>(bias + whole, rest, 0.0f);
      store_first<kWide>(x + whole, scaled<kSoftcap>(s), rest);
      s = load_first<kWide>(x + whole, rest, -INFINITY);
      peaks = s > peaks ? s : peaks;
      sums += load_first<kWide>(x + whole, rest, 0.0f);
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

  // x: s, from which come the coefficients, where `wanted`.
  template <bool kEntropy>
  Sums exponentials(const float* x, Element* coefficients, float shift, bool wanted) const {
    const int64_t whole = tile_.count - tile_.count % kWidth, rest = tile_.count - whole;
    V sums = {}, deviations = {};
    for (int64_t i = 0; i < whole; i += kWidth) {
      const V s = load_any<kWide>(x + i);
      const V e = exp_(s - shift);
      sums += e;
      if (kEntropy) deviations += e > 0.0f ? e * (s - shift) : V{};
      if (wanted) store_any<kDType>(coefficients + i, coefficient(s, e));
    }
    if (rest > 0) {
      const V s = load_first<kWide>(x + whole, rest, -INFINITY);
      const V e = exp_(s - shift);
      sums += e;
      if (kEntropy) deviations += e > 0.0f ? e * (s - shift) : V{};
      if (wanted) store_first<kDType>(coefficients + whole, coefficient(s, e), rest);
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

void fold_rows(const LogitRowsTask& task) {
  if (task.tile->dtype == DType::bfloat16) {
    Fold<DType::bfloat16>(task).run();
  } else {
    Fold<kWide>(task).run();
  }
}

}  // namespace
