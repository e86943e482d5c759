// One token through a residual Mamba sub-layer, in phases that decode.cpp runs one after the other: norm; in_proj with
// convolution and gate; x_proj; delta_proj with the scan; out_proj with the residual. Between them values are T, and
// what enters a product is rounded to the layer's type.
#pragma once
#include "conv.h"
#include "experts.h"
#include "kernels.h"
#include "scan.h"
#include "skinny.h"
#include "vec.h"
#include "window.h"

namespace {

using ssmoe::MambaStep;

constexpr int64_t kStepTile = 32;  // channels or rows between two visits of the batch; a multiple of every kStep

template <class S>
SSMOE_INLINE typename Accumulator<S>::type residual(const MambaStep& args, int64_t at) {
  using T = typename Accumulator<S>::type;
  return args.wide_residual ? static_cast<const T*>(args.x)[at] : T(widen(static_cast<const S*>(args.x)[at]));
}

template <class S>
void step_norm(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  const T *weight = static_cast<const T*>(args.norm_weight), *bias = static_cast<const T*>(args.norm_bias);
  Scratch<T> scratch(args.d + 64);
  T* row = scratch.take(args.d);
  for (int64_t b = begin; b < end; ++b) {
    Vec<T> total = splat<T>(0), squares = splat<T>(0);
    for (int64_t i = 0; i < args.d; ++i) row[i] = residual<S>(args, b * args.d + i);
    T mean = 0;
    if (bias) {
      for (int64_t i = 0; i < args.d; i += kLanes<T>) total = total + load_some(row + i, args.d - i);
      mean = sum<T>(total) / T(args.d);
      for (int64_t i = 0; i < args.d; ++i) row[i] -= mean;
    }
    for (int64_t i = 0; i < args.d; i += kLanes<T>) {
      Vec<T> v = load_some(row + i, args.d - i);
      squares = squares + v * v;
    }
    const T scale = T(1) / T(__builtin_sqrt(double(sum<T>(squares) / T(args.d)) + args.eps));
    for (int64_t i = 0; i < args.d; ++i) row[i] = row[i] * scale * weight[i] + (bias ? bias[i] : T(0));
    pack<S>(row, 0, args.d, const_cast<void*>(packed_row<S>(args.normed, b * args.d_stride)));
  }
}

// channels begin to end
template <class S>
void step_in(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const S* in_proj = static_cast<const S*>(args.in_proj);
  const int64_t k = args.k;
  Window<S> conv(args);
  alignas(64) T x[kBlock * kStepTile], z[kBlock * kStepTile];
  for (int64_t c0 = begin; c0 < end; c0 += kStepTile) {
    const int64_t channels = end - c0 < kStepTile ? end - c0 : kStepTile;
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      const void* normed = packed_row<S>(args.normed, b0 * args.d_stride);
      multiply<S>(in_proj + c0 * args.d, args.d, channels, args.d, normed, args.d_stride, batch, x, kStepTile);
      multiply<S>(in_proj + (args.inner + c0) * args.d, args.d, channels, args.d, normed, args.d_stride,
                  batch, z, kStepTile);
      for (int64_t c = c0; c < c0 + channels; c += W) {
        const int64_t lanes = c0 + channels - c;
        conv.take_weight(c, lanes);
        const Vec<T> bias = load_some(static_cast<const T*>(args.conv_bias) + c, lanes);
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t state = (b0 + b) * args.inner * (k - 1), at = (b0 + b) * args.inner_stride + c;
          const Vec<T> y = bias + conv.step(state, c, lanes, through<S>(load(x + b * kStepTile + (c - c0))));
          store(static_cast<T*>(args.u) + at, through<S>(y * sigmoid<T>(y)));
          const Vec<T> gate = load(z + b * kStepTile + (c - c0));
          store(static_cast<T*>(args.gate) + at, gate * sigmoid<T>(gate));
        }
      }
      for (int64_t b = b0; b < b0 + batch; ++b)
        pack<S>(static_cast<const T*>(args.u) + b * args.inner_stride + c0, c0, channels,
                const_cast<void*>(packed_row<S>(args.mixed, b * args.inner_stride)));
    }
  }
}

// rows begin to end of x_proj
template <class S>
void step_parts(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  T* parts = static_cast<T*>(args.parts);
  for (int64_t b0 = 0; b0 < args.b; b0 += kBlock)
    multiply<S>(static_cast<const S*>(args.x_proj) + begin * args.inner, args.inner, end - begin, args.inner,
                packed_row<S>(args.mixed, b0 * args.inner_stride), args.inner_stride,
                args.b - b0 < kBlock ? args.b - b0 : kBlock,
                parts + b0 * args.parts_stride + begin, args.parts_stride);
  if (begin < args.rank)
    for (int64_t b = 0; b < args.b; ++b)
      pack<S>(parts + b * args.parts_stride + begin, begin, (end < args.rank ? end : args.rank) - begin,
              const_cast<void*>(packed_row<S>(args.delta, b * args.rank_stride)));
}

// A vector of channels of one row: h = exp(delta A) h + delta B u; y = <C, h>. A: (channels, width), width = n in
// whole vectors, zeros behind. kWhole: n is such a width. delta, u, y: of these channels.
template <class T, bool kWhole>
SSMOE_INLINE void step_states(const MambaStep& args, int64_t b, int64_t c, int64_t channels, int64_t width, const T* A,
                              const T* delta, const T* u, T* y) {
  constexpr int W = kLanes<T>;
  const T* B = static_cast<const T*>(args.parts) + b * args.parts_stride + args.rank;
  const T* C = B + args.n;
  const int64_t at = (b * args.inner + c) * args.n;
  const T* from = static_cast<const T*>(args.ssm_in) + at;
  T* to = static_cast<T*>(args.ssm_out) + at;
  Vec<T> sums[W];
#pragma GCC unroll 16
  for (int64_t i = 0; i < W; ++i) {
    Vec<T> total = splat<T>(0);
    if (i < channels) {
      for (int64_t j = 0; j < args.n; j += W) {
        const int64_t state = i * args.n + j, lanes = kWhole ? W : args.n - j;
        Vec<T> h = load_some(from + state, lanes);
        h = exp<T>(load(A + i * width + j) * delta[i]) * h + load_some(B + j, lanes) * (delta[i] * u[i]);
        store_some(to + state, h, lanes);
        total = total + h * load_some(C + j, lanes);
      }
    }
    sums[i] = total;
  }
  sum_vectors<T>(sums, y);
}

// asks for what tile `c0` of the scan will read, which is too little at a time for the processor to foresee
template <class S>
SSMOE_INLINE void prefetch_tile(const MambaStep& args, int64_t c0) {
  using T = typename Accumulator<S>::type;
  const int64_t bytes = (args.inner - c0 < kStepTile ? args.inner - c0 : kStepTile) * args.n * sizeof(T);
  const char* A_log = reinterpret_cast<const char*>(static_cast<const T*>(args.A_log) + c0 * args.n);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(A_log + i);
  for (int64_t b = 0; b < args.b && b < kBlock; ++b) {
    const char* h = reinterpret_cast<const char*>(static_cast<const T*>(args.ssm_in) + (b * args.inner + c0) * args.n);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(h + i);
  }
}

// channels begin to end
template <class S>
void step_scan(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  alignas(64) T delta[kBlock * kStepTile], y[kBlock * kStepTile];
  const int64_t width = (args.n + W - 1) / W * W;
  Scratch<T> scratch(kStepTile * width + 64);
  T* A = scratch.take(kStepTile * width);
  for (int64_t c0 = begin; c0 < end; c0 += kStepTile) {
    const int64_t channels = end - c0 < kStepTile ? end - c0 : kStepTile;
    if (c0 + 2 * kStepTile < args.inner) prefetch_tile<S>(args, c0 + 2 * kStepTile);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < args.n; i += W)
        store(A + c * width + i,
              -exp_wide<T>(load_some(static_cast<const T*>(args.A_log) + (c0 + c) * args.n + i, args.n - i)));
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      multiply<S>(static_cast<const S*>(args.delta_proj) + c0 * args.rank, args.rank, channels, args.rank,
                  packed_row<S>(args.delta, b0 * args.rank_stride), args.rank_stride, batch, delta, kStepTile);
      for (int64_t c = 0; c < channels; c += W) {
        const Vec<T> bias = load_some(static_cast<const T*>(args.delta_bias) + c0 + c, channels - c);
        for (int64_t b = 0; b < batch; ++b) {
          Vec<T> v = get(delta + b * kStepTile + c) + bias;
          softplus_all<T, 1, false>(&v, nullptr);
          put<T>(delta + b * kStepTile + c, v);
        }
      }
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t c = 0; c < channels; c += W) {
          const T* u = static_cast<const T*>(args.u) + (b0 + b) * args.inner_stride + c0 + c;
          const int64_t at = b * kStepTile + c;
          if (width == args.n)
            step_states<T, true>(args, b0 + b, c0 + c, channels - c, width, A + c * width, delta + at, u, y + at);
          else
            step_states<T, false>(args, b0 + b, c0 + c, channels - c, width, A + c * width, delta + at, u, y + at);
        }
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = (b0 + b) * args.inner_stride + c0;
        for (int64_t c = 0; c < channels; c += W) {
          const Vec<T> D = load_some(static_cast<const T*>(args.D) + c0 + c, channels - c);
          const Vec<T> u = load(static_cast<const T*>(args.u) + at + c);
          put<T>(y + b * kStepTile + c,
                 (get(y + b * kStepTile + c) + D * u) * load(static_cast<const T*>(args.gate) + at + c));
        }
        pack<S>(y + b * kStepTile, c0, channels,
                const_cast<void*>(packed_row<S>(args.gated, (b0 + b) * args.inner_stride)));
      }
    }
  }
}

// rows begin to end of out_proj
template <class S>
void step_out(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  alignas(64) T found[kBlock * kStepTile];
  for (int64_t row = begin; row < end; row += kStepTile) {
    const int64_t rows = end - row < kStepTile ? end - row : kStepTile;
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      multiply<S>(static_cast<const S*>(args.out_proj) + row * args.inner, args.inner, rows, args.inner,
                  packed_row<S>(args.gated, b0 * args.inner_stride), args.inner_stride, batch, found, kStepTile);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (b0 + b) * args.d + row + r;
          const T value = residual<S>(args, at) + found[b * kStepTile + r];
          if (args.wide_residual)
            static_cast<T*>(args.out)[at] = value;
          else
            narrow(static_cast<S*>(args.out) + at, value);
        }
    }
  }
}

}  // namespace
