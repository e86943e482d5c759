// mamba_step and skinny_linear as torch ops: what one token costs is reading the weights once.
#include <cstring>

#include "team.h"

namespace ssmoe {
namespace {

int64_t item(Kind kind) { return kind == kFloat64 ? 8 : kind == kFloat32 ? 4 : 2; }
int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

// Whether this processor multiplies pairs of bfloat16.
bool has_pairs() {
#ifdef SSMOE_X86
  static const bool found = &kernels() == &kAvx512 && __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

// Zeroed memory of the calling thread that grows and stays.
class Scratch {
 public:
  void* take(int64_t bytes) {
    const int64_t begin = used_;
    used_ += (bytes + 63) / 64 * 64;
    return reinterpret_cast<void*>(begin);
  }
  // after the last take, for every pointer taken
  char* base() {
    static thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < used_ + 64) memory.resize(used_ + 64);
    std::memset(memory.data(), 0, used_ + 64);
    return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
  }

 private:
  int64_t used_ = 0;
};

void place(void*& pointer, char* base) { pointer = base + reinterpret_cast<intptr_t>(pointer); }

// Contiguous tensors in the type that a kernel reads, kept alive; copied only where they are not that already.
class Inputs {
 public:
  Inputs() { kept_.reserve(16); }
  const void* get(const Tensor& t, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
    STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), "mamba_step: ", name, " must have ", sizes.size(), " dimensions");
    int64_t i = 0;
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(t.size(i) == size, "mamba_step: ", name, " has size ", t.size(i), " in dimension ", i,
                      ", expected ", size);
      ++i;
    }
    if (t.scalar_type() == type && t.is_contiguous()) return t.const_data_ptr();
    kept_.push_back(torch::stable::contiguous(t.scalar_type() == type ? t : torch::stable::to(t, type)));
    return kept_.back().const_data_ptr();
  }

 private:
  std::vector<Tensor> kept_;
};

struct StepInputs {
  const Tensor &x, &norm_weight;
  const Maybe& norm_bias;
  double eps;
  const Tensor &in_proj, &conv_weight, &conv_bias, &x_proj, &delta_proj, &A_log, &D, &delta_bias, &out_proj;
};

// y; the states are read from conv and ssm and written to out_conv and out_ssm, which may be the same
Tensor step(const StepInputs& in, const Tensor& conv, const Tensor& ssm, const Tensor& out_conv,
            const Tensor& out_ssm) {
  STD_TORCH_CHECK(in.x.dim() == 2 && conv.dim() == 3 && ssm.dim() == 3 && in.delta_proj.dim() == 2,
                  "mamba_step: x (b, d_model), conv_state (b, d_inner, d_conv - 1), ssm_state (b, d_inner, d_state) "
                  "and delta_proj (d_inner, dt_rank) expected");
  const Kind kind = kind_of(conv);
  const ScalarType type = conv.scalar_type(), wide = accumulator(kind);
  MambaStep s{};
  s.b = in.x.size(0), s.d = in.x.size(1), s.inner = conv.size(1), s.k = conv.size(2) + 1, s.n = ssm.size(2);
  s.rank = in.delta_proj.size(1);
  s.eps = in.eps, s.pairs = kind == kBFloat16 && has_pairs();
  STD_TORCH_CHECK(in.x.scalar_type() == type || in.x.scalar_type() == wide,
                  "mamba_step: x must have the layer's dtype or be at least float32");
  s.wide_residual = in.x.scalar_type() == wide;

  Inputs inputs;
  s.x = inputs.get(in.x, in.x.scalar_type(), {s.b, s.d}, "x");
  s.norm_weight = inputs.get(in.norm_weight, wide, {s.d}, "norm_weight");
  s.norm_bias = in.norm_bias ? inputs.get(*in.norm_bias, wide, {s.d}, "norm_bias") : nullptr;
  s.in_proj = inputs.get(in.in_proj, type, {2 * s.inner, s.d}, "in_proj");
  s.conv_weight = inputs.get(in.conv_weight, wide, {s.inner, s.k}, "conv_weight");
  s.conv_bias = inputs.get(in.conv_bias, wide, {s.inner}, "conv_bias");
  s.x_proj = inputs.get(in.x_proj, type, {s.rank + 2 * s.n, s.inner}, "x_proj");
  s.delta_proj = inputs.get(in.delta_proj, type, {s.inner, s.rank}, "delta_proj");
  s.A_log = inputs.get(in.A_log, wide, {s.inner, s.n}, "A_log");
  s.D = inputs.get(in.D, wide, {s.inner}, "D");
  s.delta_bias = inputs.get(in.delta_bias, wide, {s.inner}, "delta_bias");
  s.out_proj = inputs.get(in.out_proj, type, {s.d, s.inner}, "out_proj");
  s.conv_in = inputs.get(conv, type, {s.b, s.inner, s.k - 1}, "conv_state");
  s.ssm_in = inputs.get(ssm, wide, {s.b, s.inner, s.n}, "ssm_state");
  s.conv_out = out_conv.mutable_data_ptr(), s.ssm_out = out_ssm.mutable_data_ptr();
  Tensor y = empty({s.b, s.d}, in.x.scalar_type());
  s.out = y.mutable_data_ptr();

  const int64_t packed = s.pairs ? 2 : item(kind == kBFloat16 ? kFloat32 : kind), full = kind == kFloat64 ? 8 : 4;
  s.d_stride = padded(s.d), s.inner_stride = padded(s.inner), s.rank_stride = padded(s.rank);
  s.parts_stride = padded(s.rank + 2 * s.n);
  Scratch scratch;
  s.normed = scratch.take(s.b * s.d_stride * packed), s.mixed = scratch.take(s.b * s.inner_stride * packed);
  s.delta = scratch.take(s.b * s.rank_stride * packed), s.gated = scratch.take(s.b * s.inner_stride * packed);
  s.u = scratch.take(s.b * s.inner_stride * full), s.gate = scratch.take(s.b * s.inner_stride * full);
  s.parts = scratch.take(s.b * s.parts_stride * full);
  char* base = scratch.base();
  for (void** pointer : {&s.normed, &s.mixed, &s.delta, &s.gated, &s.u, &s.gate, &s.parts}) place(*pointer, base);

  const Kernels& k = kernels();
  const int64_t channels = 32, rows = 4, parts = s.rank + 2 * s.n;
  auto phase = [&](Task<MambaStep> task, int64_t count, int64_t grain) {
    return Phase{(count + grain - 1) / grain, [&s, task, count, grain](int64_t i) {
                   task(s, i * grain, std::min(count, (i + 1) * grain));
                 }};
  };
  k.step_norm[kind](s, 0, s.b);
  run_phases({phase(k.step_in[kind], s.inner, channels), phase(k.step_parts[kind], parts, rows),
              phase(k.step_scan[kind], s.inner, channels), phase(k.step_out[kind], s.d, channels)},
             item(kind) * s.inner * (3 * s.d + parts + s.rank) + s.b * s.inner * s.n * 8);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mamba_step(const Tensor& x, const Tensor& norm_weight, const Maybe& norm_bias,
                                              double eps, const Tensor& in_proj, const Tensor& conv_weight,
                                              const Tensor& conv_bias, const Tensor& x_proj, const Tensor& delta_proj,
                                              const Tensor& A_log, const Tensor& D, const Tensor& delta_bias,
                                              const Tensor& out_proj, const Tensor& conv, const Tensor& ssm) {
  STD_TORCH_CHECK(conv.dim() == 3 && ssm.dim() == 3, "mamba_step: states must have 3 dimensions");
  Tensor out_conv = empty({conv.size(0), conv.size(1), conv.size(2)}, conv.scalar_type());
  Tensor out_ssm = empty({ssm.size(0), ssm.size(1), ssm.size(2)}, accumulator(kind_of(conv)));
  Tensor y = step({x, norm_weight, norm_bias, eps, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D,
                   delta_bias, out_proj},
                  conv, ssm, out_conv, out_ssm);
  return {y, out_conv, out_ssm};
}

// without conv or ssm the state is read where it is written
Tensor mamba_step_into(const Tensor& x, const Tensor& norm_weight, const Maybe& norm_bias, double eps,
                       const Tensor& in_proj, const Tensor& conv_weight, const Tensor& conv_bias, const Tensor& x_proj,
                       const Tensor& delta_proj, const Tensor& A_log, const Tensor& D, const Tensor& delta_bias,
                       const Tensor& out_proj, const Maybe& conv, const Maybe& ssm, Tensor out_conv, Tensor out_ssm) {
  const Tensor &from_conv = conv ? *conv : out_conv, &from_ssm = ssm ? *ssm : out_ssm;
  STD_TORCH_CHECK(out_conv.dim() == 3 && out_ssm.dim() == 3 && from_conv.dim() == 3 && from_ssm.dim() == 3,
                  "mamba_step: states must have 3 dimensions");
  for (int64_t i = 0; i < 3; ++i)
    STD_TORCH_CHECK(out_conv.size(i) == from_conv.size(i) && out_ssm.size(i) == from_ssm.size(i),
                    "mamba_step: out_conv and out_ssm must have the shapes of the states");
  expect(out_conv, from_conv.scalar_type(), "out_conv");
  expect(out_ssm, accumulator(kind_of(from_conv)), "out_ssm");
  STD_TORCH_CHECK(out_conv.is_contiguous() && out_ssm.is_contiguous(), "mamba_step: out states must be contiguous");
  return step({x, norm_weight, norm_bias, eps, in_proj, conv_weight, conv_bias, x_proj, delta_proj, A_log, D,
               delta_bias, out_proj},
              from_conv, from_ssm, out_conv, out_ssm);
}

// x (t, n), weight (rows, n), bias (rows,) -> (t, rows), for few t
Tensor skinny_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "skinny_linear: x (t, n) and weight (rows, n) expected");
  const Kind kind = kind_of(x);
  Inputs inputs;
  Skinny s{};
  s.rows = weight.size(0), s.n = weight.size(1), s.batch = x.size(0);
  s.weight = inputs.get(weight, x.scalar_type(), {s.rows, s.n}, "weight");
  s.bias = bias ? inputs.get(*bias, accumulator(kind), {s.rows}, "bias") : nullptr;
  s.source = inputs.get(x, x.scalar_type(), {s.batch, s.n}, "x");
  s.pairs = kind == kBFloat16 && has_pairs();
  s.x_stride = padded(s.n);
  Scratch scratch;
  s.x = scratch.take(s.batch * s.x_stride * (s.pairs ? 2 : item(kind == kBFloat16 ? kFloat32 : kind)));
  place(s.x, scratch.base());
  Tensor out = empty({s.batch, s.rows}, x.scalar_type());
  s.out = out.mutable_data_ptr();
  kernels().pack_vectors[kind](s, 0, s.batch);
  const Task<Skinny> task = kernels().skinny[kind];
  constexpr int64_t kRows = 64;
  run_phases({Phase{(s.rows + kRows - 1) / kRows,
                    [&](int64_t i) { task(s, i * kRows, std::min(s.rows, (i + 1) * kRows)); }}},
             item(kind) * s.rows * s.n);
  return out;
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("mamba_step", TORCH_BOX(&ssmoe::mamba_step));
  m.impl("mamba_step_into", TORCH_BOX(&ssmoe::mamba_step_into));
  m.impl("skinny_linear", TORCH_BOX(&ssmoe::skinny_linear));
}
