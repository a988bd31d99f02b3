// The backward of attention_mass for one task, which holds all rows of a batch entry that share one key head.
//
// With dP the upstream gradient at a key, scores have the gradient P (dP - sum over keys of P dP). A first scan finds each row's total and that
// sum, a second one the gradients; queries' and keys' are matrix products of it.

#include "attention_mass/attention_mass_rows.inl"

namespace {

template <class T, class Products = VectorProducts<T>>
class Backward : Rows<T, Products> {
  using Base = Rows<T, Products>;
  using Base::a_, Base::M_, Base::task_, Base::products_, Base::shift_, Base::total_;
  using typename Base::Part, typename Base::V;

 public:
  explicit Backward(const AttentionMassTask& task)
      : Base(task),
        D_(products_.columns()),
        rows_(up_to(M_, kTileRows)),
        grad_(static_cast<const T*>(task.gradients->grad)) {}

  bool run() {
    return Base::with_workspace([this](Arena& arena) { lay_out(arena); }, [this] { compute(); });
  }

  const Products& products() const { return products_; }

 private:
  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    dot_ = arena.take<double>(M_);
    grad_p_ = arena.take<T>(kKeyBlock);
    query_rows_ = arena.take<Part>(rows_ * D_);
    key_rows_ = arena.take<Part>(kKeyBlock * D_);
    grad_scores_ = arena.take<Part>(rows_ * kKeyBlock);
    products_.lay_out_sums(arena, rows_);
    grad_query_ = arena.take<T>(rows_ * D_);
    grad_key_ = arena.take<T>(kKeyBlock * D_);
  }

  void compute() {
    Base::pack_query();
    Base::start_rows();
    memset(dot_, 0, M_ * sizeof(double));
    memset(query_rows_, 0, rows_ * D_ * sizeof(Part));
    memset(grad_query_, 0, rows_ * D_ * sizeof(T));
    for (int64_t m = 0; m < M_; ++m) products_.pack_row(a_.query, Base::query_offset(m), query_rows_ + m * D_);
    products_.finish_rows(rows_, query_rows_);
    Base::for_blocks([this](const KeyBlock<T>& block) {
      fill_shared_grad(block);
      Base::for_rows(block, [&](int64_t m, T* scores, T peak) { survey(block, m, scores, peak); });
    });
    for (int64_t m = 0; m < M_; ++m) dot_[m] /= total_[m];
    Base::for_blocks([this](const KeyBlock<T>& block) { differentiate(block); });
    T* grad_query = static_cast<T*>(task_.gradients->grad_query);
    for (int64_t m = 0; m < M_; ++m) write(grad_query_ + m * D_, grad_query + Base::flat_row(m) * a_.D);
  }

  // Each row's total and, relative to it, the sum of P dP.
  void survey(const KeyBlock<T>& block, int64_t m, T* scores, T peak) {
    if (a_.lse == nullptr) {
      if (peak == -T(INFINITY)) return;
      if (peak != peak) total_[m] = NAN;
      dot_[m] *= Base::raise_shift(m, peak);
    }
    const T sum = Base::exponentials(scores, shift_[m]);
    if (a_.lse == nullptr) total_[m] += sum;
    const T* grad = grad_of(block, m);
    V dots = {};
    for (int i = 0; i < kKeyBlock; i += kLanes<T>) dots += load(scores + i) * load(grad + i);
    dot_[m] += sum_of<T>(dots);
  }

  void differentiate(const KeyBlock<T>& block) {
    fill_shared_grad(block);
    memset(grad_scores_, 0, rows_ * kKeyBlock * sizeof(Part));
    const bool any = Base::for_rows(block, [&](int64_t m, T* scores, T) { differentiate_scores(block, m, scores); });
    if (!any) return;
    pack_key_rows(block);
    products_.add_keys(rows_, grad_scores_, key_rows_, grad_query_);
    products_.sum_queries(rows_, grad_scores_, query_rows_, grad_key_);
    T* grad_key = static_cast<T*>(task_.gradients->grad_key) + ((task_.batch * a_.Hkv + task_.key_head) * a_.S + block.first) * a_.D;
    for (int64_t j = 0; j < block.count; ++j) write(grad_key_ + j * D_, grad_key + j * a_.D);
  }

  // Row m of grad_scores_, all but the scale, which gradients get when they are written.
  void differentiate_scores(const KeyBlock<T>& block, int64_t m, const T* scores) {
    if (total_[m] == 0.0) return;
    const T *grad = grad_of(block, m), weight = static_cast<T>(1.0 / total_[m]), dot = static_cast<T>(dot_[m]);
    const T shift = shift_[m], inverse_cap = a_.softcap > 0 ? static_cast<T>(1.0 / a_.softcap) : 0;
    Part* to = grad_scores_ + m * kKeyBlock;
    for (int i = 0; i < kKeyBlock; i += kLanes<T>) {
      const V s = load(scores + i), p = exp_(s - shift) * weight, capped = s * inverse_cap;
      const V change = p * (load(grad + i) - dot) * (T(1) - capped * capped);
      // Scores of hidden keys are infinite.
      Products::put(to + i, p != 0 ? change : V{});
    }
  }

  // grad_p_ where all rows have the same upstream gradients of probabilities.
  void fill_shared_grad(const KeyBlock<T>& block) {
    const T weight = static_cast<T>(1.0 / task_.row_weight);
    for (int64_t j = 0; j < kKeyBlock; ++j) {
      grad_p_[j] = 0;
      if (j >= block.count) continue;
      if (a_.reduce == mmdpo::Reduce::tokens) grad_p_[j] = grad_[task_.batch * a_.S + block.first + j] * weight;
      if (a_.reduce == mmdpo::Reduce::mean && block.segment[j] >= 0) grad_p_[j] = grad_[task_.batch * a_.N + block.segment[j]] * weight;
    }
  }

  // -> (kKeyBlock) upstream gradients of row m's probabilities.
  const T* grad_of(const KeyBlock<T>& block, int64_t m) {
    if (a_.reduce != mmdpo::Reduce::none) return grad_p_;
    const T* grad = grad_ + Base::flat_row(m) * a_.N;
    if (block.one_segment) {
      const T shared = block.segment[0] >= 0 ? grad[block.segment[0]] : 0;
      for (int64_t j = 0; j < kKeyBlock; ++j) grad_p_[j] = shared;
    } else {
      for (int64_t j = 0; j < kKeyBlock; ++j) grad_p_[j] = block.segment[j] >= 0 ? grad[block.segment[j]] : 0;
    }
    return grad_p_;
  }

  // key_rows_: (kKeyBlock, D_), zero past the last key and past D, as the right factor of `add_keys`.
  void pack_key_rows(const KeyBlock<T>& block) {
    memset(key_rows_, 0, kKeyBlock * D_ * sizeof(Part));
    for (int64_t j = 0; j < block.count; ++j) products_.pack_row(a_.key, Base::key_offset(block.first + j), key_rows_ + j * D_);
    products_.finish_rows(kKeyBlock, key_rows_);
  }

  void write(const T* from, T* to) const {
    for (int64_t d = 0; d < a_.D; ++d) to[d] = from[d] * static_cast<T>(a_.scale);
  }

  const int64_t D_, rows_;  // D and M, padded to whole tiles
  const T* grad_;           // (B, Hq, R, N), (B, N) or (B, S)
  double* dot_;             // (M) sums over keys of P dP
  T* grad_p_;                                              // (kKeyBlock)
  Part *grad_scores_, *query_rows_, *key_rows_;            // (rows_, kKeyBlock); (rows_ or kKeyBlock, D_)
  T *grad_query_, *grad_key_;                              // (rows_ or kKeyBlock, D_)
};

}  // namespace
