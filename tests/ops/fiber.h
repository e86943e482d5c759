// What the emulators share: CUDA's words for a C++ compiler, the start of a fiber, the bits of a number.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EMULATED
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
    unsigned x;
};

// a thread that has not begun: it runs `enter` on the stack that it has; `runs` is what it waits for, nothing
template <class Fiber, class Wait>
void prepare(Fiber& fiber, void (*enter)(), Wait runs) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    fiber.wait = runs;
    fiber.parity = 0;
    makecontext(&fiber.context, enter, 0);
}

inline float __uint_as_float(unsigned v) {
    float f;
    memcpy(&f, &v, 4);
    return f;
}
inline unsigned __float_as_uint(float v) {
    unsigned u;
    memcpy(&u, &v, 4);
    return u;
}
