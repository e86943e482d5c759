// What the decode ops share: scratch memory and contiguous inputs.
#pragma once
#include <cstring>

#include "team.h"

namespace ssmoe {

inline int64_t item(Kind kind) { return kind == kFloat64 ? 8 : kind == kFloat32 ? 4 : 2; }
inline int64_t padded(int64_t count) { return (count + 31) / 32 * 32; }

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

inline void place(void*& pointer, char* base) { pointer = base + reinterpret_cast<intptr_t>(pointer); }

// Contiguous tensors in the type that a kernel reads, kept alive; copied only where they are not that already.
class Inputs {
 public:
  const void* get(const Tensor& t, ScalarType type, std::initializer_list<int64_t> sizes, const char* name) {
    STD_TORCH_CHECK(t.dim() == int64_t(sizes.size()), "ssmoe cpu: ", name, " must have ", sizes.size(), " dimensions");
    int64_t i = 0;
    for (int64_t size : sizes) {
      STD_TORCH_CHECK(t.size(i) == size, "ssmoe cpu: ", name, " has size ", t.size(i), " in dimension ", i,
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

}  // namespace ssmoe
