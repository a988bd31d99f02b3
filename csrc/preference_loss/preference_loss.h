// preference_loss: from log-probabilities of tokens, or of whole responses, to losses, metrics and the gradient. On the CPU.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mmdpo {

enum class PairLoss : int { sigmoid, hinge, ipo, cdpo, robust, simpo, orpo, bco_pair, kto_pair, nll, copo, ancpo };

enum Branch : int { chosen, rejected, corrupted, num_branches };

struct PreferenceLossOptions {
  std::vector<std::pair<PairLoss, double>> losses;  // with their weights
  double beta, label_smoothing, anchor, simpo_gamma, bco_shift;
  bool anchors[num_branches];  // what ancpo holds
  bool length_normalised;
  int K;                     // branches there are
  int columns[num_branches];  // where each is among the K, -1 = not there
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

// The names in the order of PairLoss.
const std::vector<std::string>& pair_loss_names();

// Writes every element of loss, gradient and table. Throws std::invalid_argument for lengths that do not sum to N, and for weights
// below 0 or all 0 in a response.
void preference_loss(const PreferenceLossOptions& options, const PreferenceLossArgs& args);

}  // namespace mmdpo
