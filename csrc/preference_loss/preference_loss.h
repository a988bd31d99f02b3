// preference_loss: from log-probabilities of tokens, or of whole responses, to losses, metrics and the gradient. On the CPU.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mmdpo {

// As LINKS and VALUES of mmdpo_kernels/backends/loss_options.py, which say what each is.
enum class Link : int { minus_log_sigmoid, hinge, square, sigmoid, identity };
enum class ValueKind : int { ratio, mean_ratio, logp, mean_logp, log_odds, batch_ratio, batch_logp };

struct TermValue {
  ValueKind kind;
  int branch;  // its column
  double coefficient;
};

// weight * link(scale * (sum of coefficient * value) + offset) of each record.
struct LossTerm {
  Link link;
  double weight, scale, offset;
  std::vector<TermValue> values;
};

// The sum of its terms, which counts in the whole with its weight.
struct WeightedLoss {
  double weight;
  std::vector<LossTerm> terms;
};

struct PreferenceLossOptions {
  std::vector<WeightedLoss> losses;
  bool batch_values;  // whether some term looks at the whole batch
  double beta;        // factor of the rewards
  bool length_normalised;
  int K;                 // branches there are
  int chosen, rejected;  // columns of the two that metrics compare
};

// B records of K responses; N elements of policy. All that is void is float64 or float32; arithmetic is in float64 either way.
struct PreferenceLossArgs {
  int64_t B, N;
  bool is_float64;
  const void* policy;      // (N) tokens, response after response and record by record; without lengths (K, B) sums
  const void* reference;   // as policy, or null = zeros
  bool reference_is_sums;  // (K, B), whatever policy is
  const int64_t* lengths;  // (B, K) tokens, or null
  const void* weights;     // (N), or null = sums; else a response's value is its weighted mean. Of both models
  const void* counts;      // (K, B) tokens of each response where lengths is null, or null = 1
  void* loss;              // (1)
  void* gradient;          // (N) d loss / d policy, or null = not wanted
  void* table;             // (losses + 2 K + 2, B): losses; K rewards; K values of policy; chosen reward above rejected; difference
};

// The names in the order of Link and of ValueKind.
const std::vector<std::string>& link_names();
const std::vector<std::string>& value_names();

// Writes every element of loss, gradient and table. Throws std::invalid_argument for lengths that do not sum to N, and for weights
// below 0 or all 0 in a response.
void preference_loss(const PreferenceLossOptions& options, const PreferenceLossArgs& args);

}  // namespace mmdpo
