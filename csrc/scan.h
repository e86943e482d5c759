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
constexpr int kStates = 16;
#else
constexpr int kStates = 4;
#endif
constexpr int kBackwardStates = 4;

template <class S>
SSMOE_INLINE S* row_at(const Rows& rows, int64_t b, int64_t l) {
  return static_cast<S*>(rows.data) + b * rows.batch_stride + l * rows.row_stride;
}

template <class T>
struct Scratch {
  explicit Scratch(int64_t count) {
    void* raw = __builtin_malloc(count * sizeof(T) + 64);
    memory = raw;
    data = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw) + 63) & ~uintptr_t(63));
  }
  ~Scratch() { __builtin_free(memory); }
  T* take(int64_t count) {
    T* p = data;
    data += (count + 15) & ~int64_t(15);
    return p;
  }
  void* memory;
  T* data;
};

// (d, n) rows of channels c0.. to [vector][n][lane]; lanes past the last channel are zero
template <class T>
void pack_states(const T* source, T factor, int64_t c0, int64_t channels, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < (channels + W - 1) / W * W; ++c) {
    T* to = out + (c / W) * n * W + c % W;
    for (int64_t i = 0; i < n; ++i)
      to[i * W] = c < channels && source ? source[(c0 + c) * n + i] * factor : T(0);
  }
}
template <class T>
void unpack_states(const T* in, T factor, int64_t c0, int64_t channels, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < n; ++i) out[(c0 + c) * n + i] = in[((c / W) * n + i) * W + c % W] * factor;
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
template <class T, int N>
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
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      state[i] = state[i] * exp<T>(step * get(a + i * W)) + input * B[i];
      if (i % 2)
        odd = odd + state[i] * C[i];
      else
        even = even + state[i] * C[i];
    }
    put<T>(y + t * W, even + odd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) put(h + (i0 + i) * W, state[i]);
}

template <class T>
void advance_all(const Chunk<T>& chunk, const T* delta, const T* drive, const T* A, T* h, T* y) {
  const int64_t n = chunk.args.n;
  int64_t i = 0;
  for (; i + kStates <= n; i += kStates) advance<T, kStates>(chunk, i, delta, drive, A, h, y);
  if constexpr (kStates > 4)
    for (; i + 4 <= n; i += 4) advance<T, 4>(chunk, i, delta, drive, A, h, y);
  for (; i < n; ++i) advance<T, 1>(chunk, i, delta, drive, A, h, y);
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
    Vec<T> delta = softplus<T>(u);
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

template <class S>
void scan_row(const Scan& args, int64_t b, int64_t c0, int64_t channels) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n, vectors = (channels + W - 1) / W, all_vectors = (args.d + W - 1) / W;
  const int64_t chunks = (args.l + kChunk - 1) / kChunk;
  const T *D = static_cast<const T*>(args.D), *bias = static_cast<const T*>(args.delta_bias);
  Scratch<T> scratch(2 * vectors * n * W + 2 * kChunk * n + 3 * kChunk * W + 128);
  T *A = scratch.take(vectors * n * W), *h = scratch.take(vectors * n * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n);
  T *delta = scratch.take(kChunk * W), *drive = scratch.take(kChunk * W), *y = scratch.take(kChunk * W);

  pack_states<T>(static_cast<const T*>(args.A), 1, c0, channels, n, A);
  const T* from = static_cast<const T*>(args.initial_state);
  if (from) from += (args.slots ? args.slots[b] : b) * args.d * n;
  pack_states<T>(from, 1, c0, channels, n, h);

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
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = c0 + v * W, lanes = args.d - c;
      Vec<T> offset = bias ? load_some(bias + c, lanes) : splat<T>(0);
      for (int64_t t = 0; t < steps; ++t) {
        if (flags && flags[t] == ssmoe::kPadding) {
          put<T>(delta + t * W, splat<T>(0));
          put<T>(drive + t * W, splat<T>(0));
          continue;
        }
        Vec<T> step = softplus<T>(load_some(row_at<S>(args.delta, b, t0 + t) + c, lanes) + offset);
        put<T>(delta + t * W, step);
        put<T>(drive + t * W, step * load_some(row_at<S>(args.x, b, t0 + t) + c, lanes));
      }
      advance_all<T>(chunk, delta, drive, A + v * n * W, h + v * n * W, y);
      Vec<T> skip = D ? load_some(D + c, lanes) : splat<T>(0);
      for (int64_t t = 0; t < steps; ++t) {
        Vec<T> out = get(y + t * W);
        if (D) out = out + skip * load_some(row_at<S>(args.x, b, t0 + t) + c, lanes);
        if (args.z.data) {
          Vec<T> z = load_some(row_at<S>(args.z, b, t0 + t) + c, lanes);
          out = out * z * sigmoid<T>(z);
        }
        if (flags && flags[t] == ssmoe::kPadding) out = splat<T>(0);
        store_some(row_at<S>(args.y, b, t0 + t) + c, out, lanes);
      }
    }
  }
  T* to = static_cast<T*>(args.final_state) + (args.out_slots ? args.out_slots[b] : b) * args.d * n;
  unpack_states<T>(h, 1, c0, channels, n, to);
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
  T *delta, *drive, *x, *g;  // in
  T* y;                      // out: <C, h>, only with a gate
  T *ddrive, *ddecay;        // out: sum over n of dh B, and of dh h_{t-1} exp(delta A) A
  T *decay, *carried;        // scratch [step][N][lane]: exp(delta A), and that times h_{t-1}
};

// Recompute the states i0 .. i0 + N of a chunk, then walk it backwards.
// With q = dh_t h_{t-1} exp(delta A):  ddelta += q A,  dA += q delta,  dB += dh drive,  dC += g h_t.
template <class T, int N, bool kGate>
SSMOE_INLINE void retreat(const Chunk<T>& chunk, int64_t i0, const Partial<T>& p, const T* A, const T* h, T* dh,
                          T* dA, T* dB, T* dC) {
  constexpr int W = kLanes<T>;
  const int64_t n = chunk.args.n;
  {
    Vec<T> state[N], a[N];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) state[i] = get(h + (i0 + i) * W), a[i] = get(A + (i0 + i) * W);
    for (int64_t t = 0; t < chunk.steps; ++t) {
      if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) state[i] = splat<T>(0);
      }
      Vec<T> step = get(p.delta + t * W), input = get(p.drive + t * W);
      Vec<T> y = kGate && i0 ? get(p.y + t * W) : splat<T>(0);
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) {
        Vec<T> decay = exp<T>(step * a[i]);
        Vec<T> carried = decay * state[i];
        put<T>(p.decay + (t * N + i) * W, decay);
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
    total[i] = get(dA + (i0 + i) * W);
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
    put(dA + (i0 + i) * W, total[i]);
  }
}

template <class T, bool kGate>
void retreat_all(const Chunk<T>& chunk, const Partial<T>& p, const T* A, const T* h, T* dh, T* dA, T* dB, T* dC) {
  const int64_t n = chunk.args.n;
  int64_t i = 0;
  for (; i + kBackwardStates <= n; i += kBackwardStates)
    retreat<T, kBackwardStates, kGate>(chunk, i, p, A, h, dh, dA, dB, dC);
  for (; i < n; ++i) retreat<T, 1, kGate>(chunk, i, p, A, h, dh, dA, dB, dC);
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

  Scratch<T> scratch(3 * packed + 2 * vectors * W + (2 + 2 * W) * kChunk * n + kChunk * W * (8 + 2 * kBackwardStates) +
                     512);
  T *A = scratch.take(packed), *dA = scratch.take(packed), *dh = scratch.take(packed);
  T *dD = scratch.take(vectors * W), *dbias = scratch.take(vectors * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n);
  T *dB = scratch.take(kChunk * n * W), *dC = scratch.take(kChunk * n * W);
  T* slope = scratch.take(kChunk * W);
  Partial<T> p;
  T** const buffers[] = {&p.delta, &p.drive, &p.x, &p.g, &p.y, &p.ddrive, &p.ddecay};
  for (T** buffer : buffers) *buffer = scratch.take(kChunk * W);
  p.decay = scratch.take(kChunk * W * kBackwardStates);
  p.carried = scratch.take(kChunk * W * kBackwardStates);

  pack_states<T>(static_cast<const T*>(args.A), 1, c0, channels, n, A);
  const T* dfinal = static_cast<const T*>(args.dfinal);
  pack_states<T>(dfinal ? dfinal + b * args.d * n : nullptr, 1, c0, channels, n, dh);
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
    const T* kept = static_cast<const T*>(args.checkpoints) + ((b * chunks + k) * all_vectors + c0 / W) * n * W;
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t c = c0 + v * W, lanes = args.d - c;
      Vec<T> offset = bias ? load_some(bias + c, lanes) : splat<T>(0);
      Vec<T> skip = D ? load_some(D + c, lanes) : splat<T>(0);
      for (int64_t t = 0; t < steps; ++t) {
        if (flags && flags[t] == ssmoe::kPadding) {
          T* const buffers[] = {p.delta, p.drive, p.x, p.g, slope};
          for (T* buffer : buffers) put<T>(buffer + t * W, splat<T>(0));
          continue;
        }
        Vec<T> u = load_some(row_at<S>(args.delta, b, t0 + t) + c, lanes) + offset;
        Vec<T> x = load_some(row_at<S>(args.x, b, t0 + t) + c, lanes);
        Vec<T> g = args.dy.data ? load_some(row_at<S>(args.dy, b, t0 + t) + c, lanes) : splat<T>(0);
        if (gate) {
          Vec<T> z = load_some(row_at<S>(args.z, b, t0 + t) + c, lanes);
          g = g * z * sigmoid<T>(z);
        }
        Vec<T> step = softplus<T>(u);
        put<T>(p.delta + t * W, step);
        put<T>(p.drive + t * W, step * x);
        put<T>(p.x + t * W, x);
        put<T>(p.g + t * W, g);
        put<T>(slope + t * W, sigmoid<T>(u));
      }
      const T *a = A + v * n * W, *h = kept + v * n * W;
      if (gate)
        retreat_all<T, true>(chunk, p, a, h, dh + v * n * W, dA + v * n * W, dB, dC);
      else
        retreat_all<T, false>(chunk, p, a, h, dh + v * n * W, dA + v * n * W, dB, dC);

      Vec<T> sum_D = get(dD + v * W), sum_bias = get(dbias + v * W);
      for (int64_t t = 0; t < steps; ++t) {
        const bool padding = flags && flags[t] == ssmoe::kPadding;
        Vec<T> x = get(p.x + t * W), g = get(p.g + t * W), ddrive = get(p.ddrive + t * W);
        Vec<T> ddelta = (get(p.ddecay + t * W) + ddrive * x) * get(slope + t * W);
        Vec<T> dx = ddrive * get(p.delta + t * W) + g * skip;
        if (padding) dx = ddelta = splat<T>(0);
        sum_D = sum_D + g * x;
        sum_bias = sum_bias + ddelta;
        store_some(row_at<S>(args.dx, b, t0 + t) + c, dx, lanes);
        store_some(row_at<S>(args.ddelta, b, t0 + t) + c, ddelta, lanes);
        if (gate) {
          Vec<T> dz = splat<T>(0);
          if (!padding && args.dy.data) {
            Vec<T> z = load_some(row_at<S>(args.z, b, t0 + t) + c, lanes), s = sigmoid<T>(z);
            Vec<T> y = get(p.y + t * W) + skip * x;
            dz = load_some(row_at<S>(args.dy, b, t0 + t) + c, lanes) * y * s * (T(1) + z * (T(1) - s));
          }
          store_some(row_at<S>(args.dz, b, t0 + t) + c, dz, lanes);
        }
      }
      put<T>(dD + v * W, sum_D);
      put<T>(dbias + v * W, sum_bias);
    }
    T* to_B = static_cast<T*>(args.dB) + ((group * args.b + b) * args.l + t0) * n;
    T* to_C = static_cast<T*>(args.dC) + ((group * args.b + b) * args.l + t0) * n;
    for (int64_t i = 0; i < steps * n; ++i) {
      to_B[i] = sum<T>(get(dB + i * W));
      to_C[i] = sum<T>(get(dC + i * W));
    }
  }
  const int64_t row = b * args.d;
  unpack_states<T>(dA, 1, c0, channels, n, static_cast<T*>(args.dA) + row * n);
  memcpy(static_cast<T*>(args.dD) + row + c0, dD, channels * sizeof(T));
  memcpy(static_cast<T*>(args.ddelta_bias) + row + c0, dbias, channels * sizeof(T));
  if (args.dinitial) unpack_states<T>(dh, 1, c0, channels, n, static_cast<T*>(args.dinitial) + row * n);
}

template <class S>
void scan_backward(const Scan& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    scan_row_backward<S>(args, task / args.groups, task % args.groups);
}

}  // namespace
