// Argument checks and division of the work into tasks.
#include "logit_rows/logit_rows.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_level.h"
#include "logit_rows/logit_rows_task.h"
#include "common/parallel.h"

namespace mmdpo {
namespace {

using Run = void (*)(const LogitRowsTask&);

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("linear_logprobs: " + message);
}

void check(const LogitRowsArgs& a, const LogitTile& tile, int num_threads) {
  require(a.rows >= 0 && a.hidden_size >= 0 && tile.first >= 0 && tile.count >= 0, "sizes must not be negative");
  require(a.coefficient_rows >= 0 && a.coefficient_rows <= a.rows,
          "coefficient_rows must lie in [0, " + std::to_string(a.rows) + "], got " + std::to_string(a.coefficient_rows));
  require(tile.dtype == DType::float32 || tile.dtype == DType::bfloat16, "logits must be float32 or bfloat16");
  require(tile.stride >= tile.count,
          "stride must be at least " + std::to_string(tile.count) + ", got " + std::to_string(tile.stride));
  require(std::isfinite(a.softcap) && a.softcap >= 0, "softcap must be finite and not negative");
  require(std::isfinite(a.logit_scale), "logit_scale must be finite");
  require(std::isfinite(a.temperature) && a.temperature > 0, "temperature must be finite and positive");
  require(num_threads >= 1, "num_threads must be at least 1");
}

Run select_run() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::amx:
    case CpuLevel::avx512: return avx512::fold_logit_rows;
    case CpuLevel::avx2: return avx2::fold_logit_rows;
    default: break;
  }
#else
  cpu_level();  // refuses a level that this CPU does not have
#endif
  return generic::fold_logit_rows;
}

}  // namespace

void fold_logit_tile(const LogitRowsArgs& args, const LogitTile& tile, int num_threads) {
  check(args, tile, num_threads);
  const Run run = select_run();
  if (args.rows == 0 || tile.count == 0) return;
  // A thread must have enough to do to be worth starting: this many logits take about 100 microseconds.
  constexpr int64_t kLogitsPerThread = 1 << 17, kTasksPerThread = 4;
  const int threads = static_cast<int>(std::min<int64_t>(num_threads, 1 + args.rows * tile.count / kLogitsPerThread));
  const int64_t tasks = std::min<int64_t>(args.rows, threads == 1 ? 1 : threads * kTasksPerThread);
  parallel_for(tasks, threads, [&](int64_t task) {
    std::vector<float> row(tile.dtype == DType::float32 ? 0 : tile.count);
    run({&args, &tile, args.rows * task / tasks, args.rows * (task + 1) / tasks, row.data()});
  });
}

}  // namespace mmdpo
