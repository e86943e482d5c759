// Cross-entropy of rows of logits and its gradient, in one visit: a row stays in cache over the three passes.
#pragma once
#include <math.h>

#include "kernels.h"
#include "vec.h"

namespace {

using ssmoe::Softmax;

template <class T>
T largest_logit(T* row, const T* bias, int64_t v) {
  constexpr int W = kLanes<T>;
  T most = row[0] + (bias ? bias[0] : T(0));
  Vec<T> most_of = splat<T>(most);
  int64_t i = 0;
  for (; i + W <= v; i += W) {
    Vec<T> l = load(row + i);
    if (bias) store(row + i, l = l + load(bias + i));
    most_of = larger<T>(l, most_of);
  }
  for (; i < v; ++i) {
    if (bias) row[i] += bias[i];
    if (row[i] > most || row[i] != row[i]) most = row[i];
  }
  for (int j = 0; j < W; ++j)
    if (most_of[j] > most || most_of[j] != most_of[j]) most = most_of[j];
  return most;
}

// e^(logit - most) in place; their sum, added up in stretches
template <class T>
double exponentials(T* row, T most, int64_t v) {
  constexpr int W = kLanes<T>, N = 4;
  double total = 0;
  int64_t i = 0;
  while (i + N * W <= v) {
    Vec<T> part = splat<T>(0);
    for (int64_t end = i + 1024 * W < v ? i + 1024 * W : v; i + N * W <= end; i += N * W) {
      Vec<T> e[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) e[j] = load(row + i + j * W) - most;
      exp_all<T, N, true>(e);
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        store(row + i + j * W, e[j]);
        part = part + e[j];
      }
    }
    total += sum<T>(part);
  }
  for (; i < v; ++i) total += row[i] = T(::exp(double(row[i] - most)));
  return total;
}

template <class S>
void softmax_rows(const Softmax& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const T* bias = static_cast<const T*>(args.bias);
  for (int64_t t = begin; t < end; ++t) {
    T* row = static_cast<T*>(args.logits) + t * args.v;
    S* out = reinterpret_cast<S*>(row);  // never ahead of what is read
    const int64_t target = args.target[t];
    args.loss[t] = 0;
    if (target < 0) {
      memset(out, 0, args.v * sizeof(S));
      continue;
    }
    const T most = largest_logit(row, bias, args.v);
    const double at_target = double(row[target]) - double(most);
    const double total = exponentials(row, most, args.v), log_p = at_target - ::log(total);
    args.loss[t] = -log_p;
    const T factor = T(args.scale / total);
    int64_t i = 0;
    for (; i + W <= args.v; i += W) store(out + i, load(row + i) * factor);
    for (; i < args.v; ++i) narrow(out + i, T(row[i] * factor));
    narrow(out + target, T(::expm1(log_p) * args.scale));
  }
}

}  // namespace
