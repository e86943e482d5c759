// The selective scan, lanes = channels. A task owns a group of channels of one row; it walks the row in
// chunks of kChunk positions, so that inputs, steps and partial sums of a chunk stay in cache while the
// states of `kStates` of the n state entries stay in registers.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

using ssmoe::kChunk;
using ssmoe::Rows;
using ssmoe::Scan;

#if SSMOE_BYTES == 64
constexpr int kStates = 8;
#else
constexpr int kStates = 4;
#endif
constexpr int kBackwardStates = 4;

template <class S>
SSMOE_INLINE S* row_at(const Rows& rows, int64_t b, int64_t l) {
  return static_cast<S*>(rows.data) + b * rows.batch_stride + l * rows.row_stride;
}

// This thread's working memory: it grows and stays, because fresh pages cost more than the work done in them.
// One Scratch of a kind lives at a time.
template <class T, int kSlot = 0>
struct Scratch {
  explicit Scratch(int64_t count) {
    static thread_local void* memory = nullptr;
    static thread_local int64_t size = 0;
    const int64_t wanted = count * int64_t(sizeof(T)) + 64;
    if (size < wanted) {
      __builtin_free(memory);
      memory = __builtin_malloc(wanted);
      if (!memory) __builtin_trap();
      size = wanted;
    }
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t(63));
  }
  T* take(int64_t count) {
    T* p = data;
    data += (count + 15) & ~int64_t(15);
    return p;
  }
  T* data;
};

// (d, n) rows of channels c0.. to [vector][n][lane]; lanes past the last channel are zero
template <class T>
void pack_states(const T* source, int64_t c0, int64_t channels, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < (channels + W - 1) / W * W; ++c) {
    T* to = out + (c / W) * n * W + c % W;
    for (int64_t i = 0; i < n; ++i)
      to[i * W] = c < channels && source ? source[(c0 + c) * n + i] : T(0);
  }
}
template <class T>
void unpack_states(const T* in, int64_t c0, int64_t channels, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[(c0 + c) * n + i] = in[((c / W) * n + i) * W + c % W];
}

// B or C of a chunk in accumulator type, zero on padding
template <class S, class T>
void widen_rows(const Rows& rows, int64_t b, int64_t t0, int64_t steps, int64_t n, const uint8_t* flags, T* out) {
  for (int64_t t = 0; t < steps; ++t) {
    const S* from = row_at<S>(rows, b, t0 + t);
    bool padding = flags && flags[t] == ssmoe::kPadding;
    for (int64_t i = 0; i < n; ++i) out[t * n + i] = padding ? T(0) : widen(from[i]);
  }
}

template <class T>
struct Chunk {
  const Scan& args;
  int64_t b, t0, steps;
  const uint8_t* flags;  // of the chunk, or null
  const T* B;            // (steps, n)
  const T* C;
};

// states i0 .. i0 + N of one channel vector through a chunk; y gets or adds <C, h>
template <class T, int N, bool kDeep>
SSMOE_INLINE void advance(const Chunk<T>& chunk, int64_t i0, const T* delta, const T* drive, const T* A, T* h,
                          T* y) {
  constexpr int W = kLanes<T>;
  const int64_t n = chunk.args.n;
  Vec<T> state[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) state[i] = get(h + (i0 + i) * W);
  const T* a = A + i0 * W;
  const T* B = chunk.B + i0;
  const T* C = chunk.C + i0;
  for (int64_t t = 0; t < chunk.steps; ++t, B += n, C += n) {
    if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) state[i] = splat<T>(0);
    }
    Vec<T> step = get(delta + t * W), input = get(drive + t * W);
    Vec<T> even = i0 ? get(y + t * W) : splat<T>(0), odd = splat<T>(0);
    constexpr int M = N < 4 ? N : 4;
#pragma GCC unroll 16
    for (int j = 0; j < N; j += M) {
      Vec<T> decay[M];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) decay[i] = step * get(a + (i + j) * W);
      exp_all<T, M, kDeep>(decay);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) state[i + j] = state[i + j] * decay[i] + input * B[i + j];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        if (i % 2)
          odd = odd + state[i + j] * C[i + j];
        else
          even = even + state[i + j] * C[i + j];
      }
    }
    put<T>(y + t * W, even + odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) put(h + (i0 + i) * W, state[i]);
}

template <class T, bool kDeep>
void advance_all(const Chunk<T>& chunk, const T* delta, const T* drive, const T* A, T* h, T* y) {
  const int64_t n = chunk.args.n;
  int64_t i = 0;
  for (; i + kStates <= n; i += kStates) advance<T, kStates, kDeep>(chunk, i, delta, drive, A, h, y);
  if constexpr (kStates > 4)
    for (; i + 4 <= n; i += 4) advance<T, 4, kDeep>(chunk, i, delta, drive, A, h, y);
  for (; i < n; ++i) advance<T, 1, kDeep>(chunk, i, delta, drive, A, h, y);
}

// Whether some exp(delta A) of a chunk could fall below the smallest normal number.
template <class T>
bool deep(const T* delta, int64_t steps, const T* A, int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> longest = splat<T>(0), steepest = splat<T>(0);
  for (int64_t t = 0; t < steps; ++t) longest = larger<T>(get(delta + t * W), longest);
  for (int64_t i = 0; i < n; ++i) steepest = larger<T>(-get(A + i * W), steepest);
  Vec<T> product = longest * steepest;
  bool any = false;
  for (int w = 0; w < W; ++w) any = any || !(product[w] < -kShallow<T>);
  return any;
}

// a row of length one: lanes = states, so that the state is read and written where it lies
template <class S>
void scan_one(const Scan& args, int64_t b, int64_t c0, int64_t channels) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n;
  const T *A = static_cast<const T*>(args.A), *D = static_cast<const T*>(args.D),
          *bias = static_cast<const T*>(args.delta_bias);
  const uint8_t flag = args.flags ? args.flags[b] : uint8_t(ssmoe::kReal);
  const T* from = static_cast<const T*>(args.initial_state);
  if (from) from += (args.slots ? args.slots[b] : b) * args.d * n;
  T* to = static_cast<T*>(args.final_state) + (args.out_slots ? args.out_slots[b] : b) * args.d * n;
  const S* B = row_at<S>(args.B, b, 0);
  const S* C = row_at<S>(args.C, b, 0);

  for (int64_t v = 0; v < channels; v += W) {
    const int64_t c = c0 + v, lanes = channels - v < W ? channels - v : W;
    alignas(64) T step[W], drive[W], out[W];
    Vec<T> x = load_some(row_at<S>(args.x, b, 0) + c, lanes);
    Vec<T> u = load_some(row_at<S>(args.delta, b, 0) + c, lanes);
    if (bias) u = u + load_some(bias + c, lanes);
    if (flag == ssmoe::kPadding) {
      store_some(row_at<S>(args.y, b, 0) + c, splat<T>(0), lanes);
      for (int64_t i = c * n; i < (c + lanes) * n; ++i) to[i] = from ? from[i] : T(0);
      continue;
    }
    softplus_all<T, 1>(&u, nullptr);
    Vec<T> delta = u;
    put<T>(step, delta);
    put<T>(drive, delta * x);
    const bool keep = from && flag != ssmoe::kReset;
    for (int64_t j = 0; j < lanes; ++j) {
      const T* a = A + (c + j) * n;
      const T* h = from + (c + j) * n;
      T* next = to + (c + j) * n;
      Vec<T> total = splat<T>(0);
      for (int64_t i = 0; i < n; i += W) {
        const int64_t count = n - i;
        Vec<T> state = load_some(B + i, count) * drive[j];
        if (keep) state = state + exp<T>(load_some(a + i, count) * step[j]) * load_some(h + i, count);
        store_some(next + i, state, count);
        total = total + state * load_some(C + i, count);
      }
      out[j] = sum<T>(total);
    }
    Vec<T> y = get(out);
    if (D) y = y + load_some(D + c, lanes) * x;
    if (args.z.data) {
      Vec<T> z = load_some(row_at<S>(args.z, b, 0) + c, lanes);
      y = y * z * sigmoid<T>(z);
    }
    store_some(row_at<S>(args.y, b, 0) + c, y, lanes);
  }
}

// A group's part of chunk rows, read and written whole rows at a time: rows lie far apart, in different pages
// and often in the same cache sets.
constexpr int64_t kAhead = 4;

template <class S>
SSMOE_INLINE void prefetch_row(const Rows& rows, int64_t b, int64_t t, int64_t length, int64_t c0, int64_t channels) {
  if (t >= length) return;
  const char* p = reinterpret_cast<const char*>(row_at<S>(rows, b, t) + c0);
  for (int64_t at = 0; at < int64_t(channels * sizeof(S)); at += 64) __builtin_prefetch(p + at, 0, 2);
}

template <class T>
SSMOE_INLINE void clear(T* staged, int64_t t, int64_t vectors) {
  for (int64_t v = 0; v < vectors; ++v) put<T>(staged + (v * kChunk + t) * kLanes<T>, splat<T>(0));
}

// Step sizes and inputs of one position, [vector][kChunk][lane]; slope as in softplus_all
template <class S, int N, class T>
SSMOE_INLINE void stage_some(const S* x, const S* u, const T* bias, int64_t t, int64_t channels, int64_t v, T* delta,
                             T* drive, T* slope) {
  constexpr int W = kLanes<T>;
  Vec<T> step[N], steep[N];
  SSMOE_EACH_VECTOR step[i] = load_some(u + (v + i) * W, channels - (v + i) * W);
  if (bias) {
    SSMOE_EACH_VECTOR step[i] = step[i] + load_some(bias + (v + i) * W, channels - (v + i) * W);
  }
  softplus_all<T, N>(step, slope ? steep : nullptr);
  SSMOE_EACH_VECTOR {
    const int64_t at = ((v + i) * kChunk + t) * W;
    put<T>(delta + at, step[i]);
    put<T>(drive + at, step[i] * load_some(x + (v + i) * W, channels - (v + i) * W));
    if (slope) put<T>(slope + at, steep[i]);
  }
}
template <class S, class T>
void stage(const S* x, const S* u, const T* bias, int64_t t, int64_t channels, T* delta, T* drive, T* slope) {
  constexpr int W = kLanes<T>;
  int64_t v = 0;
  for (; (v + 4) * W <= channels; v += 4) stage_some<S, 4>(x, u, bias, t, channels, v, delta, drive, slope);
  for (; v * W < channels; ++v) stage_some<S, 1>(x, u, bias, t, channels, v, delta, drive, slope);
}

template <class S>
void scan_row(const Scan& args, int64_t b, int64_t c0, int64_t channels) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n, vectors = (channels + W - 1) / W, all_vectors = (args.d + W - 1) / W;
  const int64_t chunks = (args.l + kChunk - 1) / kChunk, staged = vectors * kChunk * W;
  const T *D = static_cast<const T*>(args.D), *bias = static_cast<const T*>(args.delta_bias);
  Scratch<T> scratch(2 * vectors * n * W + 2 * kChunk * n + 3 * staged + 128);
  T *A = scratch.take(vectors * n * W), *h = scratch.take(vectors * n * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n);
  T *delta = scratch.take(staged), *drive = scratch.take(staged), *y = scratch.take(staged);

  pack_states<T>(static_cast<const T*>(args.A), c0, channels, n, A);
  const T* from = static_cast<const T*>(args.initial_state);
  if (from) from += (args.slots ? args.slots[b] : b) * args.d * n;
  pack_states<T>(from, c0, channels, n, h);

  for (int64_t t0 = 0; t0 < args.l; t0 += kChunk) {
    const int64_t steps = args.l - t0 < kChunk ? args.l - t0 : kChunk;
    const uint8_t* flags = args.flags ? args.flags + b * args.l + t0 : nullptr;
    widen_rows<S>(args.B, b, t0, steps, n, flags, B);
    widen_rows<S>(args.C, b, t0, steps, n, flags, C);
    const Chunk<T> chunk{args, b, t0, steps, flags, B, C};
    if (args.checkpoints) {
      T* kept = static_cast<T*>(args.checkpoints) + ((b * chunks + t0 / kChunk) * all_vectors + c0 / W) * n * W;
      memcpy(kept, h, vectors * n * W * sizeof(T));
    }
    for (int64_t t = 0; t < steps; ++t) {
      const S *x = row_at<S>(args.x, b, t0 + t) + c0, *u = row_at<S>(args.delta, b, t0 + t) + c0;
      if (flags && flags[t] == ssmoe::kPadding) {
        clear<T>(delta, t, vectors), clear<T>(drive, t, vectors);
        continue;
      }
      prefetch_row<S>(args.x, b, t0 + t + kAhead, args.l, c0, channels);
      prefetch_row<S>(args.delta, b, t0 + t + kAhead, args.l, c0, channels);
      prefetch_row<S>(args.y, b, t0 + t, args.l, c0, channels);
      stage<S>(x, u, bias ? bias + c0 : nullptr, t, channels, delta, drive, static_cast<T*>(nullptr));
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v * kChunk * W;
      const T* a = A + v * n * W;
      if (deep<T>(delta + at, steps, a, n))
        advance_all<T, true>(chunk, delta + at, drive + at, a, h + v * n * W, y + at);
      else
        advance_all<T, false>(chunk, delta + at, drive + at, a, h + v * n * W, y + at);
    }
    for (int64_t t = 0; t < steps; ++t) {
      const bool padding = flags && flags[t] == ssmoe::kPadding;
      const S* x = row_at<S>(args.x, b, t0 + t) + c0;
      const S* gate = args.z.data ? row_at<S>(args.z, b, t0 + t) + c0 : nullptr;
      S* to = row_at<S>(args.y, b, t0 + t) + c0;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = channels - v * W;
        Vec<T> out = get(y + (v * kChunk + t) * W);
        if (D) out = out + load_some(D + c0 + v * W, lanes) * load_some(x + v * W, lanes);
        if (gate) {
          Vec<T> z = load_some(gate + v * W, lanes);
          out = out * z * sigmoid<T>(z);
        }
        store_some(to + v * W, padding ? splat<T>(0) : out, lanes);
      }
    }
  }
  T* to = static_cast<T*>(args.final_state) + (args.out_slots ? args.out_slots[b] : b) * args.d * n;
  unpack_states<T>(h, c0, channels, n, to);
}

template <class S>
void scan_forward(const Scan& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t c0 = task % args.groups * args.group;
    const int64_t channels = args.d - c0 < args.group ? args.d - c0 : args.group;
    if (args.l == 1 && !args.checkpoints)
      scan_one<S>(args, task / args.groups, c0, channels);
    else
      scan_row<S>(args, task / args.groups, c0, channels);
  }
}

// Partial sums of one channel vector over a chunk, [step][lane]
template <class T>
struct Partial {
  T *delta, *drive, *g;      // in
  T* y;                      // out: <C, h>, only with a gate
  T *ddrive, *ddecay;        // out: sum over n of dh B, and of dh h_{t-1} exp(delta A) A
  T *decay, *carried;        // scratch [step][N][lane]: exp(delta A), and that times h_{t-1}
};

// Recompute the states i0 .. i0 + N of a chunk, then walk it backwards.
// With q = dh_t h_{t-1} exp(delta A):  ddelta += q A,  dA += q delta,  dB += dh drive,  dC += g h_t.
template <class T, int N, bool kGate, bool kDeep>
SSMOE_INLINE void retreat(const Chunk<T>& chunk, int64_t i0, const Partial<T>& p, const T* A, const T* h, T* dh,
                          T* dA, T* dB, T* dC) {
  constexpr int W = kLanes<T>;
  const int64_t n = chunk.args.n;
  {
    Vec<T> state[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) state[i] = get(h + (i0 + i) * W);
    for (int64_t t = 0; t < chunk.steps; ++t) {
      if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) state[i] = splat<T>(0);
      }
      Vec<T> step = get(p.delta + t * W), input = get(p.drive + t * W);
      Vec<T> y = kGate && i0 ? get(p.y + t * W) : splat<T>(0);
      Vec<T> decay[N];
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) decay[i] = step * get(A + (i0 + i) * W);
      exp_all<T, N, kDeep>(decay);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        Vec<T> carried = decay[i] * state[i];
        put<T>(p.decay + (t * N + i) * W, decay[i]);
        put<T>(p.carried + (t * N + i) * W, carried);
        state[i] = carried + input * chunk.B[t * n + i0 + i];
        if (kGate) y = y + state[i] * chunk.C[t * n + i0 + i];
      }
      if (kGate) put<T>(p.y + t * W, y);
    }
  }
  Vec<T> gradient[N], total[N], a[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    gradient[i] = get(dh + (i0 + i) * W);
    total[i] = splat<T>(0);  // added up chunk by chunk, so that rounding grows with the number of chunks
    a[i] = get(A + (i0 + i) * W);
  }
  for (int64_t t = chunk.steps - 1; t >= 0; --t) {
    Vec<T> step = get(p.delta + t * W), input = get(p.drive + t * W), g = get(p.g + t * W);
    Vec<T> ddrive = i0 ? get(p.ddrive + t * W) : splat<T>(0);
    Vec<T> ddecay = i0 ? get(p.ddecay + t * W) : splat<T>(0);
    T *to_B = dB + (t * n + i0) * W, *to_C = dC + (t * n + i0) * W;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const T B = chunk.B[t * n + i0 + i], C = chunk.C[t * n + i0 + i];
      Vec<T> carried = get(p.carried + (t * N + i) * W);
      gradient[i] = gradient[i] + g * C;
      put<T>(to_B + i * W, get(to_B + i * W) + gradient[i] * input);
      put<T>(to_C + i * W, get(to_C + i * W) + g * (carried + input * B));
      Vec<T> q = gradient[i] * carried;
      ddecay = ddecay + q * a[i];
      total[i] = total[i] + q * step;
      ddrive = ddrive + gradient[i] * B;
      gradient[i] = gradient[i] * get(p.decay + (t * N + i) * W);
    }
    put<T>(p.ddrive + t * W, ddrive);
    put<T>(p.ddecay + t * W, ddecay);
    if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) gradient[i] = splat<T>(0);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    put(dh + (i0 + i) * W, gradient[i]);
    put<T>(dA + (i0 + i) * W, get(dA + (i0 + i) * W) + total[i]);
  }
}

template <class T, bool kGate, bool kDeep>
void retreat_all(const Chunk<T>& chunk, const Partial<T>& p, const T* A, const T* h, T* dh, T* dA, T* dB, T* dC) {
  const int64_t n = chunk.args.n;
  int64_t i = 0;
  for (; i + kBackwardStates <= n; i += kBackwardStates)
    retreat<T, kBackwardStates, kGate, kDeep>(chunk, i, p, A, h, dh, dA, dB, dC);
  for (; i < n; ++i) retreat<T, 1, kGate, kDeep>(chunk, i, p, A, h, dh, dA, dB, dC);
}

template <class S>
void scan_row_backward(const Scan& args, int64_t b, int64_t group) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n, c0 = group * args.group;
  const int64_t channels = args.d - c0 < args.group ? args.d - c0 : args.group;
  const int64_t vectors = (channels + W - 1) / W, all_vectors = (args.d + W - 1) / W;
  const int64_t chunks = (args.l + kChunk - 1) / kChunk, packed = vectors * n * W;
  const T *D = static_cast<const T*>(args.D), *bias = static_cast<const T*>(args.delta_bias);
  const bool gate = args.z.data;
  const int64_t staged = vectors * kChunk * W;

  Scratch<T> scratch(3 * packed + 4 * vectors * W + (2 + 2 * W) * kChunk * n + 7 * staged +
                     2 * kChunk * W * kBackwardStates + 512);
  T *A = scratch.take(packed), *dA = scratch.take(packed), *dh = scratch.take(packed);
  T *dD = scratch.take(vectors * W), *dbias = scratch.take(vectors * W);
  T *chunk_dD = scratch.take(vectors * W), *chunk_dbias = scratch.take(vectors * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n);
  T *dB = scratch.take(kChunk * n * W), *dC = scratch.take(kChunk * n * W);
  T* slope = scratch.take(staged);
  Partial<T> all;
  T** const buffers[] = {&all.delta, &all.drive, &all.g, &all.y, &all.ddrive, &all.ddecay};
  for (T** buffer : buffers) *buffer = scratch.take(staged);
  all.decay = scratch.take(kChunk * W * kBackwardStates);
  all.carried = scratch.take(kChunk * W * kBackwardStates);

  pack_states<T>(static_cast<const T*>(args.A), c0, channels, n, A);
  const T* dfinal = static_cast<const T*>(args.dfinal);
  pack_states<T>(dfinal ? dfinal + b * args.d * n : nullptr, c0, channels, n, dh);
  memset(dA, 0, packed * sizeof(T));
  memset(dD, 0, vectors * W * sizeof(T));
  memset(dbias, 0, vectors * W * sizeof(T));

  for (int64_t k = chunks - 1; k >= 0; --k) {
    const int64_t t0 = k * kChunk, steps = args.l - t0 < kChunk ? args.l - t0 : kChunk;
    const uint8_t* flags = args.flags ? args.flags + b * args.l + t0 : nullptr;
    widen_rows<S>(args.B, b, t0, steps, n, flags, B);
    widen_rows<S>(args.C, b, t0, steps, n, flags, C);
    const Chunk<T> chunk{args, b, t0, steps, flags, B, C};
    memset(dB, 0, kChunk * n * W * sizeof(T));
    memset(dC, 0, kChunk * n * W * sizeof(T));
    memset(chunk_dD, 0, vectors * W * sizeof(T));
    memset(chunk_dbias, 0, vectors * W * sizeof(T));
    const T* kept = static_cast<const T*>(args.checkpoints) + ((b * chunks + k) * all_vectors + c0 / W) * n * W;
    for (int64_t t = 0; t < steps; ++t) {
      const bool padding = flags && flags[t] == ssmoe::kPadding;
      const S *x = row_at<S>(args.x, b, t0 + t) + c0, *u = row_at<S>(args.delta, b, t0 + t) + c0;
      const S* z = gate ? row_at<S>(args.z, b, t0 + t) + c0 : nullptr;
      const S* dy = args.dy.data ? row_at<S>(args.dy, b, t0 + t) + c0 : nullptr;
      const int64_t ahead = t + kAhead < steps ? t0 + t + kAhead : args.l;
      prefetch_row<S>(args.x, b, ahead, args.l, c0, channels);
      prefetch_row<S>(args.delta, b, ahead, args.l, c0, channels);
      prefetch_row<S>(args.dx, b, t0 + t, args.l, c0, channels);
      prefetch_row<S>(args.ddelta, b, t0 + t, args.l, c0, channels);
      if (dy) prefetch_row<S>(args.dy, b, ahead, args.l, c0, channels);
      if (padding) {
        clear<T>(all.delta, t, vectors), clear<T>(all.drive, t, vectors), clear<T>(all.g, t, vectors);
        continue;
      }
      stage<S>(x, u, bias ? bias + c0 : nullptr, t, channels, all.delta, all.drive, slope);
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<T> g = dy ? load_some(dy + v * W, channels - v * W) : splat<T>(0);
        if (gate) {
          Vec<T> open = load_some(z + v * W, channels - v * W);
          g = g * open * sigmoid<T>(open);
        }
        put<T>(all.g + (v * kChunk + t) * W, g);
      }
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = v * kChunk * W, state = v * n * W;
      const Partial<T> p{all.delta + at, all.drive + at, all.g + at, all.y + at, all.ddrive + at, all.ddecay + at,
                         all.decay, all.carried};
      const T *a = A + state, *h = kept + state;
      auto run = deep<T>(p.delta, steps, a, n) ? (gate ? retreat_all<T, true, true> : retreat_all<T, false, true>)
                                               : (gate ? retreat_all<T, true, false> : retreat_all<T, false, false>);
      run(chunk, p, a, h, dh + state, dA + state, dB, dC);
    }
    for (int64_t t = 0; t < steps; ++t) {
      const bool padding = flags && flags[t] == ssmoe::kPadding;
      const S* x_row = row_at<S>(args.x, b, t0 + t) + c0;
      const S* z_row = gate ? row_at<S>(args.z, b, t0 + t) + c0 : nullptr;
      const S* dy_row = args.dy.data ? row_at<S>(args.dy, b, t0 + t) + c0 : nullptr;
      S *to_x = row_at<S>(args.dx, b, t0 + t) + c0, *to_delta = row_at<S>(args.ddelta, b, t0 + t) + c0;
      S* to_z = gate ? row_at<S>(args.dz, b, t0 + t) + c0 : nullptr;
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = (v * kChunk + t) * W, lanes = channels - v * W;
        if (padding) {
          store_some(to_x + v * W, splat<T>(0), lanes);
          store_some(to_delta + v * W, splat<T>(0), lanes);
          if (gate) store_some(to_z + v * W, splat<T>(0), lanes);
          continue;
        }
        Vec<T> x = load_some(x_row + v * W, lanes), g = get(all.g + at), ddrive = get(all.ddrive + at);
        Vec<T> skip = D ? load_some(D + c0 + v * W, lanes) : splat<T>(0);
        Vec<T> ddelta = (get(all.ddecay + at) + ddrive * x) * get(slope + at);
        put<T>(chunk_dD + v * W, get(chunk_dD + v * W) + g * x);
        put<T>(chunk_dbias + v * W, get(chunk_dbias + v * W) + ddelta);
        store_some(to_x + v * W, ddrive * get(all.delta + at) + g * skip, lanes);
        store_some(to_delta + v * W, ddelta, lanes);
        if (gate) {
          Vec<T> z = load_some(z_row + v * W, lanes), s = sigmoid<T>(z), y = get(all.y + at) + skip * x;
          Vec<T> dz = dy_row ? load_some(dy_row + v * W, lanes) * y * s * (T(1) + z * (T(1) - s)) : splat<T>(0);
          store_some(to_z + v * W, dz, lanes);
        }
      }
    }
    for (int64_t c = 0; c < vectors * W; ++c) dD[c] += chunk_dD[c], dbias[c] += chunk_dbias[c];
    T* to_B = static_cast<T*>(args.dB) + ((group * args.b + b) * args.l + t0) * n;
    T* to_C = static_cast<T*>(args.dC) + ((group * args.b + b) * args.l + t0) * n;
    for (int64_t i = 0; i < steps * n; ++i) {
      to_B[i] = sum<T>(get(dB + i * W));
      to_C[i] = sum<T>(get(dC + i * W));
    }
  }
  const int64_t row = b * args.d;
  unpack_states<T>(dA, c0, channels, n, static_cast<T*>(args.dA) + row * n);
  memcpy(static_cast<T*>(args.dD) + row + c0, dD, channels * sizeof(T));
  memcpy(static_cast<T*>(args.ddelta_bias) + row + c0, dbias, channels * sizeof(T));
  if (args.dinitial) unpack_states<T>(dh, c0, channels, n, static_cast<T*>(args.dinitial) + row * n);
}

template <class S>
void scan_backward(const Scan& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    scan_row_backward<S>(args, task / args.groups, task % args.groups);
}

}  // namespace
