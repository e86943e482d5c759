// What surrounds the matrix products of the expert bank: gather, activation, weighted sum.
// Row by row; every row is contiguous.
#pragma once
#include "kernels.h"
#include "scan.h"
#include "vec.h"

namespace {

using ssmoe::Activate;
using ssmoe::Combine;
using ssmoe::Gather;

template <class S>
void gather(const Gather& args, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r)
    memcpy(static_cast<S*>(args.out) + r * args.width,
           static_cast<const S*>(args.source) + args.index[r] * args.source_stride, args.width * sizeof(S));
}

// value and slope of the activation
template <class T>
SSMOE_INLINE void activation(int64_t kind, Vec<T> v, Vec<T>& value, Vec<T>& slope) {
  Vec<T> zero = splat<T>(0);
  if (kind == ssmoe::kSilu) {
    Vec<T> s = sigmoid<T>(v);
    value = v * s;
    slope = s * (T(1) + v * (T(1) - s));
  } else if (kind == ssmoe::kReluSquared) {
    Vec<T> r = v < zero ? zero : v;
    value = r * r;
    slope = r + r;
  } else {
    value = v < zero ? zero : v;
    slope = v > zero ? splat<T>(1) : zero;
  }
}

// to the activations' precision and back, as the reference's separate ops do
template <class S>
SSMOE_INLINE Vec<typename Accumulator<S>::type> through(Vec<typename Accumulator<S>::type> v) {
  if constexpr (sizeof(S) == 2) {
    Lane<float>::U u = rounded(v) << 16;
    return (Vec<float>)u;
  }
  return v;
}

template <class S>
void activate(const Activate& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  const S *up = static_cast<const S*>(args.up), *gate = static_cast<const S*>(args.gate);
  for (int64_t r = begin; r < end; ++r)
    for (int64_t c = 0; c < args.width; c += kLanes<T>) {
      const int64_t at = r * args.width + c, lanes = args.width - c;
      Vec<T> value, slope;
      activation<T>(args.activation, load_some((gate ? gate : up) + at, lanes), value, slope);
      if (gate) value = through<S>(value) * load_some(up + at, lanes);
      store_some(static_cast<S*>(args.inner) + at, value, lanes);
    }
}

template <class S>
void activate_backward(const Activate& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  const S *up = static_cast<const S*>(args.up), *gate = static_cast<const S*>(args.gate);
  const S* dinner = static_cast<const S*>(args.dinner);
  for (int64_t r = begin; r < end; ++r) {
    const T weight = static_cast<const T*>(args.weight)[r];
    Vec<T> dot = splat<T>(0);
    for (int64_t c = 0; c < args.width; c += kLanes<T>) {
      const int64_t at = r * args.width + c, lanes = args.width - c;
      Vec<T> value, slope, u = load_some(up + at, lanes), d = load_some(dinner + at, lanes);
      activation<T>(args.activation, gate ? load_some(gate + at, lanes) : u, value, slope);
      Vec<T> inner = gate ? through<S>(value) * u : value;
      dot = dot + inner * d;
      d = d * weight;
      store_some(static_cast<S*>(args.dup) + at, gate ? d * value : d * slope, lanes);
      if (gate) store_some(static_cast<S*>(args.dgate) + at, d * u * slope, lanes);
      // the weighted inner product, for the gradient of the second matrix
      store_some(static_cast<S*>(args.inner) + at, inner * weight, lanes);
    }
    static_cast<T*>(args.dweight)[r] = sum<T>(dot);
  }
}

template <class S>
void combine(const Combine& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  for (int64_t t = begin; t < end; ++t)
    for (int64_t c = 0; c < args.d; c += kLanes<T>) {
      const int64_t lanes = args.d - c;
      Vec<T> total = splat<T>(0);
      for (int64_t j = 0; j < args.k; ++j) {
        const int64_t place = args.place[t * args.k + j];
        if (place < 0) continue;
        Vec<T> row = load_some(static_cast<const S*>(args.rows) + place * args.d + c, lanes);
        total = total + (args.weight ? row * static_cast<const T*>(args.weight)[t * args.k + j] : row);
      }
      store_some(static_cast<S*>(args.out) + t * args.d + c, total, lanes);
    }
}

}  // namespace
