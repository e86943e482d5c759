// Cross-entropy and its gradient: a row of bfloat16 logits is read once, its gradient written in its place.
//
// A cluster of two blocks has a row, a half each, and every thread its own VECTORS x 8 columns, so that it can add
// the gradient up by column from row to row. Rows to come are on their way to shared memory meanwhile; a thread reads
// there only what it asked for itself. The two blocks exchange sums once a row, and while they wait for each other
// the next row is summed up. Compiled at run time by cross_entropy_cuda.py, which sets the macros THREADS, VECTORS
// (a thread), WIDTH (vectors of half a row), PADDED (columns past the vocabulary), STAGES, SUMS and SHARED_BYTES.

typedef long long i64;
#define UNROLL _Pragma("unroll")

#ifndef EMULATED
#define CLUSTER __cluster_dims__(2, 1, 1)
#define SWAP(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
#define LOG(value) logf(value)
#define EXP(value) expf(value)
__device__ __forceinline__ float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ unsigned address(const void* at) {
    unsigned r;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(r) : "l"(at));
    return r;
}
__device__ __forceinline__ void bring(uint4* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void brought() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// until all but the last N groups have come
template <int N>
__device__ __forceinline__ void await() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ unsigned half_of_cluster() {
    unsigned r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
// a pair to the same place in both blocks
__device__ __forceinline__ void tell(float2* at, float first, float second) {
    UNROLL for (int block = 0; block < 2; block++) {
        unsigned there;
        asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(at)), "r"(block));
        asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(there), "f"(first), "f"(second) : "memory");
    }
}
#define ARRIVE() asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory")
#define WAIT() asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory")
__device__ __forceinline__ unsigned largest2(unsigned a, unsigned b) {
    unsigned r;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
__device__ __forceinline__ unsigned down2(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
#define SHARED(type, name) \
    extern __shared__ uint4 memory[]; \
    type& name = *reinterpret_cast<type*>(memory)
#endif

constexpr int WARPS = THREADS / 32;
constexpr float LOG2E = 1.4426950408889634f;
// in place of -inf, whose difference with itself is no number
constexpr float LOWEST = -3.4e38f;
constexpr unsigned NOTHING = 0xff80ff80u;  // -inf twice
static_assert(2 * WARPS == 32, "a lane reads one warp's sums of either block");

struct Shared {
    uint4 ring[STAGES][WIDTH];
    float2 parts[2][2 * WARPS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "cross_entropy_cuda.py counts the same shared memory");

struct Arguments {
    unsigned short* logits;  // (t, width), rows `stride` apart
    const i64* targets;
    float* loss;
    float* sums;  // (clusters, width), added to
    i64 t, vocab, width, stride, clusters, ignore;
};

__device__ __forceinline__ float low(unsigned w) { return __uint_as_float(w << 16); }
__device__ __forceinline__ float high(unsigned w) { return __uint_as_float(w & 0xffff0000u); }

// (top, total) of two parts of a row: the largest logit, and the sum of exp(logit - top)
__device__ __forceinline__ void join(float& top, float& total, float top2, float total2) {
    float both = fmaxf(top, top2);
    total = total * ex2((top - both) * LOG2E) + total2 * ex2((top2 - both) * LOG2E);
    top = both;
}

// the largest logit of what a thread has of a row, and the sum of exp(logit - top)
struct Part {
    float top, total;
};

// whether every thread has a vector k
__device__ constexpr bool whole(int k) { return (k + 1) * THREADS <= WIDTH; }

// four words of two logits each, -inf from the vocabulary's end on, which lies in the last 8 vectors
__device__ __forceinline__ void read(const uint4& from, int k, i64 left, unsigned (&w)[4]) {
    uint4 v = from;
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    if (PADDED && (k + 1) * THREADS > WIDTH - 8 && left < 8) {
        UNROLL for (int j = 0; j < 4; j++) {
            if (2 * j >= left) w[j] = NOTHING;
            if (2 * j + 1 == left) w[j] = (w[j] & 0xffffu) | (NOTHING & 0xffff0000u);
        }
    }
}

extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1) cross_entropy(const Arguments g) {
    SHARED(Shared, shared);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int half = (int)half_of_cluster();
    const int first = half * 8 * WIDTH;
    unsigned short* const mine = g.logits + first + 8 * thread;
    const i64 cluster = blockIdx.x / 2;
    const i64 left = g.vocab - first - 8 * thread;

    auto fetch = [&](i64 row, int stage) {
        if (row < g.t) {
            UNROLL for (int k = 0; k < VECTORS; k++)
                if (k * THREADS + thread < WIDTH)
                    bring(&shared.ring[stage][k * THREADS + thread], mine + row * g.stride + 8 * k * THREADS);
        }
        brought();
    };
    auto sum_up = [&](int stage) {
        unsigned w[VECTORS][4];
        unsigned most = NOTHING;
        UNROLL for (int k = 0; k < VECTORS; k++) {
            UNROLL for (int j = 0; j < 4; j++) w[k][j] = NOTHING;
            if (whole(k) || k * THREADS + thread < WIDTH)
                read(shared.ring[stage][k * THREADS + thread], k, left - 8 * k * THREADS, w[k]);
            UNROLL for (int j = 0; j < 4; j++) most = largest2(most, w[k][j]);
        }
        Part part = {fmaxf(fmaxf(low(most), high(most)), LOWEST), 0.0f};
        UNROLL for (int k = 0; k < VECTORS; k++) {
            if (whole(k) || k * THREADS + warp * 32 < WIDTH) {
                float even = 0.0f, odd = 0.0f;
                UNROLL for (int j = 0; j < 4; j++) {
                    even += ex2((low(w[k][j]) - part.top) * LOG2E);
                    odd += ex2((high(w[k][j]) - part.top) * LOG2E);
                }
                part.total += even + odd;
            }
        }
        UNROLL for (int m = 16; m >= 1; m /= 2) join(part.top, part.total, SWAP(part.top, m), SWAP(part.total, m));
        return part;
    };

    float sums[VECTORS][8];
    UNROLL for (int k = 0; k < VECTORS; k++)
        UNROLL for (int j = 0; j < 8; j++) sums[k][j] = 0.0f;
    UNROLL for (int stage = 0; stage < STAGES - 1; stage++) fetch(cluster + stage * g.clusters, stage);
    // the other block has begun before anything is told to it
    ARRIVE();
    await<STAGES - 2>();
    Part next = cluster < g.t ? sum_up(0) : Part{LOWEST, 0.0f};
    i64 next_target = cluster < g.t ? g.targets[cluster] : g.ignore;
    unsigned short next_logit = cluster < g.t ? g.logits[cluster * g.stride + (next_target != g.ignore ? next_target : 0)] : 0;
    WAIT();
    if (lane == 0) tell(&shared.parts[0][half * WARPS + warp], next.top, next.total);
    ARRIVE();
    int stage = 0, side = 0;
    for (i64 row = cluster; row < g.t; row += g.clusters) {
        const i64 target = next_target, after = row + g.clusters;
        const bool real = target != g.ignore;
        const unsigned short its = next_logit;
        const int coming = (stage + 1) % STAGES;
        fetch(row + (STAGES - 1) * g.clusters, (stage + STAGES - 1) % STAGES);
        if (after < g.t) {
            next_target = g.targets[after];
            next_logit = g.logits[after * g.stride + (next_target != g.ignore ? next_target : 0)];
            await<STAGES - 2>();
            next = sum_up(coming);
        }
        WAIT();
        Part all = {shared.parts[side][lane].x, shared.parts[side][lane].y};
        // before the next row is written over, every thread has read its target's logit there
        if (lane == 0) tell(&shared.parts[side ^ 1][half * WARPS + warp], next.top, next.total);
        ARRIVE();
        UNROLL for (int m = 16; m >= 1; m /= 2) join(all.top, all.total, SWAP(all.top, m), SWAP(all.total, m));
        const float top = all.top, log_total = LOG(all.total);
        // two differences: their sum would round away what a large maximum hides
        const float log_p = low(its) - top - log_total;
        if (half == 0 && thread == 0) g.loss[row] = real ? -log_p : 0.0f;
        // exp(log_p) - 1 by its series where the difference would lose the small value
        const float series = log_p * (1 + log_p * (0.5f + log_p * (1.0f / 6 + log_p / 24)));
        const float at_target = log_p > -0.03f ? series : EXP(log_p) - 1;
        // of a row without a target nothing is left
        const float log2_total = real ? log_total * LOG2E : -LOWEST;
        UNROLL for (int k = 0; k < VECTORS; k++) {
            if (whole(k) || k * THREADS + thread < WIDTH) {
                unsigned w[4];
                read(shared.ring[stage][k * THREADS + thread], k, left - 8 * k * THREADS, w);
                float p[8];
                UNROLL for (int j = 0; j < 4; j++) {
                    p[2 * j] = ex2((low(w[j]) - top) * LOG2E - log2_total);
                    p[2 * j + 1] = ex2((high(w[j]) - top) * LOG2E - log2_total);
                }
                if (SUMS) {
                    UNROLL for (int j = 0; j < 8; j++) sums[k][j] += p[j];
                }
                uint4 v = {down2(p[0], p[1]), down2(p[2], p[3]), down2(p[4], p[5]), down2(p[6], p[7])};
                *reinterpret_cast<uint4*>(mine + row * g.stride + 8 * k * THREADS) = v;
            }
        }
        // the target's slope over what its thread has just written, and the difference to that column's sum
        const i64 column = target - first;
        if (real && column >= 0 && column < 8 * WIDTH && column / 8 % THREADS == thread) {
            g.logits[row * g.stride + target] = (unsigned short)down2(at_target, 0.0f);
            if (SUMS)
                g.sums[cluster * g.width + target] += at_target - ex2((low(its) - top) * LOG2E - log2_total);
        }
        stage = coming;
        side ^= 1;
    }
    if (SUMS) {
        UNROLL for (int k = 0; k < VECTORS; k++) {
            if (k * THREADS + thread < WIDTH) {
                float* at = g.sums + cluster * g.width + first + 8 * (k * THREADS + thread);
                UNROLL for (int j = 0; j < 8; j++) at[j] += sums[k][j];
            }
        }
    }
    // the other block may still write here
    WAIT();
}
