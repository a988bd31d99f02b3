// Vectors of kVectorBytes, their exp, and workspace. Included once by each <kernel>_<level>.cpp, through the kernel.
//
// Nothing here may call an inline function of the standard library: a copy compiled for AVX-512 could be the one that the linker keeps for
// every caller, and an older CPU would die in it. Only C functions, and anonymous namespaces throughout.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

template <class T>
struct Lane;
template <>
struct Lane<float> {
  using Int = int32_t;
};
template <>
struct Lane<double> {
  using Int = int64_t;
};

template <class T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes), may_alias));
};
template <class T>
using Vec = typename Simd<T>::Vector;
template <class T>
using Int = typename Lane<T>::Int;

template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

template <class T>
Vec<T> load(const T* from) {
  return *reinterpret_cast<const Vec<T>*>(from);
}

template <class T>
void store(T* to, Vec<T> value) {
  *reinterpret_cast<Vec<T>*>(to) = value;
}

template <class T>
Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // adding zero would turn -0 into 0, and so cost an instruction
}

// All lanes in one, pairwise: the chain of dependent steps is short.
template <class T, class Combine>
T fold(Vec<T> value, const Combine& combine) {
  alignas(kVectorBytes) T lanes[kLanes<T>];
  store<T>(lanes, value);
#pragma GCC unroll 8
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) lanes[i] = combine(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

template <class T>
T sum_of(Vec<T> values) {
  return fold<T>(values, [](T a, T b) { return a + b; });
}

inline Vec<float> reinterpret_float(Vec<int32_t> bits) { return (Vec<float>)bits; }
inline Vec<int32_t> reinterpret_int(Vec<float> value) { return (Vec<int32_t>)value; }

// exp(x) within 1 unit in the last place, 0 below the smallest normal number. Polynomials below: minimax fits (Remez).
inline Vec<float> exp_(Vec<float> x) {
  constexpr float kMin = -87.33f, kMax = 88.37f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low mantissa bits
  const auto under = x < kMin;
  Vec<float> y = under ? broadcast(kMin) : x;
  y = y > kMax ? broadcast(kMax) : y;
  const Vec<float> shifted = y * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> p = r * 1.381314558e-3f + 8.369418841e-3f;
  p = p * r + 4.166845677e-2f;
  p = p * r + 1.666651479e-1f;
  p = p * r + 4.999999305e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec<int32_t> power = (reinterpret_int(shifted) - 0x4B400000 + 127) << 23;
  p = p * reinterpret_float(power);
  return under ? Vec<float>{} : p;
}

inline int64_t up_to(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Hands out 64-byte aligned arrays from one allocation; with no memory behind it, it measures.
struct Arena {
  char* memory;
  size_t used = 0;

  template <class U>
  U* take(int64_t count) {
    U* array = memory == nullptr ? nullptr : reinterpret_cast<U*>(memory + used);
    used += (static_cast<size_t>(count) * sizeof(U) + 63) / 64 * 64;
    return array;
  }
};

}  // namespace
