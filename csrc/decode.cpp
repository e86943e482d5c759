// mamba_step and skinny_linear as torch ops: what one token costs is reading the weights once.
#include "decode.h"

namespace ssmoe {
namespace {

struct StepInputs {
  const Tensor &x, &norm_weight;
  const Maybe norm_bias;
  double eps;
  const Tensor &in_proj, &conv_weight, &conv_bias, &x_proj, &delta_proj, &A_log, &D, &delta_bias, &out_proj;
};

// Layers of one shape one after the other; the residual stream goes through `y`.
class Steps {
 public:
  Steps(const Tensor& x, const Tensor& conv, const Tensor& ssm, const Tensor& delta_proj)
      : kind_(kind_of(conv)), y_(empty({x.size(0), x.size(1)}, x.scalar_type())) {
    STD_TORCH_CHECK(x.dim() == 2 && conv.dim() == 3 && ssm.dim() == 3 && delta_proj.dim() == 2,
                    "mamba_step: x (b, d_model), conv_state (b, d_inner, d_conv - 1), ssm_state (b, d_inner, d_state) "
                    "and delta_proj (d_inner, dt_rank) expected");
    type_ = conv.scalar_type(), wide_ = accumulator(kind_);
    STD_TORCH_CHECK(x.scalar_type() == type_ || x.scalar_type() == wide_,
                    "mamba_step: x must have the layer's dtype or be at least float32");
    MambaStep& s = shape_;
    s.b = x.size(0), s.d = x.size(1), s.inner = conv.size(1), s.k = conv.size(2) + 1, s.n = ssm.size(2);
    s.rank = delta_proj.size(1), s.wide_residual = x.scalar_type() == wide_;
    s.x = inputs_.get(x, x.scalar_type(), {s.b, s.d}, "x"), s.out = y_.mutable_data_ptr();
    const int64_t packed = kernels().packed[kind_], full = kind_ == kFloat64 ? 8 : 4;
    s.d_stride = padded(s.d), s.inner_stride = padded(s.inner), s.rank_stride = padded(s.rank);
    s.parts_stride = padded(s.rank + 2 * s.n);
    Scratch scratch;
    s.normed = scratch.take(s.b * s.d_stride * packed), s.mixed = scratch.take(s.b * s.inner_stride * packed);
    s.delta = scratch.take(s.b * s.rank_stride * packed), s.gated = scratch.take(s.b * s.inner_stride * packed);
    s.u = scratch.take(s.b * s.inner_stride * full), s.gate = scratch.take(s.b * s.inner_stride * full);
    s.parts = scratch.take(s.b * s.parts_stride * full);
    char* base = scratch.base();
    for (void** pointer : {&s.normed, &s.mixed, &s.delta, &s.gated, &s.u, &s.gate, &s.parts}) place(*pointer, base);
  }

  void add(const StepInputs& in, const Tensor& conv, const Tensor& ssm, void* conv_out, void* ssm_out) {
    MambaStep s = shape_;
    if (!layers_.empty()) s.x = s.out;
    s.eps = in.eps;
    s.norm_weight = inputs_.get(in.norm_weight, wide_, {s.d}, "norm_weight");
    s.norm_bias = in.norm_bias ? inputs_.get(*in.norm_bias, wide_, {s.d}, "norm_bias") : nullptr;
    s.in_proj = inputs_.get(in.in_proj, type_, {2 * s.inner, s.d}, "in_proj");
    s.conv_weight = inputs_.get(in.conv_weight, wide_, {s.inner, s.k}, "conv_weight");
    s.conv_bias = inputs_.get(in.conv_bias, wide_, {s.inner}, "conv_bias");
    s.x_proj = inputs_.get(in.x_proj, type_, {s.rank + 2 * s.n, s.inner}, "x_proj");
    s.delta_proj = inputs_.get(in.delta_proj, type_, {s.inner, s.rank}, "delta_proj");
    s.A_log = inputs_.get(in.A_log, wide_, {s.inner, s.n}, "A_log");
    s.D = inputs_.get(in.D, wide_, {s.inner}, "D");
    s.delta_bias = inputs_.get(in.delta_bias, wide_, {s.inner}, "delta_bias");
    s.out_proj = inputs_.get(in.out_proj, type_, {s.d, s.inner}, "out_proj");
    s.conv_in = inputs_.get(conv, type_, {s.b, s.inner, s.k - 1}, "conv_state");
    s.ssm_in = inputs_.get(ssm, wide_, {s.b, s.inner, s.n}, "ssm_state");
    s.conv_out = conv_out, s.ssm_out = ssm_out;
    layers_.push_back(s);
  }

  Tensor run() {
    const Kernels& k = kernels();
    std::vector<Phase> phases;
    phases.reserve(5 * layers_.size());
    auto phase = [&phases](Task<MambaStep> task, const MambaStep& s, int64_t count, int64_t grain) {
      phases.push_back({(count + grain - 1) / grain, [&s, task, count, grain](int64_t i) {
                          task(s, i * grain, std::min(count, (i + 1) * grain));
                        }});
    };
    const int64_t channels = 32, rows = 4;
    for (const MambaStep& s : layers_) {
      phase(k.step_norm[kind_], s, s.b, 1);
      phase(k.step_in[kind_], s, s.inner, channels);
      phase(k.step_parts[kind_], s, s.rank + 2 * s.n, rows);
      phase(k.step_scan[kind_], s, s.inner, channels);
      phase(k.step_out[kind_], s, s.d, channels);
    }
    const MambaStep& s = shape_;
    const int64_t bytes = item(kind_) * s.inner * (3 * s.d + 2 * s.rank + 2 * s.n) + s.b * s.inner * s.n * 8;
    run_phases(phases, bytes * int64_t(layers_.size()), s.b);
    return y_;
  }

 private:
  Kind kind_;
  ScalarType type_, wide_;
  Tensor y_;
  MambaStep shape_{};
  Inputs inputs_;
  std::vector<MambaStep> layers_;
};

Tensor step(const StepInputs& in, const Tensor& conv, const Tensor& ssm, const Tensor& out_conv,
            const Tensor& out_ssm) {
  Steps steps(in.x, conv, ssm, in.delta_proj);
  steps.add(in, conv, ssm, out_conv.mutable_data_ptr(), out_ssm.mutable_data_ptr());
  return steps.run();
}

// Several layers of one shape. weights: of each layer norm_weight, in_proj, conv_weight, conv_bias, x_proj,
// delta_proj, A_log, D, delta_bias, out_proj, and with `biased` norm_bias. The states come as (layers, b, ...).
std::tuple<Tensor, Tensor, Tensor> mamba_steps(const Tensor& x, std::vector<Tensor> weights, bool biased, double eps,
                                               std::vector<Tensor> conv, std::vector<Tensor> ssm) {
  const size_t each = biased ? 11 : 10, layers = conv.size();
  STD_TORCH_CHECK(layers > 0 && ssm.size() == layers && weights.size() == each * layers,
                  "mamba_steps: weights and states disagree");
  STD_TORCH_CHECK(conv[0].dim() == 3 && ssm[0].dim() == 3, "mamba_step: states must have 3 dimensions");
  const int64_t count = int64_t(layers), b = conv[0].size(0), inner = conv[0].size(1), k = conv[0].size(2);
  const int64_t n = ssm[0].size(2);
  const ScalarType type = conv[0].scalar_type(), wide = accumulator(kind_of(conv[0]));
  Tensor out_conv = empty({count, b, inner, k}, type), out_ssm = empty({count, b, inner, n}, wide);
  Steps steps(x, conv[0], ssm[0], weights[5]);
  for (size_t i = 0; i < layers; ++i) {
    const Tensor* w = &weights[i * each];
    steps.add({x, w[0], biased ? Maybe(w[10]) : Maybe(), eps, w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8], w[9]},
              conv[i], ssm[i],
              static_cast<char*>(out_conv.mutable_data_ptr()) + int64_t(i) * b * inner * k * (type == wide ? item(kind_of(conv[0])) : 2),
              static_cast<char*>(out_ssm.mutable_data_ptr()) + int64_t(i) * b * inner * n * (wide == ScalarType::Double ? 8 : 4));
  }
  return {steps.run(), out_conv, out_ssm};
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
  s.x_stride = padded(s.n);
  Scratch scratch;
  s.x = scratch.take(s.batch * s.x_stride * kernels().packed[kind]);
  place(s.x, scratch.base());
  Tensor out = empty({s.batch, s.rows}, x.scalar_type());
  s.out = out.mutable_data_ptr();
  kernels().pack_vectors[kind](s, 0, s.batch);
  const Task<Skinny> task = kernels().skinny[kind];
  constexpr int64_t kRows = 64;
  run_phases(std::vector<Phase>{Phase{(s.rows + kRows - 1) / kRows,
                    [&](int64_t i) { task(s, i * kRows, std::min(s.rows, (i + 1) * kRows)); }}},
             item(kind) * s.rows * s.n, s.batch);
  return out;
}

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CPU, m) {
  m.impl("mamba_step", TORCH_BOX(&ssmoe::mamba_step));
  m.impl("mamba_steps", TORCH_BOX(&ssmoe::mamba_steps));
  m.impl("mamba_step_into", TORCH_BOX(&ssmoe::mamba_step_into));
  m.impl("skinny_linear", TORCH_BOX(&ssmoe::skinny_linear));
}
