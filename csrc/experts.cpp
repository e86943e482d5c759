// expert_mlp and its backward as torch ops: assignments sorted by expert, then one matrix product an expert.
#include "library.h"

#include <chrono>
#include <cstring>
#include <functional>

namespace ssmoe {
namespace {

// A matrix in memory that is somebody else's. Not a view of a tensor: products run on torch's worker threads, where
// autograd would follow a view.
struct Matrix {
  char* data;
  int64_t rows, columns, row_stride, column_stride;
  ScalarType type;

  int64_t item() const { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }
  Matrix part(int64_t begin, int64_t count) const {
    return {data + begin * row_stride * item(), count, columns, row_stride, column_stride, type};
  }
  Matrix t() const { return {data, columns, rows, column_stride, row_stride, type}; }
  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    return torch::stable::from_blob(data, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), type);
  }
};

Matrix matrix(const Tensor& t) {
  return {static_cast<char*>(t.mutable_data_ptr()), t.size(0), t.size(1), t.stride(0), t.stride(1), t.scalar_type()};
}
Matrix one_of(const Tensor& bank, int64_t e) {
  Matrix m{static_cast<char*>(const_cast<void*>(bank.const_data_ptr())), bank.size(1), bank.size(2), bank.stride(1),
           bank.stride(2), bank.scalar_type()};
  m.data += e * bank.stride(0) * m.item();
  return m;
}

void with_torch(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// oneDNN's op takes b transposed and has no out= form, so a copy is part of it
void with_onednn(const Tensor& a, const Tensor& b_transposed, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a),
                          torch::stable::detail::from(b_transposed),
                          torch::stable::detail::from(Maybe()),
                          torch::stable::detail::from(std::string("none")),
                          torch::stable::detail::from(std::vector<std::optional<double>>()),
                          torch::stable::detail::from(std::optional<std::string>())};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack, TORCH_ABI_VERSION));
  Tensor result = torch::stable::detail::to<Tensor>(stack[0]), target = out;
  torch::stable::copy_(target, result);
}

double seconds(const std::function<void()>& f) {
  double best = 1e9;
  for (int i = 0; i < 5; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    f();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return best;
}

// Whether oneDNN's float32 product is about as fast here or faster, copy included; measured once, a few milliseconds. torch's own
// is MKL's, which reaches 40 % of an AMD core where oneDNN reaches 90 %. bfloat16 is oneDNN's in either.
bool onednn() {
  static const bool faster = [] {
    Tensor a = torch::stable::new_zeros(empty({128, 512}, ScalarType::Float), {128, 512});
    Tensor b = torch::stable::new_zeros(a, {512, 512}), out = torch::stable::new_zeros(a, {128, 512});
    try {
      // leaning to oneDNN, so that noise does not make two runs on one machine differ
      return seconds([&] { with_onednn(a, b, out); }) < 1.5 * seconds([&] { with_torch(a, b, out); });
    } catch (const std::exception&) {
      return false;  // a torch without oneDNN
    }
  }();
  return faster;
}

// product = left right
void multiply(const Matrix& left, const Matrix& right, const Matrix& product) {
  if (left.type == ScalarType::Float && onednn())
    with_onednn(left.tensor(), right.t().tensor(), product.tensor());
  else
    with_torch(left.tensor(), right.tensor(), product.tensor());
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

// f(expert, first row, rows, alone): experts side by side, one thread each, unless they are too few for that; then
// one after the other, each product on all threads.
template <class F>
void for_each_expert(const Bank& s, const Order& order, const F& f) {
  auto one = [&](int64_t e, bool alone) { f(e, order.offset[e], order.offset[e + 1] - order.offset[e], alone); };
  if (s.e >= 2 * int64_t(torch::stable::get_num_threads()))
    for_each(s.e, [&](int64_t e) { one(e, true); });
  else
    for (int64_t e = 0; e < s.e; ++e) one(e, false);
}

void activate(Task<Activate> task, const Activate& args, int64_t rows, bool alone) {
  if (alone)
    task(args, 0, rows);
  else
    run(task, args, rows, 8);
}

// (y, order, up x, gate x): the last three are what the backward pass reads
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& up, const Tensor& down,
                                                      const Maybe& gate, const Tensor& expert, const Tensor& weight,
                                                      int64_t activation) {
  const Bank s(x, up, down, gate, expert, weight);
  if (s.kind == kFloat32) onednn();  // measured here, not on a worker thread
  const int64_t count = s.t * s.k;
  Tensor sorted = sort(expert, s.e);
  const Order order = read(sorted, count);
  const int64_t rows = order.offset[s.e];
  const ScalarType type = x.scalar_type();
  Tensor tokens = gathered(x, s, order, rows);
  Tensor hidden = empty({count, s.f}, type), gates = empty({gate ? count : 0, s.f}, type);
  Tensor inner = empty({count, s.f}, type), outputs = empty({count, s.d}, type);
  const Matrix own = matrix(tokens), h = matrix(hidden), g = matrix(gates), in = matrix(inner), out = matrix(outputs);
  for_each_expert(s, order, [&](int64_t e, int64_t begin, int64_t n, bool alone) {
    if (!n) return;
    multiply(own.part(begin, n), one_of(up, e).t(), h.part(begin, n));
    Activate a{h.part(begin, n).data, nullptr, in.part(begin, n).data, s.f, activation};
    if (gate) {
      multiply(own.part(begin, n), one_of(*gate, e).t(), g.part(begin, n));
      a.gate = g.part(begin, n).data;
    }
    activate(kernels().activate[s.kind], a, n, alone);
    multiply(in.part(begin, n), one_of(down, e).t(), out.part(begin, n));
  });
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

  const Matrix own = matrix(tokens), dy_rows = matrix(dout), h = matrix(hidden), g = matrix(gates), in = matrix(inner),
               din = matrix(dinner), dh = matrix(dhidden), dg = matrix(dgates), dx_rows = matrix(dtokens);
  auto* row_dw = static_cast<char*>(row_dweight.mutable_data_ptr());
  for_each_expert(s, order, [&](int64_t e, int64_t begin, int64_t n, bool alone) {
    if (!n) {
      for (const Tensor* bank : {&dup, &ddown, &dgate})
        if (bank->numel()) std::memset(one_of(*bank, e).data, 0, s.f * s.d * own.item());
      return;
    }
    multiply(dy_rows.part(begin, n), one_of(down, e), din.part(begin, n));
    Activate a{h.part(begin, n).data, nullptr, in.part(begin, n).data, s.f, activation, din.part(begin, n).data,
               to + begin * item, dh.part(begin, n).data, nullptr, row_dw + begin * item};
    if (gate) {
      a.gate = g.part(begin, n).data;
      a.dgate = dg.part(begin, n).data;
    }
    activate(kernels().activate_backward[s.kind], a, n, alone);
    multiply(dy_rows.part(begin, n).t(), in.part(begin, n), one_of(ddown, e));
    multiply(dh.part(begin, n).t(), own.part(begin, n), one_of(dup, e));
    multiply(dh.part(begin, n), one_of(up, e), dx_rows.part(begin, n));
    if (gate) {
      multiply(dg.part(begin, n).t(), own.part(begin, n), one_of(dgate, e));
      multiply(dg.part(begin, n), one_of(*gate, e), dx_rows.part(count + begin, n));
    }
  });
  auto* dw = static_cast<char*>(dweight.mutable_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    if (order.place[i] >= 0)
      std::memcpy(dw + i * item, row_dw + order.place[i] * item, item);
    else
      std::memset(dw + i * item, 0, item);
  }
  Tensor dx = combined(s, dtokens, places.data(), (gate ? 2 : 1) * s.k, nullptr);
  return {dx, dup, ddown, dgate, dweight};
}

std::string products() { return onednn() ? "oneDNN" : "torch"; }

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CompositeExplicitAutograd, m) { m.impl("cpu_products", TORCH_BOX(&ssmoe::products)); }

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&ssmoe::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&ssmoe::expert_mlp_backward));
}
