// Runs cross_entropy.cu on a CPU: every CUDA thread of a cluster of two blocks is a fiber, every barrier and shuffle
// a switch to the next one. Lanes that meet at different places, which would hang a GPU, abort.
#include "fiber.h"

#define CLUSTER

struct uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
enum Wait { RUNS, AT_WARP, AT_CLUSTER, DONE };
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Wait wait;
    unsigned parity;
};
constexpr int ALL = 2 * THREADS;
static Fiber fibers[ALL];
static float exchange[2][ALL];
static ucontext_t scheduler;
static int current;
static Index threadIdx, blockIdx;
static unsigned cluster_index;

static void enter(int fiber) {
    current = fiber;
    threadIdx.x = fiber % THREADS;
    blockIdx.x = 2 * cluster_index + fiber / THREADS;
}
static void yield(Wait why) {
    int me = current;
    fibers[me].wait = why;
    swapcontext(&fibers[me].context, &scheduler);
    enter(me);
}
static float SWAP(float value, int mask) {
    int me = current;
    unsigned side = fibers[me].parity++ & 1;
    exchange[side][me] = value;
    yield(AT_WARP);
    return exchange[side][me ^ mask];
}
// a barrier in two halves: a fiber that waits goes on when all have arrived
static int arrived[ALL], waited[ALL];
static void ARRIVE() { arrived[current]++; }
static void WAIT() {
    waited[current]++;
    yield(AT_CLUSTER);
}
#define LOG(value) logf(value)
#define EXP(value) expf(value)
static float ex2(float v) { return exp2f(v); }
static unsigned half_of_cluster() { return current / THREADS; }
static unsigned largest2(unsigned a, unsigned b) {
    unsigned low = __uint_as_float(a << 16) >= __uint_as_float(b << 16) ? a : b;
    unsigned high = __uint_as_float(a & 0xffff0000u) >= __uint_as_float(b & 0xffff0000u) ? a : b;
    return (low & 0xffffu) | (high & 0xffff0000u);
}
static unsigned rounded(float v) {
    unsigned u = __float_as_uint(v);
    return (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
}
static unsigned down2(float low, float high) { return rounded(low) | rounded(high) << 16; }
// copies arrive when they are waited for, and not before
struct Copy {
    uint4* to;
    const void* from;
};
static std::vector<Copy> open_group[ALL];
static std::vector<std::vector<Copy>> groups[ALL];
static void bring(uint4* to, const void* from) {
    memset(to, 0xff, 16);
    open_group[current].push_back({to, from});
}
static void brought() {
    groups[current].push_back(open_group[current]);
    open_group[current].clear();
}
template <int N>
static void await() {
    auto& mine = groups[current];
    while ((int)mine.size() > N) {
        for (Copy& copy : mine[0]) memcpy(copy.to, copy.from, 16);
        mine.erase(mine.begin());
    }
}
static char* memories[2];
static void tell(float2* at, float first, float second) {
    size_t place = (char*)at - memories[half_of_cluster()];
    for (char* memory : memories) *(float2*)(memory + place) = {first, second};
}
#define SHARED(type, name) \
    static type blocks[2]; \
    for (int i = 0; i < 2; i++) memories[i] = (char*)&blocks[i]; \
    type& name = blocks[half_of_cluster()]

#include SOURCE

static Arguments arguments;
static void body() {
    enter(current);
    cross_entropy(arguments);
    yield(DONE);
}

static void run_cluster(bool backwards) {
    for (int i = 0; i < ALL; i++) {
        Fiber& fiber = fibers[i];
        fiber.stack.resize(1 << 16);
        prepare(fiber, body, RUNS);
        arrived[i] = waited[i] = 0;
        groups[i].clear();
        open_group[i].clear();
    }
    for (;;) {
        int count[4] = {0, 0, 0, 0};
        for (int i = 0; i < ALL; i++) {
            int me = backwards ? ALL - 1 - i : i;
            if (fibers[me].wait != RUNS) continue;
            enter(me);
            swapcontext(&scheduler, &fibers[me].context);
        }
        for (Fiber& fiber : fibers) count[fiber.wait]++;
        if (count[DONE] == ALL) return;
        bool moved = false;
        int least = arrived[0];
        for (int there : arrived) least = there < least ? there : least;
        for (int i = 0; i < ALL; i++) {
            if (fibers[i].wait != AT_CLUSTER || least < waited[i]) continue;
            fibers[i].wait = RUNS;
            moved = true;
        }
        for (int warp = 0; warp < ALL / 32; warp++) {
            int there = 0;
            for (int lane = 0; lane < 32; lane++) there += fibers[32 * warp + lane].wait == AT_WARP;
            if (there == 0) continue;
            if (there < 32) fprintf(stderr, "lanes of warp %d are apart\n", warp), abort();
            for (int lane = 0; lane < 32; lane++) fibers[32 * warp + lane].wait = RUNS;
            moved = true;
        }
        if (!moved) fprintf(stderr, "threads wait for each other\n"), abort();
    }
}

extern "C" void emulate(long blocks, const void* words, int backwards) {
    memcpy(&arguments, words, sizeof arguments);
    for (cluster_index = 0; cluster_index < blocks / 2; cluster_index++) run_cluster(backwards);
}
