// Large outputs: kept when freed and handed out again, on huge pages where the system has them. The first touch
// of fresh memory costs more than the arithmetic of most kernels here.
#include <chrono>
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
constexpr std::chrono::seconds kWhile(10);       // for which the most in use is remembered, and up to twice that

using Clock = std::chrono::steady_clock;

// Blocks handed out and blocks kept for later. Together they are never more than what was in use at one time lately, so
// that keeping costs no memory that was not needed anyway.
class Blocks {
 public:
  // size: of at least so many bytes; becomes the block's own, which `give` wants back
  void* take(int64_t& size) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto found = kept_.lower_bound(size);
      // a block much too large is left for a tensor that needs it
      const bool fits = found != kept_.end() && found->first <= size + size / 4;
      in_use_ += fits ? found->first : size;
      remember();
      if (fits) {
        void* block = found->second.data;
        size = found->first;
        bytes_ -= found->first;
        kept_.erase(found);
        return block;
      }
      drop(most() - in_use_);
    }
    void* block = allocate(size);
    if (!block) {
      std::lock_guard<std::mutex> lock(mutex_);
      in_use_ -= size;
    }
    return block;
  }
  void give(void* block, int64_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= size, bytes_ += size;
    kept_.emplace(size, Kept{block, ++given_});
    drop(most() - in_use_);
  }
  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    drop(0);
  }
  int64_t bytes() {
    std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

 private:
  struct Kept {
    void* data;
    uint64_t given;
  };
  int64_t most() const { return std::max(now_, before_); }
  void remember() {
    const auto time = Clock::now();
    if (time - begin_ > kWhile) before_ = time - begin_ > 2 * kWhile ? 0 : now_, now_ = 0, begin_ = time;
    now_ = std::max(now_, in_use_);
  }
  // the oldest first, until no more than `most` bytes are kept
  void drop(int64_t most) {
    while (bytes_ > std::max<int64_t>(most, 0)) {
      auto oldest = std::min_element(kept_.begin(), kept_.end(),
                                     [](const auto& a, const auto& b) { return a.second.given < b.second.given; });
      bytes_ -= oldest->first;
      free_block(oldest->second.data, oldest->first);
      kept_.erase(oldest);
    }
  }
  static void* allocate(int64_t size);
  static void free_block(void* block, int64_t size);

  std::mutex mutex_;
  std::multimap<int64_t, Kept> kept_;
  int64_t bytes_ = 0, in_use_ = 0, now_ = 0, before_ = 0;  // kept; in use; the most in use in this while and the last
  uint64_t given_ = 0;
  Clock::time_point begin_ = Clock::now();
};

// never destroyed: tensors may outlive every static object
Blocks& blocks() {
  static Blocks* all = new Blocks;
  return *all;
}

// From a huge page on, pages of the system's own, since a heap keeps what lies between aligned blocks.
void* Blocks::allocate(int64_t size) {
#ifdef __linux__
  if (size >= kHuge) {
    void* mapped = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* all = static_cast<char*>(mapped);
    char* block = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(all) + kHuge - 1) & ~uintptr_t(kHuge - 1));
    if (block > all) munmap(all, block - all);
    if (all + kHuge > block) munmap(block + size, all + kHuge - block);
#ifdef MADV_HUGEPAGE
    madvise(block, size, MADV_HUGEPAGE);
#endif
    return block;
  }
#endif
  void* block = nullptr;
  return posix_memalign(&block, size < kHuge ? kGrain : kHuge, size) ? nullptr : block;
}

void Blocks::free_block(void* block, int64_t size) {
#ifdef __linux__
  if (size >= kHuge) {
    munmap(block, size);
    return;
  }
#endif
  std::free(block);
}

int64_t item_size(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Long ? 8 : type == ScalarType::BFloat16 ? 2 : 4;
}

}  // namespace

Tensor empty(std::vector<int64_t> sizes, ScalarType type) {
  int64_t bytes = item_size(type);
  for (int64_t size : sizes) bytes *= size;
  const int64_t unit = bytes < kHuge ? kGrain : kHuge;
  int64_t whole = (bytes + unit - 1) / unit * unit;
  void* block = bytes < kRecycled ? nullptr : blocks().take(whole);
  if (!block) return torch::stable::empty({sizes.data(), sizes.size()}, type);
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  return torch::stable::from_blob(block, {sizes.data(), sizes.size()}, {strides.data(), strides.size()},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [whole](void* data) { blocks().give(data, whole); });
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

void release_memory() { blocks().release(); }

int64_t kept_memory() { return blocks().bytes(); }

}  // namespace ssmoe
