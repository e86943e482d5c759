// One token through Mamba sub-layers, x + mixer(norm(x)) for up to 64 rows, all layers in one launch.
//
// G clusters of CS blocks stay on the GPU. A cluster owns C / G channels; its blocks share every sum over terms
// (K): each multiplies its slice of the terms, then each adds up all slices for the channels that it owns, from the
// others' shared memory. Weights go from memory straight to the registers of the matrix products, those of the next
// product before the grid waits for the last one's results. Three waits of the whole grid a layer: after x_proj,
// after the scan, after out_proj. The order of every sum is fixed and no sum depends on the number of rows.
//
// Compiled at run time; step_cuda.py sets the macros D C R N TAPS NT CS G KI KO XBF MAXL. NT: rows / 8. KI, KO: parts
// in which a block's warps share its terms of in_proj and out_proj. XBF: x is bfloat16. MAXL: layers a launch.

typedef unsigned u32;
typedef long long i64;
typedef unsigned long long u64;
struct bf16 {
    unsigned short bits;
};
struct alignas(16) U4 {
    u32 v[4];
};
struct alignas(16) F4 {
    float v[4];
};
struct alignas(8) F2 {
    float v[2];
};
struct alignas(8) U2 {
    u32 v[2];
};

#ifndef EMULATED
#define BARRIER() __syncthreads()
// the compiler forgets what it knows of an integer: places are computed anew rather than kept in registers
#define FORGET(i) asm volatile("" : "+r"(i))
#define SHARED_MEMORY(name) extern __shared__ float4 name##_[]; char* name = reinterpret_cast<char*>(name##_)
#define WARP_BARRIER() __syncwarp()
#define SWAP(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
__device__ __forceinline__ u32 rank_in_cluster() {
    u32 r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 shared_address(const void* p) {
    u32 a;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(a) : "l"(p));
    return a;
}
__device__ __forceinline__ u32 of_rank(u32 address, u32 rank) {
    u32 a;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(address), "r"(rank));
    return a;
}
// what another block of the cluster has at p of its shared memory
__device__ __forceinline__ F4 far4(const float* p, u32 rank) {
    F4 f;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3])
                 : "r"(of_rank(shared_address(p), rank)) : "memory");
    return f;
}
__device__ __forceinline__ float far1(const float* p, u32 rank) {
    float f;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(f) : "r"(of_rank(shared_address(p), rank)) : "memory");
    return f;
}
__device__ __forceinline__ U2 far_bytes8(const void* p, u32 rank) {
    U2 f;
    asm volatile("ld.shared::cluster.v2.b32 {%0, %1}, [%2];"
                 : "=r"(f.v[0]), "=r"(f.v[1]) : "r"(of_rank(shared_address(p), rank)) : "memory");
    return f;
}
// weights: read once, never written here; zeros where not live
__device__ __forceinline__ void weights16(u32* to, const void* at, bool live) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;"
                 " @p ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(at), "r"((u32)live));
}
// what other blocks wrote: from L2
__device__ __forceinline__ F4 common4(const float* at) {
    F4 f;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(f.v[0]), "=f"(f.v[1]), "=f"(f.v[2]), "=f"(f.v[3]) : "l"(at) : "memory");
    return f;
}
__device__ __forceinline__ U2 common8(const void* at) {
    U2 f;
    asm volatile("ld.global.cg.v2.b32 {%0, %1}, [%2];" : "=r"(f.v[0]), "=r"(f.v[1]) : "l"(at) : "memory");
    return f;
}
__device__ __forceinline__ float common1(const float* at) {
    float f;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(f) : "l"(at) : "memory");
    return f;
}
__device__ __forceinline__ unsigned short common_half(const void* at) {
    unsigned short f;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(f) : "l"(at) : "memory");
    return f;
}
template <int BYTES>
__device__ __forceinline__ void copy_later(void* to, const void* from, bool live) {
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(live ? 16 : 0) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from),
                     "r"(live ? BYTES : 0), "n"(BYTES) : "memory");
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// d += a b: 16 x 16 by 16 x 8
__device__ __forceinline__ void multiply(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                 " {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// a kernel that was started early: what earlier kernels wrote is there; the next one may start early
__device__ __forceinline__ void after_earlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void arrive(u32* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ u32 arrive_last(u32* counter) { return atomicAdd(counter, 1u); }
__device__ __forceinline__ void await(const u32* counter, u32 target) {
    u32 seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < target);
}
// two numbers in bfloat16, to the nearest
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
// Copies by the engine: `expect` on a barrier how many bytes come, then the copies, each of whole 16 bytes; `arrived`
// waits for them. round: of this barrier, from 0.
__device__ __forceinline__ void open_barrier(u64* barrier) {
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_by_engine(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void store_by_engine(void* to, const void* from, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;"
                 ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
}
// what this thread wrote to shared memory is there for the engine, after the next barrier
__device__ __forceinline__ void before_engine() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// the engine has read what this thread asked it to store
__device__ __forceinline__ void wait_stores() {
    asm volatile("cp.async.bulk.commit_group;\n cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void arrived(u64* barrier, u32 round) {
    asm volatile("{ .reg .pred p;\n WAIT%=: mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n @!p bra WAIT%=;\n }"
                 ::"r"(shared_address(barrier)), "r"(round & 1) : "memory");
}
__device__ __forceinline__ float exp2_fast(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
#endif

#define UNROLL _Pragma("unroll")

#ifndef WARPS
#define WARPS 8
#endif
constexpr int ROWS = 8 * NT, THREADS = 32 * WARPS;

// bfloat16 numbers from row to row: half of the banks further, so that 16-byte reads of 8 rows meet no bank twice
__device__ constexpr int stride_of(int k) { return (2 * k) % 128 == 64 ? k : k + 32; }
__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int up16(int a) { return (a + 15) / 16 * 16; }

__device__ __forceinline__ bf16 to_bf16(float v) { return bf16{(unsigned short)pack(v, 0.0f)}; }
__device__ __forceinline__ float from_bits(u32 b) { return __uint_as_float(b << 16); }
__device__ __forceinline__ float from_bf16(bf16 b) { return from_bits(b.bits); }
// sums [output][row]: eight rows together move with the output, so that stores of a tile meet no bank twice
__device__ __forceinline__ int place(int output, int row) {
    return output * ROWS + (row ^ ((output & (NT < 4 ? NT - 1 : 3)) << 3));
}

__device__ __forceinline__ void keep(float* sums, int output, int lane, float (&s)[NT][4]) {
    int g = output + lane / 4, t = 2 * (lane % 4);
    UNROLL for (int j = 0; j < NT; j++) {
        *reinterpret_cast<F2*>(sums + place(g, 8 * j + t)) = F2{{s[j][0], s[j][1]}};
        *reinterpret_cast<F2*>(sums + place(g + 8, 8 * j + t)) = F2{{s[j][2], s[j][3]}};
    }
}
// the sums of four rows over the cluster's slices
template <int PARTS, int OUTPUTS>
__device__ __forceinline__ F4 total(const float* sums, int output, int row, int rank) {
    F4 all = {{0.0f, 0.0f, 0.0f, 0.0f}};
    // from the block itself on, so that no block is read by all the others at a time
    UNROLL for (int r = 0; r < CS; r++)
        UNROLL for (int part = 0; part < PARTS; part++) {
            F4 f = far4(sums + part * OUTPUTS * ROWS + place(output, row), (rank + r) % CS);
            UNROLL for (int i = 0; i < 4; i++) all.v[i] += f.v[i];
        }
    return all;
}
// A product of ROWS rows: UNITS units of 16 outputs and STEPS x 32 terms, dealt out to the warps in turn. A warp
// holds the weights of AHEAD units in registers, of long units the next HELD_STEPS steps: `fill` asks for the first.
__device__ constexpr int held_steps(int steps) {
    for (int w = 10; w > 1; w--)
        if (steps % w == 0) return w;
    return 1;
}
template <int UNITS, int STEPS>
struct Product {
    static constexpr int ROUNDS = (UNITS + WARPS - 1) / WARPS;
    static constexpr int HELD_STEPS = held_steps(STEPS);
    static constexpr int FIT = STEPS >= 10 ? 1 : 10 / STEPS;
    static constexpr int AHEAD = ROUNDS < FIT ? ROUNDS : FIT;
    u32 w[AHEAD][HELD_STEPS][8];
    // at(unit): the first term of this lane's weights of a unit; ld: terms from an output to the next
    template <class At>
    __device__ __forceinline__ void ask(int slot, int unit, int step, At at, i64 ld) {
        const bf16* p = at(unit) + 32 * step;
        bool live = unit < UNITS;
        weights16(&w[slot][step % HELD_STEPS][0], p, live);
        weights16(&w[slot][step % HELD_STEPS][4], p + 8 * ld, live);
    }
    template <class At>
    __device__ __forceinline__ void fill(int warp, At at, i64 ld) {
        UNROLL for (int a = 0; a < AHEAD; a++)
            UNROLL for (int s = 0; s < HELD_STEPS; s++) ask(a, warp + a * WARPS, s, at, ld);
    }
    // factor(unit): this lane's 16 bytes of row 0 and step 0; done(unit, sums)
    template <class At, class Factor, class Done>
    __device__ __forceinline__ void run(int warp, At at, i64 ld, int stride, Factor factor, Done done) {
        for (int round = 0; round < ROUNDS; round += AHEAD) {
            UNROLL for (int a = 0; a < AHEAD; a++) {
                int unit = warp + (round + a) * WARPS;
                if (unit < UNITS) {
                    float sums[NT][4];
                    UNROLL for (int j = 0; j < NT; j++) UNROLL for (int i = 0; i < 4; i++) sums[j][i] = 0.0f;
                    const bf16* rows = factor(unit);
                    UNROLL for (int s = 0; s < STEPS; s++) {
                        u32* f = w[a][s % HELD_STEPS];
                        UNROLL for (int j = 0; j < NT; j++) {
                            U4 b = *reinterpret_cast<const U4*>(rows + 8 * j * stride + 32 * s);
                            multiply(sums[j], f[0], f[4], f[1], f[5], b.v[0], b.v[1]);
                            multiply(sums[j], f[2], f[6], f[3], f[7], b.v[2], b.v[3]);
                        }
                        if (s + HELD_STEPS < STEPS)
                            ask(a, unit, s + HELD_STEPS, at, ld);
                        else if (round + AHEAD < ROUNDS)
                            ask(a, unit + AHEAD * WARPS, s + HELD_STEPS - STEPS, at, ld);
                    }
                    done(unit, sums);
                }
            }
        }
    }
};

#ifdef PRODUCT
// out = a w^T (+ residual) of a layer's wide products. CS blocks share the terms, and every warp has 16 of the outputs
// of its cluster, whose weights it asks for before it waits for the kernel that makes a. Macros: TERMS, WIDTH,
// RESIDUAL, XBF (the residual and the output are bfloat16), NT, CS, WARPS, PER_SM.
constexpr int SLICE = TERMS / CS, CLUSTER = 16 * WARPS, OWN = CLUSTER / CS;
constexpr int A_STRIDE = stride_of(SLICE), O_STRIDE = OWN + 8;
constexpr int AT_SUMS = 0;                                   // float [CLUSTER][ROWS], where the factor was
constexpr int AT_TOTAL = up16(4 * CLUSTER * ROWS);           // float [ROWS][O_STRIDE]
constexpr int END = larger(2 * ROWS * A_STRIDE, AT_TOTAL + 4 * ROWS * O_STRIDE);
static_assert(WIDTH % CLUSTER == 0 && TERMS % (32 * CS) == 0 && CLUSTER % CS == 0 && OWN % 4 == 0, "whole tiles");
struct Arguments {
    const bf16* a;
    const bf16* w;
    const void* residual;
    void* out;
    i64 rows;
};
extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) product(const __grid_constant__ Arguments a) {
    SHARED_MEMORY(memory);
    int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, rank = rank_in_cluster(), rows = (int)a.rows;
    int first = blockIdx.x / CS * CLUSTER;
    bf16* factor = reinterpret_cast<bf16*>(memory);
    float* sums = reinterpret_cast<float*>(memory);
    float* all = reinterpret_cast<float*>(memory + AT_TOTAL);
    auto weights = [&](int unit) {
        return a.w + (i64)(first + 16 * unit + lane / 4) * TERMS + rank * SLICE + 8 * (lane % 4);
    };
    Product<WARPS, SLICE / 32> p;
    p.fill(warp, weights, TERMS);
    after_earlier();
    for (int i = tid; i < ROWS * (SLICE / 8); i += THREADS) {
        int row = i / (SLICE / 8), e = i % (SLICE / 8);
        bool live = row < rows;
        copy_later<16>(factor + row * A_STRIDE + 8 * e, a.a + (i64)(live ? row : 0) * TERMS + rank * SLICE + 8 * e, live);
    }
    wait_copies();
    BARRIER();
    let_next();
    float s[NT][4];
    p.run(
        warp, weights, TERMS, A_STRIDE, [&](int) { return factor + lane / 4 * A_STRIDE + 8 * (lane % 4); },
        [&](int, float(&found)[NT][4]) {
            UNROLL for (int j = 0; j < NT; j++) UNROLL for (int i = 0; i < 4; i++) s[j][i] = found[j][i];
        });
    BARRIER();
    keep(sums, 16 * warp, lane, s);
    cluster_barrier();
    for (int i = tid; i < OWN * (ROWS / 4); i += THREADS) {
        int row = i % (ROWS / 4) * 4, o = i / (ROWS / 4);
        F4 f = total<1, CLUSTER>(sums, rank * OWN + o, row, rank);
        UNROLL for (int k = 0; k < 4; k++) all[(row + k) * O_STRIDE + o] = f.v[k];
    }
    // what others read of this block is read
    cluster_barrier();
    for (int i = tid; i < rows * (OWN / 4); i += THREADS) {
        int row = i / (OWN / 4), o = i % (OWN / 4) * 4;
        F4 f = *reinterpret_cast<const F4*>(all + row * O_STRIDE + o);
        i64 cell = (i64)row * WIDTH + first + rank * OWN + o;
        if (RESIDUAL && XBF) {
            U2 u = common8((const bf16*)a.residual + cell);
            UNROLL for (int k = 0; k < 4; k++) f.v[k] += from_bits(u.v[k / 2] >> 16 * (k % 2) & 0xffff);
        } else if (RESIDUAL) {
            F4 u = common4((const float*)a.residual + cell);
            UNROLL for (int k = 0; k < 4; k++) f.v[k] += u.v[k];
        }
        if (XBF)
            *reinterpret_cast<U2*>((bf16*)a.out + cell) = U2{{pack(f.v[0], f.v[1]), pack(f.v[2], f.v[3])}};
        else
            *reinterpret_cast<F4*>((float*)a.out + cell) = f;
    }
}
#else
constexpr int P = R + 2 * N;
constexpr int CH = C / G, CC = CH / CS;          // channels of a cluster, of a block
constexpr int DG = D / G, DO = DG / CS;          // outputs of a cluster, of a block
constexpr int K1 = D / CS, K3 = C / CS;          // terms of in_proj, of out_proj a block
constexpr int CHUNK = 8, CHUNKS = NT;  // rows of states that are copied together
constexpr int HELD = SLOTS < CHUNKS ? SLOTS : CHUNKS;
constexpr int CONV_STRIDE = CC * TAPS + 2, MINE_STRIDE = CC + 4, COLUMN = ROWS + 1;
constexpr int PS = (P / 2 + CS - 1) / CS * 2, PT = (PS + 15) / 16;  // outputs of x_proj a block, tiles of 16 of them
constexpr int XK = PT >= 8 ? 1 : 8 / PT;         // parts of x_proj's terms
constexpr int XSTEPS = (CH / 32 + XK - 1) / XK;
constexpr int RP = (R + 31) / 32 * 32, PAD = RP > R ? RP - R : 1, DT = (CC + 15) / 16;
constexpr float LOG2E = 1.4426950408889634f;

static_assert(N == 16 && R % 8 == 0 && TAPS >= 1, "the scan's lanes hold four states each");
static_assert(C % (32 * G) == 0 && CH % CS == 0 && CC % 4 == 0 && P % 2 == 0 && PS % 2 == 0, "channels");
static_assert(!WHOLE || D % (16 * G) == 0 && DG % CS == 0, "outputs");
static_assert(!WHOLE || D % (32 * CS) == 0 && C % (32 * CS) == 0 && (K1 / 32) % KI == 0 && (K3 / 32) % KO == 0,
              "terms");
static_assert(CHUNK * CC % (THREADS / 4) == 0, "whole passes of the scan");
static_assert(WARPS == 8 && PT <= WARPS, "a warp has one tile of x_proj");

constexpr int H_STRIDE = stride_of(K1), Y_STRIDE = stride_of(K3), X_STRIDE = stride_of(CH), L_STRIDE = stride_of(RP);

// Shared memory, bytes. First what a layer needs from the start:
constexpr int AT_ARRIVED = 0;                                          // u64 [HELD], barriers
constexpr int AT_CONV = up16(AT_ARRIVED + 8 * HELD);                   // bf16 [ROWS][CONV_STRIDE]
constexpr int AT_TAPS = up16(AT_CONV + 2 * ROWS * CONV_STRIDE);        // float [CC][TAPS + 1]
constexpr int AT_SHIFT = up16(AT_TAPS + 4 * CC * (TAPS + 1));          // float [CC] each
constexpr int AT_SKIP = up16(AT_SHIFT + 4 * CC);
constexpr int AT_BIAS = up16(AT_SKIP + 4 * CC);
constexpr int AT_A = up16(AT_BIAS + 4 * CC);                           // float [CC][N]
constexpr int AT_NORM = up16(AT_A + 4 * CC * N);                       // float [K1]
constexpr int AT_SQUARES = up16(AT_NORM + (WHOLE ? 4 * K1 : 0));       // float [ROWS], sums of squares of the slice
constexpr int AT_STATE = up16(AT_SQUARES + 4 * ROWS);                  // float [HELD][CHUNK][CC][N]
// The norm's slice, bf16 [ROWS][H_STRIDE]; after in_proj the block's own channels:
constexpr int AT_H = up16(AT_STATE + 4 * HELD * CHUNK * CC * N);
constexpr int AT_INNER = AT_H;                                         // float [CC][COLUMN]
constexpr int AT_GATE = up16(AT_INNER + 4 * CC * COLUMN);              // float [CC][COLUMN]
constexpr int AT_MINE = up16(AT_GATE + 4 * CC * COLUMN);               // bf16 [ROWS][MINE_STRIDE]
constexpr int AT_WIDEN = up16(AT_MINE + 2 * ROWS * MINE_STRIDE);       // bf16 [CC][L_STRIDE], delta_proj
constexpr int AT_SUMS = up16(larger(AT_H + (WHOLE ? 2 * ROWS * H_STRIDE : 0), AT_WIDEN + 2 * CC * L_STRIDE));
// in_proj's sums, float [KI][2 CH][ROWS]; then the cluster's channels; then x_proj's sums:
constexpr int AT_ALL = AT_SUMS;                                        // bf16 [ROWS][X_STRIDE]
constexpr int AT_LOWSUMS = AT_SUMS;                                    // float [XK][16 PT][ROWS]
// and after the grid's wait:
constexpr int AT_SLICE = AT_SUMS;                                      // float [ROWS][PS], read by the cluster
constexpr int AT_LOW = up16(AT_SLICE + 4 * PS * ROWS);                 // bf16 [ROWS][L_STRIDE]
constexpr int AT_BC = up16(AT_LOW + 2 * ROWS * L_STRIDE);              // float [ROWS][2 N]
constexpr int AT_DELTA = up16(AT_BC + 8 * ROWS * N);                   // float [CC][COLUMN]
// out_proj: its factor bf16 [ROWS][Y_STRIDE], its sums float [KO][DG][ROWS]
constexpr int AT_Y = AT_H;
constexpr int AT_OUT = up16(AT_Y + 2 * ROWS * Y_STRIDE);
constexpr int MIDDLE = larger(larger(AT_LOWSUMS + 64 * XK * PT * ROWS, AT_ALL + 2 * ROWS * X_STRIDE),
                              AT_DELTA + 4 * CC * COLUMN);
constexpr int END = WHOLE ? larger(MIDDLE, larger(AT_SUMS + 8 * KI * CH * ROWS, AT_OUT + 4 * KO * DG * ROWS)) : MIDDLE;

struct Layer {
    const float* norm;
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
    float* parts;   // [G][P][ROWS]
    bf16* y;        // [ROWS][C]
    u32* counter;
    i64 rows;
    i64 layers;
    double eps;
    Layer layer[MAXL];
};

__device__ __forceinline__ float silu(float v) { return v / (1.0f + exp2_fast(-v * LOG2E)); }
__device__ __forceinline__ float softplus(float v) { return fmaxf(v, 0.0f) + log1pf(expf(-fabsf(v))); }
#if WHOLE
using In = Product<2 * CH / 16 * KI, K1 / 32 / KI>;
using Out = Product<DG / 16 * KO, K3 / 32 / KO>;
#endif

constexpr int OUTS = (ROWS / 4 * DO + THREADS - 1) / THREADS;  // groups of four rows of an output a thread
static_assert(CHUNKS % HELD == 0 && (!WHOLE || CHUNKS == HELD), "every barrier is used as often as round says");

// One block of the grid between two waits; `turn` counts the grid's waits.
struct Block {
    char* memory;
    const Arguments& a;
    int tid, warp, lane, rank, cluster, rows;
    u32 target;

    // no place is kept in a register from one part of a layer to the next
    __device__ __forceinline__ void forget() {
        FORGET(tid);
        FORGET(warp);
        FORGET(lane);
        FORGET(rank);
        FORGET(cluster);
    }
    template <class T>
    __device__ __forceinline__ T* at(int offset) const { return reinterpret_cast<T*>(memory + offset); }

    // what every thread of the block wrote will be seen by whoever waits
    __device__ __forceinline__ void tell() {
        BARRIER();
        if (tid == 0) arrive(a.counter);
        target += G * CS;
    }
    __device__ __forceinline__ void listen() {
        if (tid == 0) await(a.counter, target);
        BARRIER();
    }
    // the states of CHUNK rows; no block reads what they replace
    __device__ __forceinline__ void ask_states(const Layer& l, int chunk) {
        if (warp == WARPS - 1) {
            int first = chunk * CHUNK, live = rows - first < CHUNK ? rows - first : CHUNK;
            u64* barrier = at<u64>(AT_ARRIVED) + chunk % HELD;
            constexpr int BYTES = 4 * CC * N;
            if (live > 0) {
                if (lane == 0) expect(barrier, live * BYTES);
                WARP_BARRIER();
                if (lane < live)
                    copy_by_engine(at<char>(AT_STATE) + (chunk % HELD * CHUNK + lane) * BYTES,
                                   l.ssm + ((i64)(first + lane) * C + cluster * CH + rank * CC) * N, BYTES, barrier);
            }
        }
    }
    __device__ __forceinline__ void ask_all_states(const Layer& l) {
        for (int chunk = 0; chunk < HELD; chunk++) ask_states(l, chunk);
    }
    // copies of what a layer needs and no activation decides; there after wait_copies and a barrier
    __device__ __forceinline__ void stage(const Layer& l) {
        int c0 = cluster * CH + rank * CC;
        constexpr int PAIRS = CC * TAPS / 2;
        for (int i = tid; i < ROWS * PAIRS; i += THREADS) {
            int row = i / PAIRS, e = i % PAIRS;
            bool live = row < rows;
            copy_later<4>(at<bf16>(AT_CONV) + row * CONV_STRIDE + 2 * e,
                          l.conv + ((i64)(live ? row : 0) * C + c0) * TAPS + 2 * e, live);
        }
        if (WHOLE)
            for (int i = tid; i < K1 / 4; i += THREADS)
                copy_later<16>(at<float>(AT_NORM) + 4 * i, l.norm + rank * K1 + 4 * i, true);
        for (int i = tid; i < CC * (TAPS + 1); i += THREADS)
            copy_later<4>(at<float>(AT_TAPS) + i, l.taps + c0 * (TAPS + 1) + i, true);
        for (int i = tid; i < CC; i += THREADS) {
            copy_later<4>(at<float>(AT_SHIFT) + i, l.shift + c0 + i, true);
            copy_later<4>(at<float>(AT_SKIP) + i, l.skip + c0 + i, true);
            copy_later<4>(at<float>(AT_BIAS) + i, l.bias + c0 + i, true);
        }
        for (int i = tid; i < CC * N / 4; i += THREADS)
            copy_later<16>(at<float>(AT_A) + 4 * i, l.A_log + (i64)c0 * N + 4 * i, true);
    }
    __device__ __forceinline__ const bf16* in_weights(const Layer& l, int unit) const {
        int tile = unit / KI, part = unit % KI, half = tile / (CH / 16), i = tile % (CH / 16);
        if (unit >= 2 * CH / 16 * KI) return l.in_proj;
        i64 output = (i64)half * C + cluster * CH + 16 * i + lane / 4;
        return l.in_proj + output * D + rank * K1 + part * (K1 / KI) + 8 * (lane % 4);
    }
    __device__ __forceinline__ const bf16* out_weights(const Layer& l, int unit) const {
        int tile = unit / KO, part = unit % KO;
        if (unit >= DG / 16 * KO) return l.out_proj;
        i64 output = cluster * DG + 16 * tile + lane / 4;
        return l.out_proj + output * C + rank * K3 + part * (K3 / KO) + 8 * (lane % 4);
    }
    // x times the norm's weight in bfloat16, and the squares' sums: the scale itself waits for the cluster
    __device__ __forceinline__ F4 residual4(const void* x, i64 from, bool live) const {
        F4 v = {{0.0f, 0.0f, 0.0f, 0.0f}};
        if (live && XBF) {
            U2 u = common8((const bf16*)x + from);
            v = F4{{from_bits(u.v[0] & 0xffff), from_bits(u.v[0] >> 16), from_bits(u.v[1] & 0xffff),
                    from_bits(u.v[1] >> 16)}};
        } else if (live) {
            v = common4((const float*)x + from);
        }
        return v;
    }
    __device__ __forceinline__ void norm(const void* x) {
        bf16* h = at<bf16>(AT_H);
        constexpr int EACH = (K1 / 4 + 31) / 32, ONCE = NT * EACH <= 12 ? NT : 12 / EACH > 0 ? 12 / EACH : 1;
        for (int begin = 0; begin < NT; begin += ONCE) {
            F4 v[ONCE][EACH];
            UNROLL for (int i = 0; i < ONCE; i++)
                UNROLL for (int q = 0; q < EACH; q++) {
                    int k = 4 * (32 * q + lane), row = (begin + i) * WARPS + warp;
                    v[i][q] = residual4(x, (i64)row * D + rank * K1 + k, row < rows && k < K1);
                }
            if (begin == 0) {
                wait_copies();
                BARRIER();
            }
            UNROLL for (int i = 0; i < ONCE; i++) {
                int row = (begin + i) * WARPS + warp;
                float squares = 0.0f;
                UNROLL for (int q = 0; q < EACH; q++) {
                    int k = 4 * (32 * q + lane);
                    const float* f = v[i][q].v;
                    const float* g = at<float>(AT_NORM) + (k < K1 ? k : 0);
                    UNROLL for (int j = 0; j < 4; j++) squares += f[j] * f[j];
                    U2 b = {{pack(f[0] * g[0], f[1] * g[1]), pack(f[2] * g[2], f[3] * g[3])}};
                    if (row < ROWS && k < K1) *reinterpret_cast<U2*>(h + row * H_STRIDE + k) = b;
                }
                UNROLL for (int m = 16; m; m /= 2) squares += SWAP(squares, m);
                if (row < ROWS && lane == 0) at<float>(AT_SQUARES)[row] = squares;
            }
        }
    }
    // one channel of a row: the convolution and its new state, in place in shared memory
    __device__ __forceinline__ void convolve(int c, int row, float value) {
        // the state keeps bfloat16, so the convolution uses what it will read there later
        bf16 fresh = to_bf16(value);
        const float* tap = at<float>(AT_TAPS) + c * (TAPS + 1);
        bf16* past = at<bf16>(AT_CONV) + row * CONV_STRIDE + c * TAPS;
        float sum = at<float>(AT_SHIFT)[c] + from_bf16(fresh) * tap[TAPS];
        UNROLL for (int j = 0; j < TAPS; j++) sum += from_bf16(past[j]) * tap[j];
        UNROLL for (int j = 0; j + 1 < TAPS; j++) past[j] = past[j + 1];
        past[TAPS - 1] = fresh;
        float inner = silu(sum);
        at<float>(AT_INNER)[c * COLUMN + row] = inner;
        at<bf16>(AT_MINE)[row * MINE_STRIDE + c] = to_bf16(inner);
    }
    // the block's own channels from in_proj's sums
    __device__ __forceinline__ void own() {
        const float* sums = at<float>(AT_SUMS);
        // a thread's rows are the same in every turn
        int row = tid % (ROWS / 4) * 4;
        float scale[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        UNROLL for (int r = 0; r < CS; r++) {
            F4 f = far4(at<float>(AT_SQUARES) + row, (rank + r) % CS);
            UNROLL for (int k = 0; k < 4; k++) scale[k] += f.v[k];
        }
        UNROLL for (int k = 0; k < 4; k++) scale[k] = 1.0f / sqrtf(scale[k] / D + (float)a.eps);
        for (int i = tid; i < 2 * CC * (ROWS / 4); i += THREADS) {
            int c = i / (ROWS / 4);
            bool gate = c >= CC;
            c -= gate ? CC : 0;
            F4 v = total<KI, 2 * CH>(sums, (gate ? CH : 0) + rank * CC + c, row, rank);
            UNROLL for (int k = 0; k < 4; k++) {
                if (gate)
                    at<float>(AT_GATE)[c * COLUMN + row + k] = v.v[k] * scale[k];
                else
                    convolve(c, row + k, v.v[k] * scale[k]);
            }
        }
    }
    // the same from in_proj's whole output, bf16 (rows, 2 C)
    __device__ __forceinline__ void own(const bf16* mixed) {
        constexpr int ALL = ROWS * CC / 4, EACH = (ALL + THREADS - 1) / THREADS;
        int c0 = cluster * CH + rank * CC;
        U2 x[EACH], z[EACH];
        UNROLL for (int j = 0; j < EACH; j++) {
            int i = j * THREADS + tid, row = i / (CC / 4), c = i % (CC / 4) * 4;
            x[j] = z[j] = U2{{0, 0}};
            if (row < rows) {
                x[j] = common8(mixed + (i64)row * 2 * C + c0 + c);
                z[j] = common8(mixed + (i64)row * 2 * C + C + c0 + c);
            }
        }
        wait_copies();
        BARRIER();
        UNROLL for (int j = 0; j < EACH; j++) {
            int i = j * THREADS + tid, row = i / (CC / 4), c = i % (CC / 4) * 4;
            if (i < ALL)
                UNROLL for (int k = 0; k < 4; k++) {
                    convolve(c + k, row, from_bits(x[j].v[k / 2] >> 16 * (k % 2) & 0xffff));
                    at<float>(AT_GATE)[(c + k) * COLUMN + row] = from_bits(z[j].v[k / 2] >> 16 * (k % 2) & 0xffff);
                }
        }
    }
    __device__ __forceinline__ void write_conv(const Layer& l) {
        constexpr int PAIRS = CC * TAPS / 2;
        int c0 = cluster * CH + rank * CC;
        for (int i = tid; i < rows * PAIRS; i += THREADS) {
            int row = i / PAIRS, e = i % PAIRS;
            *reinterpret_cast<u32*>(l.out_conv + ((i64)row * C + c0) * TAPS + 2 * e) =
                *reinterpret_cast<const u32*>(at<bf16>(AT_CONV) + row * CONV_STRIDE + 2 * e);
        }
    }
    // the cluster's channels, from its blocks
    __device__ __forceinline__ void gather() {
        constexpr int FOURS = CC / 4, ALL = CS * ROWS * FOURS, EACH = (ALL + THREADS - 1) / THREADS;
        constexpr int ONCE = EACH < 10 ? EACH : 10;
        for (int begin = 0; begin < EACH; begin += ONCE) {
            U2 b[ONCE];
            UNROLL for (int k = 0; k < ONCE; k++) {
                int i = (begin + k) * THREADS + tid, r = (rank + i / (ROWS * FOURS)) % CS;
                int row = i / FOURS % ROWS, e = i % FOURS;
                if (i < ALL) b[k] = far_bytes8(at<bf16>(AT_MINE) + row * MINE_STRIDE + 4 * e, r);
            }
            UNROLL for (int k = 0; k < ONCE; k++) {
                int i = (begin + k) * THREADS + tid, r = (rank + i / (ROWS * FOURS)) % CS;
                int row = i / FOURS % ROWS, e = i % FOURS;
                if (i < ALL) *reinterpret_cast<U2*>(at<bf16>(AT_ALL) + row * X_STRIDE + r * CC + 4 * e) = b[k];
            }
        }
    }
    // weights of x_proj: a warp has one tile of outputs and some of the terms
    __device__ __forceinline__ void ask_narrow(const Layer& l, u32 (&w)[XSTEPS][8]) const {
        int tile = warp / XK, part = warp % XK, g = lane / 4;
        UNROLL for (int s = 0; s < XSTEPS; s++) {
            int step = part * XSTEPS + s;
            UNROLL for (int half = 0; half < 2; half++) {
                int p = 16 * tile + g + 8 * half;
                bool live = tile < PT && 32 * step < CH && p < PS && rank * PS + p < P;
                i64 from = (i64)(live ? rank * PS + p : 0) * C + cluster * CH + (live ? 32 * step : 0) + 8 * (lane % 4);
                weights16(&w[s][4 * half], l.x_proj + from, live);
            }
        }
    }
    __device__ __forceinline__ void narrow(u32 (&w)[XSTEPS][8]) {
        int tile = warp / XK, part = warp % XK;
        float s[NT][4];
        UNROLL for (int j = 0; j < NT; j++) UNROLL for (int i = 0; i < 4; i++) s[j][i] = 0.0f;
        if (tile < PT) {
            UNROLL for (int k = 0; k < XSTEPS; k++) {
                int step = part * XSTEPS + k;
                if (32 * step < CH) {
                    const bf16* rows_at = at<bf16>(AT_ALL) + lane / 4 * X_STRIDE + 32 * step + 8 * (lane % 4);
                    UNROLL for (int j = 0; j < NT; j++) {
                        U4 b = *reinterpret_cast<const U4*>(rows_at + 8 * j * X_STRIDE);
                        multiply(s[j], w[k][0], w[k][4], w[k][1], w[k][5], b.v[0], b.v[1]);
                        multiply(s[j], w[k][2], w[k][6], w[k][3], w[k][7], b.v[2], b.v[3]);
                    }
                }
            }
        }
        // the sums lie where the channels were
        BARRIER();
        if (tile < PT) keep(at<float>(AT_LOWSUMS) + part * 16 * PT * ROWS, 16 * tile, lane, s);
        BARRIER();
        for (int i = tid; i < PS * (ROWS / 4); i += THREADS) {
            int p = i / (ROWS / 4), row = i % (ROWS / 4) * 4;
            if (rank * PS + p < P) {
                F4 all = {{0.0f, 0.0f, 0.0f, 0.0f}};
                UNROLL for (int part = 0; part < XK; part++) {
                    F4 f = *reinterpret_cast<const F4*>(at<float>(AT_LOWSUMS) + part * 16 * PT * ROWS + place(p, row));
                    UNROLL for (int k = 0; k < 4; k++) all.v[k] += f.v[k];
                }
                *reinterpret_cast<F4*>(a.parts + ((i64)cluster * P + rank * PS + p) * ROWS + row) = all;
            }
        }
    }
    // x_proj's sums over the clusters, a slice a block
    __device__ __forceinline__ void add_parts() {
        for (int i = tid; i < PS * (ROWS / 4); i += THREADS) {
            int p = i / (ROWS / 4), row = i % (ROWS / 4) * 4;
            F4 all = {{0.0f, 0.0f, 0.0f, 0.0f}};
            if (rank * PS + p < P) {
                constexpr int ONCE = G;
                for (int begin = 0; begin < G; begin += ONCE) {
                    F4 f[ONCE];
                    UNROLL for (int q = 0; q < ONCE; q++)
                        f[q] = common4(a.parts + ((i64)(begin + q) * P + rank * PS + p) * ROWS + row);
                    UNROLL for (int q = 0; q < ONCE; q++) UNROLL for (int k = 0; k < 4; k++) all.v[k] += f[q].v[k];
                }
            }
            UNROLL for (int k = 0; k < 4; k++) at<float>(AT_SLICE)[(row + k) * PS + p] = all.v[k];
        }
        for (int i = tid; i < CC * N; i += THREADS) at<float>(AT_A)[i] = -LOG2E * expf(at<float>(AT_A)[i]);
    }
    // all of x_proj: delta's part in bfloat16, B and C
    __device__ __forceinline__ void spread() {
        constexpr int PAIRS = PS / 2, ALL = CS * ROWS * PAIRS, EACH = (ALL + THREADS - 1) / THREADS;
        constexpr int ONCE = EACH < 12 ? EACH : 12;
        for (int begin = 0; begin < EACH; begin += ONCE) {
            U2 f[ONCE];
            UNROLL for (int j = 0; j < ONCE; j++) {
                int i = (begin + j) * THREADS + tid, r = (rank + i / (ROWS * PAIRS)) % CS;
                int row = i / PAIRS % ROWS, p = i % PAIRS * 2;
                if (i < ALL) f[j] = far_bytes8(at<float>(AT_SLICE) + row * PS + p, r);
            }
            UNROLL for (int j = 0; j < ONCE; j++) {
                int i = (begin + j) * THREADS + tid, r = (rank + i / (ROWS * PAIRS)) % CS;
                int row = i / PAIRS % ROWS, p = r * PS + i % PAIRS * 2;
                if (i < ALL && p < R)
                    *reinterpret_cast<u32*>(at<bf16>(AT_LOW) + row * L_STRIDE + p) =
                        pack(__uint_as_float(f[j].v[0]), __uint_as_float(f[j].v[1]));
                if (i < ALL && p >= R && p < P)
                    *reinterpret_cast<U2*>(at<float>(AT_BC) + row * 2 * N + p - R) = f[j];
            }
        }
        if (RP > R)
            for (int i = tid; i < ROWS * (RP - R); i += THREADS)
                at<bf16>(AT_LOW)[i / PAD * L_STRIDE + R + i % PAD] = bf16{0};
    }
    __device__ __forceinline__ void stage_widen(const Layer& l) {
        int c0 = cluster * CH + rank * CC;
        for (int i = tid; i < CC * (RP / 8); i += THREADS) {
            int c = i / (RP / 8), e = i % (RP / 8);
            bool live = 8 * e < R;
            copy_later<16>(at<bf16>(AT_WIDEN) + c * L_STRIDE + 8 * e,
                           l.delta_proj + (i64)(c0 + c) * R + (live ? 8 * e : 0), live);
        }
    }
    // softplus of delta, for the block's channels
    __device__ __forceinline__ void widen() {
        for (int unit = warp; unit < DT * NT; unit += WARPS) {
            int tile = unit / NT, j = unit % NT, g = lane / 4, t = lane % 4;
            float s[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            UNROLL for (int step = 0; step < RP / 32; step++) {
                U4 u = {{0, 0, 0, 0}}, v = {{0, 0, 0, 0}};
                const bf16* w = at<bf16>(AT_WIDEN) + (16 * tile + g) * L_STRIDE + 32 * step + 8 * t;
                if (16 * tile + g < CC) u = *reinterpret_cast<const U4*>(w);
                if (16 * tile + g + 8 < CC) v = *reinterpret_cast<const U4*>(w + 8 * L_STRIDE);
                U4 b = *reinterpret_cast<const U4*>(at<bf16>(AT_LOW) + (8 * j + g) * L_STRIDE + 32 * step + 8 * t);
                multiply(s, u.v[0], v.v[0], u.v[1], v.v[1], b.v[0], b.v[1]);
                multiply(s, u.v[2], v.v[2], u.v[3], v.v[3], b.v[2], b.v[3]);
            }
            UNROLL for (int i = 0; i < 4; i++) {
                int c = 16 * tile + g + i / 2 * 8, row = 8 * j + 2 * t + i % 2;
                if (c < CC) at<float>(AT_DELTA)[c * COLUMN + row] = softplus(s[i] + at<float>(AT_BIAS)[c]);
            }
        }
    }
    // the rows from `first` on, whose states are at `states`, PASSES x THREADS / 4 cells
    template <int PASSES>
    __device__ __forceinline__ void scan_rows(const Layer& l, int first, float* states) {
        constexpr int BATCH = PASSES < 4 ? PASSES : 4;
        int c0 = cluster * CH + rank * CC, quad = tid % 4;
        _Pragma("unroll 1") for (int begin = 0; begin < PASSES; begin += BATCH) {
            F4 old[BATCH], A[BATCH], b[BATCH], read[BATCH];
            float delta[BATCH], inner[BATCH], gate[BATCH], y[BATCH];
            bool live[BATCH];
            UNROLL for (int i = 0; i < BATCH; i++) {
                int cell = (begin + i) * (THREADS / 4) + tid / 4, c = cell % CC, row = first + cell / CC;
                live[i] = begin + i < PASSES && row < rows;
                if (live[i]) {
                    old[i] = *reinterpret_cast<const F4*>(states + cell * N + 4 * quad);
                    A[i] = *reinterpret_cast<const F4*>(at<float>(AT_A) + c * N + 4 * quad);
                    b[i] = *reinterpret_cast<const F4*>(at<float>(AT_BC) + row * 2 * N + 4 * quad);
                    read[i] = *reinterpret_cast<const F4*>(at<float>(AT_BC) + row * 2 * N + N + 4 * quad);
                    delta[i] = at<float>(AT_DELTA)[c * COLUMN + row];
                    inner[i] = at<float>(AT_INNER)[c * COLUMN + row];
                    gate[i] = at<float>(AT_GATE)[c * COLUMN + row];
                }
            }
            UNROLL for (int i = 0; i < BATCH; i++) {
                y[i] = 0.0f;
                if (live[i])
                    UNROLL for (int k = 0; k < 4; k++) {
                        old[i].v[k] = exp2_fast(delta[i] * A[i].v[k]) * old[i].v[k] + delta[i] * inner[i] * b[i].v[k];
                        y[i] += old[i].v[k] * read[i].v[k];
                    }
            }
            UNROLL for (int i = 0; i < BATCH; i++) y[i] += SWAP(y[i], 1);
            UNROLL for (int i = 0; i < BATCH; i++) y[i] += SWAP(y[i], 2);
            UNROLL for (int i = 0; i < BATCH; i++) {
                int cell = (begin + i) * (THREADS / 4) + tid / 4, c = cell % CC, row = first + cell / CC;
                if (live[i]) {
                    float* to = WHOLE ? states + cell * N : l.out_ssm + ((i64)row * C + c0 + c) * N;
                    *reinterpret_cast<F4*>(to + 4 * quad) = old[i];
                }
                if (live[i] && quad == 0) {
                    y[i] = (y[i] + at<float>(AT_SKIP)[c] * inner[i]) * silu(gate[i]);
                    a.y[(i64)row * C + c0 + c] = to_bf16(y[i]);
                }
            }
        }
    }
    // round: how often each of the states' barriers has been waited for
    __device__ __forceinline__ void scan(const Layer& l, u32& round) {
        if (WHOLE) {
            for (int chunk = 0; chunk < CHUNKS; chunk++)
                if (chunk * CHUNK < rows) arrived(at<u64>(AT_ARRIVED) + chunk, round);
            scan_rows<ROWS * CC / (THREADS / 4)>(l, 0, at<float>(AT_STATE));
            before_engine();
        } else {
            for (int chunk = 0; chunk < CHUNKS; chunk++) {
                if (chunk * CHUNK < rows) arrived(at<u64>(AT_ARRIVED) + chunk % HELD, round + chunk / HELD);
                scan_rows<CHUNK * CC / (THREADS / 4)>(l, chunk * CHUNK,
                                                      at<float>(AT_STATE) + chunk % HELD * CHUNK * CC * N);
                if (chunk + HELD < CHUNKS) {
                    BARRIER();
                    ask_states(l, chunk + HELD);
                }
            }
        }
        round += CHUNKS / HELD;
    }
    // the new states, which lie where the old ones did, by the engine; `free_states` waits until it has read them
    __device__ __forceinline__ void write_states(const Layer& l) {
        constexpr int BYTES = 4 * CC * N;
        if (warp == WARPS - 1)
            for (int row = lane; row < rows; row += 32)
                store_by_engine(l.out_ssm + ((i64)row * C + cluster * CH + rank * CC) * N,
                                at<char>(AT_STATE) + row * BYTES, BYTES);
    }
    __device__ __forceinline__ void free_states() {
        if (warp == WARPS - 1) wait_stores();
        WARP_BARRIER();
    }
    __device__ __forceinline__ void load_y() {
        constexpr int EIGHTS = K3 / 8;
        for (int i = tid; i < ROWS * EIGHTS; i += THREADS) {
            int row = i / EIGHTS, e = i % EIGHTS;
            bool live = row < rows;
            copy_later<16>(at<bf16>(AT_Y) + row * Y_STRIDE + 8 * e,
                           a.y + (i64)(live ? row : 0) * C + rank * K3 + 8 * e, live);
        }
        wait_copies();
    }
    __device__ __forceinline__ void ask_residual(const void* x, float (&v)[OUTS][4]) const {
        UNROLL for (int j = 0; j < OUTS; j++) {
            int i = j * THREADS + tid, row = i / DO * 4, o = i % DO;
            UNROLL for (int k = 0; k < 4; k++) {
                i64 cell = (i64)(row + k) * D + cluster * DG + rank * DO + o;
                v[j][k] = 0.0f;
                if (row + k < rows)
                    v[j][k] = XBF ? from_bits(common_half((const bf16*)x + cell)) : common1((const float*)x + cell);
            }
        }
    }
    __device__ __forceinline__ void add_out(float (&v)[OUTS][4]) {
        UNROLL for (int j = 0; j < OUTS; j++) {
            int i = j * THREADS + tid, row = i / DO * 4, o = i % DO;
            if (row < rows) {
                F4 f = total<KO, DG>(at<float>(AT_OUT), rank * DO + o, row, rank);
                UNROLL for (int k = 0; k < 4; k++) {
                    i64 cell = (i64)(row + k) * D + cluster * DG + rank * DO + o;
                    if (row + k < rows && XBF) ((bf16*)a.out)[cell] = to_bf16(v[j][k] + f.v[k]);
                    if (row + k < rows && !XBF) ((float*)a.out)[cell] = v[j][k] + f.v[k];
                }
            }
        }
    }
};

#ifdef STAMPED
#define STAMP(k) \
    if (i == layers / 2 && b.tid == 0 && blockIdx.x == STAMPED) ((i64*)a.counter)[512 + k] = clock64()
#else
#define STAMP(k)
#endif

// x_proj, the scan and the gated output, from the block's own channels
__device__ __forceinline__ void middle(Block& b, const Layer& l, u32 (&small)[XSTEPS][8], u32& round, int i, int layers) {
    const Arguments& a = b.a;
    cluster_barrier();
    STAMP(6);
    b.stage_widen(l);
    b.gather();
    BARRIER();
    STAMP(7);
    b.narrow(small);
    b.tell();
    STAMP(8);
    b.write_conv(l);
    wait_copies();
    b.listen();
    STAMP(9);
    b.forget();
    b.add_parts();
    cluster_barrier();
    STAMP(10);
    b.spread();
    BARRIER();
    STAMP(11);
    b.widen();
    BARRIER();
    STAMP(12);
    if (!WHOLE) let_next();
    b.scan(l, round);
    STAMP(13);
}

__device__ __forceinline__ Block enter(char* memory, const Arguments& a) {
    Block b{memory, a, (int)threadIdx.x, (int)threadIdx.x / 32, (int)threadIdx.x % 32, (int)rank_in_cluster(),
            (int)(blockIdx.x / CS), (int)a.rows, 0};
    if (b.tid == 0)
        for (int i = 0; i < HELD; i++) open_barrier(b.at<u64>(AT_ARRIVED) + i);
    BARRIER();
    return b;
}

// nobody leaves while its memory is read; the last block leaves the counter at zero
__device__ __forceinline__ void leave(const Block& b) {
    cluster_barrier();
    if (b.tid == 0 && arrive_last(b.a.counter) == b.target + G * CS - 1) *b.a.counter = 0;
}

#if WHOLE
extern "C" __global__ void __launch_bounds__(THREADS, 1) steps(const __grid_constant__ Arguments a) {
    SHARED_MEMORY(memory);
    Block b = enter(memory, a);
    In in;
    const void* x = a.x;
    int layers = (int)a.layers;
    u32 round = 0;
    b.stage(a.layer[0]);
    b.ask_all_states(a.layer[0]);
    in.fill(b.warp, [&](int unit) { return b.in_weights(a.layer[0], unit); }, D);
    for (int i = 0; i < layers; i++) {
        const Layer& l = a.layer[i];
        STAMP(0);
        b.forget();
        u32 small[XSTEPS][8];
        b.ask_narrow(l, small);
        b.norm(x);
        BARRIER();
        STAMP(1);
        in.run(
            b.warp, [&](int unit) { return b.in_weights(l, unit); }, D, H_STRIDE,
            [&](int unit) {
                return b.template at<bf16>(AT_H) + b.lane / 4 * H_STRIDE + unit % KI * (K1 / KI) + 8 * (b.lane % 4);
            },
            [&](int unit, float(&s)[NT][4]) {
                keep(b.template at<float>(AT_SUMS) + unit % KI * 2 * CH * ROWS, unit / KI * 16, b.lane, s);
            });
        STAMP(2);
        cluster_barrier();
        STAMP(3);
        b.forget();
        b.own();
        STAMP(4);
        middle(b, l, small, round, i, layers);
        b.tell();
        b.write_states(l);
        STAMP(14);
        Out out;
        out.fill(b.warp, [&](int unit) { return b.out_weights(l, unit); }, C);
        float kept[OUTS][4];
        b.ask_residual(x, kept);
        bool more = i + 1 < layers;
        if (more) b.stage(a.layer[i + 1]);
        STAMP(15);
        b.listen();
        STAMP(16);
        b.forget();
        b.load_y();
        BARRIER();
        STAMP(17);
        out.run(
            b.warp, [&](int unit) { return b.out_weights(l, unit); }, C, Y_STRIDE,
            [&](int unit) {
                return b.template at<bf16>(AT_Y) + b.lane / 4 * Y_STRIDE + unit % KO * (K3 / KO) + 8 * (b.lane % 4);
            },
            [&](int unit, float(&s)[NT][4]) {
                keep(b.template at<float>(AT_OUT) + unit % KO * DG * ROWS, unit / KO * 16, b.lane, s);
            });
        STAMP(18);
        b.free_states();
        if (more) b.ask_all_states(a.layer[i + 1]);
#if FILL == 1
        if (more) in.fill(b.warp, [&](int unit) { return b.in_weights(a.layer[i + 1], unit); }, D);
#endif
        cluster_barrier();
        STAMP(19);
        b.add_out(kept);
        x = a.out;
        STAMP(20);
        if (more) {
            b.tell();
            STAMP(21);
#if FILL != 1
            in.fill(b.warp, [&](int unit) { return b.in_weights(a.layer[i + 1], unit); }, D);
#endif
            STAMP(22);
            b.listen();
            STAMP(23);
        }
    }
    leave(b);
}
#else
// From in_proj's output a.x, bf16 (rows, 2 C), to out_proj's input a.y, of one layer.
extern "C" __global__ void __launch_bounds__(THREADS, PER_SM) middle_step(const __grid_constant__ Arguments a) {
    SHARED_MEMORY(memory);
    Block b = enter(memory, a);
    const Layer& l = a.layer[0];
    u32 small[XSTEPS][8], round = 0;
    int i = 0, layers = 1;
    b.stage(l);
    b.ask_all_states(l);
    b.ask_narrow(l, small);
    STAMP(0);
    // so far weights and states, which no kernel writes just before this one
    after_earlier();
    STAMP(1);
    b.own((const bf16*)a.x);
    STAMP(4);
    middle(b, l, small, round, i, layers);
    leave(b);
}
#endif
#endif
