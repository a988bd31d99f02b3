// The kernels over rows of logits. p.ranks consecutive blocks share a row; each takes a slice of its 16-byte vectors, and the first also the
// logits before and after them, which are there because a row may start and end anywhere.
//
// fold_rows reads the logits once and leaves them. For the gradient they are read again: from shared memory by hold_rows, which keeps the row
// there and so moves each logit in and out of the GPU's memory once; from wherever caches left them by reread_rows.
#pragma once

#include "logit_rows/logit_rows_sums.cuh"

namespace mmdpo::cuda {

// A block's share of a row.
template <DType kDType, bool kCapped, int kThreads>
class LogitRow {
 public:
  __device__ explicit LogitRow(const LogitProblem& problem)
      : p_(problem),
        row_(blockIdx.x / p_.ranks),
        rank_(blockIdx.x % p_.ranks),
        base_(static_cast<unsigned char*>(p_.a.logits) + row_ * p_.a.row_stride * kBytes),
        target_(p_.a.targets[row_]) {
    const int width = static_cast<int>(p_.a.vocabulary);
    const int before = static_cast<int>(-reinterpret_cast<uintptr_t>(base_) % 16) / kBytes;
    head_ = min(before, width);
    const int vectors = (width - head_) / kCount;
    tail_ = width - head_ - vectors * kCount;
    first_ = min(rank_ * p_.slice, vectors);
    last_ = min(first_ + p_.slice, vectors);
    place_ = target_ >= 0 && target_ < width ? static_cast<int>(target_) : -1;
    edge_ = -1;
    const int thread = threadIdx.x;
    if (rank_ == 0 && thread < head_ + tail_) edge_ = thread < head_ ? thread : width - tail_ + thread - head_;
  }

  __device__ bool ignored() const { return target_ == p_.a.ignore_index; }

  // What a row with an ignored target becomes.
  __device__ void write_zeros() {
    if (p_.a.gradient) {
      if (edge_ >= 0) store_logit<kDType>(base_, edge_, 0.0f);
      for (int v = first_ + threadIdx.x; v < last_; v += kThreads) *vector(v) = {0, 0, 0, 0};
    }
    if (!writes_results()) return;
    for (float* to : {p_.a.logps, p_.a.entropy, p_.a.max_logp, p_.a.is_top1, p_.a.mean_logit}) {
      if (to != nullptr) to[row_] = 0;
    }
  }

  // Called before anything is awaited or folded.
  __device__ void start() {
    if (p_.ranks > 1) cluster_arrive();
    own_ = place_ >= 0 ? score_of(load_logit<kDType>(base_, place_)) : NAN;
    edge_logit_ = edge_ >= 0 ? load_logit<kDType>(base_, edge_) : 0.0f;
    sums_ = RowSums::none();
  }

  // Copies this thread's vectors of the slice to shared memory, in kParts groups.
  __device__ void start_copies(unsigned char* held) const {
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      const int end = part_start(part + 1);
      for (int v = part_start(part) + threadIdx.x; v < end; v += kThreads) copy_async(held + (v - first_) * 16, vector(v), true);
      commit_copies();
    }
  }

  __device__ void fold_held(const unsigned char* held) {
    fold_edge();
#pragma unroll 1
    for (int part = 0; part < kParts; ++part) {
      wait_for_part(part);
      const int end = part_start(part + 1);
      for (int v = part_start(part) + threadIdx.x; v < end; v += kThreads) {
        fold_vector(*reinterpret_cast<const uint4*>(held + (v - first_) * 16), v);
      }
    }
  }

  template <int kStages>
  __device__ void fold_read(unsigned char* ring) {
    fold_edge();
    read_vectors<kStages>(ring, [this](const uint4& bits, int v) { fold_vector(bits, v); });
  }

  // Sums over the whole row. No thread reads another's logits after it, nor writes any before.
  __device__ void share(unsigned char* shared) {
    sums_ = row_sums<kThreads>(sums_, shared, p_);
    const float largest = fmaxf(sums_.largest, own_);
    likeliest_ = sums_.largest <= own_;
    if (largest > sums_.largest) sums_.raise(largest, p_.factor);
    base_score_ = sums_.base();
    own_weight_ = weight_of(own_);
    const float total = sums_.total + own_weight_;
    per_weight_ = -p_.coefficient / total;
    // 1 - p(target), from what is not the target.
    own_coefficient_ = p_.coefficient * (sums_.total / total) * slope(own_);
  }

  __device__ void write_held(const unsigned char* held) {
    write_edge();
    for (int v = first_ + threadIdx.x; v < last_; v += kThreads) {
      *vector(v) = coefficients(*reinterpret_cast<const uint4*>(held + (v - first_) * 16), v);
    }
  }

  template <int kStages>
  __device__ void write_reread(unsigned char* ring) {
    write_edge();
    read_vectors<kStages>(ring, [this](const uint4& bits, int v) { *vector(v) = coefficients(bits, v); });
  }

  // In double, by one thread a row: nobody waits for it.
  __device__ void write_results() const {
    if (!writes_results()) return;
    constexpr double kLn2 = 0.6931471805599453;
    const double others = sums_.total, own = own_weight_, total = others + own, below = static_cast<double>(own_) - base_score_;
    // Near p(target) = 1 the logarithm of the total would lose what the others add to it.
    const double logp = others < own ? -log1p(others / own) : p_.score * below - log(total);
    p_.a.logps[row_] = static_cast<float>(logp);
    if (p_.a.max_logp != nullptr) p_.a.max_logp[row_] = static_cast<float>(likeliest_ ? logp : -log(total));
    if (p_.a.is_top1 != nullptr) p_.a.is_top1[row_] = likeliest_ ? 1.0f : 0.0f;
    if (p_.a.mean_logit != nullptr) p_.a.mean_logit[row_] = static_cast<float>(sums_.scores * p_.score / p_.a.vocabulary);
    if (p_.a.entropy != nullptr) {
      const double exponent = own > 0 ? p_.factor * below : 0.0, weighted = sums_.weighted;
      const double entropy = others < own ? log1p(others / own) + kLn2 * (exponent * others - weighted) / total
                                          : log(total) - kLn2 * (weighted + own * exponent) / total;
      p_.a.entropy[row_] = static_cast<float>(entropy);
    }
  }

 private:
  static constexpr int kBytes = kLogitBytes<kDType>, kCount = kVectorLogits<kDType>, kParts = 4;

  __device__ bool writes_results() const { return rank_ == 0 && threadIdx.x == 0; }

  __device__ uint4* vector(int v) const { return reinterpret_cast<uint4*>(base_ + head_ * kBytes) + v; }
  __device__ int logit_index(int v) const { return head_ + v * kCount; }

  // This thread's vectors, which pass through its places in a ring of rounds in shared memory: kStages - 1 of them are on their way.
  template <int kStages, class Use>
  __device__ void read_vectors(unsigned char* ring, Use use) const {
    const auto place = [ring](int round) { return ring + (round % kStages * kThreads + threadIdx.x) * 16; };
    const auto start_copy = [&](int round) {
      const int v = first_ + round * kThreads + threadIdx.x;
      if (v < last_) copy_async(place(round), vector(v), true);
      commit_copies();
    };
#pragma unroll
    for (int round = 0; round < kStages - 1; ++round) start_copy(round);
    int round = 0;
    for (int v = first_ + threadIdx.x; v < last_; v += kThreads, ++round) {
      wait_for_copies<kStages - 2>();
      const uint4 bits = *reinterpret_cast<const uint4*>(place(round));
      start_copy(round + kStages - 1);
      use(bits, v);
    }
  }

  // Parts are rounds of all threads: what a thread reads is what it copied.
  __device__ int part_start(int part) const {
    const int rounds = (p_.slice + kThreads - 1) / kThreads;
    return min(first_ + rounds * part / kParts * kThreads, last_);
  }

  __device__ static void wait_for_part(int part) {
    static_assert(kParts == 4);
    switch (part) {
      case 0: return wait_for_copies<3>();
      case 1: return wait_for_copies<2>();
      case 2: return wait_for_copies<1>();
      default: return wait_for_copies<0>();
    }
  }

  __device__ float score_of(float logit) const {
    const float t = logit * p_.inner;
    return kCapped ? tanhf(t) : t;
  }

  // dt/dlogit / inner.
  __device__ static float slope(float t) { return kCapped ? fmaf(-t, t, 1.0f) : 1.0f; }

  __device__ void scores_of(const uint4& bits, float (&t)[kCount]) const {
    unpack<kDType>(bits, t);
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = score_of(t[i]);
  }

  __device__ void fold_vector(const uint4& bits, int v) {
    float t[kCount];
    scores_of(bits, t);
    absorb(sums_, t, place_ - logit_index(v), p_.factor, p_.moments);
  }

  __device__ void fold_edge() {
    if (edge_ < 0) return;
    float t[1] = {score_of(edge_logit_)};
    absorb(sums_, t, place_ - edge_, p_.factor, p_.moments);
  }

  __device__ float weight_of(float t) const { return exp2_fast(p_.factor * (t - base_score_)); }

  __device__ float coefficient(float t) const { return weight_of(t) * per_weight_ * slope(t); }

  __device__ uint4 coefficients(const uint4& bits, int v) const {
    float t[kCount];
    scores_of(bits, t);
#pragma unroll
    for (int i = 0; i < kCount; ++i) t[i] = coefficient(t[i]);
    const int target = place_ - logit_index(v);
    if (static_cast<unsigned>(target) < static_cast<unsigned>(kCount)) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) t[i] = i == target ? own_coefficient_ : t[i];
    }
    return pack<kDType>(t);
  }

  __device__ void write_edge() const {
    if (edge_ < 0) return;
    store_logit<kDType>(base_, edge_, edge_ == place_ ? own_coefficient_ : coefficient(score_of(edge_logit_)));
  }

  const LogitProblem& p_;
  const int64_t row_;
  const int rank_;
  unsigned char* const base_;
  const int64_t target_;
  int head_, tail_;   // logits before the first whole vector and after the last
  int first_, last_;  // of this block's vectors
  int place_;         // of the target in the row, -1 where it is out of range
  int edge_;          // this thread's logit of the head or tail, -1 = none
  float own_, edge_logit_;  // own: the target's score
  RowSums sums_;
  float base_score_, own_weight_, per_weight_, own_coefficient_;  // weights: 2^(factor (t - base score))
  bool likeliest_;                                                // no score is above the target's
};

// Four blocks of 28 KiB on their way are more than a multiprocessor needs to keep memory busy.
constexpr int kFoldThreads = 256, kFoldStages = 8;
constexpr int kFoldBytes = kSumsBytes<kFoldThreads> + kFoldStages * kFoldThreads * 16;

template <DType kDType, bool kCapped>
__global__ void __launch_bounds__(kFoldThreads, 4) fold_rows(const LogitProblem problem) {
  unsigned char* shared = shared_memory();
  LogitRow<kDType, kCapped, kFoldThreads> row(problem);
  if (row.ignored()) return row.write_zeros();
  row.start();
  row.template fold_read<kFoldStages>(shared + kSumsBytes<kFoldThreads>);
  row.share(shared);
  row.write_results();
}

// Three blocks to a multiprocessor where slices are below 75 KiB: some load while others store.
constexpr int kHoldThreads = 384;

template <DType kDType, bool kCapped>
__global__ void __launch_bounds__(kHoldThreads, 3) hold_rows(const LogitProblem problem) {
  unsigned char* shared = shared_memory();
  unsigned char* held = shared + kSumsBytes<kHoldThreads>;
  LogitRow<kDType, kCapped, kHoldThreads> row(problem);
  if (row.ignored()) return row.write_zeros();
  row.start_copies(held);
  row.start();
  row.fold_held(held);
  row.share(shared);
  row.write_held(held);
  row.write_results();
}

// One block to a multiprocessor: the rows that are under way should fit the second-level cache.
constexpr int kRereadThreads = 1024, kRereadStages = 4;
constexpr int kRereadBytes = kSumsBytes<kRereadThreads> + kRereadStages * kRereadThreads * 16;

template <DType kDType, bool kCapped>
__global__ void __launch_bounds__(kRereadThreads, 1) reread_rows(const LogitProblem problem) {
  unsigned char* shared = shared_memory();
  unsigned char* ring = shared + kSumsBytes<kRereadThreads>;
  LogitRow<kDType, kCapped, kRereadThreads> row(problem);
  if (row.ignored()) return row.write_zeros();
  row.start();
  row.template fold_read<kRereadStages>(ring);
  row.share(shared);
  row.template write_reread<kRereadStages>(ring);
  row.write_results();
}

}  // namespace mmdpo::cuda
