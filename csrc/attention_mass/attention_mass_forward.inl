// The forward of attention_mass for one task.

#include "attention_mass/attention_mass_rows.inl"

namespace {

// online: running maximum and total; fixed: probabilities are exp(score - shift) / total with both known.
enum class Pass { online_total, online_mass, fixed_mass, fixed_columns };

template <class T, class Products = VectorProducts<T>>
class Forward : Rows<T, Products> {
  using Base = Rows<T, Products>;
  using Base::a_, Base::M_, Base::task_, Base::shift_, Base::total_;
  using typename Base::V;

 public:
  explicit Forward(const AttentionMassTask& task) : Base(task) {}

  bool run() {
    return Base::with_workspace([this](Arena& arena) { lay_out(arena); }, [this] { compute(); });
  }

  const Products& products() const { return Base::products_; }

 private:
  void lay_out(Arena& arena) {
    Base::lay_out(arena);
    mass_ = arena.take<double>(M_ * a_.N);
    column_sums_ = arena.take<T>(kKeyBlock);
  }

  void compute() {
    Base::pack_query();
    Base::start_rows();
    memset(mass_, 0, M_ * a_.N * sizeof(double));
    const bool known = a_.lse != nullptr;
    if (a_.reduce == mmdpo::Reduce::tokens) {
      if (!known) scan(Pass::online_total);
      scan(Pass::fixed_columns);
    } else {
      scan(known ? Pass::fixed_mass : Pass::online_mass);
      write_mass();
    }
  }

  void scan(Pass pass) {
    Base::for_blocks([&](const KeyBlock<T>& block) {
      if (pass == Pass::fixed_mass && !block.any_segment) return;
      memset(column_sums_, 0, kKeyBlock * sizeof(T));
      const bool any = Base::for_rows(block, [&](int64_t m, T* scores, T peak) { absorb(block, m, scores, peak, pass); });
      if (any && pass == Pass::fixed_columns) {
        for (int64_t j = 0; j < block.count; ++j) task_.partial[block.first + j] += column_sums_[j];
      }
    });
  }

  // Adds row m's probabilities on one block of keys. scores: (kKeyBlock), exponentials afterwards.
  void absorb(const KeyBlock<T>& block, int64_t m, T* scores, T peak, Pass pass) {
    if (pass == Pass::online_total || pass == Pass::online_mass) {
      if (peak == -T(INFINITY)) return;
      if (peak != peak) return spoil(m);
      const double factor = Base::raise_shift(m, peak);
      for (int64_t n = 0; factor != 1.0 && n < a_.N; ++n) mass_[m * a_.N + n] *= factor;
    } else if (total_[m] == 0.0) {
      return;  // the first pass found no visible key
    }
    const T sum = Base::exponentials(scores, shift_[m]);
    switch (pass) {
      case Pass::online_total: total_[m] += sum; break;
      case Pass::online_mass: total_[m] += sum; [[fallthrough]];
      case Pass::fixed_mass: add_mass(block, m, scores, sum); break;
      case Pass::fixed_columns: add_columns(scores, static_cast<T>(1.0 / total_[m])); break;
    }
  }

  // A visible score is NaN: so is everything about the row.
  void spoil(int64_t m) {
    total_[m] = NAN;
    for (int64_t n = 0; n < a_.N; ++n) mass_[m * a_.N + n] = NAN;
  }

  void add_mass(const KeyBlock<T>& block, int64_t m, const T* p, T sum) {
    if (!block.any_segment) return;
    double* mass = mass_ + m * a_.N;
    if (block.one_segment) {
      mass[block.segment[0]] += sum;
      return;
    }
    for (int64_t j = 0; j < block.count; ++j) {
      if (block.segment[j] >= 0) mass[block.segment[j]] += p[j];
    }
  }

  void add_columns(const T* p, T weight) {
    for (int i = 0; i < kKeyBlock; i += kLanes<T>) {
      store<T>(column_sums_ + i, load(column_sums_ + i) + load(p + i) * weight);
    }
  }

  void write_mass() {
    for (int64_t m = 0; m < M_; ++m) {
      const double weight = total_[m] != 0.0 ? 1.0 / total_[m] : 0.0;
      for (int64_t n = 0; n < a_.N; ++n) {
        const double mass = mass_[m * a_.N + n] * weight;
        if (task_.partial != nullptr) {
          task_.partial[n] += mass;
        } else {
          static_cast<T*>(a_.out)[Base::flat_row(m) * a_.N + n] = static_cast<T>(mass);
        }
      }
    }
  }

  double* mass_;    // (M, N), unnormalised
  T* column_sums_;  // (kKeyBlock)
};

}  // namespace
