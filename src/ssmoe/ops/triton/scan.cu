// The selective scan: K lanes a channel, S = N / K states a lane, CH channels a lane, time in the loop.
//
// Each lane "owns" every K-th position of its CH channels: it loads them, applies softplus and gate once, and
// hands the results to the other lanes through shared memory; sums over states end at the owner. B and C of TILE
// positions are staged once a block. Compiled at run time; the macros below are set by scan_cuda.py.
// No headers: bfloat16 is converted by hand.

#ifndef EMULATED
#define BARRIER() __syncthreads()
#define WARP_BARRIER() __syncwarp()
#define SWAP(value, mask) __shfl_xor_sync(0xffffffffu, value, mask)
__device__ __forceinline__ float ex2(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ float rcp(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// Loads for later: volatile, so that the compiler does not move them down to their use, and predicated, so that
// no branch makes it wait for them. What is not `live` is zero.
__device__ __forceinline__ unsigned load_half(const void* at, bool live) {
    unsigned w;
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.u16 %0, [%1]; }"
                 : "=r"(w) : "l"(at), "r"((unsigned)live));
    return w;
}
template <int W>
__device__ __forceinline__ void load_words(const void* at, bool live, unsigned* w) {
    if constexpr (W == 1) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.b32 %0, 0; @p ld.global.nc.b32 %0, [%1]; }"
                     : "=r"(w[0]) : "l"(at), "r"((unsigned)live));
    } else if constexpr (W == 2) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.b32 %0, 0; mov.b32 %1, 0;"
                     " @p ld.global.nc.v2.b32 {%0, %1}, [%2]; }"
                     : "=r"(w[0]), "=r"(w[1]) : "l"(at), "r"((unsigned)live));
    } else {
        for (int i = 0; i < W; i += 4)
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0;"
                         " mov.b32 %3, 0; @p ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4]; }"
                         : "=r"(w[i]), "=r"(w[i + 1]), "=r"(w[i + 2]), "=r"(w[i + 3])
                         : "l"((const char*)at + 4 * i), "r"((unsigned)live));
    }
}
// Stores what is `live`, without a branch.
__device__ __forceinline__ void store_half(void* at, bool live, unsigned w) {
    asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.global.u16 [%0], %2; }"
                 ::"l"(at), "r"((unsigned)live), "h"((unsigned short)w));
}
template <int W>
__device__ __forceinline__ void store_words(void* at, bool live, const unsigned* w) {
    if constexpr (W == 1) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.global.b32 [%0], %2; }"
                     ::"l"(at), "r"((unsigned)live), "r"(w[0]));
    } else if constexpr (W == 2) {
        asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.global.v2.b32 [%0], {%2, %3}; }"
                     ::"l"(at), "r"((unsigned)live), "r"(w[0]), "r"(w[1]));
    } else {
        for (int i = 0; i < W; i += 4)
            asm volatile("{ .reg .pred p; setp.ne.u32 p, %1, 0; @p st.global.v4.b32 [%0], {%2, %3, %4, %5}; }"
                         ::"l"((char*)at + 4 * i), "r"((unsigned)live), "r"(w[i]), "r"(w[i + 1]), "r"(w[i + 2]),
                         "r"(w[i + 3]));
    }
}
// Copies W floats straight to shared memory, or zeros where not `live`; there after the thread's next wait_copies().
template <int W>
__device__ __forceinline__ void copy_later(float* to, const float* from, bool live) {
    unsigned at;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(at) : "l"(to));
    constexpr int V = W < 4 ? W : 4;
    for (int i = 0; i < W; i += V) {
        if constexpr (V == 4) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at + 4 * i), "l"(from + i),
                         "r"(live ? 16 : 0) : "memory");
        } else {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(at), "l"(from), "r"(live ? 4 * V : 0),
                         "n"(4 * V) : "memory");
        }
    }
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// d += a b of 16 x 8 and 8 x 8, in tf32: of each factor the upper 19 bits count
__device__ __forceinline__ void product(float (&d)[4], const float (&a)[4], float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
        " {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
// One more at `at`, and what it was before: who finds a number sees all that was written before it was made.
__device__ __forceinline__ int take(int* at) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
    return before;
}
// Waits until others have made `at` as much as `count`.
__device__ __forceinline__ void wait_for(const int* at, int count) {
    int now;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(at) : "memory");
    } while (now < count);
}
#define SHARED(type, name) \
    extern __shared__ float4 memory[]; \
    type& name = *reinterpret_cast<type*>(memory)
#else
#define SHARED(type, name) static type name
#endif

struct bf16 {
    unsigned short bits;
};
typedef long long i64;

constexpr int S = N / K;
constexpr int GROUPS = 32 / K;
// Distance of the lanes of one channel. A read of 16 bytes a lane takes two wavefronts of shared memory, not four,
// when all lanes agree with their next or all with their next but one: at two, B and C agree so and the channels'
// own numbers too. The backward's sums over channels are matrix products, which go over four neighbouring lanes.
#ifdef BACKWARD
constexpr int KSTRIDE = 4;
#else
constexpr int KSTRIDE = K == 1 ? 1 : 2;
#endif
static_assert(K * KSTRIDE <= 32, "the lanes of a channel are in one warp");
constexpr int WARP_CHANNELS = GROUPS * CH;
constexpr int BLOCK_CHANNELS = WARPS * WARP_CHANNELS;
constexpr int THREADS = 32 * WARPS;
constexpr int STAGED = (TILE * N + THREADS - 1) / THREADS;
constexpr int ROWS = SUB / K;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
// stands for an infinite step: exp(RESET A) is 0 for every A at or below -TINY, and TINY itself decays nothing
constexpr float RESET = 1.0e36f;
constexpr float TINY = 1.0e-30f;

#ifndef CKPT
#define CKPT 0
#endif
static_assert(CKPT <= 0 || (CKPT <= SUB ? SUB % CKPT == 0 : CKPT % SUB == 0 && TILE % CKPT == 0),
              "saved positions fall on whole steps of a loop");
static_assert(THREADS % N == 0, "a thread stages one state");
static_assert(TILE % SUB == 0 && SUB % K == 0 && N % K == 0, "tiles are whole");

#define UNROLL _Pragma("unroll")

template <class T, int W>
struct alignas(sizeof(T) * W) Row {
    T v[W];
};

__device__ __forceinline__ void down(float v, float& out) { out = v; }
#ifdef EMULATED
__device__ __forceinline__ void down(float v, bf16& out) {
    // round to nearest even; NaN stays NaN
    unsigned u = __float_as_uint(v);
    unsigned rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    out.bits = (unsigned short)((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
__device__ __forceinline__ unsigned down2(float low, float high) {
    bf16 a, b;
    down(low, a), down(high, b);
    return a.bits | (unsigned)b.bits << 16;
}
#else
__device__ __forceinline__ unsigned down2(float low, float high) {
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
__device__ __forceinline__ void down(float v, bf16& out) { out.bits = (unsigned short)down2(v, 0.0f); }
#endif

// CH consecutive values as they lie in memory: packed, or one a word where rows are not aligned
template <class T>
struct Raw {
    unsigned w[ALIGNED ? (sizeof(T) * CH + 3) / 4 : CH];
    __device__ __forceinline__ float get(int j) const {
        if (sizeof(T) == 4) return __uint_as_float(w[j]);
        if (ALIGNED && CH > 1) return __uint_as_float(j % 2 ? w[j / 2] & 0xffff0000u : w[j / 2] << 16);
        return __uint_as_float(w[j] << 16);
    }
};

template <class T>
__device__ __forceinline__ unsigned load_one(const T* at, bool live) {
    unsigned w;
    if constexpr (sizeof(T) == 2) {
        w = load_half(at, live);
    } else {
        load_words<1>(at, live, &w);
    }
    return w;
}

template <class T>
__device__ __forceinline__ Raw<T> load_row(const T* at, bool live, int left) {
    Raw<T> row;
    if constexpr (ALIGNED && sizeof(T) * CH >= 4) {
        load_words<sizeof(T) * CH / 4>(at, live && left > 0, row.w);
    } else {
        UNROLL for (int j = 0; j < CH; j++) row.w[j] = load_one(at + j, live && j < left);
    }
    return row;
}

template <class T>
__device__ __forceinline__ void store_row(T* at, const float (&value)[CH], bool live, int left) {
    if constexpr (ALIGNED && sizeof(T) * CH >= 4) {
        constexpr int EACH = 4 / sizeof(T);
        unsigned w[CH / EACH];
        UNROLL for (int j = 0; j < CH; j += EACH)
            w[j / EACH] = EACH == 1 ? __float_as_uint(value[j]) : down2(value[j], value[j + EACH - 1]);
        store_words<CH / EACH>(at, live && left > 0, w);
    } else {
        UNROLL for (int j = 0; j < CH; j++) {
            if constexpr (sizeof(T) == 2) {
                store_half(at + j, live && j < left, down2(value[j], 0.0f));
            } else {
                const unsigned w = __float_as_uint(value[j]);
                store_words<1>(at + j, live && j < left, &w);
            }
        }
    }
}

// W floats from an address aligned to as many
template <int W>
__device__ __forceinline__ void read(const float* at, float (&out)[W]) {
    constexpr int V = W < 4 ? W : 4;
    UNROLL for (int i = 0; i < W; i += V) {
        Row<float, V> part = *reinterpret_cast<const Row<float, V>*>(at + i);
        UNROLL for (int j = 0; j < V; j++) out[i + j] = part.v[j];
    }
}

template <int W>
__device__ __forceinline__ void write(float* at, const float (&value)[W]) {
    constexpr int V = W < 4 ? W : 4;
    UNROLL for (int i = 0; i < W; i += V) {
        Row<float, V> part;
        UNROLL for (int j = 0; j < V; j++) part.v[j] = value[i + j];
        *reinterpret_cast<Row<float, V>*>(at + i) = part;
    }
}

// softplus(v) to a relative 2e-7 everywhere, and sigmoid(v)
__device__ __forceinline__ float softplus(float v, float& slope) {
    float e = ex2(-fabsf(v) * LOG2E);
    float p = fmaf(-0.008539203554391861f, e, 0.04408961534500122f);
    p = fmaf(p, e, -0.10768169164657593f);
    p = fmaf(p, e, 0.17745240032672882f);
    p = fmaf(p, e, -0.24495461583137512f);
    p = fmaf(p, e, 0.33275479078292847f);
    p = fmaf(p, e, -0.4999740421772003f);
    p = fmaf(p, e, 0.9999998211860657f);
    slope = (v >= 0.0f ? 1.0f : e) * rcp(1.0f + e);
    return fmaf(p, e, fmaxf(v, 0.0f));
}

// Sums over the K lanes of a channel; lane k keeps the sum of part[k].
__device__ __forceinline__ void to_owner(float (&part)[K][CH], float (&out)[CH], int k) {
    UNROLL for (int m = K / 2; m >= 1; m /= 2) {
        bool upper = k & m;
        UNROLL for (int i = 0; i < m; i++) {
            UNROLL for (int j = 0; j < CH; j++) {
                float send = upper ? part[i][j] : part[i + m][j];
                float keep = upper ? part[i + m][j] : part[i][j];
                part[i][j] = keep + SWAP(send, m * KSTRIDE);
            }
        }
    }
    UNROLL for (int j = 0; j < CH; j++) out[j] = part[0][j];
}

// Where a lane stands and the rows of x, delta, ... that it owns.
struct Place {
    int k, group, warp, left;
    i64 channel, b;
};

__device__ __forceinline__ Place place(i64 block_channel, i64 b, i64 d) {
    Place p;
    int lane = threadIdx.x % 32;
    p.warp = threadIdx.x / 32;
    p.k = lane / KSTRIDE % K;
    p.group = lane % KSTRIDE + lane / (KSTRIDE * K) * KSTRIDE;
    p.channel = block_channel + p.warp * WARP_CHANNELS + p.group * CH;
    i64 left = d - p.channel;
    p.left = left < 0 ? 0 : left < CH ? (int)left : CH;
    p.b = b;
    return p;
}

// S states of each of the lane's channels from a (..., d, N) tensor at row `at` of d * N floats
__device__ __forceinline__ void load_states(const float* from, i64 at, i64 d, const Place& p, float (&h)[CH][S]) {
    UNROLL for (int j = 0; j < CH; j++) {
        if (j < p.left) {
            read<S>(from + (at * d + p.channel + j) * N + p.k * S, h[j]);
        } else {
            UNROLL for (int s = 0; s < S; s++) h[j][s] = 0.0f;
        }
    }
}

__device__ __forceinline__ void store_states(float* to, i64 at, i64 d, const Place& p, const float (&h)[CH][S]) {
    UNROLL for (int j = 0; j < CH; j++)
        if (j < p.left) write<S>(to + (at * d + p.channel + j) * N + p.k * S, h[j]);
}

__device__ __forceinline__ void load_A(const float* A, i64 d, const Place& p, float (&a)[CH][S]) {
    load_states(A, 0, d, p, a);
#if SEGMENTS
    UNROLL for (int j = 0; j < CH; j++)
        UNROLL for (int s = 0; s < S; s++) a[j][s] = fminf(a[j][s], -TINY);
#endif
}

// One value a channel, absent as zeros
__device__ __forceinline__ void load_channels(const float* from, const Place& p, float (&out)[CH]) {
    UNROLL for (int j = 0; j < CH; j++) out[j] = from && j < p.left ? from[p.channel + j] : 0.0f;
}

// The state that enters `chunk` from what left the chunks between it and `edge`, walking by `step`.
__device__ __forceinline__ void enter(const float* states, const float* steps, i64 chunks, i64 d, i64 edge, i64 chunk,
                                      int step, const Place& p, const float (&a)[CH][S], float (&h)[CH][S]) {
    load_states(states, p.b * chunks + edge, d, p, h);
    for (i64 i = edge + step; i != chunk; i += step) {
        float own[CH][S];
        load_states(states, p.b * chunks + i, d, p, own);
        UNROLL for (int j = 0; j < CH; j++) {
            float sum = j < p.left ? steps[(p.b * chunks + i) * d + p.channel + j] : 0.0f;
            UNROLL for (int s = 0; s < S; s++) h[j][s] = fmaf(ex2(sum * a[j][s]), h[j][s], own[j][s]);
        }
    }
}

// What leaves a chunk: its state and the sum of its steps, of which every lane holds its own positions'.
__device__ __forceinline__ void leave(float* states, float* steps, i64 chunks, i64 d, i64 chunk, const Place& p,
                                      const float (&h)[CH][S], float (&total)[CH]) {
    store_states(states, p.b * chunks + chunk, d, p, h);
    UNROLL for (int j = 0; j < CH; j++) {
        UNROLL for (int m = 1; m < K; m *= 2) total[j] += SWAP(total[j], m * KSTRIDE);
        if (p.k == 0 && j < p.left) steps[(p.b * chunks + chunk) * d + p.channel + j] = total[j];
    }
}

__device__ __forceinline__ bool is_real(const signed char* flags, i64 at) {
#if SEGMENTS
    return flags[at] & 1;
#else
    return true;
#endif
}

// A row past the end is zero as it was loaded; padding between documents may be anything.
__device__ __forceinline__ float unless_padding(float v, bool real) { return SEGMENTS && !real ? 0.0f : v; }

template <class T>
__device__ __forceinline__ float one(unsigned w) {
    return __uint_as_float(sizeof(T) == 2 ? w << 16 : w);
}

// B and C of a tile on their way from memory to shared memory; each thread carries every THREADS-th value.
template <bool WITH_B, bool WITH_C>
struct Stage {
    static constexpr int STRIDE = THREADS / N;
    unsigned b[STAGED], c[STAGED];
    const BT* b_at;
    const CT* c_at;
    const signed char* flag_at;
    i64 b_row, c_row;
    int row;

    __device__ __forceinline__ Stage(const BT* B, const CT* C, const signed char* flags, i64 batch, i64 t, i64 length,
                                     i64 sbb, i64 sbl, i64 scb, i64 scl)
        : b_row(sbl), c_row(scl), row(threadIdx.x / N) {
        b_at = B + batch * sbb + (t + row) * sbl + threadIdx.x % N;
        c_at = C + batch * scb + (t + row) * scl + threadIdx.x % N;
        flag_at = flags + (SEGMENTS ? batch * length + t + row : 0);
    }

    // the tile that begins at t, where `rows` positions are left; then moves on by `tiles`
    __device__ __forceinline__ void fetch(int rows, int tiles) {
        UNROLL for (int i = 0; i < STAGED; i++) {
            bool live = row + i * STRIDE < (rows < TILE ? rows : TILE) && is_real(flag_at, i * STRIDE);
            if (WITH_B) b[i] = load_one(b_at + i * STRIDE * b_row, live);
            if (WITH_C) c[i] = load_one(c_at + i * STRIDE * c_row, live);
        }
        if (WITH_B) b_at += tiles * TILE * b_row;
        if (WITH_C) c_at += tiles * TILE * c_row;
        if (SEGMENTS) flag_at += tiles * TILE;
    }

    __device__ __forceinline__ void put(float* to_b, float* to_c) const {
        UNROLL for (int i = 0; i < STAGED; i++) {
            int e = threadIdx.x + i * THREADS;
            if (e < TILE * N) {
                if (WITH_B) to_b[e] = one<BT>(b[i]);
                if (WITH_C) to_c[e] = one<CT>(c[i]);
            }
        }
    }
};

#ifdef FORWARD

struct Arguments {
    const XT* x;
    const DT* delta;
    const float* A;
    const BT* B;
    const CT* C;
    const float* skip;
    const ZT* z;
    const float* bias;
    const float* initial;
    const signed char* flags;
    XT* y;
    float* last_state;
    float* saved;
    float* states;
    float* steps;
    i64 length, d, chunks, chunk_tiles, phase;
    i64 sxb, sxl, sdb, sdl, szb, szl, sbb, sbl, scb, scl;
};

// positions whose numbers are read together
constexpr int PAIRED = CH == 1 && K > 1 ? 2 : 1;
// words of their numbers: so many more than the numbers that lanes of different positions meet in no bank
constexpr int LINE = PAIRED * (GROUPS * 2 * CH + 32 / K);

struct alignas(16) Shared {
    float B[2][TILE * N];
    float C[2][TILE * N];
    float pair[WARPS][SUB / PAIRED * LINE];
};
static_assert(sizeof(Shared) <= 48 * 1024, "more would have to be asked for");

// LOCAL: only the state that leaves the chunk when zero enters it, and the sum of its steps.
template <bool LOCAL>
__device__ __forceinline__ void walk(const Arguments& g, Shared& shared, i64 block_channel, i64 chunk, i64 b) {
    const Place p = place(block_channel, b, g.d);
    float a[CH][S], h[CH][S], bias[CH], skip[CH], total[CH];
    load_A(g.A, g.d, p, a);
    load_channels(g.bias, p, bias);
    load_channels(g.skip, p, skip);
    UNROLL for (int j = 0; j < CH; j++) {
        total[j] = 0.0f;
        UNROLL for (int s = 0; s < S; s++) h[j][s] = 0.0f;
    }
    if (!LOCAL) {
        if (chunk > 0) {
            enter(g.states, g.steps, g.chunks, g.d, 0, chunk, 1, p, a, h);
        } else if (g.initial) {
            load_states(g.initial, b, g.d, p, h);
        }
    }
    const i64 first = chunk * g.chunk_tiles;
    const i64 tiles = (g.length + TILE - 1) / TILE;
    const i64 last = first + g.chunk_tiles < tiles ? first + g.chunk_tiles : tiles;
    const int end = (int)(g.length < last * TILE ? g.length : last * TILE);
    int t = (int)(first * TILE);  // of the first position of the rows in hand
    const XT* x_at = g.x + b * g.sxb + (t + p.k) * g.sxl + p.channel;
    const DT* d_at = g.delta + b * g.sdb + (t + p.k) * g.sdl + p.channel;
    const ZT* z_at = g.z + (HAS_Z ? b * g.szb + (t + p.k) * g.szl + p.channel : 0);
    XT* y_at = g.y + (b * g.length + t + p.k) * g.d + p.channel;
    const signed char* flag_at = g.flags + (SEGMENTS ? b * g.length + t + p.k : 0);
    constexpr int EVERY = CKPT > 0 ? CKPT : SUB;
    const i64 blocks = (g.length + EVERY - 1) / EVERY;
    float* saved_at = g.saved + ((b * blocks + t / EVERY) * g.d + p.channel) * N + p.k * S;

    Raw<XT> next_x[ROWS];
    Raw<DT> next_d[ROWS];
    Raw<ZT> next_z[ROWS];
    signed char next_flag[ROWS];
    auto ahead = [&](int t0) {
        UNROLL for (int r = 0; r < ROWS; r++) {
            bool live = t0 + r * K + p.k < end;
            next_x[r] = load_row(x_at + r * K * g.sxl, live, p.left);
            next_d[r] = load_row(d_at + r * K * g.sdl, live, p.left);
            if (HAS_Z && !LOCAL) next_z[r] = load_row(z_at + r * K * g.szl, live, p.left);
            if (SEGMENTS) next_flag[r] = live ? flag_at[r * K] : 0;
        }
        x_at += SUB * g.sxl;
        d_at += SUB * g.sdl;
        if (HAS_Z) z_at += SUB * g.szl;
        if (SEGMENTS) flag_at += SUB;
    };

    Stage<true, !LOCAL> stage(g.B, g.C, g.flags, b, t, g.length, g.sbb, g.sbl, g.scb, g.scl);
    stage.fetch(end - t, 1);
    ahead(t);
    stage.put(shared.B[0], shared.C[0]);
    BARRIER();
    int buffer = 0;
    float* pair = shared.pair[p.warp] + p.group * 2 * CH * PAIRED;
    float* own_pair = pair + p.k / PAIRED * LINE + p.k % PAIRED * 2 * CH;
    for (i64 tile = first; tile < last; tile++) {
        stage.fetch(end - t - TILE, 1);
        const float* B = shared.B[buffer] + p.k * S;
        const float* C = shared.C[buffer] + p.k * S;
        const int subs = end - t < TILE ? (end - t + SUB - 1) / SUB : TILE / SUB;
        _Pragma("unroll 1") for (int sub = 0; sub < subs; sub++) {
            float xs[ROWS][CH];
            Raw<ZT> zs[ROWS];
            bool real[ROWS];
            UNROLL for (int r = 0; r < ROWS; r++) {
                bool live = t + r * K + p.k < end;
                real[r] = SEGMENTS ? live && (next_flag[r] & 1) : live;
                float both[2 * CH];
                UNROLL for (int j = 0; j < CH; j++) {
                    float slope, step = softplus(next_d[r].get(j) + bias[j], slope);
                    step = real[r] ? step : 0.0f;
                    xs[r][j] = unless_padding(next_x[r].get(j), real[r]);
                    both[j] = SEGMENTS && real[r] && (next_flag[r] & 2) ? RESET : step * LOG2E;
                    both[CH + j] = step * xs[r][j];
                    if (LOCAL) total[j] += both[j];
                }
                if (HAS_Z && !LOCAL) zs[r] = next_z[r];
                write<2 * CH>(own_pair + r * (K / PAIRED) * LINE, both);
            }
            ahead(t + SUB);
            WARP_BARRIER();
            UNROLL for (int r = 0; r < ROWS; r++) {
                float part[K][CH], boths[PAIRED * 2 * CH];
                UNROLL for (int i = 0; i < K; i++) {
                    const int row = r * K + i;
                    float bs[S], cs[S];
                    if (i % PAIRED == 0) read<PAIRED * 2 * CH>(pair + row / PAIRED * LINE, boths);
                    const float* both = boths + i % PAIRED * 2 * CH;
                    read<S>(B + (sub * SUB + row) * N, bs);
                    if (!LOCAL) read<S>(C + (sub * SUB + row) * N, cs);
                    if constexpr (CKPT > 0 && !LOCAL) {
                        if (row % EVERY == 0 && (EVERY <= SUB || t % EVERY == 0)) {
                            if (t + row < end) {
                                UNROLL for (int j = 0; j < CH; j++)
                                    if (j < p.left) write<S>(saved_at + j * N, h[j]);
                            }
                            saved_at += g.d * N;
                        }
                    }
                    UNROLL for (int j = 0; j < CH; j++) {
                        float sum = 0.0f;
                        UNROLL for (int s = 0; s < S; s++) {
                            h[j][s] = fmaf(ex2(both[j] * a[j][s]), h[j][s], both[CH + j] * bs[s]);
                            if (!LOCAL) sum = s ? fmaf(cs[s], h[j][s], sum) : cs[s] * h[j][s];
                        }
                        part[i][j] = sum;
                    }
                }
                if (!LOCAL) {
                    float out[CH];
                    to_owner(part, out, p.k);
                    UNROLL for (int j = 0; j < CH; j++) {
                        out[j] = fmaf(skip[j], xs[r][j], out[j]);
                        if (HAS_Z) {
                            float gate = unless_padding(zs[r].get(j), real[r]);
                            out[j] = out[j] * gate * rcp(1.0f + ex2(-gate * LOG2E));
                        }
                    }
                    store_row(y_at + r * K * g.d, out, t + r * K + p.k < end, p.left);
                }
            }
            y_at += SUB * g.d;
            t += SUB;
            WARP_BARRIER();
        }
        buffer ^= 1;
        stage.put(shared.B[buffer], shared.C[buffer]);
        BARRIER();
    }
    if (!LOCAL && chunk == g.chunks - 1) store_states(g.last_state, b, g.d, p, h);
    if (LOCAL || (g.phase == 1 && chunk == 0)) leave(g.states, g.steps, g.chunks, g.d, chunk, p, h, total);
}

// phase 0: no chunks. 1: the first chunk whole and the others but the last LOCAL. 2: all chunks but the first.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_forward(const Arguments g) {
    __shared__ Shared shared;
    const i64 groups = (g.d + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
    const i64 slots = g.phase ? g.chunks - 1 : 1;
    const i64 rest = blockIdx.x / groups;
    const i64 channel = (blockIdx.x - rest * groups) * BLOCK_CHANNELS;
    const i64 chunk = rest % slots + (g.phase == 2);
    if (g.phase == 1 && chunk > 0) {
        walk<true>(g, shared, channel, chunk, rest / slots);
    } else {
        walk<false>(g, shared, channel, chunk, rest / slots);
    }
}

#endif

#ifdef BACKWARD

struct Arguments {
    const XT* x;
    const DT* delta;
    const float* A;
    const BT* B;
    const CT* C;
    const float* skip;
    const ZT* z;
    const float* bias;
    const signed char* flags;
    const float* saved;
    const XT* dy;
    const float* dlast;
    float* states;
    float* steps;
    XT* dx;
    DT* ddelta;
    ZT* dz;
    float* partial;  // (groups, b, l, 2 N): dB and dC summed over a block's channels
    float* dA;       // (b * chunks, d, N), likewise dskip and dbias (b * chunks, d)
    float* dskip;
    float* dbias;
    float* dinitial;
    // in turn, counts that are zero at first: blocks that have begun; of every (b, group) the chunks that are done; of
    // every (b, chunk) the groups that are done
    int* begun;
    int* turns;
    int* done;
    BT* dB;
    CT* dC;
    i64 length, d, batch, chunks, chunk_tiles, phase;
    i64 sxb, sxl, sdb, sdl, szb, szl, sbb, sbl, scb, scl, syb, syl;
};

constexpr int STEPS = TILE / SUB;
// positions of a tile, and of a step, that a lane owns
constexpr int OWNED = TILE / K;
// lanes of one k that a product does not sum over: so many partial sums a warp
constexpr int HALVES = 8 / K;
constexpr int COPIES = WARPS * HALVES;
constexpr int QUADS = (S + 3) / 4;
constexpr int OWN = 1 + SEGMENTS + HAS_Z;
constexpr bool EXACT = sizeof(BT) == 4 || sizeof(CT) == 4;
// words of a position's sums: four more than the numbers, so that lanes of two positions meet in no bank
constexpr int LINE = 2 * N + 8;
constexpr int PER = CKPT / SUB;  // steps between two saved states
static_assert(K <= 8 && SUB % 4 == 0, "a product has four columns of states and takes four positions");
static_assert(CKPT % SUB == 0 && TILE % CKPT == 0, "states are saved before whole steps");

struct alignas(16) Shared {
    float B[2][TILE * N];
    float C[2][TILE * N];
    float partial[COPIES][TILE * LINE];
    // of the positions that a lane owns, where no two lanes meet in a bank: log2(e) step or RESET, step x
    float pair[WARPS][OWNED][32][2 * CH];
    float grad[WARPS][OWNED][32][CH];
    float own[WARPS][OWN][OWNED][32][CH];  // slope, step with segments, the gate's slope
    int group, b, chunk, before;              // where the block stands, and how many were done before it
    float entry[STEPS][CH][THREADS][S];       // states before the steps of a tile
    Raw<XT> x[OWNED][THREADS], y[OWNED][THREADS];
    Raw<DT> d[OWNED][THREADS];
    Raw<ZT> z[HAS_Z ? OWNED : 1][THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES, "scan_cuda.py counts the same shared memory");

// A lane's row on its way to its own place in shared memory
template <class T>
__device__ __forceinline__ void bring(Raw<T>& to, const T* at, bool live, int left) {
    if constexpr (ALIGNED && sizeof(T) * CH >= 4) {
        copy_later<sizeof(T) * CH / 4>(reinterpret_cast<float*>(to.w), reinterpret_cast<const float*>(at),
                                       live && left > 0);
    } else {
        to = load_row(at, live, left);
    }
}

typedef float Sums[SUB / 4][QUADS][4];

// Adds v at position `row` of a step, summed over the four lanes that differ in the last two bits, to sums.
__device__ __forceinline__ void collect(Sums& sums, const float (&v)[S], int row) {
    const int line = threadIdx.x % 32 / 4;
    float low = line == row % 4 ? 1.0f : 0.0f, high = line == row % 4 + 4 ? 1.0f : 0.0f;
    UNROLL for (int q = 0; q < QUADS; q++) {
        float part[4], rest[4];
        UNROLL for (int i = 0; i < 4; i++) {
            part[i] = 4 * q + i < S ? v[4 * q + i < S ? 4 * q + i : 0] : 0.0f;
            if (EXACT) {
                rest[i] = part[i];
                part[i] = __uint_as_float(__float_as_uint(part[i]) & 0xffffe000u);
                rest[i] -= part[i];
            }
        }
        product(sums[row / 4][q], part, low, high);
        if (EXACT) product(sums[row / 4][q], rest, low, high);
    }
}

// Writes sums to the rows of a step at `to`, whose column is the lane's first state.
__device__ __forceinline__ void lay(float* to, const Sums& sums) {
    const int part = threadIdx.x % 4;
    UNROLL for (int r = 0; r < SUB / 4; r++) {
        UNROLL for (int q = 0; q < QUADS; q++) {
            const int s = 4 * q + part / 2 * 2;
            float* at = to + (r * 4 + part % 2 * 2) * LINE + s;
            if constexpr (S > 1) {
                float one[2] = {sums[r][q][0], sums[r][q][2]}, next[2] = {sums[r][q][1], sums[r][q][3]};
                if (s < S) {
                    write<2>(at, one);
                    write<2>(at + LINE, next);
                }
            } else if (s == 0) {
                at[0] = sums[r][q][0];
                at[LINE] = sums[r][q][1];
            }
        }
    }
}

// LOCAL: only the adjoint that leaves the chunk when zero enters it, and the sum of its steps.
//
// A tile, from the last to the first: every lane prepares the positions that it owns; the states before its steps
// are made from those that were saved; then each step, again from the last, is replayed in registers and walked
// back.
template <bool LOCAL>
__device__ __forceinline__ void walk(const Arguments& g, Shared& shared, i64 block_channel, i64 chunk, i64 b) {
    const Place p = place(block_channel, b, g.d);
    const int me = threadIdx.x;
    float a[CH][S], adjoint[CH][S], sum_A[CH][S], bias[CH], skip[CH], total[CH], sum_skip[CH], sum_bias[CH];
    load_A(g.A, g.d, p, a);
    load_channels(g.bias, p, bias);
    load_channels(g.skip, p, skip);
    UNROLL for (int j = 0; j < CH; j++) {
        total[j] = sum_skip[j] = sum_bias[j] = 0.0f;
        UNROLL for (int s = 0; s < S; s++) adjoint[j][s] = sum_A[j][s] = 0.0f;
    }
    const bool in_turn = g.phase == 3, follows = in_turn && chunk < g.chunks - 1;
    if (!LOCAL) {
        if (follows) {
            load_states(g.states, b, g.d, p, adjoint);
        } else if (chunk < g.chunks - 1) {
            enter(g.states, g.steps, g.chunks, g.d, g.chunks - 1, chunk, -1, p, a, adjoint);
        } else {
            load_states(g.dlast, b, g.d, p, adjoint);
        }
    }
    const i64 first = chunk * g.chunk_tiles;
    const i64 tiles = (g.length + TILE - 1) / TILE;
    const i64 last = first + g.chunk_tiles < tiles ? first + g.chunk_tiles : tiles;
    const int length = (int)g.length, begin = (int)(first * TILE);
    int t = (int)((last - 1) * TILE);  // of the tile in hand
    const XT* x_at = g.x + b * g.sxb + (t + p.k) * g.sxl + p.channel;
    const DT* d_at = g.delta + b * g.sdb + (t + p.k) * g.sdl + p.channel;
    const XT* y_at = g.dy + b * g.syb + (t + p.k) * g.syl + p.channel;
    const ZT* z_at = g.z + (HAS_Z ? b * g.szb + (t + p.k) * g.szl + p.channel : 0);
    const signed char* flag_at = g.flags + (SEGMENTS ? b * g.length + t + p.k : 0);
    i64 out_at = (b * g.length + t + p.k) * g.d + p.channel;
    const i64 blocks = (g.length + CKPT - 1) / CKPT;
    const float* saved_at = LOCAL ? g.saved : g.saved + ((b * blocks + t / CKPT) * g.d + p.channel) * N + p.k * S;
    const i64 group = block_channel / BLOCK_CHANNELS;
    float* partial_at = g.partial + ((group * g.batch + b) * g.length + t) * 2 * N;

    signed char next_flag[OWNED];
    // what the tile at t0 needs at once, and what has a place when the step has been taken that had it before
    auto ahead = [&](int t0) {
        UNROLL for (int r = 0; r < OWNED; r++) {
            bool live = t0 >= begin && t0 + r * K + p.k < length;
            bring(shared.d[r][me], d_at + r * K * g.sdl, live, p.left);
            bring(shared.y[r][me], y_at + r * K * g.syl, live, p.left);
            if (HAS_Z) bring(shared.z[r][me], z_at + r * K * g.szl, live, p.left);
            if (SEGMENTS) next_flag[r] = live ? flag_at[r * K] : 0;
        }
        d_at -= TILE * g.sdl;
        y_at -= TILE * g.syl;
        if (HAS_Z) z_at -= TILE * g.szl;
        if (SEGMENTS) flag_at -= TILE;
    };
    auto ahead_step = [&](int t0, int sub) {
        UNROLL for (int i = 0; i < SUB / K; i++) {
            const int r = sub * (SUB / K) + i;
            bring(shared.x[r][me], x_at + r * K * g.sxl, t0 >= begin && t0 + r * K + p.k < length, p.left);
        }
        if (sub % PER == 0) {
            const bool live = t0 >= begin && t0 + sub * SUB < length;
            const float* at = saved_at + sub / PER * g.d * N;
            UNROLL for (int j = 0; j < CH; j++)
                copy_later<S>(shared.entry[sub][j][me], at + j * N, live && j < p.left);
        }
    };
    auto ahead_steps_done = [&] {
        x_at -= TILE * g.sxl;
        saved_at -= TILE / CKPT * g.d * N;
    };

    Stage<!LOCAL, true> stage(g.B, g.C, g.flags, b, t, g.length, g.sbb, g.sbl, g.scb, g.scl);
    stage.fetch(length - t, -1);
    ahead(t);
    if (!LOCAL) {
        for (int sub = 0; sub < STEPS; sub++) ahead_step(t, sub);
        ahead_steps_done();
    }
    stage.put(shared.B[0], shared.C[0]);
    BARRIER();
    int buffer = 0;
    const int lane = me % 32, front = lane - p.k * KSTRIDE;  // front: the channel's first lane
    float(*pair)[32][2 * CH] = shared.pair[p.warp];
    float(*grads)[32][CH] = shared.grad[p.warp];
    float(*owns)[OWNED][32][CH] = shared.own[p.warp];
    // log2(e) step and step x of position r * K + i of a tile, and its gradient
    auto read_pair = [&](int r, int i, float (&out)[2 * CH]) { read<2 * CH>(pair[r][front + i * KSTRIDE], out); };
    auto read_grad = [&](int r, int i, float (&out)[CH]) { read<CH>(grads[r][front + i * KSTRIDE], out); };
    float* partial = shared.partial[p.warp * HALVES + p.group / 4] + p.k * S;
    for (i64 tile = last - 1; tile >= first; tile--) {
        if (tile > first) stage.fetch(TILE, -1);
        const float* B = shared.B[buffer] + p.k * S;
        const float* C = shared.C[buffer] + p.k * S;
        wait_copies();
        unsigned real_rows = 0;
        UNROLL for (int r = 0; r < OWNED; r++) {
            const int row = r * K + p.k;
            const bool real = t + row < length && (!SEGMENTS || (next_flag[r] & 1));
            real_rows |= (unsigned)real << r;
            Raw<DT> raw_d = shared.d[r][me];
            Raw<XT> raw_y = shared.y[r][me];
            Raw<XT> raw_x;
            Raw<ZT> raw_z;
            if (!LOCAL) raw_x = shared.x[r][me];
            if (HAS_Z) raw_z = shared.z[r][me];
            float both[2 * CH], grad[CH], own[OWN][CH];
            UNROLL for (int j = 0; j < CH; j++) {
                float slope, step = softplus(raw_d.get(j) + bias[j], slope);
                step = real ? step : 0.0f;
                grad[j] = unless_padding(raw_y.get(j), real);
                own[0][j] = real ? slope : 0.0f;
                if (SEGMENTS) own[1][j] = step;
                if (HAS_Z) {
                    float gate = unless_padding(raw_z.get(j), real);
                    float sigmoid = rcp(1.0f + ex2(-gate * LOG2E));
                    own[OWN - 1][j] = grad[j] * sigmoid * fmaf(gate, 1.0f - sigmoid, 1.0f);
                    grad[j] *= gate * sigmoid;
                }
                both[j] = SEGMENTS && real && (next_flag[r] & 2) ? RESET : step * LOG2E;
                both[CH + j] = LOCAL ? 0.0f : step * unless_padding(raw_x.get(j), real);
                if (LOCAL) total[j] += both[j];
            }
            write<2 * CH>(pair[r][lane], both);
            write<CH>(grads[r][lane], grad);
            if (!LOCAL) UNROLL for (int i = 0; i < OWN; i++) write<CH>(owns[i][r][lane], own[i]);
        }
        ahead(t - TILE);
        WARP_BARRIER();
        if (LOCAL) {
            _Pragma("unroll 1") for (int r = OWNED - 1; r >= 0; r--) {
                UNROLL for (int i = K - 1; i >= 0; i--) {
                    float both[2 * CH], dys[CH], cs[S];
                    read_pair(r, i, both);
                    read_grad(r, i, dys);
                    read<S>(C + (r * K + i) * N, cs);
                    UNROLL for (int j = 0; j < CH; j++)
                        UNROLL for (int s = 0; s < S; s++)
                            adjoint[j][s] = fmaf(cs[s], dys[j], adjoint[j][s]) * ex2(both[j] * a[j][s]);
                }
            }
        } else {
            if constexpr (PER > 1) {
                _Pragma("unroll 1") for (int from = 0; from < STEPS; from += PER) {
                    float h[CH][S];
                    UNROLL for (int j = 0; j < CH; j++) read<S>(shared.entry[from][j][me], h[j]);
                    UNROLL for (int step = 0; step < PER - 1; step++) {
                        const int sub = from + step;
                        UNROLL for (int i = 0; i < SUB; i++) {
                            float both[2 * CH], bs[S];
                            read_pair(sub * (SUB / K) + i / K, i % K, both);
                            read<S>(B + (sub * SUB + i) * N, bs);
                            UNROLL for (int j = 0; j < CH; j++)
                                UNROLL for (int s = 0; s < S; s++)
                                    h[j][s] = fmaf(ex2(both[j] * a[j][s]), h[j][s], both[CH + j] * bs[s]);
                        }
                        UNROLL for (int j = 0; j < CH; j++) write<S>(shared.entry[sub + 1][j][me], h[j]);
                    }
                }
            }
            // the sums of the tile before have been read
            BARRIER();
            _Pragma("unroll 1") for (int sub = STEPS - 1; sub >= 0; sub--) {
                float h[SUB][CH][S], decay[SUB][CH][S];
                UNROLL for (int j = 0; j < CH; j++) read<S>(shared.entry[sub][j][me], h[0][j]);
                Raw<XT> own_x[SUB / K];
                UNROLL for (int r = 0; r < SUB / K; r++) own_x[r] = shared.x[sub * (SUB / K) + r][me];
                ahead_step(t - TILE, sub);
                Sums sums = {};
                UNROLL for (int r = 0; r < SUB / K; r++) {
                    float part[K][CH];
                    UNROLL for (int i = 0; i < K; i++) {
                        const int row = r * K + i;
                        float both[2 * CH], bs[S], cs[S], dys[CH], values[S];
                        read_pair(sub * (SUB / K) + r, i, both);
                        read_grad(sub * (SUB / K) + r, i, dys);
                        read<S>(B + (sub * SUB + row) * N, bs);
                        if (HAS_Z) read<S>(C + (sub * SUB + row) * N, cs);
                        UNROLL for (int j = 0; j < CH; j++) {
                            float sum = 0.0f;
                            UNROLL for (int s = 0; s < S; s++) {
                                decay[row][j][s] = ex2(both[j] * a[j][s]);
                                float next = fmaf(decay[row][j][s], h[row][j][s], both[CH + j] * bs[s]);
                                values[s] = j ? fmaf(next, dys[j], values[s]) : next * dys[0];
                                if (HAS_Z) sum = s ? fmaf(cs[s], next, sum) : cs[s] * next;
                                if (row + 1 < SUB) h[row + 1][j][s] = next;
                            }
                            part[i][j] = sum;
                        }
                        collect(sums, values, row);
                    }
                    if (HAS_Z) {
                        float out[CH];
                        to_owner(part, out, p.k);
                        const int mine = sub * (SUB / K) + r, row = mine * K + p.k;
                        UNROLL for (int j = 0; j < CH; j++) {
                            float x = unless_padding(own_x[r].get(j), real_rows >> mine & 1);
                            out[j] = fmaf(skip[j], x, out[j]) * owns[OWN - 1][mine][lane][j];
                        }
                        store_row(g.dz + out_at + mine * K * g.d, out, t + row < length, p.left);
                    }
                }
                lay(partial + sub * SUB * LINE + N, sums);
                UNROLL for (int r = 0; r < SUB / 4; r++)
                    UNROLL for (int q = 0; q < QUADS; q++)
                        UNROLL for (int i = 0; i < 4; i++) sums[r][q][i] = 0.0f;
                UNROLL for (int r = SUB / K - 1; r >= 0; r--) {
                    float drive[K][CH], through[K][CH];
                    UNROLL for (int i = K - 1; i >= 0; i--) {
                        const int row = r * K + i;
                        float both[2 * CH], dys[CH], bs[S], cs[S], values[S];
                        read_pair(sub * (SUB / K) + r, i, both);
                        read_grad(sub * (SUB / K) + r, i, dys);
                        read<S>(B + (sub * SUB + row) * N, bs);
                        read<S>(C + (sub * SUB + row) * N, cs);
                        UNROLL for (int j = 0; j < CH; j++) {
                            float driven = 0.0f, passed = 0.0f;
                            UNROLL for (int s = 0; s < S; s++) {
                                float q = fmaf(cs[s], dys[j], adjoint[j][s]);
                                values[s] = j ? fmaf(q, both[CH + j], values[s]) : q * both[CH];
                                driven = s ? fmaf(q, bs[s], driven) : q * bs[s];
                                q *= decay[row][j][s];
                                float back = q * h[row][j][s];
                                sum_A[j][s] = fmaf(back, both[j], sum_A[j][s]);
                                passed = s ? fmaf(back, a[j][s], passed) : back * a[j][s];
                                adjoint[j][s] = q;
                            }
                            drive[i][j] = driven;
                            through[i][j] = passed;
                        }
                        collect(sums, values, row);
                    }
                    float driven[CH], passed[CH], both[2 * CH], grad[CH], own[OWN][CH];
                    to_owner(drive, driven, p.k);
                    to_owner(through, passed, p.k);
                    const int mine = sub * (SUB / K) + r, row = mine * K + p.k;
                    read<2 * CH>(pair[mine][lane], both);
                    read<CH>(grads[mine][lane], grad);
                    UNROLL for (int i = 0; i < OWN; i++) read<CH>(owns[i][mine][lane], own[i]);
                    UNROLL for (int j = 0; j < CH; j++) {
                        float x = unless_padding(own_x[r].get(j), real_rows >> mine & 1);
                        float step = SEGMENTS ? own[OWN > 1 ? 1 : 0][j] : both[j] * LN2;
                        passed[j] = fmaf(x, driven[j], passed[j]) * own[0][j];
                        driven[j] = fmaf(step, driven[j], skip[j] * grad[j]);
                        sum_skip[j] = fmaf(x, grad[j], sum_skip[j]);
                        sum_bias[j] += passed[j];
                    }
                    store_row(g.dx + out_at + mine * K * g.d, driven, t + row < length, p.left);
                    store_row(g.ddelta + out_at + mine * K * g.d, passed, t + row < length, p.left);
                }
                lay(partial + sub * SUB * LINE, sums);
            }
            ahead_steps_done();
        }
        buffer ^= 1;
        stage.put(shared.B[buffer], shared.C[buffer]);
        BARRIER();
        if (!LOCAL) {
            const int inside = (length - t < TILE ? length - t : TILE) * 2 * N;
            UNROLL for (int e = 4 * me; e < TILE * 2 * N; e += 4 * THREADS) {
                float sum[4], own[4];
                const int at = e / (2 * N) * LINE + e % (2 * N);
                read<4>(shared.partial[0] + at, sum);
                UNROLL for (int w = 1; w < COPIES; w++) {
                    read<4>(shared.partial[w] + at, own);
                    UNROLL for (int i = 0; i < 4; i++) sum[i] += own[i];
                }
                if (e < inside) write<4>(partial_at + e, sum);
            }
            partial_at -= TILE * 2 * N;
        }
        out_at -= TILE * g.d;
        t -= TILE;
    }
    if (LOCAL || (g.phase == 1 && chunk == g.chunks - 1)) leave(g.states, g.steps, g.chunks, g.d, chunk, p, adjoint, total);
    if (!LOCAL) {
        const i64 part = in_turn ? b : b * g.chunks + chunk;
        UNROLL for (int j = 0; j < CH; j++) {
            UNROLL for (int s = 0; s < S; s++) sum_A[j][s] *= LN2;
            UNROLL for (int m = 1; m < K; m *= 2) {
                sum_skip[j] += SWAP(sum_skip[j], m * KSTRIDE);
                sum_bias[j] += SWAP(sum_bias[j], m * KSTRIDE);
            }
            if (p.k == 0 && j < p.left) {
                float* to_skip = g.dskip + part * g.d + p.channel + j;
                float* to_bias = g.dbias + part * g.d + p.channel + j;
                if (g.dskip) *to_skip = follows ? *to_skip + sum_skip[j] : sum_skip[j];
                if (g.dbias) *to_bias = follows ? *to_bias + sum_bias[j] : sum_bias[j];
            }
        }
        if (follows) {
            float before[CH][S];
            load_states(g.dA, part, g.d, p, before);
            UNROLL for (int j = 0; j < CH; j++)
                UNROLL for (int s = 0; s < S; s++) sum_A[j][s] += before[j][s];
        }
        store_states(g.dA, part, g.d, p, sum_A);
        if (in_turn && chunk > 0) store_states(g.states, b, g.d, p, adjoint);
        if (chunk == 0 && g.dinitial) store_states(g.dinitial, b, g.d, p, adjoint);
    }
}

// Four neighbouring numbers of dB and dC (rows, N) from the partial sums of all groups, always in the same order.
__device__ __forceinline__ void fold(const float* partial, BT* dB, CT* dC, i64 groups, i64 size, i64 e) {
    float sum[4] = {};
    _Pragma("unroll 8") for (i64 i = 0; i < groups; i++) {
        float own[4];
        read<4>(partial + i * size + e, own);
        UNROLL for (int v = 0; v < 4; v++) sum[v] += own[v];
    }
    const i64 row = e / (2 * N);
    const int n = (int)(e % (2 * N));
    UNROLL for (int v = 0; v < 4; v++) {
        if (n < N) {
            down(sum[v], dB[row * N + n + v]);
        } else {
            down(sum[v], dC[row * N + n - N + v]);
        }
    }
}

// phase 0: no chunks. 1: the last chunk whole and the others but the first LOCAL. 2: all chunks but the last.
// 3: all chunks in turn: the last of every channel before any other, each block going on where another left its
// channels. More channels than fit on the GPU at once then end together, and what the groups of channels have summed
// of a chunk is folded by the last of them, while it is still near.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) scan_backward(const Arguments g) {
    SHARED(Shared, shared);
    const i64 groups = (g.d + BLOCK_CHANNELS - 1) / BLOCK_CHANNELS;
    if (threadIdx.x == 0) {
        // in the order in which they begin: who waits for a block with an earlier turn waits for one that runs
        const i64 index = g.phase == 3 ? take(g.begun) : blockIdx.x;
        const i64 rest = index / groups, group = index - rest * groups;
        i64 b = rest, chunk = 0;
        if (g.phase == 3) {
            const i64 taken = rest / g.batch;
            b = rest - taken * g.batch;
            chunk = g.chunks - 1 - taken;
            wait_for(g.turns + b * groups + group, (int)taken);
        } else if (g.phase) {
            const i64 slots = g.chunks - 1;
            b = rest / slots;
            chunk = rest - b * slots + (g.phase == 1);
        }
        shared.group = (int)group;
        shared.b = (int)b;
        shared.chunk = (int)chunk;
    }
    BARRIER();
    i64 group = shared.group, b = shared.b, chunk = shared.chunk;
    if (g.phase == 1 && chunk < g.chunks - 1) {
        walk<true>(g, shared, group * BLOCK_CHANNELS, chunk, b);
        return;
    }
    walk<false>(g, shared, group * BLOCK_CHANNELS, chunk, b);
    if (g.phase < 3) return;
    group = shared.group;
    b = shared.b;
    chunk = shared.chunk;
    BARRIER();
    if (threadIdx.x == 0) {
        take(g.turns + b * groups + group);
        shared.before = take(g.done + b * g.chunks + chunk);
    }
    BARRIER();
    if (shared.before < groups - 1) return;
    const i64 begin = chunk * g.chunk_tiles * TILE, stop = begin + g.chunk_tiles * TILE;
    const i64 to = (b * g.length + (stop < g.length ? stop : g.length)) * 2 * N;
    for (i64 e = (b * g.length + begin) * 2 * N + threadIdx.x * 4; e < to; e += THREADS * 4)
        fold(g.partial, g.dB, g.dC, groups, g.batch * g.length * 2 * N, e);
}

struct FoldArguments {
    const float* partial;
    BT* dB;
    CT* dC;
    const float* dA_parts;
    const float* dskip_parts;
    const float* dbias_parts;
    float* dA;
    float* dskip;
    float* dbias;
    i64 groups, rows, parts, d;
};

constexpr int COLUMNS = 32, SLICES = 256 / COLUMNS;

// Sums over parts of V neighbouring columns a thread, of COLUMNS threads a block; the others take other parts.
template <int V>
__device__ __forceinline__ void total(Row<float, 4> (&shared)[SLICES][COLUMNS], const float* from, float* to,
                                      i64 block, i64 width, i64 parts) {
    const int slice = threadIdx.x / COLUMNS, column = threadIdx.x % COLUMNS;
    const i64 at = (block * COLUMNS + column) * V;
    float sum[V] = {};
    if (at < width) {
        _Pragma("unroll 4") for (i64 i = slice; i < parts; i += SLICES) {
            float own[V];
            read<V>(from + i * width + at, own);
            UNROLL for (int v = 0; v < V; v++) sum[v] += own[v];
        }
    }
    write<V>(shared[slice][column].v, sum);
    BARRIER();
    if (slice == 0 && at < width) {
        for (int i = 1; i < SLICES; i++) {
            float own[V];
            read<V>(shared[i][column].v, own);
            UNROLL for (int v = 0; v < V; v++) sum[v] += own[v];
        }
        write<V>(to + at, sum);
    }
}

// dA, dskip and dbias from the parts of all chunks, always in the same order; then dB and dC (rows, N).
extern "C" __global__ void __launch_bounds__(256) scan_fold(const FoldArguments g) {
    __shared__ Row<float, 4> shared[SLICES][COLUMNS];
    const i64 wide = (g.d * N + COLUMNS * 4 - 1) / (COLUMNS * 4), narrow = (g.d + COLUMNS - 1) / COLUMNS;
    const i64 block = blockIdx.x;
    if (block < wide) {
        total<4>(shared, g.dA_parts, g.dA, block, g.d * N, g.parts);
    } else if (block < wide + narrow) {
        if (g.dskip) total<1>(shared, g.dskip_parts, g.dskip, block - wide, g.d, g.parts);
    } else if (block < wide + 2 * narrow) {
        if (g.dbias) total<1>(shared, g.dbias_parts, g.dbias, block - wide - narrow, g.d, g.parts);
    } else {
        const i64 e = ((block - wide - 2 * narrow) * 256 + threadIdx.x) * 4, size = g.rows * 2 * N;
        if (e < size) fold(g.partial, g.dB, g.dC, g.groups, size, e);
    }
}

#endif
