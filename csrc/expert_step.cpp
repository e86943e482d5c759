// expert_mlp for a few tokens: only the experts that somebody chose are read, row by row, on all threads.
#include "decode.h"

namespace ssmoe {
namespace {

constexpr int64_t kRows = 64;  // of a matrix, a task

// Assignments of one expert, adjacent once sorted by expert.
struct Group {
  int64_t expert, first, count;
};

struct Assigned {
  std::vector<Group> groups;
  std::vector<int64_t> token;  // of each sorted row
  std::vector<int64_t> place;  // (t, k): row of each assignment, -1 if dropped
};

Assigned assign(const int32_t* expert, int64_t t, int64_t k, int64_t experts) {
  Assigned found;
  std::vector<std::pair<int32_t, int64_t>> order;
  for (int64_t i = 0; i < t * k; ++i) {
    STD_TORCH_CHECK(expert[i] >= -1 && expert[i] < experts, "ssmoe cpu: expert ", expert[i], " is not between -1 and ",
                    experts - 1);
    if (expert[i] >= 0) order.emplace_back(expert[i], i);
  }
  std::sort(order.begin(), order.end());
  found.place.assign(t * k, -1);
  for (const auto& [e, i] : order) {
    const int64_t row = int64_t(found.token.size());
    if (found.groups.empty() || found.groups.back().expert != e) found.groups.push_back({e, row, 0});
    ++found.groups.back().count;
    found.place[i] = row;
    found.token.push_back(i / k);
  }
  return found;
}

// The matrices (e, rows, columns) of a bank, each in the activations' type: where they lie, or cast when asked for.
class Matrices {
 public:
  Matrices(const Tensor& all, ScalarType type, int64_t e, int64_t rows, int64_t columns, const char* name)
      : all_(all), type_(type), there_(all.scalar_type() == type && all.is_contiguous()) {
    STD_TORCH_CHECK(all.dim() == 3 && all.size(0) == e && all.size(1) == rows && all.size(2) == columns,
                    "ssmoe cpu: expert_mlp: ", name, " must have shape (", e, ", ", rows, ", ", columns, ")");
    bytes_ = rows * columns * item(kind_of(all));
  }
  const void* of(int64_t expert) {
    if (there_) return static_cast<const char*>(all_.const_data_ptr()) + expert * bytes_;
    const Tensor one = torch::stable::contiguous(torch::stable::select(all_, 0, expert));
    cast_.push_back(one.scalar_type() == type_ ? one : torch::stable::to(one, type_));
    return cast_.back().const_data_ptr();
  }

 private:
  const Tensor all_;
  const ScalarType type_;
  const bool there_;
  int64_t bytes_;
  std::vector<Tensor> cast_;
};

// x (t, d), up, gate (e, f, d), down (e, d, f), expert (t, k), weight (t, k) -> (t, d)
Tensor expert_step(const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& gate, const Tensor& expert,
                   const Tensor& weight, int64_t activation) {
  STD_TORCH_CHECK(x.dim() == 2 && up.dim() == 3 && expert.dim() == 2,
                  "ssmoe cpu: expert_mlp takes x (t, d), up (e, f, d), down (e, d, f), expert (t, k)");
  const Kind kind = kind_of(x);
  const ScalarType type = x.scalar_type();
  const int64_t t = x.size(0), d = x.size(1), e = up.size(0), f = up.size(1), k = expert.size(1), size = item(kind);
  Inputs inputs;
  const auto* tokens = static_cast<const char*>(inputs.get(x, type, {t, d}, "x"));
  Matrices ups(up, type, e, f, d, "up"), downs(down, type, e, d, f, "down");
  Matrices gates(gate ? *gate : up, type, e, f, d, "gate");
  const void* weights = inputs.get(weight, accumulator(kind), {t, k}, "weight");
  const Assigned sorted = assign(static_cast<const int32_t*>(inputs.get(expert, ScalarType::Int, {t, k}, "expert")), t,
                                 k, e);
  const int64_t rows = int64_t(sorted.token.size()), packed = kernels().packed[kind], d_stride = padded(d),
                f_stride = padded(f);

  Scratch scratch;
  void *in = scratch.take(rows * d_stride * packed), *inner = scratch.take(rows * f * size);
  void *hidden = scratch.take(rows * f * size), *opened = scratch.take(gate ? rows * f * size : 0);
  void *middle = scratch.take(rows * f_stride * packed), *out = scratch.take(rows * d * size);
  char* base = scratch.base();
  for (void** pointer : {&in, &inner, &hidden, &opened, &middle, &out}) place(*pointer, base);

  const Kernels& kernel = kernels();
  auto product = [&](Matrices& bank, int64_t outputs, int64_t width, void* from, int64_t stride, void* to,
                     const Group& group) {
    Skinny s{};
    s.rows = outputs, s.n = width, s.batch = group.count, s.x_stride = stride;
    s.weight = bank.of(group.expert);
    s.x = static_cast<char*>(from) + group.first * stride * packed;
    s.out = static_cast<char*>(to) + group.first * outputs * size;
    return s;
  };
  std::vector<Skinny> first, second;
  for (const Group& group : sorted.groups) {
    first.push_back(product(ups, f, d, in, d_stride, hidden, group));
    if (gate) first.push_back(product(gates, f, d, in, d_stride, opened, group));
    second.push_back(product(downs, d, f, middle, f_stride, out, group));
  }
  for (int64_t row = 0; row < rows; ++row) {
    Skinny s{};
    s.n = d, s.source = tokens + sorted.token[row] * d * size;
    s.x = static_cast<char*>(in) + row * d_stride * packed;
    kernel.pack_vectors[kind](s, 0, 1);
  }
  Activate act{};
  act.up = hidden, act.gate = gate ? opened : nullptr, act.inner = inner, act.width = f, act.activation = activation;
  Skinny repack{};
  repack.n = f, repack.source = inner, repack.x = middle, repack.x_stride = f_stride;
  Tensor y = empty({t, d}, type);
  const Combine sum{out, sorted.place.data(), weights, y.mutable_data_ptr(), k, d};

  auto products = [&](const std::vector<Skinny>& all, int64_t outputs) {
    const int64_t pieces = (outputs + kRows - 1) / kRows;
    return Phase{int64_t(all.size()) * pieces, [&all, &kernel, kind, pieces, outputs](int64_t i) {
                   const int64_t begin = i % pieces * kRows;
                   kernel.skinny[kind](all[i / pieces], begin, std::min(outputs, begin + kRows));
                 }};
  };
  run_phases(std::vector<Phase>{
              products(first, f),
              Phase{rows,
                    [&](int64_t i) {
                      kernel.activate[kind](act, i, i + 1);
                      kernel.pack_vectors[kind](repack, i, i + 1);
                    }},
              products(second, d), Phase{t, [&](int64_t i) { kernel.combine[kind](sum, i, i + 1); }}},
             int64_t(sorted.groups.size()) * f * d * (gate ? 3 : 2) * size, rows);
  return y;
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) { m.impl("expert_step", TORCH_BOX(&ssmoe::expert_step)); }
