// One token of a few rows through equal Mamba sub-layers, x + mixer(norm(x)) each, all layers in one launch.
//
// G blocks stay on the GPU, one a multiprocessor. A block owns C / G channels (their rows of in_proj and delta_proj,
// their states), D / G outputs of out_proj and up to RX of x_proj. One thread streams the block's weights, layer after
// layer, into a ring of shared memory; weights depend on nothing, so the stream goes on while the blocks exchange
// results. The other warps multiply what has come, 16 x 16 weights a matrix instruction, rows of the batch as its
// columns.
//
// Blocks exchange numbers as 64-bit words of a number and a flag, this launch's and layer's: a reader that sees the
// flag has the number, so no barrier of the grid is needed. A layer has four exchanges: the convolution's outputs,
// which are under way while the first gates are made; x_proj's, while the other gates are; out_proj's inputs; x.
// The order of every sum is fixed and no sum depends on the number of rows.
//
// What orders reads and writes of the same place:
//
// A stage of the ring, and what a layer reads but once: the copy engine writes, all warps read. Written before read:
// every thread that reads waits for `full` itself, whose phase ends when all the bytes announced have come. Read before
// written again: a lane's reads, its fence, the warp's barrier, lane 0's arrival at `empty`, the streaming thread's wait
// for all sixteen, its next copy. Only that thread announces and copies, so its own order needs nothing. Neither barrier
// can get two phases ahead: phase i + 1 of `full` needs phase i of `empty`, which needs phase i of `full`.
//
// Other shared memory: the sixteen warps write and read, and a BARRIER lies between each write and its reads, and
// between those and the next write. For sums: those that the convolution reads are first overwritten by out_proj's,
// those of the gates by out_proj's and the next layer's, after two barriers at least.
//
// Words: a number and its flag are one word, so a reader needs no order among words. In layer l a block reads all of
// X(l - 1), sends V(l), reads all V(l), sends totals T(l), reads all T(l), sends Y(l), reads all Y(l), sends X(l), with a
// BARRIER between what all its threads read and what any of them sends next. So a word may be written again a layer
// later: whoever sends V(l + 1) has read X(l) of every block, which each sent after reading V(l) and T(l); T(l + 1) is sent
// after reading V(l + 1), X(l + 1) after Y(l + 1), and both of those each block sends after reading X(l), hence Y(l).
// The epoch is read before a block's first BARRIER and written by block 0 after it read every block's last Y.
//
// States may be written in place: a thread writes those that it read, the scan's after their copy has come. States of
// different layers share no memory.
//
// Compiled at run time; step_cuda.py sets the macros D C R N TAPS ROWS G XBF LAYERNORM MAXL RI KI RO KO STAGES WINDOW
// COPIES SHARED_BYTES. RI, RO: rows of a tile of in_proj and out_proj; KI, KO: its columns. XBF: x is bfloat16.
// MAXL: layers a launch.

typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;
struct bf16 {
    unsigned short bits;
};
struct alignas(8) U2 {
    u32 v[2];
};
struct alignas(16) U4 {
    u32 v[4];
};
struct alignas(8) F2 {
    float v[2];
};

#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
constexpr int WARPS = 16, THREADS = 32 * WARPS;  // that multiply; one more streams

#ifndef EMULATED
#define SHARED_MEMORY(name) extern __shared__ float4 name##_[]; char* name = reinterpret_cast<char*>(name##_)
#define SWAP(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
// all threads but those of the streaming warp
#define BARRIER() asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory")
#define WHOLE_BARRIER() __syncthreads()
#define WARP_BARRIER() __syncwarp()
#define LOOK_AGAIN()
__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}
__device__ __forceinline__ void open_barrier(u64* barrier, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_opened() {
    asm volatile("fence.mbarrier_init.release.cluster;\n fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// waits until the barrier's phase of this parity is over
__device__ __forceinline__ void passed(u64* barrier, u32 parity) {
    asm volatile("{ .reg .pred p;\n WAIT%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @!p bra WAIT%=;\n }"
                 ::"r"(shared_address(barrier)), "r"(parity & 1) : "memory");
}
// one lane of a warp that has come together, by an instruction that tells the compiler so
__device__ __forceinline__ bool chosen(int) {
    u32 is;
    asm volatile("{ .reg .pred p;\n elect.sync _|p, 0xffffffff;\n selp.u32 %0, 1, 0, p;\n }" : "=r"(is));
    return is;
}
// What this thread read of shared memory comes before what the copy engine writes after a later arrival. Without the
// fence the compiler lets a warp arrive while its matrices are still on their way.
__device__ __forceinline__ void done_reading() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void copy_by_engine(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void matrices4(u32* to, const void* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(at)) : "memory");
}
__device__ __forceinline__ void matrices2(u32* to, const void* at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1]) : "r"(shared_address(at)) : "memory");
}
// d += a b: 16 x 16 by 16 x 8
__device__ __forceinline__ void multiply(float* d, const u32* a, const u32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                 " {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void send(u64* to, u64 word) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}
__device__ __forceinline__ u64 look(const u64* at) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(at) : "memory");
    return word;
}
// two numbers in bfloat16, to the nearest
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#define EXP(v) __expf(v)
#endif

constexpr int P = R + 2 * N, CC = C / G, DO = D / G;
constexpr int TI = CC / RI, QI = D / KI, TO = DO / RO, QO = C / KO, EARLY = TI / 2;
constexpr int RX = (P + G - 1) / G;              // outputs of x_proj of a block; the last blocks have none
constexpr int ROW_I = 2 * KI + 16, ROW_O = 2 * KO + 16, ROW_X = 2 * C + 16;  // bytes from row to row of a tile: eight rows meet no bank twice
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int up16(int a) { return (a + 15) / 16 * 16; }
constexpr int SLOT = larger(larger(RI * ROW_I, RO * ROW_O), larger(RX * ROW_X, 2 * CC * R));
constexpr int SUMS = WARPS + 1;
constexpr int OUTPUTS = larger(2 * CC, DO);

static_assert(C % G == 0 && D % G == 0 && CC % 4 == 0 && CC % RI == 0 && DO % RO == 0 && P % RX == 0, "whole tiles");
static_assert(D % KI == 0 && C % KO == 0 && KI % (16 * WARPS) == 0 && KO % (16 * WARPS) == 0, "whole chunks");
static_assert(SLOT % 16 == 0 && R % 8 == 0 && 2 * CC * R % 16 == 0, "whole copies");
static_assert(N == 16 && 8 * CC <= THREADS, "threads");
static_assert(ROWS <= 8 && CC * ROWS <= THREADS && DO * ROWS <= THREADS && RX * ROWS <= THREADS, "rows");

// Shared memory, bytes
constexpr int AT_BARRIERS = STAGES * SLOT;                 // u64 [2][STAGES]: a slot is full; it is empty
constexpr int AT_SMALL = AT_BARRIERS + 16 * STAGES;        // u64 [2]: what follows is full; it is empty
// what a layer reads but once, brought while the layer before ends
constexpr int AT_WEIGHT = AT_SMALL + 16;                   // float [1 or 2][D], the norm's
constexpr int AT_TAPS = AT_WEIGHT + 4 * D * (1 + LAYERNORM);  // float [CC][TAPS + 1]
constexpr int AT_SHIFT = AT_TAPS + 4 * CC * (TAPS + 1);    // float [CC] each
constexpr int AT_SKIP = AT_SHIFT + 4 * CC;
constexpr int AT_BIAS = AT_SKIP + 4 * CC;
constexpr int AT_A = AT_BIAS + 4 * CC;                     // float [CC][N]
constexpr int AT_STATE = AT_A + 4 * CC * N;                // float [ROWS][CC][N]
constexpr int SMALL = AT_STATE + 4 * ROWS * CC * N - AT_WEIGHT;
constexpr int STRIDE_H = 2 * D + 16, STRIDE_Y = 2 * C + 16;  // bytes from row to row of the factors
constexpr int AT_H = AT_WEIGHT + SMALL;                    // bf16 [ROWS][STRIDE_H / 2], in_proj's
constexpr int AT_WIDE = AT_H + ROWS * STRIDE_H;            // bf16 [ROWS][STRIDE_Y / 2], x_proj's, then out_proj's
constexpr int AT_SUMS = AT_WIDE + ROWS * STRIDE_Y;         // float [OUTPUTS][ROWS][SUMS], by warp
constexpr int AT_LOWSUMS = AT_SUMS + up16(4 * OUTPUTS * ROWS * SUMS);  // float [RX][ROWS][SUMS]
constexpr int AT_INNER = AT_LOWSUMS + up16(4 * RX * ROWS * SUMS);  // float [ROWS][CC]
constexpr int AT_LOW = AT_INNER + 4 * ROWS * CC;           // float [ROWS][P]
constexpr int AT_NORMS = AT_LOW + 4 * ROWS * P;            // float [2][ROWS][WARPS]
constexpr int AT_EPOCH = AT_NORMS + 8 * ROWS * WARPS;      // u32
constexpr int END = AT_EPOCH + 16;
static_assert(END == SHARED_BYTES, "step_cuda.py counts the same");

// What blocks exchange, words of 64 bits
constexpr int AT_X = 2;                               // [COPIES][ROWS][D]
constexpr int AT_Y = AT_X + COPIES * ROWS * D;        // [COPIES][ROWS][C / 2]
constexpr int AT_V = AT_Y + COPIES * ROWS * C / 2;    // [COPIES][ROWS][C / 2], the convolution's outputs
constexpr int AT_TOTALS = AT_V + COPIES * ROWS * C / 2;  // [COPIES][ROWS][P]
constexpr int WORDS = AT_TOTALS + COPIES * ROWS * P;

struct Layer {
    const float* norm;
    const float* norm_bias;
    const bf16* in_proj;
    const float* taps;
    const float* shift;
    const bf16* x_proj;
    const bf16* delta_proj;
    const float* A_log;
    const float* skip;
    const float* bias;
    const bf16* out_proj;
    const bf16* conv;
    bf16* out_conv;
    const float* ssm;
    float* out_ssm;
};
struct Arguments {
    const void* x;
    void* out;
    u64* words;
    i64 layers;
    double eps;
    Layer layer[MAXL];
};

__device__ __forceinline__ float from_bits(u32 b) { return __uint_as_float(b << 16); }
__device__ __forceinline__ float low_half(u32 b) { return __uint_as_float(b << 16); }
__device__ __forceinline__ float high_half(u32 b) { return __uint_as_float(b & 0xffff0000u); }
__device__ __forceinline__ float rounded(float v) { return low_half(pack(v, 0.0f)); }
__device__ __forceinline__ float silu(float v) { return v / (1.0f + EXP(-v)); }
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }
__device__ __forceinline__ u64 word(u32 bits, u32 flag) { return (u64)flag << 32 | bits; }
__device__ __forceinline__ u32 flag_of(u64 word) { return (u32)(word >> 32); }

// Up to V numbers at at + place(i), those with place(i) >= 0, once all of them are there.
template <int V, class Place>
__device__ __forceinline__ void gather(u32 (&to)[V], const u64* at, Place place, u32 flag) {
    bool missing;
    do {
        u64 seen[V];
        UNROLL for (int i = 0; i < V; i++)
            if (place(i) >= 0) seen[i] = look(at + place(i));
        missing = false;
        UNROLL for (int i = 0; i < V; i++) {
            to[i] = 0;
            if (place(i) >= 0) to[i] = (u32)seen[i], missing |= flag_of(seen[i]) != flag;
        }
        if (missing) LOOK_AGAIN();
    } while (missing);
}
__device__ __forceinline__ float sum_of_warp(float v) {
    UNROLL for (int mask = 16; mask; mask /= 2) v += SWAP(v, mask);
    return v;
}

struct Ring {
    char* memory;
    u64* full;
    u64* empty;
    u32 slot, round;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) slot = 0, round++;
    }
};

// One thread's part: the block's weights in the order in which they are multiplied.
// At most WINDOW stages are under way: what else the block reads would wait behind them.
__device__ __forceinline__ void bring(Ring& ring, Ring& behind, int& sent, int rows, u32 bytes, int stride, const char* first,
                                      i64 step, int jump, i64 far) {
    // row i comes from first + i step, from row `jump` on from `far` bytes further
    if (ring.round > 0) passed(&ring.empty[ring.slot], ring.round - 1);
    if (sent++ >= WINDOW) {
        passed(&behind.full[behind.slot], behind.round);
        behind.next();
    }
    expect(&ring.full[ring.slot], rows * bytes);
    char* to = ring.memory + ring.slot * SLOT;
    for (int i = 0; i < rows; i++)
        copy_by_engine(to + i * stride, first + i * step + (i >= jump ? far : 0), bytes, &ring.full[ring.slot]);
    ring.next();
}
__device__ __forceinline__ void stream(const Arguments& a, char* memory, Ring ring) {
    Ring behind = ring;
    int sent = 0;
    const int block = blockIdx.x;
    u64* small = (u64*)(memory + AT_SMALL);
    for (int l = 0; l < (int)a.layers; l++) {
        const Layer& layer = a.layer[l];
        if (l > 0) passed(&small[1], l - 1);
        expect(&small[0], SMALL);
        auto part = [&](int to, const float* from, int count) {
            copy_by_engine(memory + to, from, 4 * count, &small[0]);
        };
        part(AT_WEIGHT, layer.norm, D);
        if (LAYERNORM) part(AT_WEIGHT + 4 * D, layer.norm_bias, D);
        part(AT_TAPS, layer.taps + block * CC * (TAPS + 1), CC * (TAPS + 1));
        part(AT_SHIFT, layer.shift + block * CC, CC);
        part(AT_SKIP, layer.skip + block * CC, CC);
        part(AT_BIAS, layer.bias + block * CC, CC);
        part(AT_A, layer.A_log + block * CC * N, CC * N);
        UNROLL for (int r = 0; r < ROWS; r++)
            part(AT_STATE + 4 * r * CC * N, layer.ssm + ((i64)r * C + block * CC) * N, CC * N);

        auto enter = [&](int from, int to) {
            const char* in = (const char*)(layer.in_proj + (i64)block * CC * D);
            for (int t = from; t < to; t++) {
                int begin = t * RI;
                for (int q = 0; q < QI; q++)
                    bring(ring, behind, sent, RI, 2 * KI, ROW_I, in + 2 * ((i64)begin * D + q * KI), 2 * D,
                          CC - begin, 2 * (i64)(C - CC) * D);
            }
        };
        enter(0, TI + EARLY);
        if (block * RX < P)
            bring(ring, behind, sent, RX, 2 * C, ROW_X, (const char*)(layer.x_proj + (i64)block * RX * C), 2 * C,
                  RX, 0);
        enter(TI + EARLY, 2 * TI);
        bring(ring, behind, sent, 1, 2 * CC * R, 0, (const char*)(layer.delta_proj + (i64)block * CC * R), 0, 1, 0);
        const char* out = (const char*)(layer.out_proj + (i64)block * DO * C);
        for (int t = 0; t < TO; t++)
            for (int q = 0; q < QO; q++)
                bring(ring, behind, sent, RO, 2 * KO, ROW_O, out + 2 * ((i64)t * RO * C + q * KO), 2 * C, RO, 0);
    }
}

// The other warps: TILES tiles of RT rows, each CHUNKS chunks of K columns, a warp 1 / WARPS of the columns.
template <int TILES, int RT, int CHUNKS, int K, int STRIDE>
__device__ __forceinline__ void multiply_all(Ring& ring, const char* factor, float* sums, int warp, int lane) {
    constexpr int MT = (RT + 15) / 16, STEPS = K / (16 * WARPS), ROW = 2 * K + 16, AT_ONCE = STEPS % 2 ? 1 : 2;
    const char* right = factor + min(lane % 8, ROWS - 1) * STRIDE + 2 * (warp * 16 * STEPS + lane / 8 % 2 * 8);
    int place[MT];
    UNROLL for (int m = 0; m < MT; m++)
        place[m] = min(16 * m + lane % 16, RT - 1) * ROW + 2 * (warp * 16 * STEPS + lane / 16 * 8);
    for (int t = 0; t < TILES; t++) {
        float d[MT][AT_ONCE][4];
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int s = 0; s < AT_ONCE; s++)
            UNROLL for (int i = 0; i < 4; i++) d[m][s][i] = 0.0f;
        UNROLL for (int q = 0; q < CHUNKS; q++) {
            u32 b[AT_ONCE][2], w[AT_ONCE][MT][4];
            // the factor waits for nothing
            UNROLL for (int s = 0; s < AT_ONCE; s++) matrices2(b[s], right + 2 * (q * K + 16 * s));
            passed(&ring.full[ring.slot], ring.round);
            const char* left = ring.memory + ring.slot * SLOT;
            UNROLL for (int from = 0; from < STEPS; from += AT_ONCE) {
                UNROLL for (int s = 0; s < AT_ONCE; s++) {
                    if (from) matrices2(b[s], right + 2 * (q * K + 16 * (from + s)));
                    UNROLL for (int m = 0; m < MT; m++) matrices4(w[s][m], left + place[m] + 32 * (from + s));
                }
                UNROLL for (int s = 0; s < AT_ONCE; s++) UNROLL for (int m = 0; m < MT; m++)
                    multiply(d[m][s], w[s][m], b[s]);
            }
            done_reading();
            WARP_BARRIER();
            if (lane == 0) arrive(&ring.empty[ring.slot]);
            ring.next();
        }
        int row = lane % 4 * 2;
        UNROLL for (int m = 0; m < MT; m++) UNROLL for (int i = 0; i < 4; i++) {
            int o = 16 * m + lane / 4 + i / 2 * 8;
            float all = AT_ONCE == 2 ? d[m][0][i] + d[m][AT_ONCE - 1][i] : d[m][0][i];
            if (o < RT && row + i % 2 < ROWS) sums[((t * RT + o) * ROWS + row + i % 2) * SUMS + warp] = all;
        }
    }
}
__device__ __forceinline__ float total(const float* sums) {
    float s = 0.0f;
    UNROLL for (int w = 0; w < WARPS; w++) s += sums[w];
    return s;
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1) steps(const __grid_constant__ Arguments a) {
    SHARED_MEMORY(memory);
    const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, block = blockIdx.x, layers = (int)a.layers;
    Ring ring = {memory, (u64*)(memory + AT_BARRIERS), (u64*)(memory + AT_BARRIERS) + STAGES, 0, 0};
    u64* small = (u64*)(memory + AT_SMALL);
    if (tid == 0) {
        for (int s = 0; s < STAGES; s++) open_barrier(&ring.full[s], 1), open_barrier(&ring.empty[s], WARPS);
        open_barrier(&small[0], 1), open_barrier(&small[1], WARPS);
        barriers_opened();
    }
    WHOLE_BARRIER();
    if (warp == WARPS) {
        if (chosen(lane)) stream(a, memory, ring);
        return;
    }
    const float* weight = (const float*)(memory + AT_WEIGHT);
    char *factor = memory + AT_H, *wide = memory + AT_WIDE;
    float* sums = (float*)(memory + AT_SUMS);
    float* low_sums = (float*)(memory + AT_LOWSUMS);
    float* inner = (float*)(memory + AT_INNER);
    float* low = (float*)(memory + AT_LOW);
    float* norms = (float*)(memory + AT_NORMS);
    u64* words = a.words;
    u32 epoch = 0;
    if (tid == 0) *(u32*)(memory + AT_EPOCH) = (u32)look(words);
    // the copy of what all blocks read that this one reads: fewer blocks meet at one place
    const int copy = block % COPIES;
    const u64 *own_x = words + AT_X + copy * ROWS * D, *own_y = words + AT_Y + copy * ROWS * (C / 2),
              *own_v = words + AT_V + copy * ROWS * (C / 2), *own_totals = words + AT_TOTALS + copy * ROWS * P;
    const float eps = (float)a.eps;
    constexpr int XV = (D + THREADS - 1) / THREADS, YV = (C / 2 + THREADS - 1) / THREADS, TWO = ROWS < 2 ? 1 : 2;
    // who does what: channels, outputs of x_proj, states, outputs of out_proj
    const bool convolves = tid < CC * ROWS;
    const int c_row = tid / CC, c_at = tid % CC;
    const bool narrows = block * RX < P;
    const int n_row = tid / RX, n_at = tid % RX;
    const bool scans = tid < 8 * CC;
    const int s_at = tid / 8, s_lane = tid % 8;
    const bool leaves = tid < DO * ROWS;
    const int o_row = tid / DO, o_at = tid % DO;
    float mine = 0.0f;  // the residual stream at this thread's output
    if (leaves) {
        i64 at = (i64)o_row * D + block * DO + o_at;
        mine = XBF ? from_bits(((const bf16*)a.x)[at].bits) : ((const float*)a.x)[at];
    }
    u32 past[TAPS];
    auto remember = [&](const Layer& layer) {
        if (convolves)
            UNROLL for (int j = 0; j < TAPS; j++)
                past[j] = layer.conv[((i64)c_row * C + block * CC + c_at) * TAPS + j].bits;
    };
    remember(a.layer[0]);
    // numbers two by two, from all blocks to the rows of `wide`
    auto widen = [&](const u64* at, u32 flag) {
        UNROLL for (int q = 0; q < ROWS; q += TWO) {
            u32 found[TWO * YV];
            auto column = [&](int i) { return tid + i % YV * THREADS; };
            auto real = [&](int i) { return column(i) < C / 2 && q + i / YV < ROWS; };
            gather(found, at, [&](int i) { return real(i) ? (q + i / YV) * (C / 2) + column(i) : -1; }, flag);
            UNROLL for (int i = 0; i < TWO * YV; i++)
                if (real(i)) *(u32*)(wide + (q + i / YV) * STRIDE_Y + 4 * column(i)) = found[i];
        }
    };

    for (int l = 0; l < layers; l++) {
        const Layer& layer = a.layer[l];
        u32 flag = epoch + 1 + l;
        // the norm of x, which all blocks made
        float x[ROWS][XV];
        UNROLL for (int q = 0; q < ROWS; q += TWO) {
            u32 found[TWO * XV];
            auto column = [&](int i) { return tid + i % XV * THREADS; };
            auto real = [&](int i) { return column(i) < D && q + i / XV < ROWS; };
            if (l == 0) {
                UNROLL for (int i = 0; i < TWO * XV; i++) {
                    i64 at = (i64)(q + i / XV) * D + column(i);
                    float v = 0.0f;
                    if (real(i)) v = XBF ? from_bits(((const bf16*)a.x)[at].bits) : ((const float*)a.x)[at];
                    found[i] = __float_as_uint(v);
                }
            } else {
                gather(found, own_x, [&](int i) { return real(i) ? (q + i / XV) * D + column(i) : -1; }, flag - 1);
            }
            UNROLL for (int i = 0; i < TWO * XV; i++)
                if (q + i / XV < ROWS) x[q + i / XV][i % XV] = __uint_as_float(found[i]);
        }
        if (LAYERNORM) {
            UNROLL for (int r = 0; r < ROWS; r++) {
                float s = 0.0f;
                UNROLL for (int i = 0; i < XV; i++) s += x[r][i];
                s = sum_of_warp(s);
                if (lane == 0) norms[(ROWS + r) * WARPS + warp] = s;
            }
            BARRIER();
            UNROLL for (int r = 0; r < ROWS; r++) {
                float mean = total(norms + (ROWS + r) * WARPS) / D;
                UNROLL for (int i = 0; i < XV; i++)
                    if (tid + i * THREADS < D) x[r][i] -= mean;
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++) {
            float s = 0.0f;
            UNROLL for (int i = 0; i < XV; i++) s += x[r][i] * x[r][i];
            s = sum_of_warp(s);
            if (lane == 0) norms[r * WARPS + warp] = s;
        }
        passed(&small[0], l);
        BARRIER();
        UNROLL for (int r = 0; r < ROWS; r++) {
            float scale = 1.0f / sqrtf(total(norms + r * WARPS) / D + eps);
            UNROLL for (int i = 0; i < XV; i++) {
                int k = tid + i * THREADS;
                if (k >= D) break;
                u32 bits = pack(x[r][i] * scale * weight[k] + (LAYERNORM ? weight[D + k] : 0.0f), 0.0f);
                *(unsigned short*)(factor + r * STRIDE_H + 2 * k) = (unsigned short)bits;
            }
        }
        BARRIER();
        if (l == 0) epoch = *(const u32*)(memory + AT_EPOCH), flag = epoch + 1;
        multiply_all<TI, RI, QI, KI, STRIDE_H>(ring, factor, sums, warp, lane);
        BARRIER();

        // the convolution of the block's channels
        {
            float value = 0.0f;
            if (convolves) {
                u32 fresh = pack(total(sums + (c_at * ROWS + c_row) * SUMS), 0.0f) & 0xffff;
                const float* taps = (const float*)(memory + AT_TAPS) + c_at * (TAPS + 1);
                float s = ((const float*)(memory + AT_SHIFT))[c_at];
                UNROLL for (int j = 0; j < TAPS; j++) s += from_bits(past[j]) * taps[j];
                s += from_bits(fresh) * taps[TAPS];
                value = silu(s);
                inner[c_row * CC + c_at] = value;
                bf16* state = layer.out_conv + ((i64)c_row * C + block * CC + c_at) * TAPS;
                UNROLL for (int j = 0; j < TAPS; j++)
                    state[j].bits = (unsigned short)(j + 1 < TAPS ? past[j + 1 < TAPS ? j + 1 : j] : fresh);
            }
            float other = SWAP(value, 1);
            if (convolves && tid % 2 == 0)
                UNROLL for (int i = 0; i < COPIES; i++)
                    send(words + AT_V + (i * ROWS + c_row) * (C / 2) + (block * CC + c_at) / 2,
                         word(pack(value, other), flag));
        }
        // the first gates, while those are under way, then x_proj of all channels
        multiply_all<EARLY, RI, QI, KI, STRIDE_H>(ring, factor, sums + CC * ROWS * SUMS, warp, lane);
        widen(own_v, flag);
        BARRIER();
        if (narrows) multiply_all<1, RX, 1, C, STRIDE_Y>(ring, wide, low_sums, warp, lane);
        BARRIER();
        if (narrows && tid < RX * ROWS) {
            float s = total(low_sums + (n_at * ROWS + n_row) * SUMS);
            UNROLL for (int i = 0; i < COPIES; i++)
                send(words + AT_TOTALS + (i * ROWS + n_row) * P + block * RX + n_at, word(__float_as_uint(s), flag));
        }
        multiply_all<TI - EARLY, RI, QI, KI, STRIDE_H>(ring, factor, sums + (CC + EARLY * RI) * ROWS * SUMS, warp, lane);
        // delta, the states and the gated output, eight threads a channel; first what needs no x_proj
        BARRIER();
        F2 decay = {{0.0f, 0.0f}}, h[ROWS];
        float open[ROWS], value[ROWS], delta[ROWS], skip = 0.0f;
        UNROLL for (int r = 0; r < ROWS; r++) open[r] = value[r] = delta[r] = 0.0f;
        if (scans) {
            F2 A = ((const F2*)(memory + AT_A))[tid];
            UNROLL for (int j = 0; j < 2; j++) decay.v[j] = -expf(A.v[j]);
            skip = ((const float*)(memory + AT_SKIP))[s_at];
            UNROLL for (int r = 0; r < ROWS; r++) {
                h[r] = ((const F2*)(memory + AT_STATE))[r * CC * N / 2 + tid];
                open[r] = silu(total(sums + ((CC + s_at) * ROWS + r) * SUMS));
                value[r] = inner[r * CC + s_at];
                delta[r] = s_lane == 0 ? ((const float*)(memory + AT_BIAS))[s_at] : 0.0f;
            }
        }
        {
            constexpr int V = (P * ROWS + THREADS - 1) / THREADS;
            u32 found[V];
            auto at = [&](int i) { return tid + i * THREADS < P * ROWS ? tid + i * THREADS : -1; };
            gather(found, own_totals, at, flag);
            UNROLL for (int i = 0; i < V; i++)
                if (at(i) >= 0) low[at(i)] = __uint_as_float(found[i]);
        }
        BARRIER();
        passed(&ring.full[ring.slot], ring.round);
        if (scans) {
            const char* at = ring.memory + ring.slot * SLOT + 2 * s_at * R;
            UNROLL for (int v = 0; v < (R / 8 + 7) / 8; v++) {
                int k = v * 64 + s_lane * 8;
                if (k < R) {
                    U4 w = *(const U4*)(at + 2 * k);
                    UNROLL for (int r = 0; r < ROWS; r++) UNROLL for (int j = 0; j < 4; j++) {
                        F2 f = *(const F2*)(low + r * P + k + 2 * j);
                        delta[r] += low_half(w.v[j]) * f.v[0];
                        delta[r] += high_half(w.v[j]) * f.v[1];
                    }
                }
            }
        }
        done_reading();
        WARP_BARRIER();
        if (lane == 0) arrive(&ring.empty[ring.slot]), arrive(&small[1]);
        ring.next();
        UNROLL for (int r = 0; r < ROWS; r++) {
            float y = 0.0f;
            UNROLL for (int mask = 4; mask; mask /= 2) delta[r] += SWAP(delta[r], mask);
            if (scans) {
                float d = softplus(delta[r]);
                const float* B = low + r * P + R + 2 * s_lane;
                UNROLL for (int j = 0; j < 2; j++) {
                    h[r].v[j] = expf(d * decay.v[j]) * h[r].v[j] + d * value[r] * B[j];
                    y += h[r].v[j] * B[N + j];
                }
            }
            UNROLL for (int mask = 4; mask; mask /= 2) y += SWAP(y, mask);
            y = (y + skip * value[r]) * open[r];
            float other = SWAP(y, 8);
            if (scans && lane % 16 < COPIES)
                send(words + AT_Y + (s_lane * ROWS + r) * (C / 2) + (block * CC + s_at) / 2, word(pack(y, other), flag));
        }
        if (scans) {
            UNROLL for (int r = 0; r < ROWS; r++)
                *(F2*)(layer.out_ssm + ((i64)r * C + block * CC + s_at) * N + 2 * s_lane) = h[r];
        }
        if (l + 1 < layers) remember(a.layer[l + 1]);
        widen(own_y, flag);
        BARRIER();
        multiply_all<TO, RO, QO, KO, STRIDE_Y>(ring, wide, sums, warp, lane);
        BARRIER();
        if (leaves) {
            mine += total(sums + (o_at * ROWS + o_row) * SUMS);
            if (XBF) mine = rounded(mine);
            int k = block * DO + o_at;
            if (l + 1 < layers) {
                UNROLL for (int i = 0; i < COPIES; i++)
                    send(words + AT_X + (i * ROWS + o_row) * D + k, word(__float_as_uint(mine), flag));
            } else if (XBF) {
                ((bf16*)a.out)[(i64)o_row * D + k].bits = (unsigned short)pack(mine, 0.0f);
            } else {
                ((float*)a.out)[(i64)o_row * D + k] = mine;
            }
        }
    }
    // every block has read the epoch: this one could not have come so far otherwise
    if (block == 0 && tid == 0) send(words, epoch + layers);
}
