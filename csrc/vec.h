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

// whether v < most in every lane; not where one is NaN
template <class T>
SSMOE_INLINE bool all_below(Vec<T> v, T most) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, (__m512)splat<T>(most), _CMP_LT_OQ) == 0xffff;
#endif
  bool all = true;
  for (int i = 0; i < kLanes<T>; ++i) all = all && v[i] < most;
  return all;
}

// NaN in a stays
template <class T>
SSMOE_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_max_ps((__m512)b, (__m512)a);
#endif
  return a < b ? b : a;
}

// e^r for |r| <= ln(2) / 2, exactly 1 at 0. float: minimax, within 6e-8 relative as evaluated; double: Taylor,
// within 4e-16.
SSMOE_INLINE Vec<float> exp_fraction(Vec<float> r) {
  Vec<float> p = r * 0.0013814537087455392f + 0.00836874544620514f;
  p = p * r + 0.04166839271783829f;
  p = p * r + 0.1666652113199234f;
  p = p * r + 0.4999999403953552f;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  p = p * r + 1.0f;
  return p * r + 1.0f;
#else
  return (r * r * p + r) + 1.0f;  // what is rounded at one only once
#endif
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

#define SSMOE_EACH_VECTOR _Pragma("GCC unroll 16") for (int i = 0; i < N; ++i)
#if SSMOE_BYTES == 64
// bits of 2^(j / 16), less j in the place where the sum with `shifted << 19` leaves it
alignas(64) constexpr int32_t kPowers[16] = {
    1065353216, 1065200323, 1065063874, 1064944595, 1064843248, 1064760626, 1064697559, 1064654911,
    1064633587, 1064634532, 1064658730, 1064707212, 1064781053, 1064881375, 1065009351, 1065166205};

// e^v in place: 2^(j / 16) from a table in a register times a cubic, within 1.5e-7 relative and 1 + v where v is
// small, which a slow decay needs. v from -87.3 up.
template <int N>
SSMOE_INLINE void exp_table(Vec<float>* v) {
  using I = Lane<float>::I;
  const __m512 powers = *reinterpret_cast<const __m512*>(kPowers);
  Vec<float> shifted[N], p[N];
  SSMOE_EACH_VECTOR shifted[i] = v[i] * (16 * kLog2E<float>) + kMagic<float>;
  SSMOE_EACH_VECTOR p[i] = shifted[i] - kMagic<float>;
  SSMOE_EACH_VECTOR v[i] = v[i] - p[i] * (0.693147180559945309417f / 16);
  SSMOE_EACH_VECTOR p[i] = v[i] * 0.16666667f + 0.5f;
  SSMOE_EACH_VECTOR shifted[i] =
      (Vec<float>)((I)_mm512_permutexvar_ps((__m512i)shifted[i], powers) + ((I)shifted[i] << 19));
  SSMOE_EACH_VECTOR p[i] = p[i] * v[i] + 1.0f;
  SSMOE_EACH_VECTOR p[i] = p[i] * v[i];
  SSMOE_EACH_VECTOR v[i] = shifted[i] + shifted[i] * p[i];
}

// What rounding took from 2^(j / 16), relative to it. A slow decay applies one of them at every step.
alignas(64) constexpr float kPowersRest[16] = {
    0.0f, 4.628547e-08f, -1.199216e-08f, 4.729782e-08f, 3.193418e-08f, 3.621057e-08f, -3.099072e-08f, -7.475213e-09f, 1.711427e-08f, -3.047683e-08f, 5.233334e-09f, 6.107592e-09f, -1.471961e-08f, -5.258795e-09f, -6.128260e-09f, 5.140609e-09f};

// 2^v the same way, exponents in powers of two, so that one instruction takes off the nearest sixteenth: within
// 1e-7 relative, right on the average over v, and 1 + v ln 2 where v is small. v from -126 up. In two halves: the first leaves the rest in v and the
// sixteenths in index, the second the value in v. Here the first half of `next` goes on beside the second of `v`.
template <int N>
SSMOE_INLINE void exp2_halves(Vec<float>* next, Vec<float>* next_index, Vec<float>* v, Vec<float>* index) {
  using I = Lane<float>::I;
  const __m512 powers = *reinterpret_cast<const __m512*>(kPowers);
  const __m512 rest = *reinterpret_cast<const __m512*>(kPowersRest);
  Vec<float> p[N];
  SSMOE_EACH_VECTOR p[i] = v[i] * 0.05550411f + 0.24022651f;
  SSMOE_EACH_VECTOR {
    next_index[i] = next[i] + kMagic<float> / 16;
    p[i] = p[i] * v[i] + 0.69314718f;
  }
  SSMOE_EACH_VECTOR {
    p[i] = p[i] * v[i] + (Vec<float>)_mm512_permutexvar_ps((__m512i)index[i], rest);
    index[i] = (Vec<float>)((I)_mm512_permutexvar_ps((__m512i)index[i], powers) + ((I)index[i] << 19));
  }
  SSMOE_EACH_VECTOR {
    v[i] = index[i] + index[i] * p[i];
    next[i] = (Vec<float>)_mm512_reduce_ps((__m512)next[i], 0x48);
  }
}
#endif

// Exponents from here up need no clamp in `exp_all`.
template <class T>
constexpr T kShallow = sizeof(T) == 4 ? T(-87) : T(-708);

// e^v in place for N vectors, v as in `exp`, step by step over all of them so that steps of different vectors
// overlap. Without kDeep every exponent must be above kShallow.
template <class T, int N, bool kDeep>
SSMOE_INLINE void exp_all(Vec<T>* v) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    if constexpr (kDeep) {
      SSMOE_EACH_VECTOR v[i] = larger<T>(v[i], splat<T>(-87.3f));
    }
    return exp_table<N>(v);
  }
#endif
  SSMOE_EACH_VECTOR v[i] = exp<T>(v[i]);
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

#if SSMOE_BYTES == 64
// 1 / (1 + j / 8) and log(1 + j / 8)
alignas(64) constexpr float kEighths[16] = {
    1.0f, 0.8888889f, 0.8f, 0.72727275f, 0.6666667f, 0.61538464f, 0.5714286f, 0.53333336f, 0.5f};
alignas(64) constexpr float kLogEighths[16] = {
    0.0f, 0.11778303f, 0.22314355f, 0.31845373f, 0.4054651f, 0.48550782f, 0.5596158f, 0.62860864f, 0.6931472f};

// log(1 + u) for u in [0, 1], within 1.5e-7 relative: that of the nearest eighth from a table, and u times a
// polynomial of what is left.
template <int N>
SSMOE_INLINE void log1p_unit(const Vec<float>* u, Vec<float>* out) {
  const __m512 inverse = *reinterpret_cast<const __m512*>(kEighths);
  const __m512 whole = *reinterpret_cast<const __m512*>(kLogEighths);
  Vec<float> index[N], r[N];
  SSMOE_EACH_VECTOR {
    index[i] = u[i] + kMagic<float> / 8;
    r[i] = (Vec<float>)_mm512_reduce_ps((__m512)u[i], 0x38);
  }
  SSMOE_EACH_VECTOR r[i] = r[i] * (Vec<float>)_mm512_permutexvar_ps((__m512i)index[i], inverse);
  SSMOE_EACH_VECTOR out[i] = r[i] * 0.20077918469905853f - 0.2508152723312378f;
  SSMOE_EACH_VECTOR out[i] = out[i] * r[i] + 0.3333323895931244f;
  SSMOE_EACH_VECTOR out[i] = out[i] * r[i] - 0.49999919533729553f;
  SSMOE_EACH_VECTOR out[i] = out[i] * r[i] + 1.0f;
  SSMOE_EACH_VECTOR out[i] = out[i] * r[i] + (Vec<float>)_mm512_permutexvar_ps((__m512i)index[i], whole);
}
#else
// log(1 + u) for u in [0, 1]: u times a minimax polynomial, within 2e-7 relative
template <int N>
SSMOE_INLINE void log1p_unit(const Vec<float>* u, Vec<float>* out) {
  constexpr float c[] = {-0.4999993145465851f, 0.33330512046813965f, -0.24958586692810059f, 0.19695398211479187f, -0.15355387330055237f, 0.10680537670850754f, -0.05766425281763077f, 0.02020447514951229f, -0.0033184464555233717f};
  SSMOE_EACH_VECTOR out[i] = u[i] * c[8] + c[7];
#pragma GCC unroll 9
  for (int j = 6; j >= 0; --j) {
    SSMOE_EACH_VECTOR out[i] = out[i] * u[i] + c[j];
  }
  SSMOE_EACH_VECTOR out[i] = (out[i] * u[i] + 1.0f) * u[i];
}
#endif
// 2 atanh(u / (2 + u))
template <int N>
SSMOE_INLINE void log1p_unit(const Vec<double>* u, Vec<double>* out) {
  for (int i = 0; i < N; ++i) {
    Vec<double> s = u[i] / (u[i] + 2.0);
    Vec<double> square = s * s;
    Vec<double> p = splat(1 / 33.0);
#pragma GCC unroll 17
    for (int j = 15; j >= 0; --j) p = p * square + 1 / (2.0 * j + 1);
    out[i] = 2.0 * s * p;
  }
}

// log(1 + e^v) = max(v, 0) + log1p(e^-|v|) in place; slope, with kSlope, gets its derivative, the sigmoid
template <class T, int N, bool kSlope>
SSMOE_INLINE void softplus_all(Vec<T>* v, Vec<T>* slope) {
  using I = typename Lane<T>::I;
  const I sign = (I)-splat<T>(0);
  Vec<T> u[N], log[N];
  SSMOE_EACH_VECTOR u[i] = (Vec<T>)((I)v[i] | sign);
  exp_all<T, N, true>(u);
  log1p_unit<N>(u, log);
  if constexpr (kSlope) {
    SSMOE_EACH_VECTOR slope[i] = (v[i] > T(0) ? splat<T>(1) : u[i]) / (u[i] + T(1));
  }
  SSMOE_EACH_VECTOR v[i] = larger<T>(v[i], splat<T>(0)) + log[i];
}

}  // namespace
