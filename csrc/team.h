// Phases of small tasks by a few threads in one parallel region, and how many threads are worth it right now.
#pragma once
#include <functional>
#include <vector>

#include "library.h"

namespace ssmoe {

// Tasks that may run in any order and on any thread; a phase begins when the one before it is done.
struct Phase {
  int64_t tasks;
  std::function<void(int64_t)> run;
};

// Runs the phases with the number of threads that has lately been the fastest for this work: all of torch's, or fewer
// while other processes hold some of the cores. Every thread claims the tasks of a part of its own, which lie side by
// side in memory, one at a time, and then those of the others, so that a thread that comes late does less; the results
// do not depend on who did them. bytes of weights that are read and rows tell one kind of work from another.
void run_phases(const std::vector<Phase>& phases, int64_t bytes, int64_t rows);

}  // namespace ssmoe
