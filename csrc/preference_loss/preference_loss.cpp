// One pass over the tokens for the values of responses, one over the records for each term and its derivatives, one over the tokens
// for the gradient.
#include "preference_loss/preference_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
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

ValueAndSlope hinge(double x) { return {1 - x < 0 ? 0 : 1 - x, 1 - x > 0 ? -1.0 : 0.0}; }

ValueAndSlope square(double x) { return {x * x, 2 * x}; }

ValueAndSlope identity(double x) { return {x, 1}; }

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
  double value, ratio;  // policy; policy minus reference
  double count;         // tokens
  double weight;        // sum of the tokens' weights; 1 without weights
  double slope = 0;     // derivative of the loss in the value
};

double ratio_mean(const Response& r) { return r.ratio / r.count; }

// What is the same for all records of a branch.
struct BranchStatistics {
  double batch_ratio, batch_logp, tokens;
};

template <class T>
class Batch {
 public:
  Batch(const PreferenceLossOptions& options, const PreferenceLossArgs& args)
      : o_(options), a_(args), responses_(static_cast<size_t>(args.B * options.K)), statistics_(static_cast<size_t>(options.K)) {}

  void run() {
    read();
    look_at_batch();
    std::vector<double> found(static_cast<size_t>(a_.B)), arguments(static_cast<size_t>(a_.B));
    double total = 0;
    for (size_t j = 0; j < o_.losses.size(); ++j) {
      std::fill(found.begin(), found.end(), 0.0);
      const double weight = o_.losses[j].weight / static_cast<double>(a_.B);
      for (const LossTerm& term : o_.losses[j].terms) add(term, weight, arguments, found);
      std::copy(found.begin(), found.end(), table(j));
      total += o_.losses[j].weight * std::accumulate(found.begin(), found.end(), 0.0) / static_cast<double>(a_.B);
    }
    // What is not finite must show, also where a loss levels out or does not look.
    for (const Response& r : responses_) total += 0 * r.ratio;
    *static_cast<T*>(a_.loss) = static_cast<T>(total);
    write_metrics();
    if (a_.gradient != nullptr) write_gradient();
  }

 private:
  Response& response(int64_t b, int column) { return responses_[static_cast<size_t>(b * o_.K + column)]; }
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

  void look_at_batch() {
    if (!o_.batch_values) return;
    for (int k = 0; k < o_.K; ++k) {
      double tokens = 0, value = 0, ratio = 0;
      for (int64_t b = 0; b < a_.B; ++b) {
        const Response& r = response(b, k);
        tokens += r.count;
        value += r.value;
        ratio += seen(r);
      }
      ratio /= static_cast<double>(a_.B);
      statistics_[static_cast<size_t>(k)] = {ratio < 0 ? 0 : ratio, value / tokens, tokens};
    }
  }

  double seen(const Response& r) const { return o_.length_normalised ? r.ratio / r.count : r.ratio; }

  // Adds the term of each record to `found`; its derivatives, times `weight`, to the responses'.
  void add(const LossTerm& term, double weight, std::vector<double>& x, std::vector<double>& found) {
    std::fill(x.begin(), x.end(), 0.0);
    for (const TermValue& at : term.values) look(at, x.data());
    switch (term.link) {
      case Link::minus_log_sigmoid:
        link<minus_log_sigmoid>(term, weight, x.data(), found.data());
        break;
      case Link::hinge:
        link<hinge>(term, weight, x.data(), found.data());
        break;
      case Link::square:
        link<square>(term, weight, x.data(), found.data());
        break;
      case Link::sigmoid:
        link<sigmoid>(term, weight, x.data(), found.data());
        break;
      case Link::identity:
        link<identity>(term, weight, x.data(), found.data());
        break;
    }
    for (const TermValue& at : term.values) pull(at, x.data());
  }

  // From the sums of a term's values to its derivatives in them.
  template <ValueAndSlope (*function)(double)>
  void link(const LossTerm& term, double weight, double* x, double* found) const {
    const double share = weight * term.weight * term.scale;
    for (int64_t b = 0; b < a_.B; ++b) {
      const ValueAndSlope linked = function(term.scale * x[b] + term.offset);
      found[b] += term.weight * linked.value;
      x[b] = share * linked.slope;
    }
  }

  // Adds what a term looks at of each record to its sum.
  void look(const TermValue& at, double* sums) {
    const BranchStatistics& all = statistics_[static_cast<size_t>(at.branch)];
    const auto each = [&](auto value) {
      for (int64_t b = 0; b < a_.B; ++b) sums[b] += at.coefficient * value(response(b, at.branch));
    };
    switch (at.kind) {
      case ValueKind::ratio:
        return o_.length_normalised ? each(ratio_mean) : each([](const Response& r) { return r.ratio; });
      case ValueKind::mean_ratio:
        return each(ratio_mean);
      case ValueKind::logp:
        return each([](const Response& r) { return r.value; });
      case ValueKind::mean_logp:
        return each([](const Response& r) { return r.value / r.count; });
      case ValueKind::log_odds:
        return each([](const Response& r) { return log_odds(r.value / r.count, std::numeric_limits<T>::epsilon()).value; });
      case ValueKind::batch_ratio:
        return each([&](const Response&) { return all.batch_ratio; });
      case ValueKind::batch_logp:
        return each([&](const Response&) { return all.batch_logp; });
    }
  }

  // Adds the derivatives in what a term looks at, as ones in the responses' values.
  void pull(const TermValue& at, const double* slopes) {
    const auto each = [&](auto through) {
      for (int64_t b = 0; b < a_.B; ++b) {
        Response& r = response(b, at.branch);
        r.slope += through(r, at.coefficient * slopes[b]);
      }
    };
    const auto plain = [](const Response&, double slope) { return slope; };
    const auto per_token = [](const Response& r, double slope) { return slope / r.count; };
    switch (at.kind) {
      case ValueKind::ratio:
        return o_.length_normalised ? each(per_token) : each(plain);
      case ValueKind::logp:
        return each(plain);
      case ValueKind::mean_ratio:
      case ValueKind::mean_logp:
        return each(per_token);
      case ValueKind::log_odds:
        return each([](const Response& r, double slope) {
          return slope * log_odds(r.value / r.count, std::numeric_limits<T>::epsilon()).slope / r.count;
        });
      case ValueKind::batch_ratio:
        return;
      case ValueKind::batch_logp: {
        // All records have this one value and so one slope of the link: that of the mean over the batch is B times a record's.
        const double share = static_cast<double>(a_.B) / statistics_[static_cast<size_t>(at.branch)].tokens;
        return each([share](const Response&, double slope) { return slope * share; });
      }
    }
  }

  void write_metrics() {
    const size_t losses = o_.losses.size(), columns = static_cast<size_t>(o_.K);
    for (int64_t b = 0; b < a_.B; ++b) {
      for (size_t k = 0; k < columns; ++k) {
        const Response& r = response(b, static_cast<int>(k));
        table(losses + k)[b] = static_cast<T>(o_.beta * seen(r));
        table(losses + columns + k)[b] = static_cast<T>(r.value);
      }
      const double up = o_.beta * seen(response(b, o_.chosen)), down = o_.beta * seen(response(b, o_.rejected));
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
        if (a_.lengths == nullptr) {
          gradient[k * a_.B + b] = static_cast<T>(r.slope);
          continue;
        }
        const int64_t end = first + a_.lengths[b * o_.K + k];
        if (weights == nullptr) {
          std::fill(gradient + first, gradient + end, static_cast<T>(r.slope));
        } else {
          for (int64_t i = first; i < end; ++i) gradient[i] = static_cast<T>(r.slope * weights[i] / r.weight);
        }
        first = end;
      }
    }
  }

  const PreferenceLossOptions& o_;
  const PreferenceLossArgs& a_;
  std::vector<Response> responses_;
  std::vector<BranchStatistics> statistics_;
};

}  // namespace

const std::vector<std::string>& link_names() {
  static const std::vector<std::string> names{"minus_log_sigmoid", "hinge", "square", "sigmoid", "identity"};
  return names;
}

const std::vector<std::string>& value_names() {
  static const std::vector<std::string> names{"ratio", "mean_ratio", "logp", "mean_logp", "log_odds", "batch_ratio", "batch_logp"};
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
