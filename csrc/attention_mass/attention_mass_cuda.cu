// attention_mass on the GPU: checks, division of the work, launches. At most three: a scan (of totals, where they are needed before
// columns), a scan of what is asked for, and the sums over blocks.
#include "attention_mass/attention_mass_cuda.h"

#include <algorithm>
#include <climits>
#include <cmath>

#include "attention_mass/attention_mass_checks.h"
#include "attention_mass/attention_mass_finish.cuh"
#include "attention_mass/attention_mass_scan.cuh"
#include "common/launch.cuh"

namespace mmdpo::cuda {
namespace {

int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

// With `base` null it only measures.
struct Workspace {
  unsigned char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    T* array = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += divide_up(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return array;
  }
};

bool wants_columns(const AttentionMassArgs& a) { return a.reduce == Reduce::tokens; }

int64_t slices_of(const Problem& p) { return divide_up(p.a.Hkv * p.rows, kThreads); }

Problem make_problem(const AttentionMassArgs& args, int multiprocessors, Workspace& workspace) {
  Problem p{};
  p.a = args;
  if (wants_columns(args)) p.a.N = 0;  // segments play no part in it
  p.group = static_cast<int>(args.Hq / args.Hkv);
  p.rows = static_cast<int>(args.R * p.group);
  p.row_tiles = static_cast<int>(divide_up(p.rows, kTileRows));
  p.tile_keys = args.dtype == DType::float32 ? kTileKeys<DType::float32> : kTileKeys<DType::bfloat16>;
  // Short chunks where there are few rows, so that every multiprocessor finds blocks; what blocks set up is shared by the tiles of long ones.
  constexpr int64_t kBlocksPerMultiprocessor = 3, kMaxChunkKeys = 512;
  const int64_t tiles = divide_up(args.S, p.tile_keys);
  const int64_t blocks = std::max<int64_t>(args.B * args.Hkv * p.row_tiles, 1);
  p.chunk_tiles =
      static_cast<int>(std::clamp<int64_t>(tiles * blocks / (kBlocksPerMultiprocessor * multiprocessors), 1, kMaxChunkKeys / p.tile_keys));
  p.chunks = static_cast<int>(divide_up(tiles, p.chunk_tiles));
  const double log2e = 1.4426950408889634, factor = (args.softcap > 0 ? args.softcap : args.scale) * log2e;
  p.factor = static_cast<float>(factor);
  p.factor_rest = static_cast<float>(factor - p.factor);
  p.inner_scale = args.softcap > 0 ? static_cast<float>(args.scale / args.softcap) : 0.0f;
  const bool totals = args.lse == nullptr || !wants_columns(args);
  p.partials = workspace.take<float>(totals ? p.chunks * p.all_rows() * (p.a.N + 2) : 0);
  p.columns = workspace.take<float>(wants_columns(args) ? args.B * args.Hkv * p.row_tiles * args.S : 0);
  p.slices = workspace.take<double>(args.reduce == Reduce::mean ? args.B * slices_of(p) * args.N : 0);
  p.counters = workspace.take<int>(args.B);
  return p;
}

template <DType kDType>
void scan_as(const Problem& p, Pass pass, void* stream) {
  const ScanLayout layout(kElementBytes<kDType>, kTileKeys<kDType>, p.chunk_tiles, static_cast<int>(p.a.D), static_cast<int>(p.a.N));
  const int64_t blocks = p.a.B * p.a.Hkv * p.chunks * p.row_tiles;
  launch("attention_mass", scan_keys<kDType>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), layout.bytes, stream, p, pass);
}

void scan(const Problem& p, Pass pass, void* stream) {
  switch (p.a.dtype) {
    case DType::float32: return scan_as<DType::float32>(p, pass, stream);
    case DType::bfloat16: return scan_as<DType::bfloat16>(p, pass, stream);
    case DType::float16: return scan_as<DType::float16>(p, pass, stream);
    case DType::float64: break;
  }
}

void check(const AttentionMassArgs& a, const Place& place) {
  check_sizes(a);
  const std::string reason = attention_mass_unserved(a.dtype, a.D, a.reduce == Reduce::tokens ? 0 : a.N);
  require(reason.empty(), reason);
  const int64_t unit = 16 / (a.dtype == DType::float32 ? 4 : 2);
  for (int i = 0; i < 3; ++i) {
    require(a.query_strides[i] % unit == 0, "query strides must be multiples of 16 bytes");
    require(a.key_strides[i] % unit == 0, "key strides must be multiples of 16 bytes");
  }
  require(reinterpret_cast<uintptr_t>(a.query) % 16 == 0, "query must be aligned to 16 bytes");
  require(reinterpret_cast<uintptr_t>(a.key) % 16 == 0, "key must be aligned to 16 bytes");
  require(a.S < INT_MAX - kTileRows, "keys must be fewer than 2^31");
  require(a.R * (a.Hq / a.Hkv) < INT_MAX - kTileRows, "rows of a head group must be fewer than 2^31");
  require(a.B <= 65535, "batch must be at most 65535");
  require(place.multiprocessors > 0, "multiprocessors must be positive");
}

}  // namespace

std::string attention_mass_unserved(DType dtype, int64_t D, int64_t N) {
  if (dtype == DType::float64) return "on CUDA it has no float64";
  if (D % 8 != 0 || D > kMaxHeadSize) {
    return "on CUDA the head size must be a multiple of 8 up to " + std::to_string(kMaxHeadSize) + ", got " + std::to_string(D);
  }
  if (N > kMaxSegments) return "on CUDA it takes at most " + std::to_string(kMaxSegments) + " segments, got " + std::to_string(N);
  return "";
}

int64_t attention_mass_workspace_bytes(const AttentionMassArgs& args, int multiprocessors) {
  check_sizes(args);
  Workspace measure{nullptr};
  make_problem(args, multiprocessors, measure);
  return measure.used;
}

void attention_mass(const AttentionMassArgs& args, const Place& place) {
  check(args, place);
  const int64_t out_size = args.B * (args.reduce == Reduce::none ? args.Hq * args.R * args.N : wants_columns(args) ? args.S : args.N);
  if (out_size == 0) return;
  require_success(cudaSetDevice(place.device), "attention_mass");
  Workspace workspace{static_cast<unsigned char*>(place.workspace)};
  const Problem p = make_problem(args, place.multiprocessors, workspace);
  if (p.rows == 0 || p.chunks == 0) {
    require_success(cudaMemsetAsync(args.out, 0, out_size * sizeof(float), static_cast<cudaStream_t>(place.stream)), "attention_mass");
    return;
  }
  require(args.B * args.Hkv * p.chunks * p.row_tiles <= INT_MAX, "too many blocks of work");
  const dim3 threads(kThreads);
  const unsigned batch = static_cast<unsigned>(args.B);
  if (wants_columns(args)) {
    if (args.lse == nullptr) scan(p, Pass::totals, place.stream);
    scan(p, Pass::columns, place.stream);
    const dim3 blocks(static_cast<unsigned>(divide_up(args.S, kThreads)), batch);
    launch("attention_mass", finish_columns, blocks, threads, kWarps * sizeof(int), place.stream, p);
  } else {
    scan(p, Pass::masses, place.stream);
    const size_t shared = kWarps * args.N * sizeof(double) + (kWarps + 1) * sizeof(int);
    launch("attention_mass", finish_masses, dim3(static_cast<unsigned>(slices_of(p)), batch), threads, shared, place.stream, p);
  }
}

std::string unavailable(int device) {
  cudaFuncAttributes attributes{};
  cudaError_t error = cudaSetDevice(device);
  // The device's own error where it has no code of ours: the kernel is looked up.
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(finish_columns));
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace mmdpo::cuda
