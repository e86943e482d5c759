// The convolution's window at length 1: a vector of channels of one row, whose states lie channel by channel.
#pragma once
#include "conv.h"
#include "kernels.h"
#include "scan.h"
#include "vec.h"

namespace {

using ssmoe::MambaStep;

#if SSMOE_BYTES == 64
// 16 channels of 3 floats to [tap][lane], and with `x` as the newest tap back
SSMOE_INLINE void open_window(const float* from, Vec<float> (&taps)[3]) {
  const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16), c = _mm512_loadu_ps(from + 32);
  const __m512i lane = _mm512_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 42, 45);
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(j));
    const __mmask16 last = _mm512_cmpge_epi32_mask(index, _mm512_set1_epi32(32));
    taps[j] = (Vec<float>)_mm512_mask_permutexvar_ps(_mm512_permutex2var_ps(a, index, b), last, index, c);
  }
}
SSMOE_INLINE void shift_window(const float* from, Vec<float> x, float* to) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  __m512 parts[3] = {_mm512_loadu_ps(from + 1), _mm512_loadu_ps(from + 17), _mm512_maskz_loadu_ps(0x7fff, from + 33)};
  // every third place is a channel's newest: of part j the places 2 - j, 5 - j, ... hold channels 5 j + (place + j) / 3
  constexpr int newest[3] = {0x4924, 0x2492, 0x9249};
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) {
    // (16 j + place) / 3
    const __m512i third = _mm512_srli_epi32(
        _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16 * j)), _mm512_set1_epi32(21846)), 16);
    parts[j] = _mm512_mask_permutexvar_ps(parts[j], __mmask16(newest[j]), third, (__m512)x);
  }
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) _mm512_storeu_ps(to + 16 * j, parts[j]);
}
SSMOE_INLINE void open_window(const bfloat16* from, Vec<float> (&taps)[3]) {
  alignas(64) float wide[48];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) put<float>(wide + 16 * j, load(from + 16 * j));
  open_window(wide, taps);
}
SSMOE_INLINE void shift_window(const bfloat16* from, Vec<float> x, bfloat16* to) {
  // as floats: a bfloat16 widens and narrows without loss
  alignas(64) float wide[48];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) put<float>(wide + 16 * j, load(from + 16 * j));
  shift_window(wide, x, wide);
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) store(to + 16 * j, get(wide + 16 * j));
}
#endif

template <class S>
class Window {
 public:
  using T = typename Accumulator<S>::type;

  explicit Window(const MambaStep& args) : args_(args), scratch_((2 * args.k + 1) * kLanes<T> + 128) {
    taps_ = scratch_.take(args.k * kLanes<T>);
    window_ = scratch_.take((args.k + 1) * kLanes<T>);
  }
  // the weights of the channels from c on
  void take_weight(int64_t c, int64_t lanes) {
    pack_taps<T>(static_cast<const T*>(args_.conv_weight), c, lanes, args_.k, taps_);
  }
  // the convolution after x, without bias; the state of these channels moves on. state: where the row's begins
  SSMOE_INLINE Vec<T> step(int64_t state, int64_t c, int64_t lanes, Vec<T> x) {
    constexpr int W = kLanes<T>;
    const int64_t k = args_.k;
    const S* from = static_cast<const S*>(args_.conv_in) + state;
    S* to = static_cast<S*>(args_.conv_out) + state;
#if SSMOE_BYTES == 64
    if constexpr (sizeof(T) == 4) {
      if (k == 4 && lanes >= W) {
        Vec<T> past[3];
        open_window(from + c * 3, past);
        shift_window(from + c * 3, x, to + c * 3);
        return past[0] * get(taps_) + past[1] * get(taps_ + W) + past[2] * get(taps_ + 2 * W) + x * get(taps_ + 3 * W);
      }
    }
#endif
    pack_taps<S>(from, c, lanes, k - 1, window_);
    put<T>(window_ + (k - 1) * W, x);
    Vec<T> y = splat<T>(0);
    for (int64_t j = 0; j < k; ++j) y = y + get(window_ + j * W) * get(taps_ + j * W);
    unpack_taps<S>(window_ + W, c, lanes, k - 1, to);
    return y;
  }

 private:
  const MambaStep& args_;
  Scratch<T> scratch_;
  T *taps_, *window_;
};

}  // namespace
