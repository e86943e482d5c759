// A piece of a matrix product whose operands lie anywhere: the left one packed whole, the right one two panels at a
// time (product.h). Operands of the accumulator's type are narrowed while they are packed.
#pragma once
#include "kernels.h"
#include "product.h"

namespace {

using ssmoe::Dense;
using ssmoe::Piece;

// `rows` of the left operand from `row` on, or as many columns of the right one, over k elements at..at + count
template <class U, class S>
SSMOE_INLINE void pack_panel(U* panel, const S* data, int64_t outer, int64_t inner, int64_t row, int64_t rows,
                             int64_t all, int64_t at, int64_t count) {
  if (inner == 1)
    pack_rows(panel, Source<S>{data, outer}, row, rows, at, count);
  else
    pack_columns(panel, Source<S>{data, inner}, at, count, row, all);
}
template <class S, class U>
SSMOE_INLINE void pack_operand(U* panel, const void* data, bool wide, int64_t outer, int64_t inner, int64_t row,
                               int64_t rows, int64_t all, int64_t at, int64_t count) {
  using T = typename Accumulator<S>::type;
  if (wide)
    pack_panel(panel, static_cast<const T*>(data), outer, inner, row, rows, all, at, count);
  else
    pack_panel(panel, static_cast<const S*>(data), outer, inner, row, rows, all, at, count);
}

template <class S>
constexpr int64_t kPieceDepth = kDepth * Element<S>::kPer;

// left panels, two right panels, sums (of one tile, or where they are narrowed after several pieces of k, of all)
template <class S>
struct DenseScratch {
  using U = typename Element<S>::U;
  using T = typename Accumulator<S>::type;
  static constexpr int W = kLanes<T>;
  int64_t left, right, sums;

  DenseScratch(const Dense& p, int64_t rows, int64_t columns)
      : left(panels_of<T>(rows) * kDepth * W),
        right(2 * kDepth * W),
        sums(p.c_wide || p.k <= kPieceDepth<S> ? kMost<T> * 2 * W : rows * up_to(columns, 2 * W)) {}
  int64_t bytes() const { return (left + right) * sizeof(U) + sums * sizeof(T); }
};

template <class S>
int64_t dense_scratch(const Dense& p, int64_t rows, int64_t columns) {
  return DenseScratch<S>(p, rows, columns).bytes();
}

// rows of sums to c, `columns` of them
template <class S>
void settle(const Dense& p, const typename Accumulator<S>::type* sums, int64_t stride, int64_t row, int64_t rows,
            int64_t column, int64_t columns) {
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += W) {
      const Vec<T> v = load(sums + i * stride + j);
      if (p.c_wide) {
        T* to = static_cast<T*>(p.c) + (row + i) * p.c_row + column + j;
        store_some(to, v, columns - j);
      } else {
        store_some(static_cast<S*>(p.c) + (row + i) * p.c_row + column + j, v, columns - j);
      }
    }
}

// the memory of the right operand's next two panels
template <class S>
SSMOE_INLINE Ahead next_columns(const Dense& p, const Piece& piece, int64_t column, int64_t at, int64_t count) {
  using T = typename Accumulator<S>::type;
  const int64_t columns = least(2 * kLanes<T>, piece.right - piece.left - column);
  if (columns <= 0) return {};
  const int64_t item = p.b_wide ? sizeof(T) : sizeof(S);
  const char* from = static_cast<const char*>(p.b) + ((piece.left + column) * p.b_column + at * p.b_row) * item;
  return p.b_row == 1 ? Ahead(from, count * item, p.b_column * item, columns)
                      : Ahead(from, columns * item, p.b_row * item, count);
}

template <class S>
void dense_block(const Dense& p, const Piece& piece, void* scratch) {
  using U = typename Element<S>::U;
  using T = typename Accumulator<S>::type;
  constexpr int W = kLanes<T>, per = Element<S>::kPer;
  const int64_t m = piece.bottom - piece.top, n = piece.right - piece.left, panels = panels_of<T>(m);
  const DenseScratch<S> sizes(p, m, n);
  U *left = static_cast<U*>(scratch), *right = left + sizes.left;
  T* sums = reinterpret_cast<T*>(right + sizes.right);
  const bool whole = p.k <= kPieceDepth<S>, gather = !p.c_wide && !whole;
  const int64_t sum_row = gather ? up_to(n, 2 * W) : 2 * W;
  for (int64_t at = 0; at < p.k; at += kPieceDepth<S>) {
    const int64_t count = least(kPieceDepth<S>, p.k - at), depth = (count + per - 1) / per;
    const bool first = at == 0, last = at + count >= p.k;
    for (int64_t i = 0; i < panels; ++i)
      pack_operand<S>(left + i * kDepth * W, p.a, p.a_wide, p.a_row, p.a_column, piece.top + i * m / panels,
                      (i + 1) * m / panels - i * m / panels, p.m, at, count);
    for (int64_t column = 0; column < n; column += 2 * W) {
      const int64_t columns = least(2 * W, n - column), vectors = columns > W ? 2 : 1;
      for (int64_t j = 0; j < vectors; ++j)
        pack_operand<S>(right + j * depth * W, p.b, p.b_wide, p.b_column, p.b_row, piece.left + column + j * W,
                        least(W, columns - j * W), p.n, at, count);
      Ahead ahead = next_columns<S>(p, piece, column + 2 * W, at, count);
      if (!ahead.at) ahead.at = reinterpret_cast<const char*>(right);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t begin = i * m / panels, rows = (i + 1) * m / panels - begin;
        const U* own = left + i * kDepth * W;
        const int64_t top = piece.top + begin, side = piece.left + column;
        if (columns == vectors * W && p.c_wide) {
          T* c = static_cast<T*>(p.c) + top * p.c_row + side;
          compute(Tile<U, T>{depth, own, right, depth * W, c, p.c_row, p.add || !first ? kAdd : kSet, &ahead}, rows,
                  vectors);
        } else if (columns == vectors * W && whole) {
          S* c = static_cast<S*>(p.c) + top * p.c_row + side;
          compute(Tile<U, S>{depth, own, right, depth * W, c, p.c_row, kSet, &ahead}, rows, vectors);
        } else {
          T* tile = gather ? sums + begin * sum_row + column : sums;
          const bool add = gather ? !first : p.add || !first;
          if (add && !gather)  // bring what a wide c holds
            for (int64_t r = 0; r < rows; ++r)
              memcpy(tile + r * sum_row, static_cast<T*>(p.c) + (top + r) * p.c_row + side, columns * sizeof(T));
          compute(Tile<U, T>{depth, own, right, depth * W, tile, sum_row, add ? kAdd : kSet, &ahead}, rows, vectors);
          if (!gather || last) settle<S>(p, tile, sum_row, top, rows, side, columns);
        }
      }
    }
  }
}

}  // namespace
