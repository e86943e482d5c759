// Large outputs: kept when freed and handed out again, on huge pages where the system has them. The first touch
// of fresh memory costs more than the arithmetic of most kernels here.
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "library.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ssmoe {
namespace {

constexpr int64_t kHuge = int64_t(2) << 20;      // a huge page
constexpr int64_t kRecycled = int64_t(1) << 18;  // smaller tensors are torch's own
constexpr int64_t kGrain = int64_t(1) << 16;     // sizes below a huge page are multiples of this
constexpr int64_t kMostKept = int64_t(1) << 30;  // bytes kept beyond those in use

struct Kept {
  std::mutex mutex;
  std::multimap<int64_t, void*> blocks;
  int64_t bytes = 0;
};
// never destroyed: tensors may outlive every static object
Kept& kept() {
  static Kept* all = new Kept;
  return *all;
}

void* take(int64_t size) {
  {
    std::lock_guard<std::mutex> lock(kept().mutex);
    auto found = kept().blocks.lower_bound(size);
    // a block much too large is left for a tensor that needs it
    if (found != kept().blocks.end() && found->first <= size + size / 4) {
      void* block = found->second;
      kept().bytes -= found->first;
      kept().blocks.erase(found);
      return block;
    }
  }
  void* block = nullptr;
  if (posix_memalign(&block, size < kHuge ? kGrain : kHuge, size)) return nullptr;
#ifdef MADV_HUGEPAGE
  if (size >= kHuge) madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

void give(void* block, int64_t size) {
  std::lock_guard<std::mutex> lock(kept().mutex);
  kept().blocks.emplace(size, block);
  kept().bytes += size;
  while (kept().bytes > kMostKept) {
    auto smallest = kept().blocks.begin();
    kept().bytes -= smallest->first;
    std::free(smallest->second);
    kept().blocks.erase(smallest);
  }
}

int64_t item_size(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Long ? 8 : type == ScalarType::BFloat16 ? 2 : 4;
}

}  // namespace

Tensor empty(std::vector<int64_t> sizes, ScalarType type) {
  int64_t bytes = item_size(type);
  for (int64_t size : sizes) bytes *= size;
  const int64_t unit = bytes < kHuge ? kGrain : kHuge, whole = (bytes + unit - 1) / unit * unit;
  void* block = bytes < kRecycled ? nullptr : take(whole);
  if (!block) return torch::stable::empty({sizes.data(), sizes.size()}, type);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return torch::stable::from_blob(block, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [whole](void* data) { give(data, whole); });
}

Tensor settled(const Tensor& x) {
  const Tensor from = torch::stable::contiguous(x);
  std::vector<int64_t> sizes, strides(from.dim(), 1);
  for (int64_t i = 0; i < from.dim(); ++i) sizes.push_back(from.size(i));
  for (int64_t i = from.dim() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  const int64_t bytes = from.numel() * item_size(from.scalar_type());
  void* block = nullptr;
  if (bytes < kHuge || posix_memalign(&block, kHuge, bytes)) return torch::stable::clone(from);
#ifdef MADV_HUGEPAGE
  // what is left over of a huge page stays on small ones
  madvise(block, bytes / kHuge * kHuge, MADV_HUGEPAGE);
#endif
  std::memcpy(block, from.const_data_ptr(), bytes);
  return torch::stable::from_blob(block, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), from.scalar_type(),
                                  [](void* data) { std::free(data); });
}

void release_memory() {
  std::lock_guard<std::mutex> lock(kept().mutex);
  for (auto& [size, block] : kept().blocks) std::free(block);
  kept().blocks.clear();
  kept().bytes = 0;
}

}  // namespace ssmoe
