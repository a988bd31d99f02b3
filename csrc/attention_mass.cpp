// Argument checks, division of the work into tasks, and the final reduction.
#include "attention_mass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_mass_task.h"
#include "cpu_level.h"
#include "parallel.h"

namespace mmdpo {
namespace {

using Run = bool (*)(const AttentionMassTask&);

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("attention_mass: " + message);
}

// The message is made only for an error: this runs over every token of every call.
void check_range(const char* name, const int32_t* values, int64_t count, int64_t end) {
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < -1 || values[i] >= end) {
      throw std::invalid_argument(std::string("attention_mass: ") + name + " must lie in [-1, " + std::to_string(end) + "), got " +
                                  std::to_string(values[i]));
    }
  }
}

void check(const AttentionMassArgs& a) {
  require(a.B >= 0 && a.R >= 0 && a.S >= 0 && a.N >= 0 && a.Hq >= 0, "sizes must not be negative");
  require(a.D > 0, "head size must be positive, got " + std::to_string(a.D));
  require(a.Hkv > 0 && a.Hq % a.Hkv == 0, "query heads must be a multiple of key heads, got " + std::to_string(a.Hq) + " and " +
                                              std::to_string(a.Hkv));
  require(std::isfinite(a.scale), "scale must be finite");
  require(std::isfinite(a.softcap) && a.softcap >= 0, "softcap must be positive, or 0 for none");
  require(a.window >= 0, "window must be positive, or 0 for none");
  require(a.num_threads >= 1, "num_threads must be at least 1");
  check_range("segments", a.segments, a.B * a.S, a.N);
  check_range("row_positions", a.row_positions, a.B * a.R, a.S);
}

Run select_run(DType dtype) {
  if (dtype == DType::float64) return generic::run_float64;
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::avx512: return avx512::run_float32;
    case CpuLevel::avx2: return avx2::run_float32;
    default: break;
  }
#endif
  return generic::run_float32;
}

struct Plan {
  std::vector<std::vector<int32_t>> used_rows;  // (B)(used)
  std::vector<AttentionMassTask> tasks;
  std::vector<double> partials;  // (tasks, partial_size)
  int64_t partial_size;
  int num_threads;
};

Plan make_plan(const AttentionMassArgs& a) {
  Plan plan;
  plan.used_rows.resize(a.B);
  int64_t most_rows = 0, all_rows = 0;
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t r = 0; r < a.R; ++r) {
      if (a.row_positions[b * a.R + r] >= 0) plan.used_rows[b].push_back(static_cast<int32_t>(r));
    }
    const int64_t used = static_cast<int64_t>(plan.used_rows[b].size());
    most_rows = std::max(most_rows, used);
    all_rows += used;
  }
  // A thread must have enough to do to be worth starting.
  constexpr double kMultiplyAddsPerThread = 2e6;
  const double work = static_cast<double>(all_rows) * a.Hq * a.S * a.D;
  plan.num_threads = static_cast<int>(std::min<double>(a.num_threads, 1 + work / kMultiplyAddsPerThread));

  // Many rows share one packed key block, but their state should stay in the L2 cache and every thread should find tasks.
  constexpr int64_t kMinRows = 48, kMaxRows = 512;
  const int64_t group = a.Hq / a.Hkv;
  const int64_t splits = (4 * plan.num_threads + a.B * a.Hkv - 1) / std::max<int64_t>(a.B * a.Hkv, 1);
  const int64_t rows = std::clamp(most_rows * group / std::max<int64_t>(splits, 1), kMinRows, kMaxRows);
  const int64_t rows_per_task = std::max<int64_t>(rows / std::max<int64_t>(group, 1), 1);

  for (int64_t b = 0; b < a.B; ++b) {
    const std::vector<int32_t>& used = plan.used_rows[b];
    const int64_t num_used = static_cast<int64_t>(used.size());
    for (int64_t h = 0; h < a.Hkv && group > 0; ++h) {
      for (int64_t first = 0; first < num_used; first += rows_per_task) {
        plan.tasks.push_back({&a, b, h, used.data() + first, std::min(rows_per_task, num_used - first), nullptr});
      }
    }
  }
  plan.partial_size = a.reduce == Reduce::none ? 0 : a.reduce == Reduce::mean ? a.N : a.S;
  plan.partials.assign(plan.tasks.size() * plan.partial_size, 0.0);
  if (a.reduce != Reduce::none) {
    for (size_t t = 0; t < plan.tasks.size(); ++t) plan.tasks[t].partial = plan.partials.data() + t * plan.partial_size;
  }
  return plan;
}

// Sums tasks in their own order, so that the result does not depend on which thread ran what.
template <class T>
void reduce_partials(const AttentionMassArgs& a, const Plan& plan) {
  const int64_t size = plan.partial_size;
  std::vector<double> sums(a.B * size, 0.0);
  for (size_t t = 0; t < plan.tasks.size(); ++t) {
    double* sum = sums.data() + plan.tasks[t].batch * size;
    for (int64_t i = 0; i < size; ++i) sum[i] += plan.partials[t * size + i];
  }
  T* out = static_cast<T*>(a.out);
  for (int64_t b = 0; b < a.B; ++b) {
    const double weight = static_cast<double>(std::max<int64_t>(a.Hq * static_cast<int64_t>(plan.used_rows[b].size()), 1));
    for (int64_t i = 0; i < size; ++i) out[b * size + i] = static_cast<T>(sums[b * size + i] / weight);
  }
}

}  // namespace

void attention_mass(const AttentionMassArgs& args) {
  check(args);
  const bool wide = args.dtype == DType::float64;
  if (args.reduce == Reduce::none) std::memset(args.out, 0, args.B * args.Hq * args.R * args.N * (wide ? sizeof(double) : sizeof(float)));
  const Run run = select_run(args.dtype);
  const Plan plan = make_plan(args);
  parallel_for(static_cast<int64_t>(plan.tasks.size()), plan.num_threads, [&](int64_t task) {
    if (!run(plan.tasks[task])) throw std::bad_alloc();
  });
  if (args.reduce == Reduce::none) return;
  wide ? reduce_partials<double>(args, plan) : reduce_partials<float>(args, plan);
}

}  // namespace mmdpo
