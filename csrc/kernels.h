// What a level (portable, AVX2, AVX-512) offers: plain structures of pointers and one table of functions.
// No C++ library types here: level.cpp is compiled once a level, and a shared inline function compiled with
// wide instructions could be picked by the linker for a machine that lacks them.
#pragma once
#include <cstdint>

namespace ssmoe {

// Activations (b, l, d) of any batch and row stride; channels are adjacent.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
};

enum Flag : uint8_t { kReal = 0, kReset = 1, kPadding = 2 };

// Positions between two kept states; also the positions a kernel keeps in cache at a time.
constexpr int64_t kChunk = 32;

// "state" below: (d, n) of a row at base + index * d * n, index = slots ? slots[row] : row.
// Accumulator type: double for float64 activations, else float; A, D, delta_bias and every state have it.
struct Scan {
  int64_t b, l, d, n;
  int64_t group;   // channels a task handles, a multiple of every level's lanes
  int64_t groups;  // tasks a row
  Rows x, delta, z, B, C;
  const void* A;           // (d, n)
  const void* D;           // (d,) or null
  const void* delta_bias;  // (d,) or null
  const void* initial_state;
  const int64_t* slots;
  const uint8_t* flags;  // (b, l) or null
  void* checkpoints;     // (b, chunks, channel vectors, n, lanes), forward writes it if not null
  // forward
  Rows y;
  void* final_state;
  const int64_t* out_slots;
  // backward
  Rows dy;             // data may be null
  const void* dfinal;  // (b, d, n) or null
  Rows dx, ddelta, dz;
  void* dB;            // (groups, b, l, n)
  void* dC;            // (groups, b, l, n)
  void* dA;            // (b, d, n)
  void* dD;            // (b, d)
  void* ddelta_bias;   // (b, d)
  void* dinitial;      // (b, d, n) or null
};

struct Conv {
  int64_t b, l, d, k;
  int64_t group, groups;
  Rows x;
  const void* weight;         // (d, k) accumulator type
  const void* bias;           // (d,) or null
  const void* initial_state;  // (d, k - 1) a row, activation type, or null
  const int64_t* slots;
  const uint8_t* flags;
  Rows y;
  void* final_state;
  const int64_t* out_slots;
  // backward
  Rows dy;
  const void* dfinal;  // (b, d, k - 1) activation type or null
  Rows dx;
  void* dweight;   // (b, d, k) accumulator type
  void* dbias;     // (b, d)
  void* dinitial;  // (b, d, k - 1) activation type or null
};

enum Activation : int64_t { kRelu = 0, kReluSquared = 1, kSilu = 2 };

// One call of an expert bank. Assignments lie sorted by expert; "row" is a place in that order.
struct Bank {
  int64_t d, f, activation;
  bool wide;             // weights and their gradients have the accumulator's type, whatever the activations'
  bool direct;           // one expert a token: rows go straight to their tokens
  bool stream;           // gradients of weights are too large to stay in cache
  const int64_t* token;  // (rows,)
  const int64_t* slot;   // (rows,): place in (t, k)
  const void *up, *down, *gate;  // (e, f, d), (e, d, f), (e, f, d) or null
  const void* x;                 // (t, d)
  const void* weight;            // (t, k) accumulator type
  void *hidden, *gates;          // (rows, f): up x and gate x; not kept if null
  void* out;                     // (rows, d), or (t, d) if direct: result, or gradient of x
  // backward
  const void* dy;                       // (t, d)
  void *inner, *dhidden, *dgates;       // (rows, f); inner times its row's weight
  void* dweight;                        // (t, k)
  void *dup, *ddown, *dgate;
};

// A task: rows of an expert, or with a matrix (0 down, 1 up, 2 gate) rows first..last of its gradient.
struct Block {
  int64_t expert, begin, end;
  int64_t matrix, first, last;
};

struct Combine {
  const void* rows;      // (assignments, d) in expert order
  const int64_t* place;  // (t, k): row of each assignment, -1 if dropped
  const void* weight;    // (t, k) or null for ones
  void* out;             // (t, d)
  int64_t k, d;
};

template <class Args>
using Task = void (*)(const Args&, int64_t begin, int64_t end);

enum Kind { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2, kKinds = 3 };

struct Kernels {
  const char* name;
  int64_t lanes[kKinds];
  Task<Scan> scan_forward[kKinds];
  Task<Scan> scan_backward[kKinds];
  Task<Conv> conv_forward[kKinds];
  Task<Conv> conv_backward[kKinds];
  // scratch: as many bytes as expert_scratch says, aligned to a line, one task at a time
  void (*expert_forward[kKinds])(const Bank&, const Block&, void* scratch);
  void (*expert_backward[kKinds])(const Bank&, const Block&, void* scratch);
  void (*expert_gradients[kKinds])(const Bank&, const Block&, void* scratch);
  int64_t (*expert_scratch[kKinds])(const Bank&, int64_t block_rows, int64_t expert_rows, int64_t outputs);
  Task<Combine> combine[kKinds];
};

extern const Kernels kPortable;
#ifdef SSMOE_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#endif

}  // namespace ssmoe
