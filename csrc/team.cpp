// See team.h.
#include "team.h"

#include <array>
#include <chrono>
#include <mutex>
#include <thread>

#ifdef SSMOE_X86
#include <immintrin.h>
#endif

namespace ssmoe {
namespace {

constexpr int64_t kSmall = 256 << 10;     // bytes below which waking a thread costs more than it brings
constexpr double kMemory = 512e6;         // bytes over which a cost is averaged
constexpr double kBetweenProbes = 1e9;    // bytes after which another number of threads is tried
constexpr double kProbe = 30e6;           // bytes for which it is tried
constexpr int kLevels = 10;               // all threads, a half, a quarter, ...

// What a byte costs with each number of threads. Cores are shared with processes that nobody here knows of, so this
// is about the machine at this moment and there is one for the process.
class Pace {
 public:
  int level(int64_t threads) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (threads != threads_) *this = Pace(threads);
    int best = 0;
    for (int i = 0; i < levels_; ++i) {
      if (seen_[i].bytes == 0) return i;
      if (cost(i) < cost(best)) best = i;
    }
    if (levels_ > 1 && since_ > kBetweenProbes) {
      // the neighbours in turn; when the turn is over the clock starts again
      if (since_ > kBetweenProbes + kProbe) {
        since_ = 0;
        up_ = !up_;
      }
      const int other = best + (up_ ? -1 : 1);
      return other < 0 || other >= levels_ ? best + (up_ ? 1 : -1) : other;
    }
    return best;
  }
  void record(int level, int64_t bytes, double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (level >= levels_) return;
    since_ += bytes;
    const double keep = 1 / (1 + bytes / kMemory);
    for (int i = 0; i < levels_; ++i) seen_[i].bytes *= keep, seen_[i].seconds *= keep;
    seen_[level].bytes += bytes, seen_[level].seconds += seconds;
  }
  Pace() = default;

 private:
  explicit Pace(int64_t threads) : threads_(threads) {
    for (levels_ = 1; levels_ < kLevels && (threads >> levels_) > 0;) ++levels_;
  }
  Pace& operator=(const Pace& other) {
    threads_ = other.threads_, levels_ = other.levels_, since_ = other.since_, up_ = other.up_, seen_ = other.seen_;
    return *this;
  }
  double cost(int i) const { return seen_[i].seconds / seen_[i].bytes; }

  struct Seen {
    double bytes = 0, seconds = 0;
  };
  std::mutex mutex_;
  int64_t threads_ = 0;
  int levels_ = 0;
  double since_ = 0;
  bool up_ = true;
  std::array<Seen, kLevels> seen_{};
};

Pace& pace() {
  static Pace one;
  return one;
}

// own lines, so that claiming does not disturb waiting
struct Progress {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

void wait_for(const std::atomic<int64_t>& done, int64_t tasks) {
  for (int spins = 0; done.load(std::memory_order_acquire) < tasks; ++spins) {
    // the thread that is waited for may need this very core
    if (spins > 2000) std::this_thread::yield();
#ifdef SSMOE_X86
    _mm_pause();
#endif
  }
}

void work(const Phase* phases, Progress* progress, size_t count) {
  for (size_t p = 0; p < count; ++p) {
    for (int64_t i; (i = progress[p].next.fetch_add(1, std::memory_order_relaxed)) < phases[p].tasks;) {
      phases[p].run(i);
      progress[p].done.fetch_add(1, std::memory_order_release);
    }
    if (p + 1 < count) wait_for(progress[p].done, phases[p].tasks);
  }
}

void run_alone(const Phase* phases, size_t count) {
  for (size_t p = 0; p < count; ++p)
    for (int64_t i = 0; i < phases[p].tasks; ++i) phases[p].run(i);
}

}  // namespace

void run_phases(std::initializer_list<Phase> phases, int64_t bytes) {
  constexpr size_t kMost = 8;
  STD_TORCH_CHECK(phases.size() <= kMost, "ssmoe cpu: too many phases");
  const int64_t most = torch::stable::get_num_threads();
  if (most <= 1 || bytes < kSmall) return run_alone(phases.begin(), phases.size());
  const int level = pace().level(most);
  const int64_t threads = most >> level;
  const auto begin = std::chrono::steady_clock::now();
  if (threads <= 1) {
    run_alone(phases.begin(), phases.size());
  } else {
    Progress progress[kMost];
    // a worker that starts when all is claimed finds nothing to wait for
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(phases.begin(), progress, phases.size());
    });
  }
  pace().record(level, bytes, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
}

}  // namespace ssmoe
