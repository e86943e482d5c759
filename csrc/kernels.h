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

// c (m, n) = or += a (m, k) b (k, n). Of an operand's two strides one is 1. Operands are activations, or "wide":
// of the accumulator's type.
struct Dense {
  int64_t m, n, k;
  const void *a, *b;
  int64_t a_row, a_column, b_row, b_column;
  bool a_wide, b_wide;
  void* c;
  int64_t c_row;
  bool c_wide, add;  // add: only to a wide c
};

// Rows and columns of c.
struct Piece {
  int64_t top, bottom, left, right;
};

// Rows of logits (t, v) become the gradient of their mean cross-entropy, as activations in the same place, a row
// of them where the row of logits began.
struct Softmax {
  int64_t v;
  void* logits;          // accumulator type
  const void* bias;      // (v,) accumulator type or null
  const int64_t* target;  // (t,), below 0: not predicted
  double scale;          // of the gradient
  double* loss;          // (t,)
};

// y = (x - mean) / deviation * weight + bias by row, or without bias x / root mean square * weight.
struct Norm {
  int64_t t, d;
  double eps;
  bool wide_x, wide_y;  // of the accumulator's type, not the activations'
  const void* x;
  const void* weight;   // (d,) accumulator type
  const void* bias;     // (d,) or null
  void* y;
  void* moments;        // (t, 2): mean and 1 / deviation; forward writes it if not null
  // backward
  const void* dstream;  // added to dx, of x's type; or null
  const void* dy;
  void* dx;
  int64_t part;         // rows a task handles
  void* dparameters;    // (parts, 2, weight and bias): sums, and room
};

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

// Rows of hidden values, each through the activation, alone or as the factor of another.
struct Activate {
  const void* up;    // (rows, width)
  const void* gate;  // the same, or null
  void* inner;       // act(gate) * up, or act(up)
  int64_t width, activation;
};

// A matrix (rows, n), rows adjacent, times a few vectors.
struct Skinny {
  int64_t rows, n, batch;
  const void* weight;
  const void* bias;    // (rows,) accumulator type or null
  const void* source;  // (batch, n) vectors
  void* x;             // the vectors packed (skinny.h), x_stride elements apart
  int64_t x_stride;
  void* out;           // (batch, rows)
};

// One query of each row and head against its cache.
struct Attend {
  int64_t h, room, d, piece, pieces;    // tokens of a piece; pieces of the longest row
  const void *q, *keys, *values;        // (b, h, d) in T and scaled, (b, h, room, d)
  const int64_t* length;                // (b,)
  void* sums;                           // (b, h, pieces, 2 + d) T: largest score, sum of weights, of values
  void* y;                              // (b, h, d)
};

// One token through a residual Mamba sub-layer; S the layer's type, T its accumulator.
struct MambaStep {
  int64_t b, d, inner, n, k, rank;
  bool wide_residual;                       // x and out in T, else in S
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
  void (*dense[kKinds])(const Dense&, const Piece&, void* scratch);
  int64_t (*dense_scratch[kKinds])(const Dense&, int64_t rows, int64_t columns);  // bytes
  Task<Softmax> softmax[kKinds];
  Task<Norm> norm[kKinds];
  Task<Norm> norm_backward[kKinds];
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
  Task<Activate> activate[kKinds];
  int64_t packed[kKinds];  // bytes of a packed vector's element (skinny.h)
  Task<Skinny> pack_vectors[kKinds];
  Task<Skinny> skinny[kKinds];
  Task<Attend> attend_pieces[kKinds];
  Task<Attend> attend_join[kKinds];
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
extern const Kernels kAvx512Bf16;
#endif

}  // namespace ssmoe
