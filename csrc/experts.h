// The expert bank: tasks of one expert's rows, or of a slice of its weights' gradients. Rows are gathered as they are
// packed, weights read from memory once a task (and narrowed, if wider, as they are packed), and what lies between
// two products stays in cache.
#pragma once
#include "kernels.h"
#include "product.h"

namespace {

using ssmoe::Bank;
using ssmoe::Block;
using ssmoe::Combine;

constexpr int64_t kSlice = 128;         // hidden columns between two products at a time
constexpr int64_t kPiece = 128 * 1024;  // elements of a gradient's packed right operand
constexpr int64_t kWidest = 1024;       // columns of it
constexpr int64_t kTogether = 4;        // panels of its left operand packed at a time

// no exponent above 0, so that nothing overflows
template <class T>
SSMOE_INLINE Vec<T> logistic(Vec<T> v) {
  const Vec<T> e = exp<T>(v < T(0) ? v : -v);
  return (v < T(0) ? e : splat<T>(1)) / (e + T(1));
}

// value and slope of the activation
template <class T>
SSMOE_INLINE void activation(int64_t kind, Vec<T> v, Vec<T>& value, Vec<T>& slope) {
  Vec<T> zero = splat<T>(0);
  if (kind == ssmoe::kSilu) {
    Vec<T> s = logistic<T>(v);
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

// to the activations' precision and back, as separate ops would
template <class S>
SSMOE_INLINE Vec<typename Accumulator<S>::type> through(Vec<typename Accumulator<S>::type> v) {
  if constexpr (sizeof(S) == 2) {
    Lane<float>::U u = rounded(v) << 16;
    return (Vec<float>)u;
  }
  return v;
}

template <class S>
void activate(const ssmoe::Activate& args, int64_t begin, int64_t end) {
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

// Pieces of a task's scratch memory, each on its own lines.
struct Room {
  char* at;
  template <class X>
  X* take(int64_t count) {
    X* found = reinterpret_cast<X*>(at);
    at += up_to(count * sizeof(X), 64);
    return found;
  }
};

// What the tasks of one element type share: sizes, scratch, and the loop over slices of the hidden width.
template <class S, class Weight>
struct Expert {
  using U = typename Element<S>::U;
  using T = typename Sum<U>::T;
  static constexpr int64_t W = kLanes<T>, per = Element<S>::kPer;
  static constexpr int64_t kDeep = kDepth * per;  // values along k packed at a time

  const Bank& bank;
  int64_t begin, rows, panels, expert;
  int64_t left_step, out_stride;
  static constexpr int64_t slice_stride = kSlice + W, inner_step = kDepth * W;
  U *left, *inner, *other, *buffer;
  T *first, *second, *out, *dots;
  S* strip;

  Expert(const Bank& b, int64_t begin, int64_t rows, int64_t expert, Room& room)
      : bank(b), begin(begin), rows(rows), panels(panels_of<T>(rows)), expert(expert) {
    left_step = (b.d + per - 1) / per * W;
    out_stride = up_to(b.d, 2 * W) + W;
    left = room.take<U>(panels * left_step);
    inner = room.take<U>(panels * inner_step);
    other = room.take<U>(panels * inner_step);
    buffer = room.take<U>(kGroup * inner_step);
    first = room.take<T>(rows * slice_stride);
    second = room.take<T>(rows * slice_stride);
    out = room.take<T>(rows * out_stride);
    dots = room.take<T>(rows);
    strip = room.take<S>(kMost<T> * kSlice);
  }

  const Weight* of(const void* weights) const {
    return static_cast<const Weight*>(weights) + expert * bank.d * bank.f;
  }
  // up or gate, hidden columns from `at` on: as (d, count), or as (count, d)
  Right<Weight> wide(const void* weights, int64_t at, int64_t count, bool transposed) const {
    return {{of(weights) + at * bank.d, bank.d}, transposed ? bank.d : count, transposed ? count : bank.d, transposed};
  }
  // down, hidden columns from `at` on: as (count, d), or as (d, count)
  Right<Weight> narrow(int64_t at, int64_t count, bool transposed) const {
    return {{of(bank.down) + at, bank.f}, transposed ? count : bank.d, transposed ? bank.d : count, transposed};
  }
  // where a product with it begins
  template <class R>
  Ahead start(const R& right) const {
    return right.ahead(0, least(kDeep, right.k), 0);
  }
  int64_t row(int64_t panel) const { return panel * rows / panels; }

  void gather(const void* from) {
    const Source<S> source{static_cast<const S*>(from), bank.d, bank.token + begin};
    for (int64_t p = 0; p < panels; ++p) pack_rows(left + p * left_step, source, row(p), row(p + 1) - row(p), 0, bank.d);
  }
  S* saved(void* array, int64_t r, int64_t column) const {
    return array ? static_cast<S*>(array) + (begin + r) * bank.f + column : nullptr;
  }
  // into columns `column` on of the inner panels
  void pack_inner(U* panels_, int64_t p, const S* from, int64_t stride, int64_t column, int64_t count) const {
    pack_rows(panels_ + p * inner_step + column / per * W, Source<S>{from, stride}, 0, row(p + 1) - row(p), 0, count);
  }
  void scatter(bool weighted) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = bank.direct ? bank.token[begin + r] : begin + r;
      const T weight = weighted ? static_cast<const T*>(bank.weight)[bank.slot[begin + r]] : T(1);
      S* to = static_cast<S*>(bank.out) + at * bank.d;
      for (int64_t c = 0; c < bank.d; c += W) store_some(to + c, load(out + r * out_stride + c) * weight, bank.d - c);
    }
  }

  void activate(int64_t at, int64_t column, int64_t count) {
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t r = row(p); r < row(p + 1); ++r)
        for (int64_t c = 0; c < count; c += W) {
          const Vec<T> hidden = load(first + r * slice_stride + c);
          const Vec<T> gate = bank.gate ? load(second + r * slice_stride + c) : hidden;
          Vec<T> value, slope;
          activation<T>(bank.activation, gate, value, slope);
          if (bank.gate) value = value * hidden;
          if (bank.hidden) {
            store_some(saved(bank.hidden, r, at + column + c), hidden, count - c);
            if (bank.gate) store_some(saved(bank.gates, r, at + column + c), gate, count - c);
          }
          store_some(strip + (r - row(p)) * kSlice + c, value, count - c);
        }
      pack_inner(inner, p, strip, kSlice, column, count);
    }
  }

  void forward() {
    gather(bank.x);
    for (int64_t at = 0; at < bank.f; at += kDeep) {
      const int64_t width = least(kDeep, bank.f - at);
      const Right<Weight> down = narrow(at, width, true);
      for (int64_t column = 0; column < width; column += kSlice) {
        const int64_t count = least(kSlice, width - column);
        const Right<Weight> up = wide(bank.up, at + column, count, true);
        const Ahead next = column + kSlice < width ? start(wide(bank.up, at + column + kSlice, kSlice, true)) : start(down);
        if (bank.gate) {
          const Right<Weight> gate = wide(bank.gate, at + column, count, true);
          product(rows, left, left_step, up, first, slice_stride, false, buffer, start(gate));
          product(rows, left, left_step, gate, second, slice_stride, false, buffer, next);
        } else {
          product(rows, left, left_step, up, first, slice_stride, false, buffer, next);
        }
        activate(at, column, count);
      }
      const Ahead next = at + width < bank.f ? start(wide(bank.up, at + width, kSlice, true)) : Ahead();
      product(rows, inner, inner_step, down, out, out_stride, at > 0, buffer, next);
    }
    scatter(bank.direct);
  }

  // the same columns two rows further down, which no hardware expects
  void soon(const S* columns, int64_t count) const {
    const char* at = reinterpret_cast<const char*>(columns + 2 * bank.f);
    for (int64_t i = 0; i < count * int64_t(sizeof(S)); i += 64) __builtin_prefetch(at + i);
  }

  void activate_backward(int64_t at, int64_t column, int64_t count) {
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t r = row(p); r < row(p + 1); ++r) {
        const T weight = static_cast<const T*>(bank.weight)[bank.slot[begin + r]];
        const int64_t place = at + column;
        const S *hidden = saved(bank.hidden, r, place), *gates = saved(bank.gates, r, place);
        S *scaled = saved(bank.inner, r, place), *dhidden = saved(bank.dhidden, r, place);
        S* dgates = saved(bank.dgates, r, place);
        soon(hidden, count), soon(scaled, count), soon(dhidden, count);
        if (bank.gate) soon(gates, count), soon(dgates, count);
        Vec<T> dot = splat<T>(0);
        for (int64_t c = 0; c < count; c += W) {
          const int64_t lanes = count - c;
          Vec<T> value, slope, h = load_some(hidden + c, lanes), d = load(first + r * slice_stride + c);
          activation<T>(bank.activation, bank.gate ? load_some(gates + c, lanes) : h, value, slope);
          const Vec<T> product = bank.gate ? value * h : value;
          // lanes beyond the width hold what was there before
          Vec<T> term = product * d;
          if (__builtin_expect(lanes < W, 0))
            for (int64_t i = lanes; i < W; ++i) term[i] = 0;
          dot = dot + term;
          d = d * weight;
          store_some(dhidden + c, bank.gate ? d * value : d * slope, lanes);
          if (bank.gate) store_some(dgates + c, d * h * slope, lanes);
          store_some(scaled + c, product * weight, lanes);
        }
        dots[r] += sum<T>(dot);
      }
      pack_inner(inner, p, saved(bank.dhidden, row(p), at + column), bank.f, column, count);
      if (bank.gate) pack_inner(other, p, saved(bank.dgates, row(p), at + column), bank.f, column, count);
    }
  }

  void backward() {
    gather(bank.dy);
    for (int64_t r = 0; r < rows; ++r) dots[r] = 0;
    for (int64_t at = 0; at < bank.f; at += kDeep) {
      const int64_t width = least(kDeep, bank.f - at);
      const Right<Weight> up = wide(bank.up, at, width, false);
      for (int64_t column = 0; column < width; column += kSlice) {
        const int64_t count = least(kSlice, width - column);
        const Ahead next = column + kSlice < width ? start(narrow(at + column + kSlice, kSlice, false)) : start(up);
        product(rows, left, left_step, narrow(at + column, count, false), first, slice_stride, false, buffer, next);
        activate_backward(at, column, count);
      }
      const Ahead next = at + width < bank.f ? start(narrow(at + width, kSlice, false)) : Ahead();
      if (bank.gate) {
        const Right<Weight> gate = wide(bank.gate, at, width, false);
        product(rows, inner, inner_step, up, out, out_stride, at > 0, buffer, start(gate));
        product(rows, other, inner_step, gate, out, out_stride, true, buffer, next);
      } else {
        product(rows, inner, inner_step, up, out, out_stride, at > 0, buffer, next);
      }
    }
    scatter(false);
    for (int64_t r = 0; r < rows; ++r) static_cast<T*>(bank.dweight)[bank.slot[begin + r]] = dots[r];
  }
};

template <class S>
struct Gradients {
  using U = typename Element<S>::U;
  using T = typename Sum<U>::T;
  static constexpr int64_t W = kLanes<T>, per = Element<S>::kPer, whole = 2 * W;

  int64_t rows, depth, columns, sum_stride;  // packed at a time: elements along the rows, columns of the right operand
  U *panels, *piece;
  T* sums;  // (outputs' rows, columns) of what does not fit into one depth

  // no smaller with more rows or outputs, so that the largest task's scratch serves all
  Gradients(int64_t rows, int64_t outputs, Room& room) : rows(rows), depth(least(kDepth, (rows + per - 1) / per)) {
    columns = least(up_to(kPiece / (depth + 1) + 1, whole), kWidest);
    sum_stride = columns + W;
    panels = room.take<U>(kTogether * kDepth * W);
    piece = room.take<U>(kPiece + kDepth * whole);
    const int64_t once = kMost<T> * (kWidest + W), added = rows > depth * per ? outputs * sum_stride : 0;
    sums = room.take<T>(once > added ? once : added);
  }

  // out (m, n), rows first..last of left^T right
  template <class O>
  void multiply(const Source<S>& left, int64_t m, const Source<S>& right, int64_t n, int64_t first, int64_t last,
                O* out, bool streamed) const {
    const bool lines = streamed && n * sizeof(O) % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
    const bool once = rows <= depth * per;
    for (int64_t from = 0; from < n; from += columns) {
      const int64_t count = least(columns, n - from);
      for (int64_t at = 0; at < rows; at += depth * per) {
        const int64_t some = least(depth * per, rows - at);
        pack_all_columns(piece, depth * W, right, at, some, from, count, n);
        piece_of(left, m, at, some, first, last, [&](const U* panel, int64_t top, int64_t tall) {
          for (int64_t c = 0; c < count; c += whole) {
            const U* vectors = piece + c * depth;
            O* to = out + top * n + from + c;
            if (once && count - c >= whole) {
              tile(panel, vectors, some, to, n, lines ? kStream : kSet, tall, 2);
              continue;
            }
            T* sum = sums + (once ? 0 : (top - first) * sum_stride) + c;
            tile(panel, vectors, some, sum, sum_stride, at ? kAdd : kSet, tall, count - c > W ? 2 : 1);
            if (at + some == rows) copy(sum, tall, least(whole, count - c), to, n);
          }
        });
      }
    }
    if (lines) drain();
  }

 private:
  // f(panel, first output row, output rows) for every panel of the left operand
  template <class F>
  void piece_of(const Source<S>& left, int64_t m, int64_t at, int64_t some, int64_t first, int64_t last,
                const F& f) const {
    const int64_t outputs = last - first, count = panels_of<T>(outputs);
    auto top = [&](int64_t p) { return first + p * outputs / count; };
    for (int64_t p = 0; p < count; p += kTogether) {
      const int64_t end = least(p + kTogether, count);
      for (int64_t r = 0; r < some; r += kNear)
        for (int64_t q = p; q < end; ++q)
          pack_columns(panels + (q - p) * depth * W + r / per * W, left, at + r, least(kNear, some - r), top(q), m);
      for (int64_t q = p; q < end; ++q) f(panels + (q - p) * depth * W, top(q), top(q + 1) - top(q));
    }
  }
  template <class O>
  void tile(const U* panel, const U* vectors, int64_t some, O* to, int64_t stride, Mode mode, int64_t tall,
            int64_t wide) const {
    Ahead none;
    none.at = reinterpret_cast<const char*>(panel);
    compute(Tile<U, O>{(some + per - 1) / per, panel, vectors, depth * W, to, stride, mode, &none}, tall, wide);
  }
  template <class O>
  void copy(const T* sum, int64_t tall, int64_t wide, O* to, int64_t n) const {
    for (int64_t r = 0; r < tall; ++r)
      for (int64_t i = 0; i < wide; i += W) store_some(to + r * n + i, load(sum + r * sum_stride + i), wide - i);
  }
};

template <class S>
using Wide = typename Accumulator<S>::type;

template <class S>
void expert_forward(const Bank& bank, const Block& block, void* scratch) {
  Room room{static_cast<char*>(scratch)};
  const int64_t rows = block.end - block.begin;
  if (bank.wide)
    Expert<S, Wide<S>>(bank, block.begin, rows, block.expert, room).forward();
  else
    Expert<S, S>(bank, block.begin, rows, block.expert, room).forward();
}

template <class S>
void expert_backward(const Bank& bank, const Block& block, void* scratch) {
  Room room{static_cast<char*>(scratch)};
  const int64_t rows = block.end - block.begin;
  if (bank.wide)
    Expert<S, Wide<S>>(bank, block.begin, rows, block.expert, room).backward();
  else
    Expert<S, S>(bank, block.begin, rows, block.expert, room).backward();
}

template <class S, class O>
void expert_gradient(const Bank& bank, const Block& block, void* scratch) {
  const int64_t rows = block.end - block.begin, n = block.matrix ? bank.d : bank.f;
  void* gradients[] = {bank.ddown, bank.dup, bank.dgate};
  O* out = static_cast<O*>(gradients[block.matrix]) + block.expert * bank.d * bank.f;
  if (!rows) {
    memset(out + block.first * n, 0, (block.last - block.first) * n * sizeof(O));
    return;
  }
  Room room{static_cast<char*>(scratch)};
  const Gradients<S> work(rows, block.last - block.first, room);
  auto tokens = [&](const void* data) {
    return Source<S>{static_cast<const S*>(data), bank.d, bank.token + block.begin};
  };
  auto sorted = [&](const void* data) {
    return Source<S>{static_cast<const S*>(data) + block.begin * bank.f, bank.f};
  };
  if (block.matrix == 0)
    work.multiply(tokens(bank.dy), bank.d, sorted(bank.inner), n, block.first, block.last, out, bank.stream);
  else
    work.multiply(sorted(block.matrix == 1 ? bank.dhidden : bank.dgates), bank.f, tokens(bank.x), n, block.first,
                  block.last, out, bank.stream);
}

template <class S>
void expert_gradients(const Bank& bank, const Block& block, void* scratch) {
  if (bank.wide)
    expert_gradient<S, Wide<S>>(bank, block, scratch);
  else
    expert_gradient<S, S>(bank, block, scratch);
}

// bytes
template <class S>
int64_t expert_scratch(const Bank& bank, int64_t block_rows, int64_t expert_rows, int64_t outputs) {
  Room rows{nullptr}, gradients{nullptr};
  Expert<S, S>(bank, 0, block_rows, 0, rows);
  Gradients<S>(expert_rows, outputs, gradients);
  const int64_t most = rows.at > gradients.at ? rows.at - (char*)nullptr : gradients.at - (char*)nullptr;
  return up_to(most, 4096);
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
