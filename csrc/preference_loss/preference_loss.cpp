// One pass over the tokens for the values of responses, one over the records for each loss and its derivatives, one over the tokens
// for the gradient.
#include "preference_loss/preference_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmdpo {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument("preference_loss: " + message); }

// Of a function, with its derivative. None below overflows or cancels, and a NaN stays one.
struct ValueAndSlope {
  double value, slope;
};

ValueAndSlope minus_log_sigmoid(double x) {
  const double small = std::exp(-std::fabs(x));
  return {(x < 0 ? -x : 0) + std::log1p(small), (x < 0 ? -1 : -small) / (1 + small)};
}

ValueAndSlope sigmoid(double x) {
  const double small = std::exp(-std::fabs(x)), sum = 1 + small;
  return {(x < 0 ? small : 1) / sum, small / (sum * sum)};
}

// log p - log(1 - p) of a mean log-probability. A p that rounds to 1 counts as the number before it.
ValueAndSlope log_odds(double mean, double epsilon) {
  const bool certain = mean > -epsilon;
  if (certain) mean = -epsilon;
  const double other = -std::expm1(mean);
  return {mean - std::log(other), certain ? 0 : 1 / other};
}

// Several sums at a time, so that one addition need not wait for the last.
template <class Term>
double sum(int64_t count, Term term) {
  constexpr int kLanes = 8;
  double lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (; i < count; ++i) lanes[0] += term(i);
  double total = 0;
  for (double lane : lanes) total += lane;
  return total;
}

// One response of one record.
struct Response {
  double value, ratio;   // policy; policy minus reference
  double count;          // tokens
  double weight;         // sum of the tokens' weights; 1 without weights
  double by_ratio = 0;   // derivatives of the loss in the ratio that losses see,
  double by_mean = 0;    // in the ratio divided by the count,
  double by_value = 0;   // and in the value
};

template <class T>
class Batch {
 public:
  Batch(const PreferenceLossOptions& options, const PreferenceLossArgs& args)
      : o_(options), a_(args), responses_(static_cast<size_t>(args.B * options.K)) {}

  void run() {
    read();
    look_at_batch();
    double total = 0;
    for (size_t j = 0; j < o_.losses.size(); ++j) {
      const auto [loss, weight] = o_.losses[j];
      T* row = table(j);
      double sum = 0;
      for (int64_t b = 0; b < a_.B; ++b) {
        const double value = example(loss, b, weight / static_cast<double>(a_.B));
        row[b] = static_cast<T>(value);
        sum += value;
      }
      total += weight * sum / static_cast<double>(a_.B);
    }
    // What is not finite must show, also where a loss levels out or does not look.
    for (const Response& r : responses_) total += 0 * r.ratio;
    *static_cast<T*>(a_.loss) = static_cast<T>(total);
    write_metrics();
    if (a_.gradient != nullptr) write_gradient();
  }

 private:
  Response& response(int64_t b, int column) { return responses_[static_cast<size_t>(b * o_.K + column)]; }
  Response& of(Branch branch, int64_t b) { return response(b, o_.columns[branch]); }
  T* table(size_t row) { return static_cast<T*>(a_.table) + row * static_cast<size_t>(a_.B); }

  void read() {
    const T* policy = static_cast<const T*>(a_.policy);
    const T* reference = static_cast<const T*>(a_.reference);
    const T* weights = static_cast<const T*>(a_.weights);
    const T* counts = static_cast<const T*>(a_.counts);
    int64_t first = 0;
    for (int64_t b = 0; b < a_.B; ++b) {
      for (int k = 0; k < o_.K; ++k) {
        Response& r = response(b, k);
        const int64_t place = k * a_.B + b;
        double base = 0;
        if (a_.lengths == nullptr) {
          r.value = policy[place];
          r.count = counts == nullptr ? 1 : counts[place];
        } else {
          const int64_t length = a_.lengths[b * o_.K + k];
          if (length < 0 || length > a_.N - first) refuse_lengths();
          r.count = static_cast<double>(length);
          r.weight = weights == nullptr ? 1 : weight_of(weights + first, length, b * o_.K + k);
          r.value = value_of(policy + first, weights, first, length) / r.weight;
          if (reference != nullptr && !a_.reference_is_sums) {
            base = value_of(reference + first, weights, first, length) / r.weight;
          }
          first += length;
        }
        if (reference != nullptr && (a_.lengths == nullptr || a_.reference_is_sums)) base = reference[place];
        r.ratio = r.value - base;
      }
    }
    if (a_.lengths != nullptr && first != a_.N) refuse_lengths();
  }

  [[noreturn]] void refuse_lengths() const {
    refuse("policy.lengths must be counts that sum to the " + std::to_string(a_.N) + " policy.logps");
  }

  static double value_of(const T* tokens, const T* weights, int64_t first, int64_t length) {
    if (weights == nullptr) return sum(length, [tokens](int64_t i) { return static_cast<double>(tokens[i]); });
    weights += first;
    return sum(length, [tokens, weights](int64_t i) { return static_cast<double>(weights[i]) * tokens[i]; });
  }

  static double weight_of(const T* weights, int64_t length, int64_t index) {
    if (length == 0) return 1;
    const double total = sum(length, [weights](int64_t i) { return static_cast<double>(weights[i]); });
    const bool fine = std::all_of(weights, weights + length, [](T weight) { return weight >= 0; });
    if (!fine || !(total > 0) || !std::isfinite(total)) {
      refuse("policy.weights must be 0 or more and not all 0 in a response, unlike those of response " + std::to_string(index));
    }
    return total;
  }

  // What losses know of the batch: nll the number of chosen tokens and their value; kto_pair the mean ratios, those below 0 as 0.
  void look_at_batch() {
    double count = 0, value = 0, of_chosen = 0, of_rejected = 0;
    for (int64_t b = 0; b < a_.B; ++b) {
      count += of(chosen, b).count;
      value += of(chosen, b).value;
      of_chosen += seen(of(chosen, b));
      of_rejected += seen(of(rejected, b));
    }
    chosen_tokens_ = count;
    nll_ = -value / count;
    of_chosen /= static_cast<double>(a_.B);
    of_rejected /= static_cast<double>(a_.B);
    mean_chosen_ = of_chosen < 0 ? 0 : of_chosen;
    mean_rejected_ = of_rejected < 0 ? 0 : of_rejected;
  }

  double seen(const Response& r) const { return o_.length_normalised ? r.ratio / r.count : r.ratio; }

  // The loss of record b; its derivatives, times `weight`, are added to the responses'.
  double example(PairLoss loss, int64_t b, double weight) {
    Response &w = of(chosen, b), &l = of(rejected, b);
    const double beta = o_.beta, margin = beta * (seen(w) - seen(l));
    const auto pull = [&](Response& up, Response& down, double slope) {
      up.by_ratio += weight * beta * slope;
      down.by_ratio -= weight * beta * slope;
    };
    switch (loss) {
      case PairLoss::sigmoid: {
        const ValueAndSlope clean = minus_log_sigmoid(margin);
        pull(w, l, clean.slope);
        return clean.value;
      }
      case PairLoss::hinge: {
        const double distance = 1 - margin;
        if (distance > 0) pull(w, l, -1);
        return distance < 0 ? 0 : distance;
      }
      case PairLoss::ipo: {
        const double distance = w.ratio / w.count - l.ratio / l.count - 1 / (2 * beta);
        w.by_mean += weight * 2 * distance;
        l.by_mean -= weight * 2 * distance;
        return distance * distance;
      }
      case PairLoss::cdpo:
      case PairLoss::robust: {
        const ValueAndSlope clean = minus_log_sigmoid(margin), flipped = minus_log_sigmoid(-margin);
        const bool robust = loss == PairLoss::robust;
        const double e = o_.label_smoothing, sign = robust ? -1 : 1, scale = robust ? 1 / (1 - 2 * e) : 1;
        pull(w, l, ((1 - e) * clean.slope - sign * e * flipped.slope) * scale);
        return ((1 - e) * clean.value + sign * e * flipped.value) * scale;
      }
      case PairLoss::simpo: {
        const ValueAndSlope found = minus_log_sigmoid(beta * (w.value / w.count - l.value / l.count) - o_.simpo_gamma);
        w.by_value += weight * beta * found.slope / w.count;
        l.by_value -= weight * beta * found.slope / l.count;
        return found.value;
      }
      case PairLoss::orpo: {
        const double epsilon = std::numeric_limits<T>::epsilon();
        const ValueAndSlope up = log_odds(w.value / w.count, epsilon), down = log_odds(l.value / l.count, epsilon);
        const ValueAndSlope found = minus_log_sigmoid(up.value - down.value);
        w.by_value += weight * beta * found.slope * up.slope / w.count;
        l.by_value -= weight * beta * found.slope * down.slope / l.count;
        return beta * found.value;
      }
      case PairLoss::bco_pair: {
        const ValueAndSlope above = minus_log_sigmoid(beta * seen(w) - o_.bco_shift);
        const ValueAndSlope below = minus_log_sigmoid(o_.bco_shift - beta * seen(l));
        w.by_ratio += weight * beta * above.slope;
        l.by_ratio -= weight * beta * below.slope;
        return above.value + below.value;
      }
      case PairLoss::kto_pair: {
        const ValueAndSlope above = sigmoid(beta * (mean_rejected_ - seen(w))), below = sigmoid(beta * (seen(l) - mean_chosen_));
        w.by_ratio -= weight * beta * above.slope / 2;
        l.by_ratio += weight * beta * below.slope / 2;
        return (above.value + below.value) / 2;
      }
      case PairLoss::nll: {
        w.by_value -= weight * static_cast<double>(a_.B) / chosen_tokens_;
        return nll_;
      }
      case PairLoss::copo: {
        Response& c = of(corrupted, b);
        const ValueAndSlope found = minus_log_sigmoid(beta * (seen(w) - seen(c)));
        pull(w, c, found.slope);
        return found.value;
      }
      case PairLoss::ancpo: {
        double total = 0;
        for (const Branch branch : {chosen, rejected, corrupted}) {
          if (!o_.anchors[branch]) continue;
          Response& r = of(branch, b);
          const double sign = branch == chosen ? 1 : -1;
          const ValueAndSlope found = minus_log_sigmoid(sign * (beta * seen(r) - o_.anchor));
          r.by_ratio += weight * beta * sign * found.slope;
          total += found.value;
        }
        return total;
      }
    }
    throw std::logic_error("preference_loss: unknown loss");
  }

  void write_metrics() {
    const size_t losses = o_.losses.size(), columns = static_cast<size_t>(o_.K);
    for (int64_t b = 0; b < a_.B; ++b) {
      for (size_t k = 0; k < columns; ++k) {
        const Response& r = response(b, static_cast<int>(k));
        table(losses + k)[b] = static_cast<T>(o_.beta * seen(r));
        table(losses + columns + k)[b] = static_cast<T>(r.value);
      }
      const double up = o_.beta * seen(of(chosen, b)), down = o_.beta * seen(of(rejected, b));
      table(losses + 2 * columns)[b] = up > down ? 1 : 0;
      table(losses + 2 * columns + 1)[b] = static_cast<T>(up - down);
    }
  }

  void write_gradient() {
    T* gradient = static_cast<T*>(a_.gradient);
    const T* weights = static_cast<const T*>(a_.weights);
    int64_t first = 0;
    for (int64_t b = 0; b < a_.B; ++b) {
      for (int k = 0; k < o_.K; ++k) {
        const Response& r = response(b, k);
        double slope = r.by_value + (o_.length_normalised ? r.by_ratio / r.count : r.by_ratio);
        if (r.by_mean != 0) slope += r.by_mean / r.count;
        if (a_.lengths == nullptr) {
          gradient[k * a_.B + b] = static_cast<T>(slope);
          continue;
        }
        const int64_t end = first + a_.lengths[b * o_.K + k];
        if (weights == nullptr) {
          std::fill(gradient + first, gradient + end, static_cast<T>(slope));
        } else {
          for (int64_t i = first; i < end; ++i) gradient[i] = static_cast<T>(slope * weights[i] / r.weight);
        }
        first = end;
      }
    }
  }

  const PreferenceLossOptions& o_;
  const PreferenceLossArgs& a_;
  std::vector<Response> responses_;
  double chosen_tokens_ = 0, nll_ = 0, mean_chosen_ = 0, mean_rejected_ = 0;
};

}  // namespace

const std::vector<std::string>& pair_loss_names() {
  static const std::vector<std::string> names{"sigmoid", "hinge",    "ipo",      "cdpo", "robust", "simpo",
                                              "orpo",    "bco_pair", "kto_pair", "nll",  "copo",   "ancpo"};
  return names;
}

void preference_loss(const PreferenceLossOptions& options, const PreferenceLossArgs& args) {
  if (args.is_float64) {
    Batch<double>(options, args).run();
  } else {
    Batch<float>(options, args).run();
  }
}

}  // namespace mmdpo
