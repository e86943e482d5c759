// One vector of the level being compiled, and the few functions of it that the kernels need.
// GNU vector extensions, so that the same lines serve SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#define SSMOE_BYTES 64
#elif defined(__AVX2__)
#define SSMOE_BYTES 32
#else
#define SSMOE_BYTES 16
#endif

#define SSMOE_INLINE inline __attribute__((always_inline))

namespace {

struct bfloat16 {
  uint16_t bits;
};

template <class S>
struct Accumulator {
  using type = S;
};
template <>
struct Accumulator<bfloat16> {
  using type = float;
};

template <class T>
struct Lane;
template <>
struct Lane<float> {
  typedef float V __attribute__((vector_size(SSMOE_BYTES)));
  typedef int32_t I __attribute__((vector_size(SSMOE_BYTES)));
  typedef uint32_t U __attribute__((vector_size(SSMOE_BYTES)));
  typedef uint16_t H __attribute__((vector_size(SSMOE_BYTES / 2)));
};
template <>
struct Lane<double> {
  typedef double V __attribute__((vector_size(SSMOE_BYTES)));
  typedef int64_t I __attribute__((vector_size(SSMOE_BYTES)));
};

template <class T>
using Vec = typename Lane<T>::V;
template <class T>
constexpr int kLanes = SSMOE_BYTES / sizeof(T);

template <class T>
SSMOE_INLINE Vec<T> splat(T value) {
  return Vec<T>{} + value;
}

// aligned, accumulator type
template <class T>
SSMOE_INLINE Vec<T> get(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
SSMOE_INLINE void put(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}

SSMOE_INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  memcpy(&v, p, sizeof v);
  return v;
}
SSMOE_INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  memcpy(&v, p, sizeof v);
  return v;
}
SSMOE_INLINE Vec<float> load(const bfloat16* p) {
  Lane<float>::H h;
  memcpy(&h, p, sizeof h);
  Lane<float>::U u = __builtin_convertvector(h, Lane<float>::U) << 16;
  return (Vec<float>)u;
}
SSMOE_INLINE void store(float* p, Vec<float> v) { memcpy(p, &v, sizeof v); }
SSMOE_INLINE void store(double* p, Vec<double> v) { memcpy(p, &v, sizeof v); }
// to nearest, ties to even; a NaN stays one
SSMOE_INLINE Lane<float>::U rounded(Vec<float> v) {
  Lane<float>::U u = (Lane<float>::U)v;
  Lane<float>::U nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  Lane<float>::I number = v == v;
  return (nearest & (Lane<float>::U)number) |
         (0x7fc0u & ~(Lane<float>::U)number);
}
SSMOE_INLINE void store(bfloat16* p, Vec<float> v) {
  Lane<float>::H h = __builtin_convertvector(rounded(v), Lane<float>::H);
  memcpy(p, &h, sizeof h);
}

SSMOE_INLINE float widen(float v) { return v; }
SSMOE_INLINE double widen(double v) { return v; }
SSMOE_INLINE float widen(bfloat16 v) {
  uint32_t u = uint32_t(v.bits) << 16;
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}
SSMOE_INLINE void narrow(float* p, float v) { *p = v; }
SSMOE_INLINE void narrow(double* p, double v) { *p = v; }
SSMOE_INLINE void narrow(bfloat16* p, float v) {
  uint32_t u;
  memcpy(&u, &v, sizeof u);
  p->bits = v == v ? uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16) : 0x7fc0;
}

// the first `count` lanes; the rest read as zero and are not written
template <class S>
SSMOE_INLINE Vec<typename Accumulator<S>::type> load_some(const S* p, int64_t count) {
  using T = typename Accumulator<S>::type;
  if (__builtin_expect(count >= kLanes<T>, 1)) return load(p);
  S whole[kLanes<T>] = {};
  memcpy(whole, p, count * sizeof(S));
  return load(whole);
}
template <class S>
SSMOE_INLINE void store_some(S* p, Vec<typename Accumulator<S>::type> v, int64_t count) {
  using T = typename Accumulator<S>::type;
  if (__builtin_expect(count >= kLanes<T>, 1)) return store(p, v);
  S whole[kLanes<T>];
  store(whole, v);
  memcpy(p, whole, count * sizeof(S));
}

template <class T>
SSMOE_INLINE T sum(Vec<T> v) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
  if constexpr (sizeof(T) == 8) return _mm512_reduce_add_pd((__m512d)v);
#endif
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <class T>
SSMOE_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a < b ? b : a;  // NaN in a stays
}

// e^r for |r| <= ln(2) / 2, exactly 1 at 0. float: minimax, within 6e-8 relative as evaluated; double: Taylor,
// within 4e-16.
SSMOE_INLINE Vec<float> exp_fraction(Vec<float> r) {
  Vec<float> p = r * 0.0013814537087455392f + 0.00836874544620514f;
  p = p * r + 0.04166839271783829f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  return p * r + 1.0f;
}
SSMOE_INLINE Vec<double> exp_fraction(Vec<double> r) {
  constexpr double factorial[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600};
  Vec<double> p = splat(1 / factorial[12]);
#pragma GCC unroll 12
  for (int i = 11; i >= 0; --i) p = p * r + 1 / factorial[i];
  return p;
}

// 1.5 * 2^(mantissa bits): adding it leaves the nearest integer in the low bits
template <class T>
constexpr T kMagic = sizeof(T) == 4 ? T(12582912.0) : T(6755399441055744.0);

template <class T>
SSMOE_INLINE Vec<T> nearest(Vec<T> t) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_roundscale_ps((__m512)t, 0x08);
  else
    return (Vec<T>)_mm512_roundscale_pd((__m512d)t, 0x08);
#else
  return (t + kMagic<T>)-kMagic<T>;
#endif
}

// p 2^whole; outside AVX-512 the result's exponent must be in range
template <class T>
SSMOE_INLINE Vec<T> scale(Vec<T> p, Vec<T> whole) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)whole);
  else
    return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)whole);
#else
  using I = typename Lane<T>::I;
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  Vec<T> shifted = whole + kMagic<T>;
  I bits = (I)p + ((I)shifted << mantissa);
  return (Vec<T>)bits;
#endif
}

template <class T>
SSMOE_INLINE Vec<T> clamped(Vec<T> t, T least, T most) {
  t = larger<T>(t, splat(least));
  return t > most ? splat(most) : t;
}

template <class T>
constexpr T kLog2E = T(1.44269504088896340736);

// v - whole ln 2. One rounding with a fused multiply-add, because float and double ln 2 happen to be good to
// 2e-9 and 4e-17 relative; in two parts without.
template <class T>
SSMOE_INLINE Vec<T> without_powers(Vec<T> v, Vec<T> whole) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return v - whole * T(0.693147180559945309417);
#else
  constexpr T high = sizeof(T) == 4 ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T low = sizeof(T) == 4 ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  return (v - whole * high) - whole * low;
#endif
}

// e^v for v <= 0 (or moderate): within 2 ulp; at most 2^-126 (2^-1022) below -87.3 (-708.3); NaN stays.
template <class T>
SSMOE_INLINE Vec<T> exp(Vec<T> v) {
  constexpr T most = sizeof(T) == 4 ? T(87.3) : T(708.3);
  v = SSMOE_BYTES == 64 ? larger<T>(v, splat<T>(-2 * most)) : clamped<T>(v, -most, most);
  Vec<T> whole = nearest<T>(v * kLog2E<T>);
  return scale<T>(exp_fraction(without_powers<T>(v, whole)), whole);
}

// e^v for any v, 0 and infinite outside the range
template <class T>
SSMOE_INLINE Vec<T> exp_wide(Vec<T> v) {
  constexpr T most = sizeof(T) == 4 ? T(87.3) : T(708.3);
  Vec<T> inside = clamped<T>(v, -most, most);
  Vec<T> whole = nearest<T>(inside * kLog2E<T>);
  Vec<T> result = scale<T>(exp_fraction(without_powers<T>(inside, whole)), whole);
  return v > most ? splat<T>(T(__builtin_inf())) : (v < -most ? splat<T>(0) : result);
}

template <class T>
SSMOE_INLINE Vec<T> sigmoid(Vec<T> v) {
  return T(1) / (T(1) + exp_wide<T>(-v));
}

// log(1 + e^v) = max(v, 0) + log1p(e^-|v|), log1p(u) = 2 atanh(u / (2 + u)) by its series, u in [0, 1]
template <class T>
SSMOE_INLINE Vec<T> softplus(Vec<T> v) {
  constexpr int terms = sizeof(T) == 4 ? 8 : 17;
  Vec<T> u = exp_wide<T>(v > T(0) ? -v : v);
  Vec<T> s = u / (u + T(2));
  Vec<T> square = s * s;
  Vec<T> p = splat(T(1) / T(2 * terms - 1));
#pragma GCC unroll 17
  for (int i = terms - 2; i >= 0; --i) p = p * square + T(1) / T(2 * i + 1);
  return larger<T>(v, splat<T>(0)) + T(2) * s * p;
}

}  // namespace
