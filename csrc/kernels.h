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

// Rows of the expert bank between its matrix products; m rows of width f or d, all contiguous.
struct Gather {
  const void* source;
  int64_t source_stride;
  const int64_t* index;  // row of source, per output row
  void* out;
  int64_t width;
};

struct Activate {
  const void* up;
  const void* gate;  // null without a gate
  void* inner;
  int64_t width;
  int64_t activation;
  // backward: dinner is the gradient of the unweighted inner product, scaled here by the row's weight
  const void* dinner;
  const void* weight;  // (rows,) accumulator type
  void* dup;
  void* dgate;
  void* dweight;  // (rows,) accumulator type
};

struct Combine {
  const void* rows;      // (assignments, d) in expert order
  const int64_t* place;  // (t, k): row of each assignment, -1 if dropped
  const void* weight;    // (t, k) or null for ones
  void* out;             // (t, d)
  int64_t k, d;
};

// A matrix (rows, n), rows adjacent, times a few vectors.
struct Skinny {
  int64_t rows, n, batch;
  const void* weight;
  const void* bias;    // (rows,) accumulator type or null
  const void* source;  // (batch, n) vectors
  void* x;             // the vectors packed (skinny.h), x_stride elements apart
  int64_t x_stride;
  bool pairs;          // packed for the processor's product of bfloat16 pairs
  void* out;           // (batch, rows)
};

// One token through a residual Mamba sub-layer; S the layer's type, T its accumulator.
struct MambaStep {
  int64_t b, d, inner, n, k, rank;
  bool pairs, wide_residual;            // x and out in T, else in S
  double eps;
  const void *x, *norm_weight, *norm_bias;  // norm in T; norm_bias null for RMSNorm
  void* out;
  const void *in_proj, *x_proj, *delta_proj, *out_proj;                   // S
  const void *conv_weight, *conv_bias, *A_log, *D, *delta_bias;           // T
  const void* conv_in;  // (b, inner, k - 1) S
  void* conv_out;
  const void* ssm_in;  // (b, inner, n) T
  void* ssm_out;
  // between the phases: packed vectors and their distances, and T with rows of inner_stride
  void *normed, *mixed, *delta, *gated;
  int64_t d_stride, inner_stride, rank_stride, parts_stride;
  void *u, *gate;  // (b, inner) T: after the convolution; silu(z)
  void* parts;     // (b, rank + 2 n) T: delta, B, C
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
  Task<Gather> gather[kKinds];
  Task<Activate> activate[kKinds];
  Task<Activate> activate_backward[kKinds];
  Task<Combine> combine[kKinds];
  Task<Skinny> pack_vectors[kKinds];
  Task<Skinny> skinny[kKinds];
  Task<MambaStep> step_norm[kKinds];  // of batch rows
  Task<MambaStep> step_in[kKinds];    // of channels: in_proj, convolution, gate
  Task<MambaStep> step_parts[kKinds];  // of rows of x_proj
  Task<MambaStep> step_scan[kKinds];  // of channels: delta, scan, gate
  Task<MambaStep> step_out[kKinds];   // of rows of out_proj
};

extern const Kernels kPortable;
#ifdef SSMOE_X86
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace ssmoe
