// A matrix (rows, n), as it lies in memory, times a few vectors: every weight is read once and in order, which is
// all that matters while there are so few vectors.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

using ssmoe::Skinny;

constexpr int kBlock = 8;  // vectors at a time
constexpr int64_t kReadAhead = 4096;  // bytes prefetched ahead of the reading

#if SSMOE_BYTES == 64
// lane i: the sum of v[i]
SSMOE_INLINE __m512 sum_each(const __m512* v) {
  __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    two[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    eight[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                       _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
}
#endif

// out[i] = the sum of v[i], for a whole vector of them
template <class T>
SSMOE_INLINE void sum_vectors(const Vec<T>* v, T* out) {
#if SSMOE_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    store(out, (Vec<T>)sum_each(reinterpret_cast<const __m512*>(v)));
    return;
  }
#endif
  for (int i = 0; i < kLanes<T>; ++i) out[i] = sum<T>(v[i]);
}

// Whether products of this type are the processor's own of bfloat16 pairs.
#ifdef __AVX512BF16__
template <class S>
constexpr bool kPaired = sizeof(S) == 2;
#else
template <class S>
constexpr bool kPaired = false;
#endif

// How a vector is kept for its products, padded with zeros to whole steps: as bfloat16 for the processor's own product
// of pairs, else in the accumulator type; for bfloat16 weights then the even places of a step before its odd ones,
// which is how its weights are widened.
template <class S>
constexpr int64_t kPacked = kPaired<S> ? 2 : sizeof(typename Accumulator<S>::type);
template <class S>
constexpr int kStep = kLanes<typename Accumulator<S>::type> * (sizeof(S) == 2 ? 2 : 1);

template <class S>
void pack(const typename Accumulator<S>::type* from, int64_t begin, int64_t count, void* to) {
  using T = typename Accumulator<S>::type;
  if constexpr (kPaired<S>) {
    bfloat16* out = static_cast<bfloat16*>(to) + begin;
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) store(out + i, load(from + i));
    for (; i < count; ++i) narrow(out + i, from[i]);
  } else if constexpr (sizeof(S) == 2) {
    constexpr int step = kStep<S>;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = begin + i, place = at % step;
      bfloat16 narrowed;
      narrow(&narrowed, from[i]);
      static_cast<T*>(to)[at - place + place % 2 * (step / 2) + place / 2] = widen(narrowed);
    }
  } else {
    memcpy(static_cast<T*>(to) + begin, from, count * sizeof(T));
  }
}

// R weights rows against B vectors over one step of n
template <class S, int R, int B>
SSMOE_INLINE void multiply_step(const S* const* w, const typename Accumulator<S>::type* x, int64_t x_stride,
                                Vec<typename Accumulator<S>::type> (&sums)[R][B]) {
  using T = typename Accumulator<S>::type;
  if constexpr (sizeof(S) == 2) {
    Vec<T> even[R], odd[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Lane<float>::U pairs;
      memcpy(&pairs, w[r], sizeof pairs);
      even[r] = (Vec<T>)(pairs << 16);
      odd[r] = (Vec<T>)(pairs & 0xffff0000u);
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      Vec<T> first = get(x + b * x_stride), second = get(x + b * x_stride + kLanes<T>);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        sums[r][b] = sums[r][b] + even[r] * first;
        sums[r][b] = sums[r][b] + odd[r] * second;
      }
    }
  } else {
    Vec<T> weight[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weight[r] = load(w[r]);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      Vec<T> value = get(x + b * x_stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r][b] = sums[r][b] + weight[r] * value;
    }
  }
}

// out[b * out_stride + r]; the rows lie `stride` apart
template <class S, int R, int B>
SSMOE_INLINE void multiply_rows(const S* weight, int64_t stride, int64_t n, const typename Accumulator<S>::type* x,
                                int64_t x_stride, typename Accumulator<S>::type* out, int64_t out_stride) {
  using T = typename Accumulator<S>::type;
  constexpr int step = kStep<S>;
  Vec<T> sums[R][B] = {};
  const S* w[R];
  int64_t k = 0;
  for (; k + step <= n; k += step) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      w[r] = weight + r * stride + k;
      __builtin_prefetch(reinterpret_cast<const char*>(w[r]) + kReadAhead + (R - 1) * stride * sizeof(S));
    }
    multiply_step<S, R, B>(w, x + k, x_stride, sums);
  }
  if (k < n) {
    S rest[R][step] = {};
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      memcpy(rest[r], weight + r * stride + k, (n - k) * sizeof(S));
      w[r] = rest[r];
    }
    multiply_step<S, R, B>(w, x + k, x_stride, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) out[b * out_stride + r] = sum<T>(sums[r][b]);
}

#ifdef __AVX512BF16__
// values of R rows against B vectors over one step of n
template <int R, int B>
SSMOE_INLINE void multiply_pairs_step(const __m512i* values, const bfloat16* x, int64_t x_stride, __m512 (&sums)[R][B]) {
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    const __m512i other = _mm512_load_si512(x + b * x_stride);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r][b] = _mm512_dpbf16_ps(sums[r][b], (__m512bh)values[r], (__m512bh)other);
  }
}

template <int R, int B>
void multiply_pairs(const bfloat16* weight, int64_t stride, int64_t rows, int64_t n, const bfloat16* x,
                    int64_t x_stride, float* out, int64_t out_stride) {
  for (int64_t row = 0; row + R <= rows; row += R) {
    __m512 sums[R][B] = {};
    __m512i values[R];
    const bfloat16* w = weight + row * stride;
    int64_t k = 0;
    for (; k + 32 <= n; k += 32) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const bfloat16* from = w + r * stride + k;
        _mm_prefetch(reinterpret_cast<const char*>(from) + kReadAhead + (R - 1) * stride * 2, _MM_HINT_T0);
        values[r] = _mm512_loadu_si512(from);
      }
      multiply_pairs_step<R, B>(values, x + k, x_stride, sums);
    }
    if (k < n) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        values[r] = _mm512_maskz_loadu_epi16((__mmask32(1) << (n - k)) - 1, w + r * stride + k);
      multiply_pairs_step<R, B>(values, x + k, x_stride, sums);
    }
    if constexpr (R * B == 16) {
      alignas(64) float found[16];
      _mm512_store_ps(found, sum_each(&sums[0][0]));
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) out[b * out_stride + row + r] = found[r * B + b];
    } else {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) out[b * out_stride + row + r] = _mm512_reduce_add_ps(sums[r][b]);
    }
  }
}
#endif

// x: packed vectors, x_stride elements apart; out[b * out_stride + r] for `rows` rows and B vectors
template <class S, int B>
void multiply_block(const S* weight, int64_t stride, int64_t rows, int64_t n, const void* x, int64_t x_stride,
                    typename Accumulator<S>::type* out, int64_t out_stride) {
  using T = typename Accumulator<S>::type;
  constexpr int R = B > 1 ? 2 : 1;
#ifdef __AVX512BF16__
  if constexpr (kPaired<S>) {
    const auto* vectors = static_cast<const bfloat16*>(x);
    multiply_pairs<R, B>(weight, stride, rows, n, vectors, x_stride, out, out_stride);
    const int64_t done = rows / R * R;
    if (done < rows)
      multiply_pairs<1, B>(weight + done * stride, stride, rows - done, n, vectors, x_stride, out + done, out_stride);
    return;
  }
#endif
  int64_t row = 0;
  const T* vectors = static_cast<const T*>(x);
  for (; row + R <= rows; row += R)
    multiply_rows<S, R, B>(weight + row * stride, stride, n, vectors, x_stride, out + row, out_stride);
  if (row < rows) multiply_rows<S, 1, B>(weight + row * stride, stride, n, vectors, x_stride, out + row, out_stride);
}

template <class S>
SSMOE_INLINE const void* packed_row(const void* x, int64_t at) {
  return static_cast<const char*>(x) + at * kPacked<S>;
}

// the same for 1 to kBlock vectors
template <class S>
void multiply(const S* weight, int64_t stride, int64_t rows, int64_t n, const void* x, int64_t x_stride, int64_t batch,
              typename Accumulator<S>::type* out, int64_t out_stride) {
#define SSMOE_BATCH(B) \
  case B:              \
    return multiply_block<S, B>(weight, stride, rows, n, x, x_stride, out, out_stride);
  switch (batch) {
    SSMOE_BATCH(1)
    SSMOE_BATCH(2)
    SSMOE_BATCH(3)
    SSMOE_BATCH(4)
    SSMOE_BATCH(5)
    SSMOE_BATCH(6)
    SSMOE_BATCH(7)
    SSMOE_BATCH(8)
  }
#undef SSMOE_BATCH
}

// rows begin to end of the product, in the activations' type
template <class S>
void skinny(const Skinny& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int64_t kRows = 32;
  alignas(64) T found[kBlock * kRows];
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = end - row < kRows ? end - row : kRows;
    const S* weight = static_cast<const S*>(args.weight) + row * args.n;
    for (int64_t b0 = 0; b0 < args.batch; b0 += kBlock) {
      const int64_t batch = args.batch - b0 < kBlock ? args.batch - b0 : kBlock;
      multiply<S>(weight, args.n, rows, args.n, packed_row<S>(args.x, b0 * args.x_stride),
                  args.x_stride, batch, found, kRows);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = 0; r < rows; ++r)
          narrow(static_cast<S*>(args.out) + (b0 + b) * args.rows + row + r,
                 found[b * kRows + r] + (bias ? bias[row + r] : T(0)));
    }
  }
}

// vectors begin to end, (batch, n) contiguous, to their packed form
template <class S>
void pack_vectors(const Skinny& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  for (int64_t b = begin; b < end; ++b) {
    const S* from = static_cast<const S*>(args.source) + b * args.n;
    void* to = const_cast<void*>(packed_row<S>(args.x, b * args.x_stride));
    for (int64_t i = 0; i < args.n; ++i) {
      const T value = widen(from[i]);
      pack<S>(&value, i, 1, to);
    }
  }
}

}  // namespace
