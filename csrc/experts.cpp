// expert_mlp and its backward as torch ops: assignments sorted by expert, then tasks (experts.h) that threads claim.
#include "library.h"

#include <cstring>

namespace ssmoe {
namespace {

constexpr int64_t kMostRows = 168;                   // a task's rows, so that what it keeps fits a core's cache
constexpr int64_t kLeastRows = 48;                   // so that reading the weights again does not dominate
constexpr int64_t kMostOutputs = int64_t(512) << 10;   // of a gradient, a task
constexpr int64_t kStreamed = int64_t(16) << 20;     // bytes of gradients that no cache keeps

// Where each assignment's row lies once rows are sorted by expert; stable, dropped assignments have none.
struct Order {
  const int64_t* place;   // (t, k), -1 if dropped
  const int64_t* token;   // (rows,)
  const int64_t* slot;    // (rows,): place in (t, k)
  const int64_t* offset;  // (e + 1,)
};

Order read(const Tensor& order, int64_t count) {
  const auto* place = static_cast<const int64_t*>(order.const_data_ptr());
  return {place, place + count, place + 2 * count, place + 3 * count};
}

// place, token, slot and offset, one after the other
Tensor sort(const Tensor& expert, int64_t experts) {
  expect(expert, ScalarType::Int, "expert");
  const int64_t t = expert.size(0), k = expert.size(1), count = t * k;
  Keep keep;
  const auto* assigned = static_cast<const int32_t*>(keep.flat(expert, count, "expert"));
  Tensor order = empty({3 * count + experts + 1}, ScalarType::Long);
  auto* place = static_cast<int64_t*>(order.mutable_data_ptr());
  int64_t *token = place + count, *slot = token + count, *offset = slot + count;
  std::memset(token, 0, (2 * count + experts + 1) * sizeof(int64_t));
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(assigned[i] >= -1 && assigned[i] < experts, "ssmoe cpu: expert ", assigned[i],
                    " is not between -1 and ", experts - 1);
    if (assigned[i] >= 0) ++offset[assigned[i] + 1];
  }
  for (int64_t e = 0; e < experts; ++e) offset[e + 1] += offset[e];
  std::vector<int64_t> next(offset, offset + experts);
  for (int64_t row = 0, i = 0; row < t; ++row)
    for (int64_t j = 0; j < k; ++j, ++i) {
      place[i] = assigned[i] < 0 ? -1 : next[assigned[i]]++;
      if (place[i] < 0) continue;
      token[place[i]] = row;
      slot[place[i]] = i;
    }
  return order;
}

struct Call {
  Kind kind;
  int64_t t, d, k, e, f;
  Keep keep;
  Bank bank{};

  Call(const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& gate, const Tensor& expert,
       const Tensor& weight, int64_t activation)
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
    bank.wide = up.scalar_type() != x.scalar_type();
    const ScalarType weights = bank.wide ? accumulator(kind) : x.scalar_type();
    expect(up, weights, "up");
    expect(down, weights, "down");
    if (gate) expect(*gate, weights, "gate");
    expect(weight, accumulator(kind), "weight");
    bank.d = d, bank.f = f, bank.activation = activation, bank.direct = k == 1;
    bank.x = keep.flat(x, t * d, "x");
    bank.up = keep.flat(up, e * f * d, "up"), bank.down = keep.flat(down, e * f * d, "down");
    bank.gate = keep.flat(gate, e * f * d, "gate");
    bank.weight = keep.flat(weight, t * k, "weight");
  }
  Call(const Call&) = delete;

  Order use(const Tensor& sorted) {
    const Order order = read(sorted, t * k);
    bank.token = order.token, bank.slot = order.slot;
    return order;
  }
};

// Rows of every expert in tasks of about equal size, the largest first so that threads end together.
std::vector<Block> blocks_of_rows(const Call& s, const Order& order) {
  const int64_t threads = torch::stable::get_num_threads(), wanted = order.offset[s.e] / (4 * threads) + 1;
  const int64_t size = std::min(kMostRows, std::max(kLeastRows, wanted));
  std::vector<Block> blocks;
  for (int64_t e = 0; e < s.e; ++e) {
    const int64_t begin = order.offset[e], rows = order.offset[e + 1] - begin, count = (rows + size - 1) / size;
    for (int64_t i = 0; i < count; ++i)
      blocks.push_back({e, begin + i * rows / count, begin + (i + 1) * rows / count, 0, 0, 0});
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.end - a.begin > b.end - b.begin; });
  return blocks;
}

// Slices of every weight's gradient; an expert without rows has them too, for their zeros.
std::vector<Block> blocks_of_gradients(const Call& s, const Order& order) {
  std::vector<Block> blocks;
  for (int64_t e = 0; e < s.e; ++e)
    for (int64_t matrix = 0; matrix < (s.bank.gate ? 3 : 2); ++matrix) {
      const int64_t rows = matrix ? s.f : s.d, columns = matrix ? s.d : s.f;
      const int64_t size = std::max<int64_t>(256, kMostOutputs / std::max<int64_t>(columns, 1));
      const int64_t count = (rows + size - 1) / size;
      for (int64_t i = 0; i < count; ++i)
        blocks.push_back({e, order.offset[e], order.offset[e + 1], matrix, i * rows / count, (i + 1) * rows / count});
    }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.end - a.begin > b.end - b.begin; });
  return blocks;
}

// task(block, scratch) for every block, claimed one at a time
template <class F>
void for_each_block(const Call& s, const std::vector<Block>& blocks, const F& task) {
  if (blocks.empty()) return;
  int64_t rows = 0, outputs = 0;
  for (const Block& b : blocks) rows = std::max(rows, b.end - b.begin), outputs = std::max(outputs, b.last - b.first);
  const int64_t bytes = kernels().expert_scratch[s.kind](s.bank, std::min(rows, kMostRows), rows, outputs);
  const int64_t workers = std::min<int64_t>(blocks.size(), torch::stable::get_num_threads());
  Tensor scratch = empty({workers * bytes / 4}, ScalarType::Float);
  auto* base = static_cast<char*>(scratch.mutable_data_ptr());
  std::atomic<size_t> next{0};
  for_each(workers, [&](int64_t worker) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < blocks.size();)
      task(s.bank, blocks[i], base + worker * bytes);
  });
}

// Rows of `out` that no expert writes, when rows go straight to their tokens.
void clear_dropped(const Call& s, const Order& order, const Tensor& out) {
  const int64_t bytes = s.d * (s.kind == kFloat64 ? 8 : s.kind == kFloat32 ? 4 : 2);
  auto* data = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; i < s.t; ++i)
    if (order.place[i] < 0) std::memset(data + i * bytes, 0, bytes);
}

// f fills rows in expert order, or those of their tokens; the sum over each token's experts
template <class F>
Tensor summed(Call& s, const Order& order, ScalarType type, const void* weight, const F& f) {
  Tensor rows = empty({s.t * (s.bank.direct ? 1 : s.k), s.d}, type);
  s.bank.out = rows.mutable_data_ptr();
  f();
  if (s.bank.direct) {
    clear_dropped(s, order, rows);
    return rows;
  }
  Tensor out = empty({s.t, s.d}, type);
  Combine c{rows.const_data_ptr(), order.place, weight, out.mutable_data_ptr(), s.k, s.d};
  run(kernels().combine[s.kind], c, s.t, 64);
  return out;
}

// (y, order, up x, gate x): the last three are what the backward pass reads, the last two empty without `keep`
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& up, const Tensor& down,
                                                      const Maybe& gate, const Tensor& expert, const Tensor& weight,
                                                      int64_t activation, bool keep) {
  Call s(x, up, down, gate, expert, weight, activation);
  Tensor sorted = sort(expert, s.e);
  const Order order = s.use(sorted);
  const int64_t count = keep ? s.t * s.k : 0;
  Tensor hidden = empty({count, s.f}, x.scalar_type()), gates = empty({gate ? count : 0, s.f}, x.scalar_type());
  if (keep) s.bank.hidden = hidden.mutable_data_ptr(), s.bank.gates = gates.mutable_data_ptr();
  Tensor y = summed(s, order, x.scalar_type(), s.bank.weight, [&] {
    for_each_block(s, blocks_of_rows(s, order), kernels().expert_forward[s.kind]);
  });
  return {y, sorted, hidden, gates};
}

// gradients of x, up, down, gate, weight
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& dy, const Tensor& x, const Tensor& up, const Tensor& down, const Maybe& gate, const Tensor& expert,
    const Tensor& weight, int64_t activation, const Tensor& sorted, const Tensor& hidden, const Tensor& gates) {
  Call s(x, up, down, gate, expert, weight, activation);
  Bank& b = s.bank;
  const Order order = s.use(sorted);
  const int64_t count = s.t * s.k, weights = s.e * s.f * s.d;
  const ScalarType type = x.scalar_type(), own = up.scalar_type();
  expect(dy, type, "dy");
  STD_TORCH_CHECK(hidden.size(0) == count, "ssmoe cpu: expert_mlp kept nothing for its backward pass");
  Tensor inner = empty({count, s.f}, type), dhidden = empty({count, s.f}, type);
  Tensor dgates = empty({gate ? count : 0, s.f}, type), dweight = empty({s.t, s.k}, accumulator(s.kind));
  Tensor dup = empty({s.e, s.f, s.d}, own), ddown = empty({s.e, s.d, s.f}, own);
  Tensor dgate = empty({gate ? s.e : 0, s.f, s.d}, own);
  b.dy = s.keep.flat(dy, s.t * s.d, "dy");
  b.hidden = hidden.mutable_data_ptr(), b.gates = gates.mutable_data_ptr();
  b.inner = inner.mutable_data_ptr(), b.dhidden = dhidden.mutable_data_ptr(), b.dgates = dgates.mutable_data_ptr();
  b.dweight = dweight.mutable_data_ptr();
  b.dup = dup.mutable_data_ptr(), b.ddown = ddown.mutable_data_ptr(), b.dgate = dgate.mutable_data_ptr();
  b.stream = weights * (gate ? 3 : 2) * (own == ScalarType::BFloat16 ? 2 : 4) > kStreamed;
  const size_t item = s.kind == kFloat64 ? 8 : 4;
  for (int64_t i = 0; i < count; ++i)
    if (order.place[i] < 0) std::memset(static_cast<char*>(b.dweight) + i * item, 0, item);
  Tensor dx = summed(s, order, type, nullptr, [&] {
    for_each_block(s, blocks_of_rows(s, order), kernels().expert_backward[s.kind]);
  });
  for_each_block(s, blocks_of_gradients(s, order), kernels().expert_gradients[s.kind]);
  return {dx, dup, ddown, dgate, dweight};
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("expert_mlp", TORCH_BOX(&ssmoe::expert_mlp));
  m.impl("expert_mlp_backward", TORCH_BOX(&ssmoe::expert_mlp_backward));
}
