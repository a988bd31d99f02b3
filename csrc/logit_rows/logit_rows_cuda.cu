// Rows of logits on the GPU: checks, division of rows among blocks, launches.
#include "logit_rows/logit_rows_cuda.h"

#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

#include "common/launch.cuh"
#include "logit_rows/logit_rows_kernels.cuh"

namespace mmdpo::cuda {
namespace {

constexpr const char* kName = "logit_rows";

void require_rows(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(std::string(kName) + ": " + message);
}

int64_t vectors_in(const LogitRowsArgs& a) { return a.vocabulary * (a.dtype == DType::float32 ? 4 : 2) / 16; }

int64_t slice_of(const LogitRowsArgs& a, int ranks) { return (vectors_in(a) + ranks - 1) / ranks; }

int64_t held_bytes(const LogitRowsArgs& a, int ranks) { return kSumsBytes<kHoldThreads> + slice_of(a, ranks) * 16; }

struct Division {
  int ranks;  // blocks a row
  bool held;  // in shared memory, for the gradient
};

Division divide(const LogitRowsArgs& a, const LogitRowsPlace& place) {
  constexpr int64_t kBlocksPerMultiprocessor = 8, kMinVectors = 1024;
  constexpr int kSystemBytes = 1024;  // of shared memory, that every block takes beside what it asks for
  const int max_ranks = place.capability >= 9 ? kMaxRanks : 1;
  // Several blocks a row where rows are few, so that every multiprocessor finds blocks, and not one more than its neighbour.
  int ranks = 1;
  while (ranks < max_ranks && a.rows * ranks < kBlocksPerMultiprocessor * place.multiprocessors && slice_of(a, 2 * ranks) >= kMinVectors) {
    ranks *= 2;
  }
  if (!a.gradient) return {ranks, false};
  // And so many that two blocks fit a multiprocessor: one loads while the other stores.
  int holding = ranks;
  while (holding < max_ranks && held_bytes(a, holding) + kSystemBytes > place.shared_bytes / 2) holding *= 2;
  const bool held = held_bytes(a, holding) + kSystemBytes <= place.shared_bytes;
  return {held ? holding : ranks, held};
}

LogitProblem make_problem(const LogitRowsArgs& a, int ranks) {
  constexpr double kLog2e = 1.4426950408889634;
  LogitProblem p{};
  p.a = a;
  p.ranks = ranks;
  p.slice = static_cast<int>(slice_of(a, ranks));
  p.moments = a.entropy != nullptr || a.mean_logit != nullptr;
  const bool capped = a.softcap > 0;
  const double slope = a.logit_scale / a.temperature;
  p.inner = capped ? static_cast<float>(a.logit_scale / a.softcap) : a.logit_scale < 0 ? -1.0f : 1.0f;
  p.score = capped ? a.softcap / a.temperature : std::abs(slope);
  // Never 0: a score of -inf, which is how the target is left out, stays that.
  p.factor = std::max(static_cast<float>(p.score * kLog2e), FLT_MIN);
  p.coefficient = static_cast<float>(a.coefficient_scale * slope);
  return p;
}

template <DType kDType, bool kCapped>
void launch_rows(const LogitRowsArgs& a, const LogitRowsPlace& place) {
  const Division division = divide(a, place);
  const LogitProblem p = make_problem(a, division.ranks);
  require_rows(a.rows * p.ranks <= INT_MAX, "too many rows");
  const auto start = [&](auto kernel, int threads, size_t shared_bytes) {
    const dim3 blocks(static_cast<unsigned>(a.rows * p.ranks));
    prefer_shared_memory(kName, kernel);
    launch_clusters(kName, kernel, p.ranks, blocks, dim3(threads), shared_bytes, place.stream, p);
  };
  if (!a.gradient) return start(fold_rows<kDType, kCapped>, kFoldThreads, kFoldBytes);
  if (!division.held) return start(reread_rows<kDType, kCapped>, kRereadThreads, kRereadBytes);
  start(hold_rows<kDType, kCapped>, kHoldThreads, held_bytes(a, p.ranks));
}

template <DType kDType>
void launch_rows_as(const LogitRowsArgs& a, const LogitRowsPlace& place) {
  a.softcap > 0 ? launch_rows<kDType, true>(a, place) : launch_rows<kDType, false>(a, place);
}

void check(const LogitRowsArgs& a, const LogitRowsPlace& place) {
  require_rows(a.rows >= 0 && a.vocabulary > 0, "there must be at least one logit a row");
  require_rows(a.vocabulary < INT_MAX / 2, "the vocabulary must be below 2^30");
  require_rows(a.row_stride >= a.vocabulary || a.rows <= 1, "rows of logits must not overlap");
  require_rows(std::isfinite(a.softcap) && a.softcap >= 0, "softcap must be positive, or 0 for none");
  require_rows(std::isfinite(a.logit_scale), "logit_scale must be finite");
  require_rows(std::isfinite(a.temperature) && a.temperature > 0, "temperature must be positive");
  require_rows(place.multiprocessors > 0 && place.shared_bytes > 0, "multiprocessors and shared_bytes must be positive");
}

}  // namespace

void logit_rows(const LogitRowsArgs& args, const LogitRowsPlace& place) {
  check(args, place);
  if (args.rows == 0) return;
  require_success(cudaSetDevice(place.device), kName);
  switch (args.dtype) {
    case DType::float32: return launch_rows_as<DType::float32>(args, place);
    case DType::bfloat16: return launch_rows_as<DType::bfloat16>(args, place);
    case DType::float16: return launch_rows_as<DType::float16>(args, place);
    case DType::float64: throw std::invalid_argument("logit_rows: it has no float64");
  }
}

}  // namespace mmdpo::cuda
