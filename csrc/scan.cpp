// selective_scan and its backward as torch ops: shapes, buffers and tasks around the kernels of scan.h.
#include "library.h"

namespace ssmoe {
namespace {

struct Prepared {
  Scan args{};
  Kind kind;
  Keep keep;
  std::vector<uint8_t> flags;

  Prepared(const Tensor& x, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const Maybe& D,
           const Maybe& z, const Maybe& delta_bias, const Maybe& ids, const Maybe& starts)
      : kind(kind_of(x)), flags(flags_of(ids, starts, x.size(0), x.size(1))) {
    STD_TORCH_CHECK(A.dim() == 2, "ssmoe cpu: A must have shape (d, n)");
    for (const Tensor& t : {delta, B, C}) expect(t, x.scalar_type(), "delta, B or C");
    if (z) expect(*z, x.scalar_type(), "z");
    expect(A, accumulator(kind), "A");
    if (D) expect(*D, accumulator(kind), "D");
    if (delta_bias) expect(*delta_bias, accumulator(kind), "delta_bias");
    Scan& s = args;
    const int64_t b = s.b = x.size(0), l = s.l = x.size(1), d = s.d = x.size(2), n = s.n = A.size(1);
    s.x = keep.rows(x, b, l, d, "x"), s.delta = keep.rows(delta, b, l, d, "delta"), s.z = keep.rows(z, b, l, d, "z");
    s.B = keep.rows(B, b, l, n, "B"), s.C = keep.rows(C, b, l, n, "C");
    s.A = keep.flat(A, d * n, "A"), s.D = keep.flat(D, d, "D");
    s.delta_bias = keep.flat(delta_bias, d, "delta_bias");
    s.flags = flags.empty() ? nullptr : flags.data();
    s.group = group_size(b, d, 64);
    s.groups = (d + s.group - 1) / s.group;
  }
  Prepared(const Prepared&) = delete;
};

int64_t padded(const Scan& s, Kind kind) {
  const int64_t lanes = kernels().lanes[kind];
  return (s.d + lanes - 1) / lanes * lanes;
}

void forward(Prepared& p, const Tensor& y) {
  p.args.y = rows(y);
  run(kernels().scan_forward[p.kind], p.args, p.args.b * p.args.groups);
}

std::tuple<Tensor, Tensor, Tensor> selective_scan(const Tensor& x, const Tensor& delta, const Tensor& A,
                                                  const Tensor& B, const Tensor& C, const Maybe& D, const Maybe& z,
                                                  const Maybe& delta_bias, const Maybe& initial_state,
                                                  const Maybe& ids, const Maybe& starts, bool keep) {
  Prepared p(x, delta, A, B, C, D, z, delta_bias, ids, starts);
  Scan& s = p.args;
  const ScalarType type = accumulator(p.kind);
  Tensor y = empty({s.b, s.l, s.d}, x.scalar_type());
  Tensor final_state = empty({s.b, s.d, s.n}, type);
  const int64_t chunks = (s.l + kChunk - 1) / kChunk;
  Tensor checkpoints = empty({keep ? s.b * chunks * padded(s, p.kind) * s.n : 0}, type);
  if (initial_state) expect(*initial_state, type, "initial_state");
  s.initial_state = p.keep.flat(initial_state, s.b * s.d * s.n, "initial_state");
  s.final_state = final_state.mutable_data_ptr();
  s.checkpoints = keep ? checkpoints.mutable_data_ptr() : nullptr;
  forward(p, y);
  return {y, final_state, checkpoints};
}

// the state is read from initial_state, or with `resume` from out_state itself
Tensor selective_scan_into(const Tensor& x, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                           const Maybe& D, const Maybe& z, const Maybe& delta_bias, const Maybe& initial_state,
                           const Maybe& ids, const Maybe& starts, const Maybe& slots, bool resume, Tensor out_state) {
  Prepared p(x, delta, A, B, C, D, z, delta_bias, ids, starts);
  Scan& s = p.args;
  Tensor y = empty({s.b, s.l, s.d}, x.scalar_type());
  const Maybe& from = resume ? Maybe(out_state) : initial_state;
  s.slots = s.out_slots = slots_of(p.keep, slots, s.b);
  if (from) s.initial_state = pool(*from, accumulator(p.kind), slots.has_value(), s.b, s.d, s.n);
  s.final_state = pool(out_state, accumulator(p.kind), slots.has_value(), s.b, s.d, s.n);
  forward(p, y);
  return y;
}

// (groups, b, l, n) -> (b, l, n) in the activations' type
Tensor sum_groups(const Tensor& partial, ScalarType type) {
  if (partial.size(0) == 1) return torch::stable::to(torch::stable::select(partial, 0, 0), type);
  const int64_t first = 0;
  return torch::stable::to(torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&first, 1)), type);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_backward(
    const Maybe& dy, const Maybe& dfinal, const Tensor& x, const Tensor& delta, const Tensor& A, const Tensor& B,
    const Tensor& C, const Maybe& D, const Maybe& z, const Maybe& delta_bias, const Maybe& ids, const Maybe& starts,
    const Tensor& checkpoints) {
  Prepared p(x, delta, A, B, C, D, z, delta_bias, ids, starts);
  Scan& s = p.args;
  const ScalarType type = accumulator(p.kind), activation = x.scalar_type();
  Tensor dx = empty({s.b, s.l, s.d}, activation), ddelta = empty({s.b, s.l, s.d}, activation);
  Tensor dz = empty({z ? s.b : 0, s.l, s.d}, activation);
  Tensor dB = empty({s.groups, s.b, s.l, s.n}, type), dC = empty({s.groups, s.b, s.l, s.n}, type);
  Tensor dA = empty({s.b, s.d, s.n}, type), dD = empty({s.b, s.d}, type), dbias = empty({s.b, s.d}, type);
  Tensor dinitial = empty({s.b, s.d, s.n}, type);
  s.checkpoints = checkpoints.mutable_data_ptr();
  s.dy = p.keep.rows(dy, s.b, s.l, s.d, "dy");
  s.dfinal = p.keep.flat(dfinal, s.b * s.d * s.n, "dfinal");
  s.dx = rows(dx), s.ddelta = rows(ddelta);
  if (z) s.dz = rows(dz);
  s.dB = dB.mutable_data_ptr(), s.dC = dC.mutable_data_ptr(), s.dA = dA.mutable_data_ptr();
  s.dD = dD.mutable_data_ptr(), s.ddelta_bias = dbias.mutable_data_ptr(), s.dinitial = dinitial.mutable_data_ptr();
  run(kernels().scan_backward[p.kind], s, s.b * s.groups);
  return {dx, ddelta, sum_groups(dA, type), sum_groups(dB, activation), sum_groups(dC, activation),
          sum_groups(dD, type), dz, sum_groups(dbias, type), dinitial};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&ssmoe::selective_scan));
  m.impl("selective_scan_into", TORCH_BOX(&ssmoe::selective_scan_into));
  m.impl("selective_scan_backward", TORCH_BOX(&ssmoe::selective_scan_backward));
}
