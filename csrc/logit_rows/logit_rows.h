// Rows of logits, folded tile by tile of the vocabulary into what log-probabilities, statistics and gradients need; on the CPU.
//
// With x = (logit + bias) * logit_scale, the softmax is over s = softcap * tanh(x / softcap) / temperature.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace mmdpo {

// What a row knows of the tiles folded so far. Exponentials are of s - peak.
enum LogitState : int {
  kPeak,       // largest s, the target's included
  kOthers,     // sum of exponentials, without the target's: 1 - p(target) comes from it without cancellation
  kTarget,     // s of the target
  kDeviation,  // sum of exponential times s - peak, without the target's; where `entropy`
  kSum,        // sum of s
  kLogitStates
};

struct LogitRowsArgs {
  int64_t rows;
  int64_t coefficient_rows;  // the first rows: those that get a gradient
  const int64_t* targets;    // (rows)
  int64_t ignore_index;      // rows with this target are skipped, their coefficients 0
  const float* bias;         // (V), or null
  double softcap;            // 0 = none
  double logit_scale, temperature;
  double coefficient_scale;
  bool entropy;
  double* state;       // (kLogitStates, rows); before the first tile peak is -inf, the rest 0
  float* accumulator;  // (coefficient_rows, hidden_size), dense: sums of coefficient times row of the head, relative to the peak
  int64_t hidden_size;
};

struct LogitTile {
  void* logits;          // rows of `count`
  DType dtype;           // float32, or bfloat16, which a CPU's matrix units may write
  int64_t stride;        // elements from row to row
  int64_t first, count;  // vocabulary entries [first, first + count)
};

// Folds a tile, in float32 whatever its dtype. Its logits are overwritten: in the coefficient rows by coefficient_scale * exp(s - peak) * (1 - tanh^2(x / softcap)),
// with the peak as this call leaves it, and by 0 for the target; elsewhere by nothing of use. Results do not depend on the number of
// threads. Throws std::invalid_argument that names the argument.
void fold_logit_tile(const LogitRowsArgs& args, const LogitTile& tile, int num_threads);

}  // namespace mmdpo
