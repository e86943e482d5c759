// Matrix products of whole tensors, and the head's cross-entropy made of them.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "library.h"

namespace ssmoe {
namespace {

// A task's room, kept by its thread.
void* scratch(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> held;
  thread_local int64_t size = 0;
  if (size < bytes) {
    held.reset();
    size = (bytes + 4095) / 4096 * 4096;
    void* block = nullptr;
    STD_TORCH_CHECK(!posix_memalign(&block, 4096, size), "ssmoe cpu: out of memory");
    held.reset(block);
  }
  return held.get();
}

int64_t parts(int64_t size, int64_t most) { return std::max<int64_t>(1, (size + most - 1) / most); }

// Pieces whose left operand fits a core's second cache; enough of them for every thread to get two.
void multiply(const Dense& p, Kind kind) {
  if (!p.m || !p.n) return;
  int64_t rows = parts(p.m, 336), columns = parts(p.n, 512);
  const int64_t wanted = 2 * int64_t(torch::stable::get_num_threads());
  while (wanted > 2 && rows * columns < wanted && (p.m / rows > 112 || p.n / columns > 64))
    (p.n / columns > 2 * (p.m / rows) || p.m / rows <= 112 ? columns : rows) += 1;
  const int64_t height = (p.m + rows - 1) / rows, width = (parts(p.n, columns) + 31) / 32 * 32;
  rows = parts(p.m, height), columns = parts(p.n, width);
  const int64_t bytes = kernels().dense_scratch[kind](p, height, width);
  for_each(rows * columns, [&](int64_t i) {
    const int64_t top = i % rows * height, left = i / rows * width;
    kernels().dense[kind](p, {top, std::min(p.m, top + height), left, std::min(p.n, left + width)}, scratch(bytes));
  });
}

struct View {
  const void* data;
  int64_t rows, columns, row, column;
  bool wide;
  View t() const { return {data, columns, rows, column, row, wide}; }
};

View view(Keep& keep, const Tensor& t, Kind kind, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, "ssmoe cpu: ", name, " must be a matrix");
  const bool wide = t.scalar_type() == accumulator(kind);
  STD_TORCH_CHECK(wide || kind_of(t) == kind, "ssmoe cpu: ", name, " has the wrong dtype");
  const Tensor& kept = keep.matrix(t);
  return {kept.const_data_ptr(), kept.size(0), kept.size(1), kept.stride(0), kept.stride(1), wide};
}

Dense dense(const View& a, const View& b, const Tensor& c, Kind kind, bool add = false) {
  STD_TORCH_CHECK(a.columns == b.rows, "ssmoe cpu: a product of (", a.rows, ", ", a.columns, ") and (", b.rows, ", ",
                  b.columns, ")");
  return {a.rows, b.columns, a.columns, a.data, b.data, a.row, a.column, b.row, b.column,
          a.wide, b.wide, c.mutable_data_ptr(), b.columns, c.scalar_type() == accumulator(kind), add};
}

// a b in the activations' type, or wide; the type of the arithmetic is the narrower operand's
Tensor product(const Tensor& a, const Tensor& b, bool wide) {
  const Kind kind = std::max(kind_of(a), kind_of(b)) == kFloat64 ? kFloat64 : std::max(kind_of(a), kind_of(b));
  Keep keep;
  const View left = view(keep, a, kind, "a"), right = view(keep, b, kind, "b");
  Tensor c = empty({left.rows, right.columns},
                   wide ? accumulator(kind) : kind == kBFloat16 ? ScalarType::BFloat16 : accumulator(kind));
  multiply(dense(left, right, c, kind), kind);
  return c;
}

// Several products of contiguous results side by side, their pieces claimed by all threads, the largest first.
void multiply_each(const std::vector<Dense>& products, Kind kind) {
  struct Work {
    const Dense* product;
    Piece piece;
  };
  std::vector<Work> works;
  for (const Dense& p : products) {
    if (!p.m || !p.n) continue;
    if (!p.k) {
      std::memset(p.c, 0, p.m * p.n * (kind == kFloat64 ? 8 : kind == kFloat32 || p.c_wide ? 4 : 2));
      continue;
    }
    const int64_t rows = parts(p.m, 168), width = (parts(p.n, parts(p.n, 512)) + 31) / 32 * 32;
    for (int64_t left = 0; left < p.n; left += width)
      for (int64_t i = 0; i < rows; ++i)
        works.push_back({&p, {i * p.m / rows, (i + 1) * p.m / rows, left, std::min(p.n, left + width)}});
  }
  auto size = [](const Work& w) {
    return (w.piece.bottom - w.piece.top) * (w.piece.right - w.piece.left) * w.product->k;
  };
  std::stable_sort(works.begin(), works.end(), [&](const Work& a, const Work& b) { return size(a) > size(b); });
  for_each(int64_t(works.size()), [&](int64_t i) {
    const auto& [p, piece] = works[i];
    const int64_t bytes = kernels().dense_scratch[kind](*p, piece.bottom - piece.top, piece.right - piece.left);
    kernels().dense[kind](*p, piece, scratch(bytes));
  });
}

// Rows sorted by expert, expert e's from offset[e] to offset[e + 1]. Without `gradient` a (rows, k) times b (e, k, n) to
// (rows, n); with it a (rows, m) transposed times b (rows, n) to (e, m, n), zeros for an expert without rows. wide: the
// result has the accumulator's type.
Tensor grouped_product(const Tensor& a, const Tensor& b, const Tensor& offset, bool gradient, bool wide) {
  const Kind kind = std::max(kind_of(a), kind_of(b)) == kFloat64 ? kFloat64 : std::max(kind_of(a), kind_of(b));
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == (gradient ? 2 : 3) && offset.dim() == 1 && offset.size(0) > 0,
                  "ssmoe cpu: grouped_product takes a (rows, k), b (e, k, n) or (rows, n), offset (e + 1,)");
  expect(offset, ScalarType::Long, "offset");
  Keep keep;
  const int64_t experts = offset.size(0) - 1;
  const auto* begin = static_cast<const int64_t*>(keep.flat(offset, experts + 1, "offset"));
  for (int64_t e = 0; e <= experts; ++e)
    STD_TORCH_CHECK(begin[e] >= (e ? begin[e - 1] : 0) && begin[e] <= a.size(0), "ssmoe cpu: offset must rise from 0 to ",
                    a.size(0), " rows");
  STD_TORCH_CHECK(begin[0] == 0 && begin[experts] == a.size(0) && (gradient ? b.size(0) == a.size(0) : b.size(0) == experts),
                  "ssmoe cpu: grouped_product: the shapes of a, b and offset disagree");
  const ScalarType type = wide ? accumulator(kind) : kind == kBFloat16 ? ScalarType::BFloat16 : accumulator(kind);
  auto bytes = [](const Tensor& t) -> int64_t {
    return t.scalar_type() == ScalarType::Double ? 8 : t.scalar_type() == ScalarType::BFloat16 ? 2 : 4;
  };
  auto some = [&](const View& v, const Tensor& t, int64_t e) {
    View own = v;
    own.rows = begin[e + 1] - begin[e];
    own.data = static_cast<const char*>(v.data) + begin[e] * v.row * bytes(t);
    return own;
  };
  const View left = view(keep, a, kind, "a");
  std::vector<Dense> products;
  if (gradient) {
    const View right = view(keep, b, kind, "b");
    Tensor c = empty({experts, left.columns, right.columns}, type);
    for (int64_t e = 0; e < experts; ++e) {
      products.push_back(dense(some(left, a, e).t(), some(right, b, e), c, kind));
      products.back().c = static_cast<char*>(c.mutable_data_ptr()) + e * left.columns * right.columns * bytes(c);
    }
    multiply_each(products, kind);
    return c;
  }
  Tensor c = empty({left.rows, b.size(2)}, type);
  for (int64_t e = 0; e < experts; ++e) {
    const View right = view(keep, torch::stable::select(b, 0, e), kind, "b");
    products.push_back(dense(some(left, a, e), right, c, kind));
    products.back().c = static_cast<char*>(c.mutable_data_ptr()) + begin[e] * b.size(2) * bytes(c);
  }
  multiply_each(products, kind);
  return c;
}

constexpr int64_t kMostLogits = int64_t(32) << 20;  // of a part of the rows

// (mean loss, gradients of x, weight and bias)
std::tuple<Tensor, Tensor, Tensor, Tensor> head_cross_entropy(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                                              const Tensor& targets) {
  const Kind kind = kind_of(x);
  const ScalarType wide = accumulator(kind);
  Keep keep;
  const View input = view(keep, x, kind, "x"), head = view(keep, weight, kind, "weight");
  const int64_t t = input.rows, d = input.columns, v = head.rows;
  STD_TORCH_CHECK(head.columns == d, "ssmoe cpu: weight must have shape (v, ", d, ")");
  expect(targets, ScalarType::Long, "targets");
  if (bias) expect(*bias, wide, "bias");
  const auto* target = static_cast<const int64_t*>(keep.flat(targets, t, "targets"));
  int64_t counted = 0;
  for (int64_t i = 0; i < t; ++i) {
    STD_TORCH_CHECK(target[i] < v && (target[i] >= 0 || target[i] == -100), "ssmoe cpu: target ", target[i],
                    " is outside the vocabulary of ", v);
    counted += target[i] >= 0;
  }
  Tensor dx = empty({t, d}, x.scalar_type()), dweight = empty({v, d}, wide), dbias = empty({bias ? v : 0}, wide);
  const int64_t rows = std::max<int64_t>(1, std::min(t, kMostLogits / std::max<int64_t>(1, v)));
  Tensor logits = empty({rows, v}, wide);
  std::vector<double> loss(t);
  const int64_t item = kind == kFloat64 ? 8 : 4, narrow = kind == kBFloat16 ? 2 : 1;
  for (int64_t begin = 0; begin < t || begin == 0; begin += rows) {
    const int64_t count = std::min(rows, t - begin);
    View own = input;
    own.data = static_cast<const char*>(input.data) + begin * input.row * (kind == kBFloat16 && !input.wide ? 2 : item);
    own.rows = count;
    multiply(dense(own, head.t(), logits, kind), kind);
    Softmax s{v, logits.mutable_data_ptr(), keep.flat(bias, v, "bias"), target + begin,
              1.0 / double(std::max<int64_t>(1, counted)), loss.data() + begin};
    run(kernels().softmax[kind], s, count, 4);
    const View gradient{logits.const_data_ptr(), count, v, narrow * v, 1, kind != kBFloat16};
    Dense to_x = dense(gradient, head, dx, kind);
    to_x.c = static_cast<char*>(to_x.c) + begin * d * (kind == kBFloat16 ? 2 : item);
    multiply(to_x, kind);
    multiply(dense(gradient.t(), own, dweight, kind, begin > 0), kind);
    if (bias) {
      // a row of ones times the gradient
      std::vector<double> ones64(kind == kFloat64 ? count : 0, 1.0);
      std::vector<float> ones32(kind == kFloat64 ? 0 : count, 1.0f);
      const void* ones = kind == kFloat64 ? static_cast<const void*>(ones64.data()) : ones32.data();
      const View row{ones, 1, count, count, 1, true};
      multiply(dense(row, gradient, dbias, kind, begin > 0), kind);
    }
    if (t == 0) break;
  }
  double total = 0;
  for (double one : loss) total += one;
  Tensor mean = empty({1}, wide);
  total /= double(std::max<int64_t>(1, counted));
  if (kind == kFloat64)
    *static_cast<double*>(mean.mutable_data_ptr()) = total;
  else
    *static_cast<float*>(mean.mutable_data_ptr()) = float(total);
  return {mean, dx, dweight, dbias};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_FRAGMENT(ssmoe, m) {
  m.def("product(Tensor a, Tensor b, bool wide) -> Tensor");
  m.def("grouped_product(Tensor a, Tensor b, Tensor offset, bool gradient, bool wide) -> Tensor");
  m.def(
      "head_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor targets) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("product", TORCH_BOX(&ssmoe::product));
  m.impl("grouped_product", TORCH_BOX(&ssmoe::grouped_product));
  m.impl("head_cross_entropy", TORCH_BOX(&ssmoe::head_cross_entropy));
}
