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

namespace {

using ssmoe::MambaStep;

constexpr int64_t kTile = 32;  // channels or rows between two visits of the batch; a multiple of every kStep

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
    pack<S>(row, 0, args.d, args.pairs, const_cast<void*>(packed_row<S>(args.normed, b * args.d_stride, args.pairs)));
  }
}

// channels begin to end
template <class S>
void step_in(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  const S* in_proj = static_cast<const S*>(args.in_proj);
  const int64_t k = args.k;
  Scratch<T> scratch((2 * k + 1) * W + 128);
  T *taps = scratch.take(k * W), *window = scratch.take((k + 1) * W);
  alignas(64) T x[kBlock * kTile], z[kBlock * kTile];
  for (int64_t c0 = begin; c0 < end; c0 += kTile) {
    const int64_t channels = end - c0 < kTile ? end - c0 : kTile;
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      const void* normed = packed_row<S>(args.normed, b0 * args.d_stride, args.pairs);
      multiply<S>(in_proj + c0 * args.d, args.d, channels, args.d, args.pairs, normed, args.d_stride, batch, x, kTile);
      multiply<S>(in_proj + (args.inner + c0) * args.d, args.d, channels, args.d, args.pairs, normed, args.d_stride,
                  batch, z, kTile);
      for (int64_t c = c0; c < c0 + channels; c += W) {
        const int64_t lanes = c0 + channels - c;
        pack_taps<T>(static_cast<const T*>(args.conv_weight), c, lanes, k, taps);
        const Vec<T> bias = load_some(static_cast<const T*>(args.conv_bias) + c, lanes);
        for (int64_t b = 0; b < batch; ++b) {
          const int64_t state = (b0 + b) * args.inner * (k - 1), at = (b0 + b) * args.inner_stride + c;
          pack_taps<S>(static_cast<const S*>(args.conv_in) + state, c, lanes, k - 1, window);
          put<T>(window + (k - 1) * W, through<S>(load(x + b * kTile + (c - c0))));
          Vec<T> y = bias;
          for (int64_t j = 0; j < k; ++j) y = y + get(window + j * W) * get(taps + j * W);
          unpack_taps<S>(window + W, c, lanes, k - 1, static_cast<S*>(args.conv_out) + state);
          store(static_cast<T*>(args.u) + at, through<S>(y * sigmoid<T>(y)));
          const Vec<T> gate = load(z + b * kTile + (c - c0));
          store(static_cast<T*>(args.gate) + at, gate * sigmoid<T>(gate));
        }
      }
      for (int64_t b = b0; b < b0 + batch; ++b)
        pack<S>(static_cast<const T*>(args.u) + b * args.inner_stride + c0, c0, channels, args.pairs,
                const_cast<void*>(packed_row<S>(args.mixed, b * args.inner_stride, args.pairs)));
    }
  }
}

// rows begin to end of x_proj
template <class S>
void step_parts(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  T* parts = static_cast<T*>(args.parts);
  for (int64_t b0 = 0; b0 < args.b; b0 += kBlock)
    multiply<S>(static_cast<const S*>(args.x_proj) + begin * args.inner, args.inner, end - begin, args.inner, args.pairs,
                packed_row<S>(args.mixed, b0 * args.inner_stride, args.pairs), args.inner_stride,
                args.b - b0 < kBlock ? args.b - b0 : kBlock,
                parts + b0 * args.parts_stride + begin, args.parts_stride);
  if (begin < args.rank)
    for (int64_t b = 0; b < args.b; ++b)
      pack<S>(parts + b * args.parts_stride + begin, begin, (end < args.rank ? end : args.rank) - begin, args.pairs,
              const_cast<void*>(packed_row<S>(args.delta, b * args.rank_stride, args.pairs)));
}

// one channel of every row of a block: h = exp(delta A) h + delta B u; <C, h> to y
template <class S>
SSMOE_INLINE void step_channel(const MambaStep& args, int64_t c, int64_t b0, int64_t batch,
                               const typename Accumulator<S>::type* delta, typename Accumulator<S>::type* y) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  Vec<T> sums[kBlock] = {};
  for (int64_t i = 0; i < args.n; i += W) {
    const int64_t lanes = args.n - i;
    const Vec<T> A = -exp_wide<T>(load_some(static_cast<const T*>(args.A_log) + c * args.n + i, lanes));
    for (int64_t b = 0; b < batch; ++b) {
      const T* parts = static_cast<const T*>(args.parts) + (b0 + b) * args.parts_stride + args.rank;
      const int64_t state = ((b0 + b) * args.inner + c) * args.n + i;
      const T step = delta[b * kTile], drive = step * static_cast<const T*>(args.u)[(b0 + b) * args.inner_stride + c];
      Vec<T> h = load_some(static_cast<const T*>(args.ssm_in) + state, lanes);
      h = exp<T>(A * step) * h + load_some(parts + i, lanes) * drive;
      store_some(static_cast<T*>(args.ssm_out) + state, h, lanes);
      sums[b] = sums[b] + h * load_some(parts + args.n + i, lanes);
    }
  }
  for (int64_t b = 0; b < batch; ++b) y[b * kTile] = sum<T>(sums[b]);
}

// channels begin to end
template <class S>
void step_scan(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  alignas(64) T delta[kBlock * kTile], y[kBlock * kTile];
  for (int64_t c0 = begin; c0 < end; c0 += kTile) {
    const int64_t channels = end - c0 < kTile ? end - c0 : kTile;
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      multiply<S>(static_cast<const S*>(args.delta_proj) + c0 * args.rank, args.rank, channels, args.rank, args.pairs,
                  packed_row<S>(args.delta, b0 * args.rank_stride, args.pairs), args.rank_stride, batch, delta, kTile);
      for (int64_t c = 0; c < channels; c += W) {
        const Vec<T> bias = load_some(static_cast<const T*>(args.delta_bias) + c0 + c, channels - c);
        for (int64_t b = 0; b < batch; ++b) {
          Vec<T> v = get(delta + b * kTile + c) + bias;
          softplus_all<T, 1>(&v, nullptr);
          put<T>(delta + b * kTile + c, v);
        }
      }
      for (int64_t c = 0; c < channels; ++c) step_channel<S>(args, c0 + c, b0, batch, delta + c, y + c);
      for (int64_t b = 0; b < batch; ++b) {
        const int64_t at = (b0 + b) * args.inner_stride + c0;
        for (int64_t c = 0; c < channels; c += W) {
          const Vec<T> D = load_some(static_cast<const T*>(args.D) + c0 + c, channels - c);
          const Vec<T> u = load(static_cast<const T*>(args.u) + at + c);
          put<T>(y + b * kTile + c,
                 (get(y + b * kTile + c) + D * u) * load(static_cast<const T*>(args.gate) + at + c));
        }
        pack<S>(y + b * kTile, c0, channels, args.pairs,
                const_cast<void*>(packed_row<S>(args.gated, (b0 + b) * args.inner_stride, args.pairs)));
      }
    }
  }
}

// rows begin to end of out_proj
template <class S>
void step_out(const MambaStep& args, int64_t begin, int64_t end) {
  using T = typename Accumulator<S>::type;
  alignas(64) T found[kBlock * kTile];
  for (int64_t row = begin; row < end; row += kTile) {
    const int64_t rows = end - row < kTile ? end - row : kTile;
    for (int64_t b0 = 0; b0 < args.b; b0 += kBlock) {
      const int64_t batch = args.b - b0 < kBlock ? args.b - b0 : kBlock;
      multiply<S>(static_cast<const S*>(args.out_proj) + row * args.inner, args.inner, rows, args.inner, args.pairs,
                  packed_row<S>(args.gated, b0 * args.inner_stride, args.pairs), args.inner_stride, batch, found, kTile);
      for (int64_t b = 0; b < batch; ++b)
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (b0 + b) * args.d + row + r;
          const T value = residual<S>(args, at) + found[b * kTile + r];
          if (args.wide_residual)
            static_cast<T*>(args.out)[at] = value;
          else
            narrow(static_cast<S*>(args.out) + at, value);
        }
    }
  }
}

}  // namespace
