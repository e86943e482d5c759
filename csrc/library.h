// What the op files share: the level in use, dynamic scheduling on torch's pool, and views of stable tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace ssmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// The widest level that this processor has and SSMOE_CPU_LEVEL allows; read once.
const Kernels& kernels();

inline Kind kind_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat32;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Double:
      return kFloat64;
    default:
      STD_TORCH_CHECK(false, "ssmoe cpu: activations must be float32, bfloat16 or float64");
  }
}

inline ScalarType accumulator(Kind kind) { return kind == kFloat64 ? ScalarType::Double : ScalarType::Float; }

// Pointers into tensors, which it keeps alive; what a kernel cannot read in place is copied.
class Keep {
 public:
  // (b, l, d) of the given sizes, any strides of b and l
  Rows rows(const Tensor& t, int64_t b, int64_t l, int64_t d, const char* name) {
    STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == b && t.size(1) == l && t.size(2) == d, "ssmoe cpu: ", name,
                    " must have shape (", b, ", ", l, ", ", d, ")");
    const Tensor& kept = hold(t.stride(2) == 1 || d == 1 ? t : torch::stable::contiguous(t));
    return {const_cast<void*>(kept.const_data_ptr()), kept.stride(0), kept.stride(1)};
  }
  Rows rows(const Maybe& t, int64_t b, int64_t l, int64_t d, const char* name) {
    return t ? rows(*t, b, l, d, name) : Rows{};
  }
  // one of the two strides is 1
  const Tensor& matrix(const Tensor& t) {
    const bool usable = t.stride(1) == 1 || t.stride(0) == 1;
    return hold(usable ? t : torch::stable::contiguous(t));
  }
  const void* flat(const Tensor& t, int64_t count, const char* name) {
    STD_TORCH_CHECK(t.numel() == count, "ssmoe cpu: ", name, " must have ", count, " elements");
    return hold(t.is_contiguous() ? t : torch::stable::contiguous(t)).const_data_ptr();
  }
  const void* flat(const Maybe& t, int64_t count, const char* name) { return t ? flat(*t, count, name) : nullptr; }

 private:
  const Tensor& hold(Tensor t) {
    tensors_.push_back(std::move(t));
    return tensors_.back();
  }
  std::vector<Tensor> tensors_;
};

inline Rows rows(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), t.stride(1)}; }

inline void expect(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == type, "ssmoe cpu: ", name, " has the wrong dtype");
}

// f(i) for every i, handed out one at a time, so that a slow or shared core holds nobody up.
template <class F>
void for_each(int64_t count, const F& f) {
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  });
}

template <class Args>
void run(Task<Args> task, const Args& args, int64_t count, int64_t grain = 1) {
  for_each((count + grain - 1) / grain,
           [&](int64_t i) { task(args, i * grain, std::min(count, (i + 1) * grain)); });
}

// Channels a task: enough tasks for every thread to get several, never less than one widest vector.
inline int64_t group_size(int64_t rows, int64_t channels, int64_t least) {
  const int64_t wanted = 4 * torch::stable::get_num_threads();
  const int64_t groups = std::max<int64_t>(1, (wanted + rows - 1) / std::max<int64_t>(1, rows));
  const int64_t size = (channels + groups - 1) / groups;
  return std::max(least, (size + 15) / 16 * 16);
}

// One flag a position; `starts` counts on real positions only.
inline std::vector<uint8_t> flags_of(const Maybe& ids, const Maybe& starts, int64_t b, int64_t l) {
  if (!ids) return {};
  STD_TORCH_CHECK(starts && ids->size(0) == b && ids->size(1) == l && starts->size(0) == b && starts->size(1) == l,
                  "ssmoe cpu: segments must have shape (", b, ", ", l, ")");
  expect(*ids, ScalarType::Int, "segments.ids");
  expect(*starts, ScalarType::Bool, "segments.starts");
  std::vector<uint8_t> flags(b * l);
  const auto* id = static_cast<const int32_t*>(ids->const_data_ptr());
  const auto* start = static_cast<const bool*>(starts->const_data_ptr());
  for (int64_t i = 0; i < b; ++i)
    for (int64_t j = 0; j < l; ++j)
      flags[i * l + j] = id[i * ids->stride(0) + j * ids->stride(1)] < 0 ? kPadding
                         : start[i * starts->stride(0) + j * starts->stride(1)] ? kReset
                                                                               : kReal;
  return flags;
}

// A pool of states (p, d, n) of which every row has a slot, or (b, d, n).
inline void* pool(const Tensor& t, ScalarType type, bool slotted, int64_t b, int64_t d, int64_t n) {
  expect(t, type, "a state pool");
  STD_TORCH_CHECK(t.dim() == 3 && t.is_contiguous() && (slotted || t.size(0) == b) && t.size(1) == d && t.size(2) == n,
                  "ssmoe cpu: a state pool must be contiguous, of shape (", b, " or slots, ", d, ", ", n, ")");
  return t.mutable_data_ptr();
}
inline const int64_t* slots_of(Keep& keep, const Maybe& slots, int64_t b) {
  if (slots) expect(*slots, ScalarType::Long, "slots");
  return static_cast<const int64_t*>(keep.flat(slots, b, "slots"));
}

// Uninitialised; large ones are recycled (memory.cpp).
Tensor empty(std::vector<int64_t> sizes, ScalarType type);
// A contiguous copy to be read often: on huge pages where the system has them, not recycled.
Tensor settled(const Tensor& x);
void release_memory();
int64_t kept_memory();  // bytes

}  // namespace ssmoe
