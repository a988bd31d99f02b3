// tanh of vectors of floats, for kernels with a softcap. Included once by each <kernel>_<level>.cpp, after simd.inl, which see.

namespace {

inline Vec<float> tanh_(Vec<float> x) {
  constexpr float kSmall = 0.625f;
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> square = x * x;
  Vec<float> p = square * 2.059581545e-3f + -8.085627258e-3f;
  p = p * square + 2.166340342e-2f;
  p = p * square + -5.393994261e-2f;
  p = p * square + 1.333315218e-1f;
  p = p * square + -3.333332944e-1f;
  const Vec<float> small = x + x * square * p;
  const Vec<float> large = 1.0f - 2.0f / (exp_(size + size) + 1.0f);
  return size < kSmall ? small : (x < 0.0f ? -large : large);
}

}  // namespace
