// causal_conv1d and its backward as torch ops.
#include "library.h"

namespace ssmoe {
namespace {

struct Prepared {
  Conv args{};
  Kind kind;
  Keep keep;
  std::vector<uint8_t> flags;

  Prepared(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& ids, const Maybe& starts)
      : kind(kind_of(x)), flags(flags_of(ids, starts, x.size(0), x.size(1))) {
    STD_TORCH_CHECK(weight.dim() == 2, "ssmoe cpu: weight must have shape (d, k)");
    expect(weight, accumulator(kind), "weight");
    if (bias) expect(*bias, accumulator(kind), "bias");
    Conv& c = args;
    c.b = x.size(0), c.l = x.size(1), c.d = x.size(2), c.k = weight.size(1);
    c.x = keep.rows(x, c.b, c.l, c.d, "x");
    c.weight = keep.flat(weight, c.d * c.k, "weight"), c.bias = keep.flat(bias, c.d, "bias");
    c.flags = flags.empty() ? nullptr : flags.data();
    c.group = group_size(c.b, c.d, 64);
    c.groups = (c.d + c.group - 1) / c.group;
  }
  Prepared(const Prepared&) = delete;

  void start_from(const Maybe& initial_state, ScalarType activation) {
    if (initial_state) expect(*initial_state, activation, "initial_state");
    args.initial_state = keep.flat(initial_state, args.b * args.d * (args.k - 1), "initial_state");
  }
};

void forward(Prepared& p, const Tensor& y) {
  p.args.y = rows(y);
  run(kernels().conv_forward[p.kind], p.args, p.args.b * p.args.groups);
}

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const Maybe& bias,
                                         const Maybe& initial_state, const Maybe& ids, const Maybe& starts) {
  Prepared p(x, weight, bias, ids, starts);
  p.start_from(initial_state, x.scalar_type());
  Tensor y = empty({p.args.b, p.args.l, p.args.d}, x.scalar_type());
  Tensor final_state = empty({p.args.b, p.args.d, p.args.k - 1}, x.scalar_type());
  p.args.final_state = final_state.mutable_data_ptr();
  forward(p, y);
  return {y, final_state};
}

// the state is read from initial_state, or with `resume` from out_state itself
Tensor causal_conv1d_into(const Tensor& x, const Tensor& weight, const Maybe& bias, const Maybe& initial_state,
                          const Maybe& ids, const Maybe& starts, const Maybe& slots, bool resume, Tensor out_state) {
  Prepared p(x, weight, bias, ids, starts);
  Conv& c = p.args;
  Tensor y = empty({c.b, c.l, c.d}, x.scalar_type());
  const Maybe& from = resume ? Maybe(out_state) : initial_state;
  c.slots = c.out_slots = slots_of(p.keep, slots, c.b);
  if (from) c.initial_state = pool(*from, x.scalar_type(), slots.has_value(), c.b, c.d, c.k - 1);
  c.final_state = pool(out_state, x.scalar_type(), slots.has_value(), c.b, c.d, c.k - 1);
  forward(p, y);
  return y;
}

Tensor sum_rows(const Tensor& partial) {
  const int64_t first = 0;
  return torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> causal_conv1d_backward(const Maybe& dy, const Maybe& dfinal,
                                                                  const Tensor& x, const Tensor& weight,
                                                                  const Maybe& bias, const Maybe& initial_state,
                                                                  const Maybe& ids, const Maybe& starts) {
  Prepared p(x, weight, bias, ids, starts);
  p.start_from(initial_state, x.scalar_type());
  Conv& c = p.args;
  const ScalarType type = accumulator(p.kind);
  Tensor dx = empty({c.b, c.l, c.d}, x.scalar_type());
  Tensor dweight = empty({c.b, c.d, c.k}, type), dbias = empty({c.b, c.d}, type);
  Tensor dinitial = empty({c.b, c.d, c.k - 1}, x.scalar_type());
  c.dy = p.keep.rows(dy, c.b, c.l, c.d, "dy");
  c.dfinal = p.keep.flat(dfinal, c.b * c.d * (c.k - 1), "dfinal");
  c.dx = rows(dx);
  c.dweight = dweight.mutable_data_ptr(), c.dbias = dbias.mutable_data_ptr();
  c.dinitial = dinitial.mutable_data_ptr();
  run(kernels().conv_backward[p.kind], c, c.b * c.groups);
  return {dx, sum_rows(dweight), sum_rows(dbias), dinitial};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&ssmoe::causal_conv1d));
  m.impl("causal_conv1d_into", TORCH_BOX(&ssmoe::causal_conv1d_into));
  m.impl("causal_conv1d_backward", TORCH_BOX(&ssmoe::causal_conv1d_backward));
}
