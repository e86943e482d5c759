// Runs scan.cu on a CPU: every CUDA thread is a fiber, every barrier and shuffle a switch to the next one.
// Lanes that meet at different barriers, which would hang or corrupt a GPU, abort.
#include "fiber.h"

#define __shared__ static

enum Wait { RUNS, AT_WARP, AT_BLOCK, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait;
    unsigned parity;
};
static std::vector<Fiber> fibers;
static std::vector<float> exchange[2];
static ucontext_t scheduler;
static Index threadIdx, blockIdx;
static void (*body)(const void*);
static const void* parameters;

static void yield(Wait why) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.wait = why;
    swapcontext(&fiber.context, &scheduler);
}
static void BARRIER() { yield(AT_BLOCK); }
static void WARP_BARRIER() { yield(AT_WARP); }
static float SWAP(float value, int mask) {
    unsigned me = threadIdx.x, side = fibers[me].parity++ & 1;
    exchange[side][me] = value;
    yield(AT_WARP);
    return exchange[side][me ^ mask];
}
// blocks run one after the other: what a block waits for was done by those before it, or never will be
static int take(int* at) { return (*at)++; }
static void wait_for(const int* at, int count) {
    if (*at < count) {
        fprintf(stderr, "a block waits for one that has a later turn\n");
        abort();
    }
}
static std::vector<float> factors[2];
static float tf32(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    u &= 0xffffe000u;
    memcpy(&v, &u, 4);
    return v;
}
static void product(float (&d)[4], const float (&a)[4], float b0, float b1) {
    unsigned me = threadIdx.x, warp = me / 32 * 32, lane = me % 32, side = fibers[me].parity++ & 1;
    for (int i = 0; i < 4; i++) factors[side][6 * me + i] = tf32(a[i]);
    factors[side][6 * me + 4] = tf32(b0);
    factors[side][6 * me + 5] = tf32(b1);
    yield(AT_WARP);
    const float* all = &factors[side][6 * warp];
    for (int c = 0; c < 4; c++)
        for (int k = 0; k < 8; k++)
            d[c] += all[6 * (lane / 4 * 4 + k % 4) + c / 2 + k / 4 * 2] *
                    all[6 * ((lane % 4 * 2 + c % 2) * 4 + k % 4) + 4 + k / 4];
}
static float ex2(float v) { return exp2f(v); }
static float rcp(float v) { return 1.0f / v; }
static unsigned load_half(const void* at, bool live) {
    unsigned short half = 0;
    if (live) memcpy(&half, at, 2);
    return half;
}
template <int W>
static void load_words(const void* at, bool live, unsigned* w) {
    memset(w, 0, 4 * W);
    if (live) memcpy(w, at, 4 * W);
}
static void store_half(void* at, bool live, unsigned w) {
    unsigned short half = (unsigned short)w;
    if (live) memcpy(at, &half, 2);
}
template <int W>
static void store_words(void* at, bool live, const unsigned* w) {
    if (live) memcpy(at, w, 4 * W);
}
// copies arrive when they are waited for, and not before
struct Copy {
    float* to;
    const float* from;
    int width;
};
static std::vector<Copy> pending[1024];
template <int W>
static void copy_later(float* to, const float* from, bool live) {
    for (int i = 0; i < W; i++) to[i] = NAN;
    pending[threadIdx.x].push_back({to, live ? from : nullptr, W});
}
static void wait_copies() {
    for (Copy& copy : pending[threadIdx.x])
        for (int i = 0; i < copy.width; i++) copy.to[i] = copy.from ? copy.from[i] : 0.0f;
    pending[threadIdx.x].clear();
}

#include SOURCE

static void enter_fiber() {
    body(parameters);
    yield(DONE);
}

static void run_block(unsigned threads, bool backwards) {
    for (unsigned i = 0; i < threads; i++) prepare(fibers[i], enter_fiber, RUNS);
    for (unsigned finished = 0; finished < threads;) {
        finished = 0;
        for (unsigned w = 0; w < threads / 32; w++) {
            unsigned warp = (backwards ? threads / 32 - 1 - w : w) * 32;
            while (fibers[warp].wait == RUNS || fibers[warp].wait == AT_WARP) {
                for (unsigned i = 0; i < 32; i++) {
                    threadIdx.x = warp + (backwards ? 31 - i : i);
                    swapcontext(&scheduler, &fibers[threadIdx.x].context);
                }
                for (unsigned i = 1; i < 32; i++) {
                    if (fibers[warp + i].wait != fibers[warp].wait) {
                        fprintf(stderr, "lanes 0 and %u of a warp wait at different barriers\n", i);
                        abort();
                    }
                }
            }
            finished += fibers[warp].wait == DONE ? 32 : 0;
        }
        for (unsigned i = 0; i < threads; i++)
            if (fibers[i].wait == AT_BLOCK) fibers[i].wait = RUNS;
    }
}

static void call(const char* kernel) {
#ifdef FORWARD
    if (!strcmp(kernel, "scan_forward")) body = [](const void* p) { scan_forward(*(const Arguments*)p); };
#else
    if (!strcmp(kernel, "scan_backward")) body = [](const void* p) { scan_backward(*(const Arguments*)p); };
    if (!strcmp(kernel, "scan_fold")) body = [](const void* p) { scan_fold(*(const FoldArguments*)p); };
#endif
}

// `backwards`: the last warp, lane and block first, which no correct kernel can tell
extern "C" void emulate(const char* kernel, long blocks, unsigned threads, const void* words, int backwards) {
    parameters = words;
    call(kernel);
    fibers.resize(threads);
    for (Fiber& fiber : fibers) fiber.stack.resize(1 << 17);
    exchange[0].assign(threads, NAN);
    exchange[1].assign(threads, NAN);
    for (auto& side : factors) side.assign(6 * threads, NAN);
    for (long block = 0; block < blocks; block++) {
        blockIdx.x = (unsigned)(backwards ? blocks - 1 - block : block);
        run_block(threads, backwards);
    }
}
