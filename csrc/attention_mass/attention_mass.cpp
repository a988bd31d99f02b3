// Argument checks, division of the work into tasks, and the final reduction.
#include "attention_mass/attention_mass.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_mass/attention_mass_checks.h"
#include "attention_mass/attention_mass_task.h"
#include "common/cpu_level.h"
#include "common/parallel.h"

namespace mmdpo {
namespace {

using Run = bool (*)(const AttentionMassTask&);

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
  check_sizes(a);
  require(a.num_threads >= 1, "num_threads must be at least 1");
  check_range("segments", a.segments, a.B * a.S, a.N);
  check_range("row_positions", a.row_positions, a.B * a.R, a.S);
}

struct Runs {
  Run forward, backward;
};

Runs select_runs(DType dtype) {
  if (dtype == DType::float64) return {generic::forward_float64, generic::backward_float64};
  const bool bfloat16 = dtype == DType::bfloat16;
  switch (cpu_level()) {
    case CpuLevel::amx_emulated:
      if (bfloat16) return {emulated::forward_bfloat16, emulated::backward_bfloat16};
      return {generic::forward_float32, generic::backward_float32};
#if defined(__x86_64__)
#if defined(MMDPO_AMX)
    case CpuLevel::amx:
      if (bfloat16) return {amx::forward_bfloat16, amx::backward_bfloat16};
      return {avx512::forward_float32, avx512::backward_float32};
#endif
    case CpuLevel::avx512: return {avx512::forward_float32, avx512::backward_float32};
    case CpuLevel::avx2: return {avx2::forward_float32, avx2::backward_float32};
#endif
    default: return {generic::forward_float32, generic::backward_float32};
  }
}

struct UsedRows {
  std::vector<std::vector<int32_t>> of;  // (B)(used) indices into R
  int64_t most = 0, all = 0;

  int64_t count(int64_t batch) const { return static_cast<int64_t>(of[batch].size()); }
};

UsedRows find_used_rows(const AttentionMassArgs& a) {
  UsedRows used;
  used.of.resize(a.B);
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t r = 0; r < a.R; ++r) {
      if (a.row_positions[b * a.R + r] >= 0) used.of[b].push_back(static_cast<int32_t>(r));
    }
    used.most = std::max(used.most, used.count(b));
    used.all += used.count(b);
  }
  return used;
}

double row_weight(const AttentionMassArgs& a, const UsedRows& used, int64_t batch) {
  return static_cast<double>(std::max<int64_t>(a.Hq * used.count(batch), 1));
}

// A thread must have enough to do to be worth starting.
int useful_threads(const AttentionMassArgs& a, const UsedRows& used) {
  constexpr double kMultiplyAddsPerThread = 2e6;
  const double work = static_cast<double>(used.all) * a.Hq * a.S * a.D;
  return static_cast<int>(std::min<double>(a.num_threads, 1 + work / kMultiplyAddsPerThread));
}

struct Plan {
  UsedRows used;
  std::vector<AttentionMassTask> tasks;
  std::vector<double> partials;  // (tasks, partial_size)
  int64_t partial_size;
  int num_threads;
};

Plan make_plan(const AttentionMassArgs& a) {
  Plan plan;
  plan.used = find_used_rows(a);
  plan.num_threads = useful_threads(a, plan.used);

  // Many rows share one packed key block, but their state should stay in the L2 cache and every thread should find tasks.
  constexpr int64_t kMinRows = 48, kMaxRows = 512;
  const int64_t group = a.Hq / a.Hkv;
  const int64_t splits = (4 * plan.num_threads + a.B * a.Hkv - 1) / std::max<int64_t>(a.B * a.Hkv, 1);
  const int64_t rows = std::clamp(plan.used.most * group / std::max<int64_t>(splits, 1), kMinRows, kMaxRows);
  const int64_t rows_per_task = std::max<int64_t>(rows / std::max<int64_t>(group, 1), 1);

  for (int64_t b = 0; b < a.B; ++b) {
    const int32_t* used = plan.used.of[b].data();
    const int64_t num_used = plan.used.count(b);
    for (int64_t h = 0; h < a.Hkv && group > 0; ++h) {
      for (int64_t first = 0; first < num_used; first += rows_per_task) {
        plan.tasks.push_back({&a, b, h, used + first, std::min(rows_per_task, num_used - first), nullptr, nullptr, 0});
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

void run_all(const std::vector<AttentionMassTask>& tasks, int num_threads, Run run) {
  parallel_for(static_cast<int64_t>(tasks.size()), num_threads, [&](int64_t task) {
    if (!run(tasks[task])) throw std::bad_alloc();
  });
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
    const double weight = row_weight(a, plan.used, b);
    for (int64_t i = 0; i < size; ++i) out[b * size + i] = static_cast<T>(sums[b * size + i] / weight);
  }
}

}  // namespace

void attention_mass(const AttentionMassArgs& args) {
  check(args);
  const bool wide = args.dtype == DType::float64;
  if (args.reduce == Reduce::none) std::memset(args.out, 0, args.B * args.Hq * args.R * args.N * (wide ? sizeof(double) : sizeof(float)));
  const Run run = select_runs(args.dtype).forward;
  const Plan plan = make_plan(args);
  run_all(plan.tasks, plan.num_threads, run);
  if (args.reduce == Reduce::none) return;
  wide ? reduce_partials<double>(args, plan) : reduce_partials<float>(args, plan);
}

void attention_mass_backward(const AttentionMassArgs& args, const AttentionMassGradients& gradients) {
  check(args);
  const size_t element = args.dtype == DType::float64 ? sizeof(double) : sizeof(float);
  std::memset(gradients.grad_query, 0, args.B * args.Hq * args.R * args.D * element);
  std::memset(gradients.grad_key, 0, args.B * args.Hkv * args.S * args.D * element);
  const Run run = select_runs(args.dtype).backward;
  const UsedRows used = find_used_rows(args);
  std::vector<AttentionMassTask> tasks;
  for (int64_t b = 0; b < args.B && args.Hq > 0; ++b) {
    if (used.count(b) == 0) continue;
    for (int64_t h = 0; h < args.Hkv; ++h) {
      tasks.push_back({&args, b, h, used.of[b].data(), used.count(b), nullptr, &gradients, row_weight(args, used, b)});
    }
  }
  run_all(tasks, useful_threads(args, used), run);
}

}  // namespace mmdpo
