// Attention of one query a row and head to its cached tokens: pieces of the cache apart, then their sums joined.
#pragma once
#include <math.h>

#include "kernels.h"
#include "vec.h"

namespace {

using ssmoe::Attend;

constexpr int kTokens = 32;  // of a tile, whose values stay in the nearest cache while their columns are summed

template <class S, class T>
SSMOE_INLINE T dot(const T* q, const S* k, int64_t d) {
  constexpr int W = kLanes<T>;
  Vec<T> total = splat<T>(0);
  int64_t i = 0;
  for (; i + W <= d; i += W) total = total + load(q + i) * load(k + i);
  if (i < d) total = total + load_some(q + i, d - i) * load_some(k + i, d - i);
  return sum<T>(total);
}

// sums += weight V over the rows of a tile
template <class S, class T>
SSMOE_INLINE void add_rows(T* sums, const T* weight, const S* v, int64_t rows, int64_t d) {
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < d; i += W) {
    const int64_t width = d - i < W ? d - i : W;
    Vec<T> total = load_some(sums + i, width);
    if (width == W)
      for (int64_t j = 0; j < rows; ++j) total = total + splat(weight[j]) * load(v + j * d + i);
    else
      for (int64_t j = 0; j < rows; ++j) total = total + splat(weight[j]) * load_some(v + j * d + i, width);
    store_some(sums + i, total, width);
  }
}

// Tasks are pieces of rows and heads: the largest score, the sum of the weights and that of the values.
template <class S>
void attend_pieces(const Attend& a, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / a.pieces, first = task % a.pieces * a.piece, used = a.length[head / a.h];
    const int64_t last = first + a.piece < used ? first + a.piece : used;
    const T* q = static_cast<const T*>(a.q) + head * a.d;
    const S* keys = static_cast<const S*>(a.keys) + head * a.room * a.d;
    const S* values = static_cast<const S*>(a.values) + head * a.room * a.d;
    T* out = static_cast<T*>(a.sums) + task * (a.d + 2);
    T* sums = out + 2;
    T most = T(-INFINITY), total = 0;
    for (int64_t i = 0; i < a.d; ++i) sums[i] = 0;
    for (int64_t t = first; t < last; t += kTokens) {
      const int64_t rows = last - t < kTokens ? last - t : kTokens;
      T weight[kTokens];
      T higher = most;
      for (int64_t j = 0; j < rows; ++j) {
        weight[j] = dot(q, keys + (t + j) * a.d, a.d);
        if (!(weight[j] <= higher)) higher = weight[j];
      }
      if (higher != most) {
        const T kept = T(::exp(double(most - higher)));
        for (int64_t i = 0; i < a.d; ++i) sums[i] *= kept;
        total *= kept, most = higher;
      }
      for (int64_t j = rows; j < kTokens; ++j) weight[j] = most;
      for (int64_t j = 0; j < kTokens; j += W) store(weight + j, exp<T>(load(weight + j) - most));
      for (int64_t j = 0; j < rows; ++j) total += weight[j];
      add_rows(sums, weight, values + t * a.d, rows, a.d);
    }
    out[0] = most, out[1] = total;
  }
}

// Tasks are rows and heads.
template <class S>
void attend_join(const Attend& a, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  const int64_t stride = a.d + 2;
  for (int64_t head = begin; head < end; ++head) {
    T* pieces = static_cast<T*>(a.sums) + head * a.pieces * stride;
    S* y = static_cast<S*>(a.y) + head * a.d;
    T most = pieces[0], total = 0;
    for (int64_t p = 1; p < a.pieces; ++p)
      if (!(pieces[p * stride] <= most)) most = pieces[p * stride];
    for (int64_t p = 0; p < a.pieces; ++p) {
      const T factor = T(::exp(double(pieces[p * stride] - most)));
      total += factor * pieces[p * stride + 1];
      pieces[p * stride] = factor;
    }
    for (int64_t i = 0; i < a.d; ++i) {
      T value = 0;
      for (int64_t p = 0; p < a.pieces; ++p) value += pieces[p * stride] * pieces[p * stride + 2 + i];
      narrow(y + i, value / total);
    }
  }
}

}  // namespace
