// Root-mean-square and layer normalisation of rows, and their gradients; sums in the accumulator's type.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace {

using ssmoe::Norm;

// mean and 1 / deviation of a row; RMS has mean 0
template <class T, class In>
SSMOE_INLINE void moments(const In* x, int64_t d, bool centred, double eps, T* mean, T* rate) {
  constexpr int W = kLanes<T>;
  T middle = 0;
  if (centred) {
    Vec<T> total = splat<T>(0);
    for (int64_t i = 0; i < d; i += W) total = total + load_some(x + i, d - i);
    middle = sum<T>(total) / T(d);
  }
  Vec<T> squares = splat<T>(0);
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const Vec<T> v = load(x + i) - middle;
    squares = squares + v * v;
  }
  T rest = 0;
  for (; i < d; ++i) rest += (widen(x[i]) - middle) * (widen(x[i]) - middle);
  *mean = middle;
  *rate = T(1 / __builtin_sqrt(double((sum<T>(squares) + rest) / T(d)) + eps));
}

template <class T, class In, class Out>
void norm_row(const Norm& args, int64_t t) {
  constexpr int W = kLanes<T>;
  const In* x = static_cast<const In*>(args.x) + t * args.d;
  const T *weight = static_cast<const T*>(args.weight), *bias = static_cast<const T*>(args.bias);
  Out* y = static_cast<Out*>(args.y) + t * args.d;
  T mean, rate;
  moments<T>(x, args.d, bias, args.eps, &mean, &rate);
  if (args.moments) static_cast<T*>(args.moments)[2 * t] = mean, static_cast<T*>(args.moments)[2 * t + 1] = rate;
  for (int64_t i = 0; i < args.d; i += W) {
    const int64_t left = args.d - i;
    Vec<T> v = (load_some(x + i, left) - mean) * rate * load_some(weight + i, left);
    if (bias) v = v + load_some(bias + i, left);
    store_some(y + i, v, left);
  }
}

// With n = (x - mean) rate and g = dy weight: dx = rate (g - mean(g) - n mean(g n)), the first mean without RMS.
template <class T, class In, class Out>
void norm_row_backward(const Norm& args, int64_t t, T* dweight, T* dbias) {
  constexpr int W = kLanes<T>;
  const int64_t d = args.d;
  const In* x = static_cast<const In*>(args.x) + t * d;
  const Out* dy = static_cast<const Out*>(args.dy) + t * d;
  const T* weight = static_cast<const T*>(args.weight);
  const In* dstream = args.dstream ? static_cast<const In*>(args.dstream) + t * d : nullptr;
  In* dx = static_cast<In*>(args.dx) + t * d;
  const T mean = static_cast<const T*>(args.moments)[2 * t], rate = static_cast<const T*>(args.moments)[2 * t + 1];
  Vec<T> along = splat<T>(0), level = splat<T>(0);
  for (int64_t i = 0; i < d; i += W) {
    const int64_t left = d - i;
    const Vec<T> n = (load_some(x + i, left) - mean) * rate, up = load_some(dy + i, left);
    const Vec<T> g = up * load_some(weight + i, left);
    along = along + g * n;
    level = level + g;
    store_some(dweight + i, load_some(dweight + i, left) + up * n, left);
    if (dbias) store_some(dbias + i, load_some(dbias + i, left) + up, left);
  }
  const T share = sum<T>(along) / T(d), base = dbias ? sum<T>(level) / T(d) : T(0);
  for (int64_t i = 0; i < d; i += W) {
    const int64_t left = d - i;
    const Vec<T> n = (load_some(x + i, left) - mean) * rate;
    const Vec<T> g = load_some(dy + i, left) * load_some(weight + i, left);
    Vec<T> change = (g - base - n * share) * rate;
    if (dstream) change = change + load_some(dstream + i, left);
    store_some(dx + i, change, left);
  }
}

// x and y are activations S, or of the accumulator's type
template <class S>
void norm_rows(const Norm& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  auto one = args.wide_x ? (args.wide_y ? norm_row<T, T, T> : norm_row<T, T, S>)
                         : (args.wide_y ? norm_row<T, S, T> : norm_row<T, S, S>);
  for (int64_t t = begin; t < end; ++t) one(args, t);
}

// A part is some rows; it has its own sums of the parameters' gradients, added up in stretches of 64.
template <class S>
void norm_backward(const Norm& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  auto one = args.wide_x ? (args.wide_y ? norm_row_backward<T, T, T> : norm_row_backward<T, T, S>)
                         : (args.wide_y ? norm_row_backward<T, S, T> : norm_row_backward<T, S, S>);
  const int64_t d = args.d, sums = (args.bias ? 2 : 1) * d;
  for (int64_t part = begin; part < end; ++part) {
    T* total = static_cast<T*>(args.dparameters) + part * 2 * sums;
    T* stretch = total + sums;
    memset(total, 0, 2 * sums * sizeof(T));
    const int64_t first = part * args.part, last = first + args.part < args.t ? first + args.part : args.t;
    for (int64_t t = first; t < last; ++t) {
      one(args, t, stretch, args.bias ? stretch + d : nullptr);
      if ((t - first) % 64 < 63 && t + 1 < last) continue;
      for (int64_t i = 0; i < sums; i += W) {
        store_some(total + i, load_some(total + i, sums - i) + load_some(stretch + i, sums - i), sums - i);
        store_some(stretch + i, splat<T>(0), sums - i);
      }
    }
  }
}

}  // namespace
