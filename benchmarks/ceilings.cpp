// What one core of this machine can do, for the floors of the CPU benchmarks: compiled by cpu_floor.py with
// -march=native, one call a thread at a time. Each function returns a rate a second.
#include <chrono>
#include <cstdint>

#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// The compiler may neither foresee nor drop v.
SSMOE_INLINE void opaque(Vec<float>& v) {
#if SSMOE_BYTES == 64
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#else
  asm volatile("" : "+w"(v));
#endif
}

// the best of many short runs of f, which does `count` of something
template <class F>
double best_rate(double count, const F& f) {
  double least = 1e9;
  const double end = seconds() + 0.2;
  do {
    const double begin = seconds();
    f();
    const double time = seconds() - begin;
    if (time < least) least = time;
  } while (seconds() < end);
  return count / least;
}

}  // namespace

extern "C" {

int lanes() { return kLanes<float>; }

// vectors a second through the exponential of the scan, inputs and outputs in registers
double exp_rate() {
  constexpr int N = 4, kRounds = 4000;
  return best_rate(double(N) * kRounds, [] {
    Vec<float> v[N] = {}, index[N] = {};
    for (int r = 0; r < kRounds; ++r) {
      Vec<float> next[N], next_index[N];
      SSMOE_EACH_VECTOR next[i] = splat<float>(-0.5f);
      SSMOE_EACH_VECTOR opaque(next[i]);
#if SSMOE_BYTES == 64
      exp2_halves<N>(next, next_index, v, index);
      SSMOE_EACH_VECTOR opaque(v[i]);
      SSMOE_EACH_VECTOR v[i] = next[i], index[i] = next_index[i];
#else
      exp_all<float, N, false>(next);
      SSMOE_EACH_VECTOR opaque(next[i]);
#endif
    }
  });
}

// fused multiply-adds a second, in vectors
double fma_rate() {
  constexpr int N = 12, kRounds = 4000;
  return best_rate(double(N) * kRounds, [] {
    Vec<float> v[N], a = splat<float>(0.999f), b = splat<float>(0.001f);
    SSMOE_EACH_VECTOR v[i] = splat<float>(float(i));
    for (int r = 0; r < kRounds; ++r) {
      SSMOE_EACH_VECTOR v[i] = v[i] * a + b;
      SSMOE_EACH_VECTOR opaque(v[i]);
    }
  });
}

// products of bfloat16 pairs added to floats a second, in vectors of floats; 0 without instructions of their own
double pair_rate() {
#ifdef __AVX512BF16__
  constexpr int N = 12, kRounds = 4000;
  return best_rate(double(N) * kRounds, [] {
    Vec<float> v[N], a = splat<float>(0.999f), b = splat<float>(0.001f);
    opaque(a), opaque(b);
    SSMOE_EACH_VECTOR v[i] = splat<float>(float(i));
    for (int r = 0; r < kRounds; ++r) {
      SSMOE_EACH_VECTOR v[i] = (Vec<float>)_mm512_dpbf16_ps((__m512)v[i], (__m512bh)a, (__m512bh)b);
      SSMOE_EACH_VECTOR opaque(v[i]);
    }
  });
#else
  return 0;
#endif
}

// bytes a second: two arrays read, one written, as the scan does
double stream_rate(const float* x, const float* y, float* out, int64_t count) {
  return best_rate(3.0 * sizeof(float) * double(count), [=] {
    for (int64_t i = 0; i < count; i += kLanes<float>) store(out + i, load(x + i) + load(y + i));
  });
}
}
