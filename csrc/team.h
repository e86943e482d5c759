// Phases of small tasks by a few threads in one parallel region, and how many threads are worth it right now.
#pragma once
#include <functional>
#include <initializer_list>

#include "library.h"

namespace ssmoe {

// Tasks that may run in any order and on any thread; a phase begins when the one before it is done.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t)> run;
};

// Runs the phases with the number of threads that has lately been the fastest for memory-bound work: all of torch's,
// or fewer while other processes hold some of the cores. Tasks are claimed one at a time, so that a thread that comes
// late does less, and the results do not depend on who did them. bytes: of weights that are read, the measure of work.
void run_phases(std::initializer_list<Phase> phases, int64_t bytes);

}  // namespace ssmoe
