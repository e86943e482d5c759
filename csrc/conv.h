// The depthwise causal convolution and its SiLU, lanes = channels. The window is the last k - 1 real tokens
// of the document, so padding is stepped over and a start empties it.
#pragma once
#include "kernels.h"
#include "scan.h"
#include "vec.h"

namespace {

using ssmoe::Conv;

// (d, k) rows of `lanes` channels from c on to [k][lane]
template <class S>
void pack_taps(const S* source, int64_t c, int64_t lanes, int64_t k, typename Accumulator<S>::type* out) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  for (int64_t j = 0; j < k; ++j)
    for (int64_t w = 0; w < W; ++w) out[j * W + w] = source && w < lanes ? widen(source[(c + w) * k + j]) : 0;
}
template <class S>
void unpack_taps(const typename Accumulator<S>::type* in, int64_t c, int64_t lanes, int64_t k, S* out) {
  constexpr int W = kLanes<typename Accumulator<S>::type>;
  for (int64_t w = 0; w < (lanes < W ? lanes : W); ++w)
    for (int64_t j = 0; j < k; ++j) narrow(out + (c + w) * k + j, in[j * W + w]);
}

// what the past holds for channel vector c of row b: the initial state, or zeros
template <class S>
void read_past(const Conv& args, int64_t b, int64_t c, int64_t lanes, typename Accumulator<S>::type* window) {
  const S* past = static_cast<const S*>(args.initial_state);
  if (past) past += (args.slots ? args.slots[b] : b) * args.d * (args.k - 1);
  pack_taps<S>(past, c, lanes, args.k - 1, window);
}

// window: [K - 1 + steps][lane] of real tokens, the first K - 1 before the chunk. K = 0: k at run time.
template <class S, int K>
void conv_vector(const Conv& args, int64_t b, int64_t c, typename Accumulator<S>::type* taps,
                 typename Accumulator<S>::type* window) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t k = K ? K : args.k, lanes = args.d - c;
  const T* bias_row = static_cast<const T*>(args.bias);
  pack_taps<T>(static_cast<const T*>(args.weight), c, lanes, k, taps);
  read_past<S>(args, b, c, lanes, window);
  Vec<T> bias = bias_row ? load_some(bias_row + c, lanes) : splat<T>(0);
  for (int64_t t0 = 0; t0 < args.l; t0 += kChunk) {
    const int64_t steps = args.l - t0 < kChunk ? args.l - t0 : kChunk;
    T* newest = window + (k - 1) * W;
    for (int64_t t = t0; t < t0 + steps; ++t) {
      const uint8_t flag = args.flags ? args.flags[b * args.l + t] : uint8_t(ssmoe::kReal);
      S* out = row_at<S>(args.y, b, t) + c;
      if (flag == ssmoe::kPadding) {
        store_some(out, splat<T>(0), lanes);
        continue;
      }
      if (flag == ssmoe::kReset) memset(newest - (k - 1) * W, 0, (k - 1) * W * sizeof(T));
      Vec<T> x = load_some(row_at<S>(args.x, b, t) + c, lanes);
      put<T>(newest, x);
      Vec<T> y = bias + x * get(taps + (k - 1) * W);
#pragma GCC unroll 4
      for (int64_t j = 1; j < k; ++j) y = y + get(newest - j * W) * get(taps + (k - 1 - j) * W);
      store_some(out, y * sigmoid<T>(y), lanes);
      newest += W;
    }
    memmove(window, newest - (k - 1) * W, (k - 1) * W * sizeof(T));
  }
  S* to = static_cast<S*>(args.final_state) + (args.out_slots ? args.out_slots[b] : b) * args.d * (k - 1);
  unpack_taps<S>(window, c, lanes, k - 1, to);
}

template <class S>
SSMOE_INLINE void prefetch_row(const Rows& rows, int64_t b, int64_t t, int64_t length, int64_t c0, int64_t channels) {
  if (t >= length) return;
  const char* p = reinterpret_cast<const char*>(row_at<S>(rows, b, t) + c0);
  for (int64_t at = 0; at < int64_t(channels * sizeof(S)); at += 64) __builtin_prefetch(p + at, 0, 2);
}

// V vectors of channels side by side down a row without documents or padding, k = 4: the window stays in registers
// and a line of memory is used whole.
template <class S, int V>
void conv_strip(const Conv& args, int64_t b, int64_t c, typename Accumulator<S>::type* memory) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>, K = 4, N = V;
  constexpr T most = sizeof(T) == 4 ? T(87.3) : T(708.3);
  const T* bias_row = static_cast<const T*>(args.bias);
  Vec<T> taps[K][V], window[K][V], bias[V];
  for (int v = 0; v < V; ++v) {
    pack_taps<T>(static_cast<const T*>(args.weight), c + v * W, W, K, memory);
    for (int j = 0; j < K; ++j) taps[j][v] = get(memory + j * W);
    read_past<S>(args, b, c + v * W, W, memory);
    for (int j = 0; j < K - 1; ++j) window[j][v] = get(memory + j * W);
    bias[v] = bias_row ? load(bias_row + c + v * W) : splat<T>(0);
  }
  for (int64_t t = 0; t < args.l; ++t) {
    const S* x = row_at<S>(args.x, b, t) + c;
    S* out = row_at<S>(args.y, b, t) + c;
    prefetch_row<S>(args.x, b, t + 8, args.l, c, V * W);
    Vec<T> y[V], e[V];
    SSMOE_EACH_VECTOR window[K - 1][i] = load(x + i * W);
    SSMOE_EACH_VECTOR y[i] = bias[i] + window[K - 1][i] * taps[K - 1][i];
#pragma GCC unroll 3
    for (int j = K - 2; j >= 0; --j) {
      SSMOE_EACH_VECTOR y[i] = y[i] + window[j][i] * taps[j][i];
    }
    SSMOE_EACH_VECTOR e[i] = clamped<T>(-y[i], -most, most);
    exp_all<T, V, false>(e);
    SSMOE_EACH_VECTOR store(out + i * W, y[i] / (e[i] + T(1)));
#pragma GCC unroll 3
    for (int j = 0; j < K - 1; ++j) {
      SSMOE_EACH_VECTOR window[j][i] = window[j + 1][i];
    }
  }
  S* to = static_cast<S*>(args.final_state) + (args.out_slots ? args.out_slots[b] : b) * args.d * (K - 1);
  for (int v = 0; v < V; ++v) {
    for (int j = 0; j < K - 1; ++j) put<T>(memory + j * W, window[j][v]);
    unpack_taps<S>(memory, c + v * W, W, K - 1, to);
  }
}

// d silu(y) / dy
template <class T>
SSMOE_INLINE Vec<T> silu_slope(Vec<T> y) {
  Vec<T> s = sigmoid<T>(y);
  return s * (T(1) + y * (T(1) - s));
}

// One channel vector, from the end. A row's real tokens are listed in `place`, with `reach` the tokens of the
// same document before each (at most k - 1; the initial state counts). `gradient` holds dL / d(conv) of the
// k tokens from the current one on.
template <class S, int K>
void conv_vector_backward(const Conv& args, int64_t b, int64_t c, const int32_t* place, const int32_t* reach,
                          int64_t count, typename Accumulator<S>::type* memory) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const int64_t k = K ? K : args.k, lanes = args.d - c;
  T *taps = memory, *past = taps + k * W, *dtaps = past + k * W, *ahead = dtaps + k * W;
  T *chunk_dtaps = ahead + k * W;  // sums of a chunk, so that rounding grows with the number of chunks
  T* window = ahead + 2 * k * W;
  const T* bias_row = static_cast<const T*>(args.bias);
  pack_taps<T>(static_cast<const T*>(args.weight), c, lanes, k, taps);
  read_past<S>(args, b, c, lanes, past);
  memset(dtaps, 0, k * W * sizeof(T));
  memset(ahead, 0, k * W * sizeof(T));
  Vec<T> bias = bias_row ? load_some(bias_row + c, lanes) : splat<T>(0), dbias = splat<T>(0);

  // `ahead` [slot][lane]: gradient arriving at tokens i - (k - 1) .. i of the compacted row; what has left the
  // window is final
  const S* dfinal = static_cast<const S*>(args.dfinal);
  if (dfinal) {
    const int64_t span = count && reach ? (reach[count - 1] + 1 < k - 1 ? reach[count - 1] + 1 : k - 1) : k - 1;
    pack_taps<S>(dfinal + b * args.d * (k - 1), c, lanes, k - 1, ahead + W);
    for (int64_t j = 0; j < k - 1 - span; ++j) put<T>(ahead + (1 + j) * W, splat<T>(0));
  }
  for (int64_t end = count; end > 0; end -= end < kChunk ? end : kChunk) {
    const int64_t begin = end < kChunk ? 0 : end - kChunk;
    for (int64_t i = begin - (k - 1); i < end; ++i) {
      T* slot = window + (i - begin + k - 1) * W;
      if (i >= 0)
        put<T>(slot, load_some(row_at<S>(args.x, b, place ? place[i] : i) + c, lanes));
      else
        put<T>(slot, i + k - 1 >= 0 ? get(past + (i + k - 1) * W) : splat<T>(0));
    }
    memset(chunk_dtaps, 0, k * W * sizeof(T));
    Vec<T> chunk_dbias = splat<T>(0);
    for (int64_t i = end - 1; i >= begin; --i) {
      const int64_t t = place ? place[i] : i, span = reach ? reach[i] : k - 1;
      const T* newest = window + (i - begin + k - 1) * W;
      Vec<T> y = bias + get(newest) * get(taps + (k - 1) * W);
#pragma GCC unroll 4
      for (int64_t j = 1; j < k; ++j)
        if (j <= span) y = y + get(newest - j * W) * get(taps + (k - 1 - j) * W);
      Vec<T> g = args.dy.data ? load_some(row_at<S>(args.dy, b, t) + c, lanes) * silu_slope<T>(y) : splat<T>(0);
      chunk_dbias = chunk_dbias + g;
#pragma GCC unroll 4
      for (int64_t j = 0; j < k; ++j)
        if (j <= span) {
          T* tap = chunk_dtaps + (k - 1 - j) * W;
          put<T>(tap, get(tap) + g * get(newest - j * W));
          T* to = ahead + (k - 1 - j) * W;
          put<T>(to, get(to) + g * get(taps + (k - 1 - j) * W));
        }
      store_some(row_at<S>(args.dx, b, t) + c, get(ahead + (k - 1) * W), lanes);
#pragma GCC unroll 4
      for (int64_t j = k - 1; j > 0; --j) put<T>(ahead + j * W, get(ahead + (j - 1) * W));
      put<T>(ahead, splat<T>(0));
    }
    dbias = dbias + chunk_dbias;
    for (int64_t j = 0; j < k; ++j) put<T>(dtaps + j * W, get(dtaps + j * W) + get(chunk_dtaps + j * W));
  }
  unpack_taps<T>(dtaps, c, lanes, k, static_cast<T*>(args.dweight) + b * args.d * k);
  store_some(static_cast<T*>(args.dbias) + b * args.d + c, dbias, lanes);
  if (args.dinitial) unpack_taps<S>(ahead + W, c, lanes, k - 1, static_cast<S*>(args.dinitial) + b * args.d * (k - 1));
}

template <class S>
void conv_forward(const Conv& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  Scratch<T> scratch((2 * args.k + kChunk) * W + 128);
  T *taps = scratch.take(args.k * W), *window = scratch.take((args.k + kChunk) * W);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.groups, c0 = task % args.groups * args.group;
    int64_t c = c0;
    if (args.k == 4 && !args.flags)
      for (; c + 2 * W <= c0 + args.group && c + 2 * W <= args.d; c += 2 * W) conv_strip<S, 2>(args, b, c, taps);
    for (; c < c0 + args.group && c < args.d; c += W) {
      if (args.k == 4)
        conv_vector<S, 4>(args, b, c, taps, window);
      else
        conv_vector<S, 0>(args, b, c, taps, window);
    }
  }
}

template <class S>
void conv_backward(const Conv& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  Scratch<T> scratch((6 * args.k + kChunk) * W + 128);
  Scratch<int32_t> lists(2 * args.l + 64);
  int32_t *place = lists.take(args.l), *reach = lists.take(args.l);
  int64_t listed = -1, count = args.l;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / args.groups, c0 = task % args.groups * args.group;
    if (args.flags && listed != b) {
      listed = b;
      count = 0;
      int64_t before = args.k - 1;
      for (int64_t t = 0; t < args.l; ++t) {
        const uint8_t flag = args.flags[b * args.l + t];
        if (flag == ssmoe::kPadding) continue;
        if (flag == ssmoe::kReset) before = 0;
        place[count] = int32_t(t);
        reach[count++] = int32_t(before);
        before = before + 1 < args.k - 1 ? before + 1 : args.k - 1;
      }
    }
    if (args.flags)
      for (int64_t t = 0; t < args.l; ++t)
        if (args.flags[b * args.l + t] == ssmoe::kPadding)
          memset(row_at<S>(args.dx, b, t) + c0, 0,
                 (args.d - c0 < args.group ? args.d - c0 : args.group) * sizeof(S));
    for (int64_t c = c0; c < c0 + args.group && c < args.d; c += W) {
      T* memory = scratch.data;
      const int32_t *p = args.flags ? place : nullptr, *r = args.flags ? reach : nullptr;
      if (args.k == 4)
        conv_vector_backward<S, 4>(args, b, c, p, r, count, memory);
      else
        conv_vector_backward<S, 0>(args, b, c, p, r, count, memory);
    }
  }
}

}  // namespace
