// The library "ssmoe" of torch.ops: schemas, and the choice of the level.
#include "library.h"

#include <cstdlib>
#include <cstring>

namespace ssmoe {

static const Kernels& choose() {
  const char* wanted = std::getenv("SSMOE_CPU_LEVEL");
  const bool any = !wanted || !*wanted || !std::strcmp(wanted, "auto");
  STD_TORCH_CHECK(any || !std::strcmp(wanted, "portable") || !std::strcmp(wanted, "avx2") || !std::strcmp(wanted, "avx512") ||
                      !std::strcmp(wanted, "avx512bf16"),
                  "SSMOE_CPU_LEVEL=", wanted, " is not one of: auto, portable, avx2, avx512, avx512bf16");
#ifdef SSMOE_X86
  __builtin_cpu_init();
  if ((any || !std::strncmp(wanted, "avx512", 6)) && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
    return (any || !std::strcmp(wanted, "avx512bf16")) && __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if ((any || std::strcmp(wanted, "portable")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return kAvx2;
#endif
  return kPortable;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

static std::string level() { return kernels().name; }

// Channels in a vector: states kept for the backward pass are padded to it.
static int64_t lanes(bool float64) { return kernels().lanes[float64 ? kFloat64 : kFloat32]; }

}  // namespace ssmoe

STABLE_TORCH_LIBRARY(ssmoe, m) {
  m.def("cpu_level() -> str");
  m.def("cpu_products() -> str");
  m.def("cpu_release_memory() -> ()");
  m.def("cpu_kept_memory() -> int");
  m.def("cpu_lanes(bool float64) -> int");
  m.def(
      "selective_scan(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? ids, Tensor? starts, bool keep) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "selective_scan_into(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? delta_bias, Tensor? initial_state, Tensor? ids, Tensor? starts, Tensor? slots, bool resume, "
      "Tensor(a!) out_state) -> Tensor");
  m.def(
      "selective_scan_backward(Tensor? dy, Tensor? dfinal, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? ids, Tensor? starts, Tensor checkpoints) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? ids, Tensor? starts) "
      "-> (Tensor, Tensor)");
  m.def(
      "causal_conv1d_into(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? ids, "
      "Tensor? starts, Tensor? slots, bool resume, Tensor(a!) out_state) -> Tensor");
  m.def(
      "causal_conv1d_backward(Tensor? dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? ids, Tensor? starts) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "expert_mlp(Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor expert, Tensor weight, int activation, "
      "bool keep) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor expert, Tensor weight, "
      "int activation, Tensor order, Tensor hidden, Tensor gates) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "expert_step(Tensor x, Tensor up, Tensor down, Tensor? gate, Tensor expert, Tensor weight, int activation) "
      "-> Tensor");
  m.def("settled(Tensor x) -> Tensor");
  m.def("skinny_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "mamba_step(Tensor x, Tensor norm_weight, Tensor? norm_bias, float norm_eps, Tensor in_proj, Tensor conv_weight, "
      "Tensor conv_bias, Tensor x_proj, Tensor delta_proj, Tensor A_log, Tensor D, Tensor delta_bias, Tensor out_proj, "
      "Tensor conv_state, Tensor ssm_state) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mamba_steps(Tensor x, Tensor[] weights, bool biased, float norm_eps, Tensor[] conv_states, Tensor[] ssm_states) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "mamba_step_into(Tensor x, Tensor norm_weight, Tensor? norm_bias, float norm_eps, Tensor in_proj, "
      "Tensor conv_weight, Tensor conv_bias, Tensor x_proj, Tensor delta_proj, Tensor A_log, Tensor D, "
      "Tensor delta_bias, Tensor out_proj, Tensor? conv_state, Tensor? ssm_state, Tensor(a!) out_conv, "
      "Tensor(b!) out_ssm) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CompositeExplicitAutograd, m) {
  m.impl("cpu_release_memory", TORCH_BOX(&ssmoe::release_memory));
  m.impl("cpu_kept_memory", TORCH_BOX(&ssmoe::kept_memory));
  m.impl("settled", TORCH_BOX(&ssmoe::settled));
  m.impl("cpu_level", TORCH_BOX(&ssmoe::level));
  m.impl("cpu_lanes", TORCH_BOX(&ssmoe::lanes));
}
