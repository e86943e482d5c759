// Which library multiplies float32 matrices faster here: `ssmoe.ops.cpu.linear` asks once.
#include <chrono>
#include <functional>
#include <string>

#include "library.h"

namespace ssmoe {
namespace {

void with_torch(const Tensor& a, const Tensor& b, const Tensor& out) {
  StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                          torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
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
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("mkldnn::_linear_pointwise", "", stack, TORCH_ABI_VERSION));
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

// Whether oneDNN's float32 product is about as fast here or faster, copy included; measured once, a few
// milliseconds. torch's own is MKL's, which reaches 40 % of an AMD core where oneDNN reaches 90 %. bfloat16 is
// oneDNN's in either.
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

std::string products() { return onednn() ? "oneDNN" : "torch"; }

}  // namespace
}  // namespace ssmoe

STABLE_TORCH_LIBRARY_IMPL(ssmoe, CompositeExplicitAutograd, m) { m.impl("cpu_products", TORCH_BOX(&ssmoe::products)); }
