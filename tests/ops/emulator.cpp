// Runs scan.cu on a CPU: every CUDA thread is a fiber, every barrier and shuffle a switch to the next one.
// Lanes that meet at different barriers, which would hang or corrupt a GPU, abort. A block that waits for others is
// laid aside while those after it begin.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <list>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

enum Wait { RUNS, AT_WARP, AT_BLOCK, AT_OTHERS, DONE };
struct Index {
    unsigned x;
};
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
static int take(int* at) { return (*at)++; }
static void wait_for(const int* at, int count) {
    while (*at < count) yield(AT_OTHERS);
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

struct alignas(16) Memory {
    char bytes[232448];
};
static Memory* memory;
#undef SHARED
#define SHARED(type, name) type& name = *reinterpret_cast<type*>(memory)

#include SOURCE

static void enter_fiber() {
    body(parameters);
    yield(DONE);
}

static void begin_block(unsigned threads) {
    fibers = std::vector<Fiber>(threads);
    memory = new Memory;
    memset(memory, 0xff, sizeof(Memory));
    for (auto& side : exchange) side.assign(threads, NAN);
    for (auto& side : factors) side.assign(6 * threads, NAN);
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 17);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.data();
        fiber.context.uc_stack.ss_size = fiber.stack.size();
        fiber.context.uc_link = nullptr;
        fiber.wait = RUNS;
        fiber.parity = 0;
        makecontext(&fiber.context, enter_fiber, 0);
    }
    for (auto& copies : pending) copies.clear();
}

// Whether a thread waits for what other blocks do, after all that do have been asked again.
static bool waits() {
    bool any = false;
    for (threadIdx.x = 0; threadIdx.x < fibers.size(); threadIdx.x++) {
        Fiber& fiber = fibers[threadIdx.x];
        if (fiber.wait == AT_OTHERS) swapcontext(&scheduler, &fiber.context);
        any |= fiber.wait == AT_OTHERS;
    }
    return any;
}

// Whether the block has ended; if not, it waits for others.
static bool run_block(bool backwards) {
    const unsigned threads = fibers.size();
    for (;;) {
        if (waits()) return false;
        unsigned finished = 0;
        for (Fiber& fiber : fibers)
            if (fiber.wait == AT_BLOCK) fiber.wait = RUNS;
        for (unsigned w = 0; w < threads / 32; w++) {
            unsigned warp = (backwards ? threads / 32 - 1 - w : w) * 32;
            while (fibers[warp].wait == RUNS || fibers[warp].wait == AT_WARP) {
                for (unsigned i = 0; i < 32; i++) {
                    threadIdx.x = warp + (backwards ? 31 - i : i);
                    swapcontext(&scheduler, &fibers[threadIdx.x].context);
                }
                for (unsigned i = 1; i < 32; i++) {
                    if (fibers[warp + i].wait != fibers[warp].wait && fibers[warp].wait != AT_OTHERS) {
                        fprintf(stderr, "lanes 0 and %u of a warp wait at different barriers\n", i);
                        abort();
                    }
                }
            }
            finished += fibers[warp].wait == DONE ? 32 : 0;
        }
        if (finished == threads) return true;
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

struct Aside {
    std::vector<Fiber> fibers;
    std::vector<float> exchange[2], factors[2];
    Memory* memory;
    Index blockIdx;
    void swap() {
        fibers.swap(::fibers);
        for (int i = 0; i < 2; i++) exchange[i].swap(::exchange[i]), factors[i].swap(::factors[i]);
        std::swap(memory, ::memory);
        std::swap(blockIdx, ::blockIdx);
    }
};

// `backwards`: the last warp, lane and block first, which no correct kernel can tell
extern "C" void emulate(const char* kernel, long blocks, unsigned threads, const void* words, int backwards) {
    parameters = words;
    call(kernel);
    std::list<Aside> aside;
    for (long block = 0; block < blocks || !aside.empty(); block++) {
        bool moved = block < blocks;
        if (moved) {
            blockIdx.x = (unsigned)(backwards ? blocks - 1 - block : block);
            begin_block(threads);
            if (run_block(backwards)) {
                delete memory;
            } else {
                aside.emplace_back();
                aside.back().swap();
            }
        }
        for (auto one = aside.begin(); one != aside.end();) {
            one->swap();
            const bool ended = run_block(backwards);
            one->swap();
            moved |= ended;
            if (ended) delete one->memory;
            one = ended ? aside.erase(one) : std::next(one);
        }
        if (!moved) {
            fprintf(stderr, "%zu blocks wait for each other\n", aside.size());
            abort();
        }
    }
}
