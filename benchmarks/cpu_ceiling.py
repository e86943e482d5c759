"""What this machine's vector units can do: multiply-adds on registers, compiled here with -march=native."""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

_SOURCE = """
#include <chrono>
#include <thread>
#include <vector>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSums = 24;
#else
constexpr int kBytes = 32, kSums = 12;
#endif
typedef float V __attribute__((vector_size(kBytes)));
constexpr long kRounds = 3000000;
#define EACH _Pragma("GCC unroll 24") for (int i = 0; i < kSums; ++i)
template <bool kPairs> void work() {
  V sums[kSums], a = V{} + 1.0001f, b = V{} + 0.9999f;
  asm volatile("" : "+x"(a), "+x"(b));
  EACH sums[i] = V{} + float(i);
  for (long r = 0; r < kRounds; ++r) {
#if defined(__AVX512BF16__)
    if (kPairs) { EACH sums[i] = (V)_mm512_dpbf16_ps((__m512)sums[i], (__m512bh)a, (__m512bh)b); }
    else
#endif
    EACH sums[i] += a * b;
    EACH asm volatile("" : "+v"(sums[i]));
  }
}
extern "C" double ceiling(int threads, int pairs) {
  double best = 0;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<std::thread> all;
    for (int i = 0; i < threads; ++i) all.emplace_back(pairs ? work<true> : work<false>);
    for (auto& t : all) t.join();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = 2.0 * threads * kRounds * kSums * (kBytes / 4) * (pairs ? 2 : 1) / seconds;
    best = rate > best ? rate : best;
  }
  return best;
}
extern "C" int has_pairs() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}
"""


@cache
def _library() -> ctypes.CDLL:
    folder = Path(tempfile.mkdtemp())
    (folder / "ceiling.cpp").write_text(_SOURCE)
    flags = ["-O2", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread"]
    command = ["c++", *flags, str(folder / "ceiling.cpp"), "-o", str(folder / "ceiling.so")]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(folder / "ceiling.so"))
    found.ceiling.restype = ctypes.c_double
    return found


def ceiling(dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the best of five runs. bfloat16 without its own instructions has float32's ceiling."""
    library = _library()
    pairs = dtype == torch.bfloat16 and library.has_pairs()
    return library.ceiling(threads, int(pairs))
