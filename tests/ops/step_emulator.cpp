// Runs step.cu on a CPU: every thread of every block is a fiber, so that blocks can read each other's shared memory
// and wait for one another. A wait that nobody ends, a misaligned access or lanes that diverge at a product abort.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define FORGET(i)
#define SHARED_MEMORY(name) char* name = shared[blockIdx.x].data()

enum Wait { RUNS, POLLS, AT_WARP, AT_BLOCK, AT_CLUSTER, DONE };
struct Index {
    unsigned x;
};
struct Copy {
    char* to;
    const char* from;
    int bytes;
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait;
    unsigned parity;
    unsigned words[2][6];
    std::vector<Copy> copies, stores;
};
#ifndef WARPS
#define WARPS 8
#endif
static const int EMULATED_THREADS = 32 * WARPS;
static std::vector<Fiber> fibers;
static std::vector<std::vector<char>> shared;
static ucontext_t scheduler;
static Index threadIdx, blockIdx;
static const void* parameters;

static Fiber& me() { return fibers[blockIdx.x * EMULATED_THREADS + threadIdx.x]; }
static Fiber* warp() { return &fibers[blockIdx.x * EMULATED_THREADS + threadIdx.x / 32 * 32]; }
static void yield(Wait why) {
    me().wait = why;
    swapcontext(&me().context, &scheduler);
}
static void aligned(const void* p, int bytes) {
    if ((uintptr_t)p % bytes) {
        fprintf(stderr, "an access of %d bytes is not aligned\n", bytes);
        abort();
    }
}
static void BARRIER() { yield(AT_BLOCK); }
static void WARP_BARRIER() { yield(AT_WARP); }
static void cluster_barrier() { yield(AT_CLUSTER); }
static unsigned rank_in_cluster() { return blockIdx.x % CS; }
static float SWAP(float value, int mask) {
    unsigned side = me().parity++ & 1;
    memcpy(me().words[side], &value, 4);
    yield(AT_WARP);
    float other;
    memcpy(&other, warp()[threadIdx.x % 32 ^ mask].words[side], 4);
    return other;
}
static float half_of(unsigned word, int i) {
    unsigned u = i ? word & 0xffff0000u : word << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static void multiply(float* d, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    unsigned side = me().parity++ & 1, all[6] = {a0, a1, a2, a3, b0, b1}, lane = threadIdx.x % 32;
    memcpy(me().words[side], all, 24);
    yield(AT_WARP);
    Fiber* w = warp();
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) {
            unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, part = k % 8 / 2;
            d[i] += half_of(w[row * 4 + part].words[side][i / 2 + k / 8 * 2], k % 2) *
                    half_of(w[column * 4 + part].words[side][4 + k / 8], k % 2);
        }
}
template <class T>
static T* far(T* p, unsigned rank) {
    const char* mine = shared[blockIdx.x].data();
    return (T*)(shared[blockIdx.x / CS * CS + rank].data() + ((const char*)p - mine));
}
static void load(void* to, const void* at, bool live, int bytes) {
    aligned(at, bytes);
    memset(to, 0, bytes);
    if (live) memcpy(to, at, bytes);
}
static void weights16(unsigned* to, const void* at, bool live) { load(to, at, live, 16); }
template <int BYTES>
static void copy_later(void* to, const void* from, bool live) {
    aligned(to, BYTES);
    aligned(from, BYTES);
    memset(to, 0xff, BYTES);
    me().copies.push_back({(char*)to, live ? (const char*)from : nullptr, BYTES});
}
static void wait_copies() {
    for (Copy& c : me().copies) {
        memset(c.to, 0, c.bytes);
        if (c.from) memcpy(c.to, c.from, c.bytes);
    }
    me().copies.clear();
}
// the engine's copies arrive when they are waited for, and not before
struct Engine {
    unsigned expected, begun, rounds;
    std::vector<Copy> copies;
};
static std::map<const void*, Engine> engines;
typedef unsigned long long Barrier;
static void open_barrier(Barrier* barrier) { engines[barrier] = {}; }
static void expect(Barrier* barrier, unsigned bytes) { engines.at(barrier).expected += bytes; }
static void copy_by_engine(void* to, const void* from, unsigned bytes, Barrier* barrier) {
    aligned(to, 16);
    aligned(from, 16);
    if (bytes % 16) abort();
    memset(to, 0xff, bytes);
    Engine& engine = engines.at(barrier);
    engine.begun += bytes;
    engine.copies.push_back({(char*)to, (const char*)from, (int)bytes});
}
// the engine reads what it stores when it is waited for, and not before
static void store_by_engine(void* to, const void* from, unsigned bytes) {
    aligned(to, 16);
    aligned(from, 16);
    me().stores.push_back({(char*)to, (const char*)from, (int)bytes});
}
static void before_engine() {}
static void wait_stores() {
    for (Copy& c : me().stores) memcpy(c.to, c.from, c.bytes);
    me().stores.clear();
}
static void arrived(Barrier* barrier, unsigned round) {
    Engine& engine = engines.at(barrier);
    while (engine.rounds <= round) {
        if (engine.expected && engine.begun == engine.expected) {
            for (Copy& c : engine.copies) memcpy(c.to, c.from, c.bytes);
            engine = {0, 0, engine.rounds + 1};
        } else {
            yield(POLLS);
        }
    }
    // what a GPU knows of a round is whether it is odd
    if (engine.rounds != round + 1) {
        fprintf(stderr, "a barrier is one or more rounds ahead\n");
        abort();
    }
}
static void after_earlier() {}
static void let_next() {}
static void arrive(unsigned* counter) { ++*counter; }
static unsigned arrive_last(unsigned* counter) { return (*counter)++; }
static void await(const unsigned* counter, unsigned target) {
    while (*counter < target) yield(POLLS);
}
static unsigned pack(float low, float high) {
    unsigned words[2];
    memcpy(&words[0], &low, 4);
    memcpy(&words[1], &high, 4);
    for (unsigned& w : words) w = (w & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
    return words[0] | words[1] << 16;
}
static float exp2_fast(float v) { return exp2f(v); }
static float __uint_as_float(unsigned v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
static unsigned __float_as_uint(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    return u;
}
struct F4;
struct U2;
static F4 far4(const float* p, unsigned rank);
static float far1(const float* p, unsigned rank) { return *far(p, rank); }
static U2 far_bytes8(const void* p, unsigned rank);
static F4 common4(const float* at);
static U2 common8(const void* at);
static float common1(const float* at) { return *at; }
static unsigned short common_half(const void* at) { return *(const unsigned short*)at; }

#include SOURCE

static F4 far4(const float* p, unsigned rank) { return aligned(p, 16), *(const F4*)far(p, rank); }
static U2 far_bytes8(const void* p, unsigned rank) { return aligned(p, 8), *(const U2*)far(p, rank); }
static F4 common4(const float* at) { return aligned(at, 16), *(const F4*)at; }
static U2 common8(const void* at) { return aligned(at, 8), *(const U2*)at; }

static void enter_fiber() {
#ifdef PRODUCT
    product(*(const Arguments*)parameters);
#elif WHOLE
    steps(*(const Arguments*)parameters);
#else
    middle_step(*(const Arguments*)parameters);
#endif
    yield(DONE);
}
static bool all_at(unsigned begin, unsigned count, Wait wait) {
    for (unsigned i = begin; i < begin + count; i++)
        if (fibers[i].wait != wait) return false;
    return true;
}
static bool release(unsigned begin, unsigned count, Wait wait) {
    if (!all_at(begin, count, wait)) return false;
    for (unsigned i = begin; i < begin + count; i++) fibers[i].wait = RUNS;
    return true;
}

// `backwards`: the last block, warp and lane first, which no correct kernel can tell
extern "C" int emulate(long blocks, const void* words, int backwards, int bytes) {
    unsigned count = blocks * EMULATED_THREADS, finished = 0;
    if (bytes != END) return 1;
    parameters = words;
    fibers.resize(count);
    shared.assign(blocks, std::vector<char>(bytes + 16, (char)0xff));
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 16);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.wait = RUNS;
        fiber.parity = 0;
        makecontext(&fiber.context, enter_fiber, 0);
    }
    while (finished < count) {
        bool moved = false;
        finished = 0;
        for (unsigned w = 0; w < count; w += 32) {
            unsigned first = backwards ? count - 32 - w : w;
            do {
                for (unsigned i = 0; i < 32; i++) {
                    unsigned at = first + (backwards ? 31 - i : i);
                    Wait wait = fibers[at].wait;
                    if (wait != RUNS && wait != POLLS) continue;
                    blockIdx.x = at / EMULATED_THREADS;
                    threadIdx.x = at % EMULATED_THREADS;
                    swapcontext(&scheduler, &fibers[at].context);
                    moved |= fibers[at].wait != POLLS;
                }
            } while (release(first, 32, AT_WARP));
            finished += all_at(first, 32, DONE) ? 32 : 0;
        }
        for (unsigned b = 0; b < count; b += EMULATED_THREADS) moved |= release(b, EMULATED_THREADS, AT_BLOCK);
        for (unsigned b = 0; b < count; b += CS * EMULATED_THREADS)
            moved |= release(b, CS * EMULATED_THREADS, AT_CLUSTER);
        if (!moved && finished < count) {
            fprintf(stderr, "the blocks wait for one another\n");
            abort();
        }
    }
    return 0;
}

extern "C" int end() { return END; }
