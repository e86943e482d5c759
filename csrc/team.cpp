// See team.h.
#include "team.h"

#include <array>
#include <chrono>
#include <map>
#include <mutex>
#include <thread>
#include <tuple>

#ifdef SSMOE_X86
#include <immintrin.h>
#endif

namespace ssmoe {
namespace {

constexpr int64_t kSmall = 256 << 10;  // bytes below which waking a thread costs more than it brings
constexpr int kLevels = 10;            // all threads, a half, a quarter, ...
constexpr int kRecent = 3;             // runs of which the middle one counts
constexpr double kSoon = 8;            // runs after which another number of threads is tried again; doubles up to
constexpr double kLate = 64;           //   so many, or
constexpr double kLatest = 1;          //   so many seconds, whichever takes longer
constexpr double kChanged = 1.25;      // a cost that differs so much means that the machine has changed
constexpr size_t kWorks = 64;          // kinds of work that are known at a time
constexpr int64_t kParts = 8;          // of a phase's tasks, at most

// How long the last runs took with each number of threads, for one kind of work. Cores are shared with processes that
// nobody here knows of, so a number of threads that was slow is tried again: soon after a change, then ever later.
class Pace {
 public:
  explicit Pace(int64_t threads) {
    for (levels_ = 1; levels_ < kLevels && (threads >> levels_) > 0;) ++levels_;
  }
  int level() const {
    for (int i = 0; i < levels_; ++i)
      if (!runs_[i]) return i;
    return levels_ > 1 && idle_ >= wait_ ? other() : best();
  }
  void record(int level, double seconds) {
    if (level >= levels_) return;
    const int before = best();
    last_[level][runs_[level]++ % kRecent] = seconds;
    const double cost = of(before);
    if (level != before) {
      if (seconds < cost) return;  // worth a second look at once
      up_ = !up_, idle_ = 0, then_ = cost;
      wait_ = std::min(2 * wait_, std::max(kLatest, kLate * cost));
    } else if (best() != before || cost > kChanged * then_ || cost < then_ / kChanged) {
      wait_ = kSoon * cost, then_ = cost;
      idle_ = wait_;
    }
    idle_ += seconds;
  }

 private:
  // the middle one of the last runs; before there are so many, the latest
  double of(int level) const {
    const auto& last = last_[level];
    if (runs_[level] < kRecent) return runs_[level] ? last[runs_[level] - 1] : 0;
    return std::max(std::min(last[0], last[1]), std::min(std::max(last[0], last[1]), last[2]));
  }
  int best() const {
    int best = 0;
    for (int i = 1; i < levels_; ++i)
      if (runs_[i] && of(i) < of(best)) best = i;
    return best;
  }
  // a neighbour of the best, above and below in turn
  int other() const {
    const int here = best(), wanted = here + (up_ ? -1 : 1);
    return wanted < 0 || wanted >= levels_ ? here + (up_ ? 1 : -1) : wanted;
  }

  int levels_;
  bool up_ = true;
  double idle_ = 0, wait_ = 0, then_ = 0;  // seconds since the last trial and until the next; the best's cost then
  std::array<int64_t, kLevels> runs_{};
  std::array<std::array<double, kRecent>, kLevels> last_{};
};

// The paces of every kind of work with so many threads; one set for the process.
class Paces {
 public:
  int level(int64_t threads, int64_t bytes, int64_t rows) {
    std::lock_guard<std::mutex> lock(mutex_);
    return of(threads, bytes, rows).level();
  }
  void record(int64_t threads, int64_t bytes, int64_t rows, int level, double seconds) {
    std::lock_guard<std::mutex> lock(mutex_);
    of(threads, bytes, rows).record(level, seconds);
  }

 private:
  Pace& of(int64_t threads, int64_t bytes, int64_t rows) {
    const auto key = std::make_tuple(threads, bytes, rows);
    auto found = paces_.find(key);
    if (found != paces_.end()) return found->second;
    if (paces_.size() >= kWorks) paces_.clear();
    return paces_.emplace(key, Pace(threads)).first->second;
  }
  std::mutex mutex_;
  std::map<std::tuple<int64_t, int64_t, int64_t>, Pace> paces_;
};

Paces& paces() {
  static Paces all;
  return all;
}

// own lines, so that claiming does not disturb waiting
struct alignas(64) Count {
  std::atomic<int64_t> value{0};
};
// Of every phase the tasks done, and those claimed of each part.
class Progress {
 public:
  Progress(size_t phases, int64_t parts) : parts(parts), counts_(phases * (parts + 1)) {}
  std::atomic<int64_t>& done(size_t phase) { return counts_[phase * (parts + 1)].value; }
  std::atomic<int64_t>& claimed(size_t phase, int64_t part) { return counts_[phase * (parts + 1) + part + 1].value; }
  const int64_t parts;

 private:
  std::vector<Count> counts_;
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

// A worker goes through its own part of the tasks, where memory is read in order, and then helps with the others.
void work(const std::vector<Phase>& phases, Progress& progress, int64_t worker) {
  const int64_t parts = progress.parts;
  for (size_t p = 0; p < phases.size(); ++p) {
    const int64_t tasks = phases[p].tasks;
    for (int64_t other = 0; other < parts; ++other) {
      const int64_t part = (worker + other) % parts, begin = part * tasks / parts, end = (part + 1) * tasks / parts;
      for (int64_t i; (i = begin + progress.claimed(p, part).fetch_add(1, std::memory_order_relaxed)) < end;) {
        phases[p].run(i);
        progress.done(p).fetch_add(1, std::memory_order_release);
      }
    }
    if (p + 1 < phases.size()) wait_for(progress.done(p), tasks);
  }
}

void run_alone(const std::vector<Phase>& phases) {
  for (const Phase& phase : phases)
    for (int64_t i = 0; i < phase.tasks; ++i) phase.run(i);
}

}  // namespace

void run_phases(const std::vector<Phase>& phases, int64_t bytes, int64_t rows) {
  const int64_t most = torch::stable::get_num_threads();
  if (most <= 1 || bytes < kSmall) return run_alone(phases);
  const int level = paces().level(most, bytes, rows);
  const int64_t threads = most >> level;
  const auto begin = std::chrono::steady_clock::now();
  if (threads <= 1) {
    run_alone(phases);
  } else {
    Progress progress(phases.size(), std::min(threads, kParts));
    // a worker that starts when all is claimed finds nothing to wait for
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(phases, progress, i);
    });
  }
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - begin;
  paces().record(most, bytes, rows, level, taken.count());
}

}  // namespace ssmoe
