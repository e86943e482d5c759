// Runs step.cu on a CPU: every thread of every block is a fiber, so that blocks can wait for one another. A wait that
// nobody ends, a misaligned access or lanes that diverge at a product abort.
#include "fiber.h"

#include <algorithm>
#include <cstdint>
#include <map>

#define __grid_constant__
#define SHARED_MEMORY(name) char* name = shared[blockIdx.x].data()

using std::min;
typedef unsigned long long Word;
enum Wait { RUNS, POLLS, AT_WARP, AT_MOST, AT_BLOCK, DONE };
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
    const void* addresses[2];
    unsigned words[2][6];
};
static const int MULTIPLIERS = 512, ALL = MULTIPLIERS + 32;
static std::vector<Fiber> fibers;
static std::vector<std::vector<char>> shared;
static ucontext_t scheduler;
static Index threadIdx, blockIdx;
static const void* parameters;

static Fiber& me() { return fibers[blockIdx.x * ALL + threadIdx.x]; }
static Fiber* warp_of_me() { return &fibers[blockIdx.x * ALL + threadIdx.x / 32 * 32]; }
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
static void BARRIER() { yield(AT_MOST); }
static void WHOLE_BARRIER() { yield(AT_BLOCK); }
static void WARP_BARRIER() { yield(AT_WARP); }
static void LOOK_AGAIN() { yield(POLLS); }
static float SWAP(float value, int mask) {
    unsigned side = me().parity++ & 1;
    memcpy(me().words[side], &value, 4);
    yield(AT_WARP);
    float other;
    memcpy(&other, warp_of_me()[threadIdx.x % 32 ^ mask].words[side], 4);
    return other;
}
static float half_of(unsigned word, int i) {
    return __uint_as_float(i ? word & 0xffff0000u : word << 16);
}
static void multiply(float* d, const unsigned* a, const unsigned* b) {
    unsigned side = me().parity++ & 1, all[6] = {a[0], a[1], a[2], a[3], b[0], b[1]}, lane = threadIdx.x % 32;
    memcpy(me().words[side], all, 24);
    yield(AT_WARP);
    Fiber* w = warp_of_me();
    for (unsigned i = 0; i < 4; i++)
        for (unsigned k = 0; k < 16; k++) {
            unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, part = k % 8 / 2;
            d[i] += half_of(w[row * 4 + part].words[side][i / 2 + k / 8 * 2], k % 2) *
                    half_of(w[column * 4 + part].words[side][4 + k / 8], k % 2);
        }
}
// each matrix: 8 rows of 16 bytes, whose addresses eight lanes have
static void matrices(unsigned* to, const void* at, int count) {
    unsigned side = me().parity++ & 1, lane = threadIdx.x % 32;
    aligned(at, 16);
    me().addresses[side] = at;
    yield(AT_WARP);
    for (int i = 0; i < count; i++)
        memcpy(&to[i], (const char*)warp_of_me()[8 * i + lane / 4].addresses[side] + lane % 4 * 4, 4);
}
static void matrices4(unsigned* to, const void* at) { matrices(to, at, 4); }
static void matrices2(unsigned* to, const void* at) { matrices(to, at, 2); }
// a barrier's round ends when all have arrived and all bytes are under way; they come when they are waited for
struct Barrier {
    unsigned count, missing, expected, begun, rounds;
    std::vector<Copy> copies;
};
static std::map<const void*, Barrier> barriers;
static void open_barrier(Word* at, unsigned count) { barriers[at] = {count, count, 0, 0, 0, {}}; }
static void barriers_opened() {}
static void arrive(Word* at) {
    Barrier& barrier = barriers.at(at);
    if (barrier.missing-- == 0) fprintf(stderr, "too many arrive\n"), abort();
}
static void expect(Word* at, unsigned bytes) {
    barriers.at(at).expected += bytes;
    arrive(at);
}
static void copy_by_engine(void* to, const void* from, unsigned bytes, Word* at) {
    aligned(to, 16);
    aligned(from, 16);
    if (bytes % 16) abort();
    memset(to, 0xff, bytes);
    Barrier& barrier = barriers.at(at);
    barrier.begun += bytes;
    barrier.copies.push_back({(char*)to, (const char*)from, (int)bytes});
}
static void passed(Word* at, unsigned round) {
    Barrier& barrier = barriers.at(at);
    while (barrier.rounds <= round) {
        if (barrier.missing == 0 && barrier.begun == barrier.expected) {
            for (Copy& c : barrier.copies) memcpy(c.to, c.from, c.bytes);
            barrier = {barrier.count, barrier.count, 0, 0, barrier.rounds + 1, {}};
        } else {
            yield(POLLS);
        }
    }
    // what a GPU knows of a round is whether it is odd
    if (barrier.rounds != round + 1) fprintf(stderr, "a barrier is rounds ahead\n"), abort();
}
static bool chosen(int lane) { return lane == 0; }
static void done_reading() {}
static void send(Word* to, Word word) { aligned(to, 8), *to = word; }
static Word look(const Word* at) { return aligned(at, 8), *at; }
static unsigned pack(float low, float high) {
    unsigned words[2];
    memcpy(&words[0], &low, 4);
    memcpy(&words[1], &high, 4);
    for (unsigned& w : words) w = (w & 0x7fffffffu) > 0x7f800000u ? 0x7fff : (w + 0x7fff + (w >> 16 & 1)) >> 16;
    return words[0] | words[1] << 16;
}
#define EXP(v) expf(v)

#include SOURCE

static void enter_fiber() {
    steps(*(const Arguments*)parameters);
    yield(DONE);
}
static bool release(unsigned begin, unsigned count, Wait wait) {
    for (unsigned i = begin; i < begin + count; i++)
        if (fibers[i].wait != wait) return false;
    for (unsigned i = begin; i < begin + count; i++) fibers[i].wait = RUNS;
    return true;
}

// `backwards`: the last block, warp and lane first, which no correct kernel can tell
extern "C" int emulate(long blocks, const void* words, int backwards, int bytes) {
    unsigned count = blocks * ALL, finished = 0;
    if (bytes != END) return 1;
    parameters = words;
    barriers.clear();
    fibers.resize(count);
    shared.assign(blocks, std::vector<char>(bytes + 16, (char)0xff));
    for (Fiber& fiber : fibers) {
        fiber.stack.resize(1 << 15);
        prepare(fiber, enter_fiber, RUNS);
    }
    // a thread that saw one of the words that it waits for may wait for the next
    int idle = 0;
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
                    blockIdx.x = at / ALL;
                    threadIdx.x = at % ALL;
                    swapcontext(&scheduler, &fibers[at].context);
                    moved |= fibers[at].wait != POLLS;
                }
            } while (release(first, 32, AT_WARP));
            for (unsigned i = first; i < first + 32; i++) finished += fibers[i].wait == DONE;
        }
        for (unsigned b = 0; b < count; b += ALL) {
            moved |= release(b, MULTIPLIERS, AT_MOST);
            moved |= release(b, ALL, AT_BLOCK);
        }
        idle = moved ? 0 : idle + 1;
        if (idle > 100) fprintf(stderr, "the threads wait for one another\n"), abort();
    }
    return 0;
}
