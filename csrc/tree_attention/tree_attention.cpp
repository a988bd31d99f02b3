// Argument checks and division of the work into tasks.
#include "tree_attention/tree_attention.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/cpu_level.h"
#include "common/parallel.h"
#include "tree_attention/tree_attention_task.h"

namespace mmdpo {
namespace {

using Run = bool (*)(const TreeAttentionTask&);

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("tree_attention: " + message);
}

void check(const TreeAttentionArgs& a) {
  require(a.B >= 0 && a.S >= 0 && a.Hq >= 0, "sizes must not be negative");
  require(a.D > 0, "head size must be positive, got " + std::to_string(a.D));
  require(a.Hkv > 0 && a.Hq % a.Hkv == 0, "query heads must be a multiple of key heads, got " + std::to_string(a.Hq) + " and " +
                                              std::to_string(a.Hkv));
  require(a.dtype != DType::float64, "dtype must be float32, bfloat16 or float16");
  require(std::isfinite(a.scale), "scale must be finite");
  require(a.num_threads >= 1, "num_threads must be at least 1");
}

// Where the keys end that rows [first, last) see.
int64_t last_key(const TreeAttentionArgs& a, int64_t batch, int64_t first, int64_t last) {
  if (a.reach == nullptr) return last;
  const int64_t farthest = *std::max_element(a.reach + batch * a.S + first, a.reach + batch * a.S + last);
  return std::clamp(farthest, last, a.S);
}

// A thread must have enough to do to be worth starting.
int useful_threads(const TreeAttentionArgs& a) {
  constexpr double kMultiplyAddsPerThread = 2e6;
  const double work = static_cast<double>(a.B) * a.Hq * a.S * a.S * a.D;
  return static_cast<int>(std::min<double>(a.num_threads, 1 + work / kMultiplyAddsPerThread));
}

void run_all(const std::vector<TreeAttentionTask>& tasks, int num_threads, Run run) {
  parallel_for(static_cast<int64_t>(tasks.size()), num_threads, [&](int64_t task) {
    if (!run(tasks[task])) throw std::bad_alloc();
  });
}

Run select_run(bool forward) {
  const char* reason = tree_attention_unavailable();
  if (reason != nullptr) throw std::invalid_argument(std::string("tree_attention: ") + reason);
  switch (cpu_level()) {
#if defined(__x86_64__)
#if defined(MMDPO_AMX)
    case CpuLevel::amx: return forward ? amx::tree_attention_forward : amx::tree_attention_backward;
#endif
    case CpuLevel::avx512: return forward ? avx512::tree_attention_forward : avx512::tree_attention_backward;
    case CpuLevel::avx2: return forward ? avx2::tree_attention_forward : avx2::tree_attention_backward;
#endif
    default: return forward ? emulated::tree_attention_forward : emulated::tree_attention_backward;
  }
}

}  // namespace

const char* tree_attention_unavailable() {
  return cpu_level() == CpuLevel::generic ? "it needs a CPU with AVX2 and FMA; PyTorch's own attention is faster without" : nullptr;
}

void tree_attention_forward(const TreeAttentionArgs& args) {
  check(args);
  const Run run = select_run(true);
  const int num_threads = useful_threads(args);
  const int64_t heads = std::max<int64_t>(args.B * args.Hkv, 1), blocks = (args.S + kTreeBlock - 1) / kTreeBlock;
  // Every task packs the keys that its last row may see, so few tasks a head are best, as long as every thread finds some.
  const int64_t splits = std::clamp<int64_t>((4 * num_threads + heads - 1) / heads, 1, std::max<int64_t>(blocks, 1));
  std::vector<TreeAttentionTask> tasks;
  // Later rows see more keys: the long tasks come first.
  for (int64_t split = splits - 1; split >= 0; --split) {
    const int64_t first = blocks * split / splits * kTreeBlock, last = std::min(blocks * (split + 1) / splits * kTreeBlock, args.S);
    for (int64_t b = 0; b < args.B && first < last; ++b) {
      const int64_t keys = last_key(args, b, first, last);
      for (int64_t h = 0; h < args.Hkv && args.Hq > 0; ++h) tasks.push_back({&args, b, h, first, last, keys});
    }
  }
  run_all(tasks, num_threads, run);
}

void tree_attention_backward(const TreeAttentionArgs& args) {
  check(args);
  const Run run = select_run(false);
  std::vector<TreeAttentionTask> tasks;
  for (int64_t b = 0; b < args.B && args.S > 0; ++b) {
    for (int64_t h = 0; h < args.Hkv && args.Hq > 0; ++h) tasks.push_back({&args, b, h, 0, args.S, args.S});
  }
  run_all(tasks, useful_threads(args), run);
}

}  // namespace mmdpo
