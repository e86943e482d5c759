// The selective scan, lanes = channels. A task owns a group of channels of one row; it walks the row in chunks
// of kChunk positions, and a chunk in tiles of kTile channels, so that steps, inputs and outputs of a tile stay in
// the first-level cache and the states of up to kStates of the n state entries in registers.
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
constexpr int64_t kTile = 64;
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
    const bool padding = flags && flags[t] == ssmoe::kPadding;
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store_some(out + t * n + i, padding ? splat<T>(0) : load_some(from + i, n - i), n - i);
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

// What a tile needs of the rows that come after it, asked for while it computes: one line a vector and position.
struct Upcoming {
  const char* row[7];
  int64_t stride[7];
  int count = 0;
  template <class S>
  void add(const Rows& rows, int64_t b, int64_t t, int64_t c) {
    if (!rows.data) return;
    stride[count] = rows.row_stride * int64_t(sizeof(S));
    row[count++] = reinterpret_cast<const char*>(row_at<S>(rows, b, t) + c);
  }
  SSMOE_INLINE void fetch(int64_t t, int64_t offset) const {
    for (int i = 0; i < count; ++i) __builtin_prefetch(row[i] + t * stride[i] + offset, 0, 2);
  }
};

// Steps are staged in units of kStepUnit: powers of two where the exponential wants them.
template <class T>
constexpr bool kPowersOfTwo = SSMOE_BYTES == 64 && sizeof(T) == 4;
template <class T>
constexpr T kStepUnit = kPowersOfTwo<T> ? kLog2E<T> : T(1);

// exp(delta A) of N states, in two halves: `next` and `next_index` become the first half of exp(step A), while
// `decay` and `index` go from their first half to the value. The two are interleaved, so that the units are busy.
template <class T, int N, bool kDeep>
SSMOE_INLINE void decays(Vec<T> step, const T* A, Vec<T>* next, Vec<T>* next_index, Vec<T>* decay, Vec<T>* index) {
  SSMOE_EACH_VECTOR next[i] = step * get(A + i * kLanes<T>);
#if SSMOE_BYTES == 64
  if constexpr (kPowersOfTwo<T>) {
    if constexpr (kDeep) {
      SSMOE_EACH_VECTOR next[i] = larger<T>(next[i], splat<T>(-126));
    }
    return exp2_halves<N>(next, next_index, decay, index);
  }
#endif
  exp_all<T, N, kDeep>(decay);
}

// Where the outputs of one whole channel vector go, at the chunk's first position.
template <class S>
struct Destination {
  using T = typename Accumulator<S>::type;
  const S* x;
  S* y;
  int64_t x_stride, y_stride;
  Vec<T> skip;  // D
};

// states i0 .. i0 + N of one channel vector through a chunk; y gets or adds <C, h>, the vector's last states with
// kFinish add the skip and write the output instead. Reads one step beyond the chunk.
template <class S, int N, bool kDeep, bool kFinish, class T>
SSMOE_INLINE void advance(const Chunk<T>& chunk, int64_t i0, const T* delta, const T* drive, const T* A, T* h,
                          T* y, const Destination<S>& to, const Upcoming& ahead, int64_t offset) {
  constexpr int W = kLanes<T>, M = N < 4 ? N : 4;
  const int64_t n = chunk.args.n;
  Vec<T> state[N], decay[M], index[M], unused[M] = {};
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) state[i] = get(h + (i0 + i) * W);
  const T* a = A + i0 * W;
  const T* B = chunk.B + i0;
  const T* C = chunk.C + i0;
  const S* x = to.x;
  S* out = to.y;
  Vec<T> step = get(delta);
  decays<T, M, kDeep>(step, a, decay, index, unused, unused);
  for (int64_t t = 0; t < chunk.steps; ++t, B += n, C += n) {
    if (!i0) ahead.fetch(t, offset);
    if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
#pragma GCC unroll 16
      for (int i = 0; i < N; ++i) state[i] = splat<T>(0);
    }
    Vec<T> input = get(drive + t * W), next_step = get(delta + (t + 1) * W);
    Vec<T> even = i0 ? get(y + t * W) : splat<T>(0), odd = splat<T>(0);
    if (kFinish) odd = to.skip * load(x), x += to.x_stride;
#pragma GCC unroll 16
    for (int j = 0; j < N; j += M) {
      Vec<T> next[M], next_index[M];
      decays<T, M, kDeep>(j + M < N ? step : next_step, a + (j + M) % N * W, next, next_index, decay, index);
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) state[i + j] = state[i + j] * decay[i] + input * B[i + j];
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) {
        if (i % 2)
          odd = odd + state[i + j] * C[i + j];
        else
          even = even + state[i + j] * C[i + j];
      }
#pragma GCC unroll 16
      for (int i = 0; i < M; ++i) decay[i] = next[i], index[i] = next_index[i];
    }
    step = next_step;
    if (kFinish) {
      const bool padding = chunk.flags && chunk.flags[t] == ssmoe::kPadding;
      store(out, padding ? splat<T>(0) : even + odd);
      out += to.y_stride;
    } else {
      put<T>(y + t * W, even + odd);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) put(h + (i0 + i) * W, state[i]);
}

template <class S, int N, bool kDeep, bool kFinish, class T>
SSMOE_INLINE void advance_each(const Chunk<T>& chunk, int64_t& i, const T* delta, const T* drive, const T* A, T* h,
                               T* y, const Destination<S>& to, const Upcoming& ahead, int64_t offset) {
  const int64_t n = chunk.args.n;
  for (; i + N <= n - (kFinish ? N : 0); i += N)
    advance<S, N, kDeep, false>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
  if (kFinish && i + N == n) {
    advance<S, N, kDeep, true>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
    i += N;
  } else if (i + N <= n) {
    advance<S, N, kDeep, false>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
    i += N;
  }
}
template <class S, bool kDeep, bool kFinish, class T>
void advance_all(const Chunk<T>& chunk, const T* delta, const T* drive, const T* A, T* h, T* y,
                 const Destination<S>& to, const Upcoming& ahead, int64_t offset) {
  int64_t i = 0;
  advance_each<S, kStates, kDeep, kFinish>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
  if constexpr (kStates > 8) advance_each<S, 8, kDeep, kFinish>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
  if constexpr (kStates > 4) advance_each<S, 4, kDeep, kFinish>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
  advance_each<S, 1, kDeep, kFinish>(chunk, i, delta, drive, A, h, y, to, ahead, offset);
}

// The largest -A of a channel vector, or zero; NaN stays.
template <class T>
Vec<T> steepest_of(const T* A, int64_t n) {
  Vec<T> steepest = splat<T>(0);
  for (int64_t i = 0; i < n; ++i) steepest = larger<T>(-get(A + i * kLanes<T>), steepest);
  return steepest;
}
// Whether some exp(delta A) of a chunk could fall below the smallest normal number.
template <class T>
bool deep(Vec<T> longest, Vec<T> steepest) {
  return !all_below<T>(longest * steepest, -kShallow<T> * kStepUnit<T>);
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
    softplus_all<T, 1, false>(&u, nullptr);
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

// Step sizes and inputs of N channel vectors at kSteps positions from t on, as in stage_vectors: several positions at
// once, because a softplus is one long chain of dependent operations.
template <class S, int N, int kSteps, bool kWhole, bool kSlope, class T>
SSMOE_INLINE void stage_steps(const S* x, int64_t x_stride, const S* u, int64_t u_stride, const Vec<T>* shift,
                              int64_t channels, int64_t t, T* delta, T* drive, T* slope, Vec<T>* most) {
  constexpr int W = kLanes<T>, M = N * kSteps;
  Vec<T> step[M], steep[M];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
    step[i] = load_some(u + i / N * u_stride + i % N * W, kWhole ? W : channels - i % N * W) + shift[i % N];
  softplus_all<T, M, kSlope>(step, steep);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i) {
    const int64_t at = (i % N * kChunk + t + i / N) * W;
    Vec<T> unit = step[i] * kStepUnit<T>;
    put<T>(delta + at, unit);
    most[i % N] = larger<T>(unit, most[i % N]);
    put<T>(drive + at, step[i] * load_some(x + i / N * x_stride + i % N * W, kWhole ? W : channels - i % N * W));
    if (kSlope) put<T>(slope + at, steep[i]);
  }
}
// Step sizes and inputs of N channel vectors over a chunk, [vector][kChunk][lane], and the longest step of each lane;
// slope as in softplus_all. x and u point at the vectors' first position.
template <class S, int N, bool kWhole, bool kSlope, class T>
void stage_vectors(const S* x, int64_t x_stride, const S* u, int64_t u_stride, const T* bias, int64_t channels,
                   const uint8_t* flags, int64_t steps, T* delta, T* drive, T* slope, T* longest) {
  constexpr int W = kLanes<T>, kSteps = SSMOE_BYTES == 64 ? 2 : 1;
  Vec<T> shift[N], most[N];
  SSMOE_EACH_VECTOR most[i] = splat<T>(0);
  SSMOE_EACH_VECTOR shift[i] = bias ? load_some(bias + i * W, kWhole ? W : channels - i * W) : splat<T>(0);
  int64_t t = 0;
  for (; !flags && t + kSteps <= steps; t += kSteps, x += kSteps * x_stride, u += kSteps * u_stride)
    stage_steps<S, N, kSteps, kWhole, kSlope>(x, x_stride, u, u_stride, shift, channels, t, delta, drive, slope, most);
  for (; t < steps; ++t, x += x_stride, u += u_stride) {
    if (flags && flags[t] == ssmoe::kPadding) {
      SSMOE_EACH_VECTOR {
        const int64_t at = (i * kChunk + t) * W;
        put<T>(delta + at, splat<T>(0)), put<T>(drive + at, splat<T>(0));
        if (kSlope) put<T>(slope + at, splat<T>(0));
      }
      continue;
    }
    stage_steps<S, N, 1, kWhole, kSlope>(x, x_stride, u, u_stride, shift, channels, t, delta, drive, slope, most);
  }
  SSMOE_EACH_VECTOR put<T>(longest + i * W, most[i]);
}
template <class S, bool kSlope, class T>
void stage(const Scan& args, int64_t b, int64_t t0, int64_t steps, const uint8_t* flags, int64_t c, int64_t channels,
           T* delta, T* drive, T* slope, T* longest) {
  constexpr int W = kLanes<T>, N = 4;
  const T* bias = static_cast<const T*>(args.delta_bias);
  const S *x = row_at<S>(args.x, b, t0) + c, *u = row_at<S>(args.delta, b, t0) + c;
  if (bias) bias += c;
  for (int64_t v = 0; v * W < channels;) {
    const int64_t at = v * kChunk * W, lanes = channels - v * W;
    const bool whole = lanes >= N * W;
    auto run = whole ? stage_vectors<S, N, true, kSlope, T> : stage_vectors<S, 1, false, kSlope, T>;
    run(x + v * W, args.x.row_stride, u + v * W, args.delta.row_stride, bias ? bias + v * W : nullptr, lanes, flags,
        steps, delta + at, drive + at, kSlope ? slope + at : nullptr, longest + v * W);
    v += whole ? N : 1;
  }
}

// y of a tile: the skip and the gate, from the staged <C, h>
template <class S, bool kWhole, class T>
void finish(const Scan& args, int64_t b, int64_t t0, int64_t steps, const uint8_t* flags, int64_t c, int64_t channels,
            const T* y) {
  constexpr int W = kLanes<T>;
  const T* D = static_cast<const T*>(args.D);
  for (int64_t t = 0; t < steps; ++t, y += W) {
    const bool padding = flags && flags[t] == ssmoe::kPadding;
    const S *x = row_at<S>(args.x, b, t0 + t) + c, *z = args.z.data ? row_at<S>(args.z, b, t0 + t) + c : nullptr;
    S* to = row_at<S>(args.y, b, t0 + t) + c;
#pragma GCC unroll 4
    for (int64_t v = 0; v < (kWhole ? kTile : channels); v += W) {
      const int64_t lanes = kWhole ? W : channels - v;
      Vec<T> out = get(y + v * kChunk);
      if (D) out = out + load_some(D + c + v, lanes) * load_some(x + v, lanes);
      if (z) {
        Vec<T> gate = load_some(z + v, lanes);
        out = out * gate * sigmoid<T>(gate);
      }
      store_some(to + v, padding ? splat<T>(0) : out, lanes);
    }
  }
}

template <class S>
void scan_row(const Scan& args, int64_t b, int64_t c0, int64_t channels) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n, vectors = (channels + W - 1) / W, all_vectors = (args.d + W - 1) / W;
  const int64_t chunks = (args.l + kChunk - 1) / kChunk, staged = kTile * kChunk;
  Scratch<T> scratch(2 * vectors * n * W + vectors * W + 2 * kChunk * n + 3 * staged + kTile + 256);
  T *A = scratch.take(vectors * n * W), *h = scratch.take(vectors * n * W), *steepest = scratch.take(vectors * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n), *longest = scratch.take(kTile);
  T *delta = scratch.take(staged), *drive = scratch.take(staged), *y = scratch.take(staged);

  const T* D = static_cast<const T*>(args.D);
  pack_states<T>(static_cast<const T*>(args.A), c0, channels, n, A);
  for (int64_t v = 0; v < vectors; ++v) put<T>(steepest + v * W, steepest_of<T>(A + v * n * W, n));
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
    for (int64_t at = 0; at < channels; at += kTile) {
      const int64_t c = c0 + at, width = channels - at < kTile ? channels - at : kTile;
      const bool last = at + kTile >= channels, fused = !args.z.data && width % W == 0;
      Upcoming ahead;
      if (!last || t0 + kChunk < args.l) {
        const int64_t next = last ? c0 : c + kTile, row = last ? t0 + kChunk : t0;
        const Rows* const wanted[] = {&args.x, &args.delta, &args.z, &args.y};
        for (const Rows* rows : wanted) ahead.add<S>(*rows, b, row, next);
      }
      stage<S, false>(args, b, t0, steps, flags, c, width, delta, drive, static_cast<T*>(nullptr), longest);
      for (int64_t v = 0; v * W < width; ++v) {
        const int64_t in = v * kChunk * W, vector = at / W + v;
        const T* a = A + vector * n * W;
        const int64_t cv = c + v * W;
        const Destination<S> to{row_at<S>(args.x, b, t0) + cv, row_at<S>(args.y, b, t0) + cv, args.x.row_stride,
                                args.y.row_stride, D && fused ? load(D + cv) : splat<T>(0)};
        const bool steep = deep<T>(get(longest + v * W), get(steepest + vector * W));
        auto run = fused ? (steep ? advance_all<S, true, true, T> : advance_all<S, false, true, T>)
                         : (steep ? advance_all<S, true, false, T> : advance_all<S, false, false, T>);
        run(chunk, delta + in, drive + in, a, h + vector * n * W, y + in, to, ahead, v * W * sizeof(S));
      }
      if (!fused) {
        auto end = width == kTile ? finish<S, true, T> : finish<S, false, T>;
        end(args, b, t0, steps, flags, c, width, y);
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
  T *delta, *drive, *g;  // in
  T* y;                  // out: <C, h>, only with a gate
  T *ddrive, *ddecay;    // out: sum over n of dh B, and of dh h_{t-1} exp(delta A) A
  T *decay, *carried;    // scratch [step][N][lane]: exp(delta A), and that times h_{t-1}
};

// dA sums over all positions: kPlain of them at a time plainly, those sums into [value, rest], so that rounding does
// not grow with the length.
constexpr int64_t kPlain = 16;
template <class T>
SSMOE_INLINE void add_exactly(T* to, Vec<T> v) {
  Vec<T> old = get(to), sum = old + v, part = sum - old;
  put<T>(to, sum);
  put<T>(to + kLanes<T>, get(to + kLanes<T>) + ((old - (sum - part)) + (v - part)));
}

// Recompute the states i0 .. i0 + N of a chunk, then walk it backwards. dB, dC: [step][N][lane], of these states.
// With q = dh_t h_{t-1} exp(delta A):  ddelta += q A,  dA += q delta,  dB += dh drive,  dC += g h_t.
template <class T, int N, bool kGate, bool kDeep>
SSMOE_INLINE void retreat(const Chunk<T>& chunk, int64_t i0, const Partial<T>& p, const T* A, const T* h, T* dh,
                          T* dA, T* dB, T* dC, const Upcoming& ahead, int64_t offset) {
  constexpr int W = kLanes<T>;
  const int64_t n = chunk.args.n;
  const T *a = A + i0 * W, *B = chunk.B + i0, *C = chunk.C + i0;
  {
    Vec<T> state[N], decay[N], index[N], unused[N] = {};
    SSMOE_EACH_VECTOR state[i] = get(h + (i0 + i) * W);
    Vec<T> step = get(p.delta);
    decays<T, N, kDeep>(step, a, decay, index, unused, unused);
    for (int64_t t = 0; t < chunk.steps; ++t) {
      if (!i0) ahead.fetch(t, offset);
      if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
        SSMOE_EACH_VECTOR state[i] = splat<T>(0);
      }
      Vec<T> next[N], next_index[N];
      decays<T, N, kDeep>(get(p.delta + (t + 1) * W), a, next, next_index, decay, index);
      Vec<T> input = get(p.drive + t * W), g = get(p.g + t * W);
      Vec<T> y = kGate && i0 ? get(p.y + t * W) : splat<T>(0);
      T* to_C = dC + t * N * W;
      SSMOE_EACH_VECTOR {
        Vec<T> carried = decay[i] * state[i];
        put<T>(p.decay + (t * N + i) * W, decay[i]);
        put<T>(p.carried + (t * N + i) * W, carried);
        state[i] = carried + input * B[t * n + i];
        put<T>(to_C + i * W, get(to_C + i * W) + g * state[i]);
        if (kGate) y = y + state[i] * C[t * n + i];
      }
      if (kGate) put<T>(p.y + t * W, y);
      SSMOE_EACH_VECTOR decay[i] = next[i], index[i] = next_index[i];
    }
  }
  Vec<T> gradient[N], total[N];
  SSMOE_EACH_VECTOR {
    gradient[i] = get(dh + (i0 + i) * W);
    total[i] = splat<T>(0);
  }
  for (int64_t t = chunk.steps - 1; t >= 0; --t) {
    Vec<T> step = get(p.delta + t * W), input = get(p.drive + t * W), g = get(p.g + t * W);
    Vec<T> ddrive = splat<T>(0), ddecay = splat<T>(0);
    T* to_B = dB + t * N * W;
    SSMOE_EACH_VECTOR {
      gradient[i] = gradient[i] + g * C[t * n + i];
      put<T>(to_B + i * W, get(to_B + i * W) + gradient[i] * input);
      Vec<T> q = gradient[i] * get(p.carried + (t * N + i) * W);
      ddecay = ddecay + q * get(a + i * W);
      total[i] = total[i] + q * step;
      ddrive = ddrive + gradient[i] * B[t * n + i];
      gradient[i] = gradient[i] * get(p.decay + (t * N + i) * W);
    }
    // block by block, so that rounding grows with their number only
    put<T>(p.ddrive + t * W, i0 ? get(p.ddrive + t * W) + ddrive : ddrive);
    put<T>(p.ddecay + t * W, i0 ? get(p.ddecay + t * W) + ddecay : ddecay);
    if (t % kPlain == 0) {
      SSMOE_EACH_VECTOR add_exactly<T>(dA + (i0 + i) * 2 * W, total[i]), total[i] = splat<T>(0);
    }
    if (chunk.flags && chunk.flags[t] == ssmoe::kReset) {
      SSMOE_EACH_VECTOR gradient[i] = splat<T>(0);
    }
  }
  SSMOE_EACH_VECTOR put(dh + (i0 + i) * W, gradient[i]);
}

// States i0 .. of a channel vector, kBackwardStates of them or one.
template <class T, bool kGate>
void retreat_some(bool deep, const Chunk<T>& chunk, int64_t i0, const Partial<T>& p, const T* A, const T* h, T* dh,
                  T* dA, T* dB, T* dC, const Upcoming& ahead, int64_t offset) {
  constexpr int N = kBackwardStates;
  const bool several = i0 + N <= chunk.args.n;
  auto run = several ? (deep ? retreat<T, N, kGate, true> : retreat<T, N, kGate, false>)
                     : (deep ? retreat<T, 1, kGate, true> : retreat<T, 1, kGate, false>);
  run(chunk, i0, p, A, h, dh, dA, dB + i0 * kChunk * kLanes<T>, dC + i0 * kChunk * kLanes<T>, ahead, offset);
}

// dB and dC of a chunk lie [states][step][state of those][lane], in blocks of kBackwardStates and then of one.
template <class T>
void sum_lanes(const T* in, int64_t steps, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t i0 = 0; i0 < n;) {
    const int64_t some = i0 + kBackwardStates <= n ? kBackwardStates : 1;
    for (int64_t t = 0; t < steps; ++t)
      for (int64_t i = 0; i < some; ++i) out[t * n + i0 + i] = sum<T>(get(in + (i0 * kChunk + t * some + i) * W));
    i0 += some;
  }
}

// The gradient of <C, h> of a tile, [vector][kChunk][lane]: dy, through the gate if there is one.
template <class S, bool kWhole, class T>
void stage_gradient(const Scan& args, int64_t b, int64_t t0, int64_t steps, const uint8_t* flags, int64_t c,
                    int64_t channels, T* g) {
  constexpr int W = kLanes<T>;
  for (int64_t t = 0; t < steps; ++t, g += W) {
    const bool none = !args.dy.data || (flags && flags[t] == ssmoe::kPadding);
    const S* dy = none ? nullptr : row_at<S>(args.dy, b, t0 + t) + c;
    const S* z = args.z.data ? row_at<S>(args.z, b, t0 + t) + c : nullptr;
    for (int64_t v = 0; v < (kWhole ? kTile : channels); v += W) {
      const int64_t lanes = kWhole ? W : channels - v;
      Vec<T> from = none ? splat<T>(0) : load_some(dy + v, lanes);
      if (z && !none) {
        Vec<T> open = load_some(z + v, lanes);
        from = from * open * sigmoid<T>(open);
      }
      put<T>(g + v * kChunk, from);
    }
  }
}

// dx, ddelta and dz of a tile, and its part of dD and ddelta_bias, all from the staged sums
template <class S, bool kWhole, class T>
void finish_backward(const Scan& args, int64_t b, int64_t t0, int64_t steps, const uint8_t* flags, int64_t c,
                     int64_t channels, const Partial<T>& p, const T* slope, T* dD, T* dbias) {
  constexpr int W = kLanes<T>;
  const T* D = static_cast<const T*>(args.D);
  for (int64_t v = 0; v < (kWhole ? kTile : channels); v += W) {
    const int64_t lanes = kWhole ? W : channels - v;
    Vec<T> skip = D ? load_some(D + c + v, lanes) : splat<T>(0), sum_D = splat<T>(0), sum_bias = splat<T>(0);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = v * kChunk + t * W;
      S* to_x = row_at<S>(args.dx, b, t0 + t) + c + v;
      S* to_delta = row_at<S>(args.ddelta, b, t0 + t) + c + v;
      S* to_z = args.z.data ? row_at<S>(args.dz, b, t0 + t) + c + v : nullptr;
      if (flags && flags[t] == ssmoe::kPadding) {
        store_some(to_x, splat<T>(0), lanes);
        store_some(to_delta, splat<T>(0), lanes);
        if (to_z) store_some(to_z, splat<T>(0), lanes);
        continue;
      }
      Vec<T> x = load_some(row_at<S>(args.x, b, t0 + t) + c + v, lanes), g = get(p.g + at), ddrive = get(p.ddrive + at);
      Vec<T> ddelta = (get(p.ddecay + at) + ddrive * x) * get(slope + at);
      sum_D = sum_D + g * x;
      sum_bias = sum_bias + ddelta;
      store_some(to_x, ddrive * (get(p.delta + at) * (T(1) / kStepUnit<T>)) + g * skip, lanes);
      store_some(to_delta, ddelta, lanes);
      if (to_z) {
        Vec<T> z = load_some(row_at<S>(args.z, b, t0 + t) + c + v, lanes), s = sigmoid<T>(z);
        Vec<T> dy = args.dy.data ? load_some(row_at<S>(args.dy, b, t0 + t) + c + v, lanes) : splat<T>(0);
        store_some(to_z, dy * (get(p.y + at) + skip * x) * s * (T(1) + z * (T(1) - s)), lanes);
      }
    }
    put<T>(dD + v, get(dD + v) + sum_D);
    put<T>(dbias + v, get(dbias + v) + sum_bias);
  }
}

template <class S>
void scan_row_backward(const Scan& args, int64_t b, int64_t group) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t n = args.n, c0 = group * args.group;
  const int64_t channels = args.d - c0 < args.group ? args.d - c0 : args.group;
  const int64_t vectors = (channels + W - 1) / W, all_vectors = (args.d + W - 1) / W;
  const int64_t chunks = (args.l + kChunk - 1) / kChunk, packed = vectors * n * W, staged = kTile * kChunk;
  const int64_t sums = kChunk * n * W;

  Scratch<T> scratch(4 * packed + 3 * vectors * W + 2 * kChunk * n + 2 * sums + 7 * staged + kTile +
                     2 * kChunk * W * kBackwardStates + 512);
  T *A = scratch.take(packed), *dA = scratch.take(2 * packed), *dh = scratch.take(packed);
  T *dD = scratch.take(vectors * W), *dbias = scratch.take(vectors * W), *steepest = scratch.take(vectors * W);
  T *B = scratch.take(kChunk * n), *C = scratch.take(kChunk * n), *longest = scratch.take(kTile);
  T *dB = scratch.take(sums), *dC = scratch.take(sums), *slope = scratch.take(staged);
  Partial<T> all;
  T** const buffers[] = {&all.delta, &all.drive, &all.g, &all.y, &all.ddrive, &all.ddecay};
  for (T** buffer : buffers) *buffer = scratch.take(staged);
  all.decay = scratch.take(kChunk * W * kBackwardStates);
  all.carried = scratch.take(kChunk * W * kBackwardStates);

  pack_states<T>(static_cast<const T*>(args.A), c0, channels, n, A);
  for (int64_t v = 0; v < vectors; ++v) put<T>(steepest + v * W, steepest_of<T>(A + v * n * W, n));
  const T* dfinal = static_cast<const T*>(args.dfinal);
  pack_states<T>(dfinal ? dfinal + b * args.d * n : nullptr, c0, channels, n, dh);
  memset(dA, 0, 2 * packed * sizeof(T));
  memset(dD, 0, vectors * W * sizeof(T));
  memset(dbias, 0, vectors * W * sizeof(T));

  for (int64_t k = chunks - 1; k >= 0; --k) {
    const int64_t t0 = k * kChunk, steps = args.l - t0 < kChunk ? args.l - t0 : kChunk;
    const uint8_t* flags = args.flags ? args.flags + b * args.l + t0 : nullptr;
    widen_rows<S>(args.B, b, t0, steps, n, flags, B);
    widen_rows<S>(args.C, b, t0, steps, n, flags, C);
    const Chunk<T> chunk{args, b, t0, steps, flags, B, C};
    memset(dB, 0, sums * sizeof(T));
    memset(dC, 0, sums * sizeof(T));
    const T* kept = static_cast<const T*>(args.checkpoints) + ((b * chunks + k) * all_vectors + c0 / W) * n * W;
    for (int64_t at = 0; at < channels; at += kTile) {
      const int64_t c = c0 + at, width = channels - at < kTile ? channels - at : kTile;
      const bool last = at + kTile >= channels;
      Upcoming ahead;
      if (!last || k) {
        const Rows* const wanted[] = {&args.x, &args.delta, &args.z, &args.dy, &args.dx, &args.ddelta, &args.dz};
        for (const Rows* rows : wanted) ahead.add<S>(*rows, b, last ? t0 - kChunk : t0, last ? c0 : c + kTile);
      }
      stage<S, true>(args, b, t0, steps, flags, c, width, all.delta, all.drive, slope, longest);
      auto gradient = width == kTile ? stage_gradient<S, true, T> : stage_gradient<S, false, T>;
      gradient(args, b, t0, steps, flags, c, width, all.g);
      for (int64_t i0 = 0; i0 < n; i0 += i0 + kBackwardStates <= n ? kBackwardStates : 1)
        for (int64_t v = 0; v * W < width; ++v) {
          const int64_t in = v * kChunk * W, vector = at / W + v, state = vector * n * W;
          const Partial<T> p{all.delta + in,  all.drive + in,  all.g + in, all.y + in,
                             all.ddrive + in, all.ddecay + in, all.decay,  all.carried};
          auto run = args.z.data ? retreat_some<T, true> : retreat_some<T, false>;
          run(deep<T>(get(longest + v * W), get(steepest + vector * W)), chunk, i0, p, A + state, kept + state,
              dh + state, dA + 2 * state, dB, dC, ahead, v * W * sizeof(S));
        }
      auto end = width == kTile ? finish_backward<S, true, T> : finish_backward<S, false, T>;
      end(args, b, t0, steps, flags, c, width, all, slope, dD + at, dbias + at);
    }
    const int64_t row = ((group * args.b + b) * args.l + t0) * n;
    sum_lanes<T>(dB, steps, n, static_cast<T*>(args.dB) + row);
    sum_lanes<T>(dC, steps, n, static_cast<T*>(args.dC) + row);
  }
  const int64_t row = b * args.d;
  for (int64_t i = 0; i < vectors * n; ++i)  // in place of A, which is done with
    put<T>(A + i * W, (get(dA + 2 * i * W) + get(dA + (2 * i + 1) * W)) * (T(1) / kStepUnit<T>));
  unpack_states<T>(A, c0, channels, n, static_cast<T*>(args.dA) + row * n);
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
