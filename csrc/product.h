// Matrix products out of cache-sized pieces: operands packed into panels, one register tile at a time.
//
// A panel is as many columns as a vector has lanes, kept as [k][lanes], k the shared dimension; both operands are
// panels. The left one's values are broadcast, at most kMost of a panel; the right one's are vectors, two panels at
// a time. With AVX512-BF16 an element of a bfloat16 panel is a pair of neighbours along k.
#pragma once
#include <type_traits>

#include "vec.h"
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

struct Pair {
  uint32_t bits;
};

// U: a panel's element for activations S, kPer of them along k in each
template <class S>
struct Element {
  using U = typename Accumulator<S>::type;
  static constexpr int kPer = 1;
};
#ifdef __AVX512BF16__
template <>
struct Element<bfloat16> {
  using U = Pair;
  static constexpr int kPer = 2;
};
#endif
// the type of sums
template <class U>
struct Sum {
  using T = U;
};
template <>
struct Sum<Pair> {
  using T = float;
};
template <class U>
constexpr bool kPairs = !std::is_same<U, typename Sum<U>::T>::value;

// Rows of a register tile, so that two vectors a row, two of the right operand and a broadcast fit the registers.
template <class T>
constexpr int kMost = SSMOE_BYTES == 64 ? (sizeof(T) == 4 ? 14 : 8) : (SSMOE_BYTES == 32 ? 6 : 4) / (sizeof(T) / 4);

SSMOE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SSMOE_INLINE int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Memory that will be needed next and is not in cache, touched a line at a time while a tile is computed.
struct Ahead {
  const char* at = nullptr;
  int64_t rows = 0, row_lines = 1, lines = 1, skip = 0, step = 0;

  Ahead() = default;
  Ahead(const void* data, int64_t row_bytes, int64_t stride, int64_t count)
      : at(static_cast<const char*>(data)), rows(count), row_lines((row_bytes + 63) / 64), lines(row_lines) {
    if (row_lines <= 0 || rows <= 0) return;
    skip = stride - row_lines * 64;
    step = 64;
  }
  SSMOE_INLINE void touch() {
    __builtin_prefetch(at, 0, 2);
    at += step;
    if (__builtin_expect(--lines > 0, 1)) return;
    lines = row_lines;
    if (--rows > 0) {
      at += skip;
    } else {  // stay on the last line
      at -= step;
      step = skip = 0;
    }
  }
};

enum Mode : int { kSet, kAdd, kStream };  // kStream: past the caches, for what is not read again soon

// c (rows, columns) = or += left^T right over k elements
template <class U, class O>
struct Tile {
  int64_t k;
  const U *left, *right;
  int64_t right_step;  // from one panel to the next
  O* c;
  int64_t stride;
  Mode mode;
  Ahead* ahead;
};

SSMOE_INLINE void stream(void* p, Vec<float> v) {
#if SSMOE_BYTES == 64
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif SSMOE_BYTES == 32 && defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  memcpy(p, &v, sizeof v);
#endif
}
// what was streamed becomes visible to other threads
SSMOE_INLINE void drain() {
#ifdef __AVX2__
  _mm_sfence();
#endif
}

#define SSMOE_EACH_TILE_ROW _Pragma("GCC unroll 16") for (int i = 0; i < R; ++i)
#define SSMOE_EACH_TILE_VECTOR _Pragma("GCC unroll 2") for (int j = 0; j < N; ++j)

template <int R, int N, class U>
SSMOE_INLINE void step(const U* left, const U* right, int64_t right_step, Vec<U> (&sums)[R][N]) {
  Vec<U> vectors[N];
  SSMOE_EACH_TILE_VECTOR vectors[j] = get(right + j * right_step);
  SSMOE_EACH_TILE_ROW {
    SSMOE_EACH_TILE_VECTOR sums[i][j] += vectors[j] * left[i];
  }
}
#ifdef __AVX512BF16__
template <int R, int N>
SSMOE_INLINE void step(const Pair* left, const Pair* right, int64_t right_step, Vec<float> (&sums)[R][N]) {
  __m512bh vectors[N];
  SSMOE_EACH_TILE_VECTOR vectors[j] = (__m512bh)_mm512_load_si512(right + j * right_step);
  SSMOE_EACH_TILE_ROW {
    // set1_epi32 here runs clang 16 out of its stack
    const __m512bh both = (__m512bh)_mm512_broadcastd_epi32(_mm_cvtsi32_si128(int(left[i].bits)));
    SSMOE_EACH_TILE_VECTOR sums[i][j] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[i][j], both, vectors[j]);
  }
}
#endif

// one row of a tile to memory
template <int N, class T>
SSMOE_INLINE void emit(T* c, const Vec<T> (&sums)[N], Mode mode) {
  constexpr int W = kLanes<T>;
  SSMOE_EACH_TILE_VECTOR {
    if (mode == kAdd)
      store(c + j * W, load(c + j * W) + sums[j]);
    else if (mode == kStream)
      stream(c + j * W, (Vec<float>)sums[j]);
    else
      store(c + j * W, sums[j]);
  }
}
template <int N>
SSMOE_INLINE void emit(bfloat16* c, const Vec<float> (&sums)[N], Mode mode) {
#ifdef __AVX512BF16__
  if constexpr (N == 2) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[1], (__m512)sums[0]);
    return mode == kStream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(c), both) : _mm512_storeu_si512(c, both);
  }
#endif
  SSMOE_EACH_TILE_VECTOR store(c + j * kLanes<float>, sums[j]);
}

template <int R, int N, class U, class O>
void compute(const Tile<U, O>& tile) {
  using T = typename Sum<U>::T;
  constexpr int W = kLanes<T>;
  Vec<T> sums[R][N];
  SSMOE_EACH_TILE_ROW {
    SSMOE_EACH_TILE_VECTOR sums[i][j] = splat<T>(0);
  }
  const U *left = tile.left, *right = tile.right;
  const int64_t right_step = tile.right_step;
  Ahead ahead = *tile.ahead;
  int64_t k = tile.k;
  for (; k >= 2; k -= 2, left += 2 * W, right += 2 * W) {
    ahead.touch();
    step<R, N>(left, right, right_step, sums);
    step<R, N>(left + W, right + W, right_step, sums);
  }
  if (k) step<R, N>(left, right, right_step, sums);
  *tile.ahead = ahead;
  O* c = tile.c;
  SSMOE_EACH_TILE_ROW emit(c + i * tile.stride, sums[i], tile.mode);
}

template <int R, class U, class O>
SSMOE_INLINE void compute(const Tile<U, O>& tile, int64_t vectors) {
  if constexpr (R <= kMost<typename Sum<U>::T>) vectors == 2 ? compute<R, 2>(tile) : compute<R, 1>(tile);
}
template <class U, class O>
void compute(const Tile<U, O>& tile, int64_t rows, int64_t vectors) {
  switch (rows) {
#define SSMOE_ROWS(r) \
  case r:             \
    return compute<r>(tile, vectors);
    SSMOE_ROWS(1)
    SSMOE_ROWS(2)
    SSMOE_ROWS(3)
    SSMOE_ROWS(4)
    SSMOE_ROWS(5)
    SSMOE_ROWS(6)
    SSMOE_ROWS(7)
    SSMOE_ROWS(8)
    SSMOE_ROWS(9)
    SSMOE_ROWS(10)
    SSMOE_ROWS(11)
    SSMOE_ROWS(12)
    SSMOE_ROWS(13)
    SSMOE_ROWS(14)
#undef SSMOE_ROWS
  }
}

constexpr int64_t kDepth = 512;  // elements along k of a packed piece of an operand
constexpr int64_t kNear = 32;    // rows that are read together, column by column
constexpr int64_t kGroup = 8;    // panels of the right operand packed at a time where its rows lie along k

// Rows of a matrix in memory, picked by index if there is one.
template <class S>
struct Source {
  const S* data;
  int64_t stride;
  const int64_t* index = nullptr;
  SSMOE_INLINE const S* row(int64_t r) const { return data + (index ? index[r] : r) * stride; }
};

// Vectors of elements: values of one row of a source side by side, or of neighbouring rows one above the other.
template <class T, class S>
SSMOE_INLINE Vec<T> along(const S* p, int64_t count, T) {
  return count > 0 ? load_some(p, count) : splat<T>(0);
}
template <class T, class S>
SSMOE_INLINE Vec<T> across(const S* const* p, int64_t count, T) {
  return load_some(p[0], count);
}
#ifdef __AVX512BF16__
SSMOE_INLINE __m512 along(const bfloat16* p, int64_t count, Pair) {
  if (__builtin_expect(count >= 32, 1)) return _mm512_loadu_ps(p);
  bfloat16 whole[32] = {};
  if (count > 0) memcpy(whole, p, count * sizeof *p);
  return _mm512_loadu_ps(whole);
}
SSMOE_INLINE __m512 along(const float* p, int64_t count, Pair) {
  const Vec<float> low = along(p, count, 0.0f), high = along(p + 16, count - 16, 0.0f);
  return (__m512)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}
SSMOE_INLINE __m512 across(const bfloat16* const* p, int64_t count, Pair) {
  const __m512i low = (__m512i)load_some(p[0], count);  // bits above zeros
  const __m512i high = p[1] ? (__m512i)load_some(p[1], count) : _mm512_setzero_si512();
  return (__m512)_mm512_or_si512(_mm512_srli_epi32(low, 16), high);
}
SSMOE_INLINE __m512 across(const float* const* p, int64_t count, Pair) {
  const __m512i low = (__m512i)load_some(p[0], count);
  const __m512i high = p[1] ? (__m512i)load_some(p[1], count) : _mm512_setzero_si512();
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (__m512)_mm512_permutexvar_epi16(order, both);
}
#endif

// W vectors of W elements, columns for rows
template <class V, int W>
SSMOE_INLINE void transpose(V (&v)[W]) {
#if SSMOE_BYTES == 64
  if constexpr (W == 16) {
    __m512 *r = reinterpret_cast<__m512*>(v), t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        r[i + 2 * h] = (__m512)_mm512_unpacklo_pd((__m512d)t[i + h], (__m512d)t[i + 2 + h]);
        r[i + 2 * h + 1] = (__m512)_mm512_unpackhi_pd((__m512d)t[i + h], (__m512d)t[i + 2 + h]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
    return;
  }
#elif SSMOE_BYTES == 32 && defined(__AVX2__)
  if constexpr (W == 8) {
    __m256 *r = reinterpret_cast<__m256*>(v), t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        r[i + 2 * h] = (__m256)_mm256_unpacklo_pd((__m256d)t[i + h], (__m256d)t[i + 2 + h]);
        r[i + 2 * h + 1] = (__m256)_mm256_unpackhi_pd((__m256d)t[i + h], (__m256d)t[i + 2 + h]);
      }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) r[i] = t[i];
    return;
  }
#endif
  using T = std::remove_reference_t<decltype(v[0][0])>;
  T from[W][W], to[W][W];
  memcpy(from, v, sizeof from);
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < W; ++j) to[j][i] = from[i][j];
  memcpy(v, to, sizeof to);
}

// Panel of up to a vector of source rows (first..first + rows), values at..at + count of each along k.
template <class U, class S>
void pack_rows(U* panel, const Source<S>& source, int64_t first, int64_t rows, int64_t at, int64_t count) {
  constexpr int W = kLanes<typename Sum<U>::T>, per = kPairs<U> ? 2 : 1;
  const S* row[W];
  for (int i = 0; i < W; ++i) row[i] = source.row(first + least(i, rows - 1)) + at;
  for (int64_t done = 0; done < count; done += W * per) {
    Vec<typename Sum<U>::T> v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = (Vec<typename Sum<U>::T>)along(row[i] + done, count - done, U{});
    transpose<Vec<typename Sum<U>::T>, W>(v);
    const int64_t elements = (count - done + per - 1) / per;
    U* out = panel + done / per * W;
    if (__builtin_expect(elements >= W, 1)) {
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) memcpy(out + i * W, &v[i], sizeof v[i]);
    } else {
      memcpy(out, v, elements * W * sizeof(U));
    }
  }
}

// Panel of up to a vector of columns, from `column` on, rows first..first + count along k; `width` columns exist.
template <class U, class S>
void pack_columns(U* panel, const Source<S>& source, int64_t first, int64_t count, int64_t column, int64_t width) {
  constexpr int W = kLanes<typename Sum<U>::T>, per = kPairs<U> ? 2 : 1;
  const int64_t lanes = least(width - column, W);
  for (int64_t r = 0; r < count; r += per, panel += W) {
    const S* rows[2] = {source.row(first + r) + column,
                        per == 2 && r + 1 < count ? source.row(first + r + 1) + column : nullptr};
    const auto v = across(static_cast<const S* const*>(rows), lanes, U{});
    memcpy(panel, &v, sizeof v);
  }
}

// Two panels side by side in one pass, 2 W columns from `column` on.
template <class U, class S>
SSMOE_INLINE void side_by_side(const S* row, const S*, U* first, U* second) {
  const auto low = load(row), high = load(row + kLanes<U>);
  memcpy(first, &low, sizeof low);
  memcpy(second, &high, sizeof high);
}
#ifdef __AVX512BF16__
SSMOE_INLINE __m512i narrowed(const bfloat16* p) { return p ? _mm512_loadu_si512(p) : _mm512_setzero_si512(); }
SSMOE_INLINE __m512i narrowed(const float* p) {
  return p ? (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 16), _mm512_loadu_ps(p)) : _mm512_setzero_si512();
}
template <class S>
SSMOE_INLINE void side_by_side(const S* above, const S* below, Pair* first, Pair* second) {
  const __m512i a = narrowed(above), b = narrowed(below), step = _mm512_set1_epi16(16);
  const __m512i order = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  _mm512_store_si512(first, _mm512_permutex2var_epi16(a, order, b));
  _mm512_store_si512(second, _mm512_permutex2var_epi16(a, _mm512_add_epi16(order, step), b));
}
#endif
template <class U, class S>
void pack_column_pair(U* panels, int64_t step, const Source<S>& source, int64_t first, int64_t count, int64_t column) {
  constexpr int W = kLanes<typename Sum<U>::T>, per = kPairs<U> ? 2 : 1;
  for (int64_t r = 0; r < count; r += per, panels += W)
    side_by_side(source.row(first + r) + column, r + 1 < count ? source.row(first + r + 1) + column : nullptr, panels,
                 panels + step);
}
// Any number of columns in panels, some rows after the other, so that their pages and lines are visited once.
template <class U, class S>
void pack_all_columns(U* panels, int64_t step, const Source<S>& source, int64_t first, int64_t count, int64_t column,
                      int64_t columns, int64_t width) {
  constexpr int W = kLanes<typename Sum<U>::T>, per = kPairs<U> ? 2 : 1;
  for (int64_t r = 0; r < count; r += kNear) {
    const int64_t rows = least(kNear, count - r);
    for (int64_t c = 0; c < columns; c += W) {
      U* to = panels + c / W * step + r / per * W;
      if (width - column - c >= 2 * W && c + W < columns) {
        pack_column_pair(to, step, source, first + r, rows, column + c);
        c += W;
      } else {
        pack_columns(to, source, first + r, rows, column + c, width);
      }
    }
  }
}

// The right operand of a product: (k, n) as it lies in memory, or the transpose of what does.
template <class S>
struct Right {
  Source<S> source;
  int64_t k, n;
  bool transposed;

  // panels packed at a time; where rows lie along k they are read over some width
  SSMOE_INLINE int64_t group() const { return transposed ? 2 : kGroup; }
  template <class U>
  SSMOE_INLINE void pack(U* panels, int64_t panel_step, int64_t at, int64_t count, int64_t column, int64_t columns) const {
    constexpr int W = kLanes<typename Sum<U>::T>;
    if (!transposed) return pack_all_columns(panels, panel_step, source, at, count, column, columns, n);
    for (int64_t c = 0; c < columns; c += W, panels += panel_step)
      pack_rows(panels, source, column + c, least(W, columns - c), at, count);
  }
  // what `pack` will read
  SSMOE_INLINE Ahead ahead(int64_t at, int64_t count, int64_t column) const {
    const int64_t bytes = source.stride * sizeof(S), columns = least(group() * kLanes<float>, n - column);
    return transposed ? Ahead(source.data + column * source.stride + at, count * sizeof(S), bytes, columns)
                      : Ahead(source.data + at * source.stride + column, columns * sizeof(S), bytes, count);
  }
};

// Rows of the left operand split evenly into panels.
template <class T>
SSMOE_INLINE int64_t panels_of(int64_t rows) {
  return (rows + kMost<T> - 1) / kMost<T>;
}

// c (m, n) = or += left right: left in panels of m rows, `left_step` elements apart; c has whole vectors a row.
// `buffer` holds kGroup panels of kDepth. `next` is what the caller will read after this.
template <class U, class S>
void product(int64_t m, const U* left, int64_t left_step, const Right<S>& right, typename Sum<U>::T* c,
             int64_t stride, bool add, U* buffer, const Ahead& next) {
  using T = typename Sum<U>::T;
  constexpr int W = kLanes<T>, per = kPairs<U> ? 2 : 1;
  const int64_t panels = panels_of<T>(m), group = right.group() * W;
  for (int64_t at = 0; at < right.k; at += kDepth * per) {
    const int64_t count = least(kDepth * per, right.k - at), depth = (count + per - 1) / per;
    for (int64_t column = 0; column < right.n; column += group) {
      const int64_t columns = least(group, right.n - column), after = at + kDepth * per;
      right.pack(buffer, depth * W, at, count, column, columns);
      Ahead ahead = column + group < right.n ? right.ahead(at, count, column + group)
                    : after < right.k        ? right.ahead(after, least(kDepth * per, right.k - after), 0)
                                             : next;
      if (!ahead.at) ahead.at = reinterpret_cast<const char*>(buffer);
      for (int64_t j = 0; j < columns; j += 2 * W)
        for (int64_t p = 0; p < panels; ++p) {
          const int64_t begin = p * m / panels, end = (p + 1) * m / panels;
          compute(Tile<U, T>{depth, left + p * left_step + at / per * W, buffer + j * depth, depth * W,
                             c + begin * stride + column + j, stride, add || at > 0 ? kAdd : kSet, &ahead},
                  end - begin, columns - j > W ? 2 : 1);
        }
    }
  }
}

}  // namespace
