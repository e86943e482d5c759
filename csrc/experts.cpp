// expert_mlp and its backward as torch ops: assignments sorted by expert, then one matrix product an expert.
#include "library.h"

#include <cstring>

namespace ssmoe {
namespace {

// (r, c) view of rows begin.. of a contiguous matrix, or of one expert of a bank
Tensor matrix(const Tensor& t, int64_t begin, int64_t count) { return torch::stable::narrow(const_cast<Tensor&>(t), 0, begin, count); }

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// out = a b
void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// Where each assignment's row lies once rows are sorted by expert; stable, dropped assignments have none.
struct Order {
  const int64_t* place;   // (t, k), -1 if dropped
  const int64_t* token;   // (rows,)
  const int64_t* offset;  // (e + 1,)
};

// place, token and offset, one after the other
Tensor sort(const Tensor& expert, int64_t experts) {
  expect(expert, ScalarType::Int, "expert");
  const int64_t t = expert.size(0), k = expert.size(1), count = t * k;
  Keep keep;
  const auto* assigned = static_cast<const int32_t*>(keep.flat(expert, count, "expert"));
  Tensor order = empty({2 * count + experts + 1}, ScalarType::Long);
  auto* place = static_cast<int64_t*>(order.mutable_data_ptr());
  int64_t *token = place + count, *offset = token + count;
  std::memset(offset, 0, (experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(assigned[i] >= -1 && assigned[i] < experts, "ssmoe cpu: expert ", assigned[i],
                    " is not between -1 and ", experts - 1);
    if (assigned[i] >= 0) ++offset[assigned[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offset[e + 1] += offset[e];
  std::vector<int64_t> next(offset, offset + experts);
  for (int64_t i = 0; i < count; ++i) {
    place[i] = assigned[i] < 0 ? -1 : next[assigned[i]]++;
    if (place[i] >= 0) token[place[i]] = i / k;
  }
  for (int64_t i = offset[experts]; i < count; ++i) token[i] = 0;
  return order;
}

Order read(const Tensor& order, int64_t count) {
  const auto* place = static_cast<const int64_t*>(order.const_data_ptr());
  return {place, place + count, place + 2 * count};
}

struct Bank {
  Kind kind;
  int64_t t, d, k, e, f;

  Bank(const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& gate, const Tensor& expert,
       const Tensor& weight)
      : kind(kind_of(x)) {
    STD_TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && down.dim() == 3 && expert.dim() == 2,
                    "ssmoe cpu: expert_mlp takes x (t, d), up (e, f, d), down (e, d, f), expert (t, k)");
    t = x.size(0), d = x.size(1), k = expert.size(1), e = up.size(0), f = up.size(1);
    STD_TORCH_CHECK(up.size(2) == d && down.size(0) == e && down.size(1) == d && down.size(2) == f &&
                        expert.size(0) == t && weight.dim() == 2 && weight.size(0) == t && weight.size(1) == k,
                    "ssmoe cpu: expert_mlp: the shapes of x, up, down, expert and weight disagree");
    if (gate)
      STD_TORCH_CHECK(gate->dim() == 3 && gate->size(0) == e && gate->size(1) == f && gate->size(2) == d,
                      "ssmoe cpu: expert_mlp: gate and up must have one shape");
    expect(up, x.scalar_type(), "up");
    expect(down, x.scalar_type(), "down");
    if (gate) expect(*gate, x.scalar_type(), "gate");
    expect(weight, accumulator(kind), "weight");
  }
};

Tensor gathered(const Tensor& source, const Bank& s, const Order& order, int64_t rows) {
  Keep keep;
  Tensor out = empty({s.t * s.k, s.d}, source.scalar_type());
  Gather g{keep.flat(source, s.t * s.d, "x"), s.d, order.token, out.mutable_data_ptr(), s.d};
  run(kernels().gather[s.kind], g, rows, 64);
  return out;
}

Tensor combined(const Bank& s, const Tensor& rows, const int64_t* place, int64_t k, const void* weight) {
  Tensor out = empty({s.t, s.d}, rows.scalar_type());
  Combine c{rows.const_data_ptr(), place, weight, out.mutable_data_ptr(), k, s.d};
  run(kernels().combine[s.kind], c, s.t, 64);
  return out;
}

// (y, order, up x, gate x): the last three are what the backward pass reads
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& up, const Tensor& down,
                                                      const Maybe& gate, const Tensor& expert, const Tensor& weight,
                                                      int64_t activation) {
  const Bank s(x, up, down, gate, expert, weight);
  const int64_t count = s.t * s.k;
  Tensor sorted = sort(expert, s.e);
  const Order order = read(sorted, count);
  const int64_t rows = order.offset[s.e];
  const ScalarType type = x.scalar_type();
  Tensor tokens = gathered(x, s, order, rows);
  Tensor hidden = empty({count, s.f}, type), gates = empty({gate ? count : 0, s.f}, type);
  Tensor inner = empty({count, s.f}, type), outputs = empty({count, s.d}, type);
  for (int64_t e = 0; e < s.e; ++e) {
    const int64_t begin = order.offset[e], n = order.offset[e + 1] - begin;
    if (!n) continue;
    Tensor own = matrix(tokens, begin, n), h = matrix(hidden, begin, n), in = matrix(inner, begin, n);
    multiply(own, transposed(torch::stable::select(up, 0, e)), h);
    Activate a{h.const_data_ptr(), nullptr, in.mutable_data_ptr(), s.f, activation};
    if (gate) {
      Tensor g = matrix(gates, begin, n);
      multiply(own, transposed(torch::stable::select(*gate, 0, e)), g);
      a.gate = g.const_data_ptr();
    }
    run(kernels().activate[s.kind], a, n, 8);
    multiply(in, transposed(torch::stable::select(down, 0, e)), matrix(outputs, begin, n));
  }
  Keep keep;
  Tensor y = combined(s, outputs, order.place, s.k, keep.flat(weight, count, "weight"));
  return {y, sorted, hidden, gates};
}

// gradients of x, up, down, gate, weight
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& gate, const Tensor& expert,
    const Tensor& weight, int64_t activation, const Tensor& sorted, const Tensor& hidden, const Tensor& gates) {
  const Bank s(x, up, down, gate, expert, weight);
  const int64_t count = s.t * s.k;
  const Order order = read(sorted, count);
  const int64_t rows = order.offset[s.e];
  const ScalarType type = x.scalar_type(), wide = accumulator(s.kind);
  Keep keep;

  Tensor tokens = gathered(x, s, order, rows), dout = gathered(dy, s, order, rows);
  Tensor inner = empty({count, s.f}, type), dinner = empty({count, s.f}, type);
  Tensor dhidden = empty({count, s.f}, type), dgates = empty({gate ? count : 0, s.f}, type);
  Tensor row_weight = empty({count}, wide), row_dweight = empty({count}, wide);
  Tensor dweight = empty({s.t, s.k}, wide);
  Tensor dup = empty({s.e, s.f, s.d}, type), ddown = empty({s.e, s.d, s.f}, type);
  Tensor dgate = empty({gate ? s.e : 0, s.f, s.d}, type);
  // with a gate a row's gradient has two parts, the second after all of the first
  Tensor dtokens = empty({(gate ? 2 : 1) * count, s.d}, type);
  const size_t item = wide == ScalarType::Double ? 8 : 4;
  auto* from = static_cast<const char*>(keep.flat(weight, count, "weight"));
  auto* to = static_cast<char*>(row_weight.mutable_data_ptr());
  std::vector<int64_t> places;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t place = order.place[i];
    if (place >= 0) std::memcpy(to + place * item, from + i * item, item);
    places.push_back(place);
    if (gate) places.push_back(place < 0 ? -1 : place + count);
  }

  for (int64_t e = 0; e < s.e; ++e) {
    const int64_t begin = order.offset[e], n = order.offset[e + 1] - begin;
    Tensor dup_e = torch::stable::select(dup, 0, e), ddown_e = torch::stable::select(ddown, 0, e);
    if (!n) {
      torch::stable::zero_(dup_e);
      torch::stable::zero_(ddown_e);
      if (gate) {
        Tensor dgate_e = torch::stable::select(dgate, 0, e);
        torch::stable::zero_(dgate_e);
      }
      continue;
    }
    Tensor own = matrix(tokens, begin, n), dy_e = matrix(dout, begin, n), h = matrix(hidden, begin, n);
    Tensor in = matrix(inner, begin, n), din = matrix(dinner, begin, n), dh = matrix(dhidden, begin, n);
    multiply(dy_e, torch::stable::select(down, 0, e), din);
    Activate a{h.const_data_ptr(), nullptr, in.mutable_data_ptr(), s.f, activation, din.const_data_ptr(),
               to + begin * item, dh.mutable_data_ptr(), nullptr,
               static_cast<char*>(row_dweight.mutable_data_ptr()) + begin * item};
    Tensor dg;
    if (gate) {
      dg = matrix(dgates, begin, n);
      a.gate = matrix(gates, begin, n).const_data_ptr();
      a.dgate = dg.mutable_data_ptr();
    }
    run(kernels().activate_backward[s.kind], a, n, 8);
    multiply(transposed(dy_e), in, ddown_e);
    multiply(transposed(dh), own, dup_e);
    multiply(dh, torch::stable::select(up, 0, e), matrix(dtokens, begin, n));
    if (gate) {
      multiply(transposed(dg), own, torch::stable::select(dgate, 0, e));
      multiply(dg, torch::stable::select(*gate, 0, e), matrix(dtokens, count + begin, n));
    }
  }
  auto* dw = static_cast<char*>(dweight.mutable_data_ptr());
  auto* row_dw = static_cast<const char*>(row_dweight.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (order.place[i] >= 0)
      std::memcpy(dw + i * item, row_dw + order.place[i] * item, item);
    else
      std::memset(dw + i * item, 0, item);
  }
  Tensor dx = combined(s, dtokens, places.data(), (gate ? 2 : 1) * s.k, nullptr);
  return {dx, dup, ddown, dgate, dweight};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&ssmoe::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&ssmoe::expert_mlp_backward));
}
