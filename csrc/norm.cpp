// norm and its backward as torch ops.
#include "library.h"

namespace ssmoe {
namespace {

// The kernel's kind: that of the narrower of x and y; the wider must be its accumulator.
Kind narrower(ScalarType x, ScalarType y) {
  const bool half = x == ScalarType::BFloat16 || y == ScalarType::BFloat16;
  const Kind kind = half ? kBFloat16 : x == ScalarType::Double ? kFloat64 : kFloat32;
  for (ScalarType type : {x, y})
    STD_TORCH_CHECK(type == accumulator(kind) || (half && type == ScalarType::BFloat16),
                    "ssmoe cpu: norm takes float32 or bfloat16, or float64 alone");
  return kind;
}

struct Prepared {
  Norm args{};
  Kind kind;
  ScalarType wide;
  Keep keep;

  Prepared(const Tensor& x, const Tensor& weight, const Maybe& bias, double eps, ScalarType y)
      : kind(narrower(x.scalar_type(), y)), wide(accumulator(kind)) {
    Norm& n = args;
    n.d = weight.numel(), n.t = n.d ? x.numel() / n.d : 0, n.eps = eps;
    STD_TORCH_CHECK(x.dim() && x.size(x.dim() - 1) == n.d, "ssmoe cpu: norm of a row of another width");
    expect(weight, wide, "weight");
    if (bias) expect(*bias, wide, "bias");
    n.x = keep.flat(x, x.numel(), "x"), n.weight = keep.flat(weight, n.d, "weight");
    n.bias = keep.flat(bias, n.d, "bias");
    n.wide_x = x.scalar_type() == wide, n.wide_y = y == wide;
  }
  Prepared(const Prepared&) = delete;
};

std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) sizes[i] = t.size(i);
  return sizes;
}

// (y, moments); moments are kept for the backward pass only
std::tuple<Tensor, Tensor> norm(const Tensor& x, const Tensor& weight, const Maybe& bias, double eps, ScalarType dtype,
                                bool keep) {
  Prepared p(x, weight, bias, eps, dtype);
  Norm& n = p.args;
  Tensor y = empty(sizes_of(x), dtype), moments = empty({keep ? n.t : 0, 2}, p.wide);
  n.y = y.mutable_data_ptr();
  n.moments = keep ? moments.mutable_data_ptr() : nullptr;
  run(kernels().norm[p.kind], n, n.t, 16);
  return {y, moments};
}

// gradients of x (with that of the stream, if there is one), weight and bias
std::tuple<Tensor, Tensor, Tensor> norm_backward(const Maybe& dstream, const Tensor& dy, const Tensor& x, const Tensor& weight,
                                                 const Maybe& bias, double eps, const Tensor& moments) {
  Prepared p(x, weight, bias, eps, dy.scalar_type());
  Norm& n = p.args;
  const int64_t tasks = std::max<int64_t>(1, std::min<int64_t>(4 * torch::stable::get_num_threads(), n.t / 16));
  n.part = std::max<int64_t>(1, (n.t + tasks - 1) / tasks);
  const int64_t parts = (n.t + n.part - 1) / n.part, sums = (bias ? 2 : 1) * n.d;
  Tensor dx = empty(sizes_of(x), x.scalar_type()), partial = empty({parts, 2, sums}, p.wide);
  if (dstream) expect(*dstream, x.scalar_type(), "dstream");
  n.dstream = p.keep.flat(dstream, x.numel(), "dstream");
  n.dy = p.keep.flat(dy, x.numel(), "dy"), n.dx = dx.mutable_data_ptr();
  n.moments = const_cast<void*>(p.keep.flat(moments, 2 * n.t, "moments"));
  n.dparameters = partial.mutable_data_ptr();
  run(kernels().norm_backward[p.kind], n, parts);
  const int64_t first = 0;
  Tensor total = torch::stable::sum(torch::stable::select(partial, 1, 0), torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
  Tensor dweight = torch::stable::narrow(total, 0, 0, n.d);
  return {dx, dweight, torch::stable::narrow(total, 0, n.d, bias ? n.d : 0)};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_FRAGMENT(ssmoe, m) {
  m.def("row_norm(Tensor x, Tensor weight, Tensor? bias, float eps, ScalarType dtype, bool keep) -> (Tensor, Tensor)");
  m.def(
      "row_norm_backward(Tensor? dstream, Tensor dy, Tensor x, Tensor weight, Tensor? bias, float eps, Tensor moments) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("row_norm", TORCH_BOX(&ssmoe::norm));
  m.impl("row_norm_backward", TORCH_BOX(&ssmoe::norm_backward));
}
