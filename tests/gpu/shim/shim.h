// Runs CUDA kernels on the processor: every thread of a block is a fiber that gives way at barriers and warp exchanges.
//
// With a seed, fibers take turns in shuffled orders and warps at speeds of their own, so a missing barrier shows as another
// result. A warp
// exchange that not all lanes reach, or a barrier that some threads skip, is reported, not waited for. `fetch` and `put`
// count the bytes that they move.
#pragma once
#define ORTHDION_SHIM
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
// Shared memory has a section of its own, so that every block can find it full of NaN.
#define __shared__ static __attribute__((section("shim_shared")))
#define __launch_bounds__(...)
#define DEVICE inline
#define COUNT_LOAD(bytes) (shim::loaded += (bytes))
#define COUNT_STORE(bytes) (shim::stored += (bytes))

struct Dim3 {
  unsigned x, y, z;
};
static Dim3 gridDim, blockDim, blockIdx, threadIdx;

extern "C" char __start_shim_shared[] __attribute__((weak)), __stop_shim_shared[] __attribute__((weak));

namespace shim {

enum State { READY, AT_BARRIER, AT_EXCHANGE, DONE };
constexpr size_t STACK = 64 << 10;

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  State state;
  bool begun;
  char* stack;
  void* fake = nullptr;  // the address sanitizer's own stack
};

static unsigned long long loaded, stored;
static std::vector<Fiber> fibers;
static jmp_buf scheduler;
static ucontext_t scheduler_context;
static int current, threads;
static void (*body)(void*);
static void* arguments;
static const char* trouble;
static double slots[2][64][32][4];  // what the lanes of each warp exchange; two sets, used in turn
static int parity[64][32];
#if defined(__SANITIZE_ADDRESS__)
static const void* main_bottom;
static size_t main_size;
static void* main_fake;
#endif

static void give_way(State state) {
  Fiber& f = fibers[current];
  f.state = state;
  int me = current;
  if (_setjmp(f.here) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(state == DONE ? nullptr : &f.fake, main_bottom, main_size);
#endif
    _longjmp(scheduler, 1);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fibers[me].fake, &main_bottom, &main_size);
#endif
  threadIdx = {(unsigned)me, 0, 0};
}

static void begin() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  body(arguments);
  give_way(DONE);
}

static void resume(int i) {
  current = i;
  threadIdx = {(unsigned)i, 0, 0};
  Fiber& f = fibers[i];
  if (_setjmp(scheduler) == 0) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&main_fake, f.stack, STACK);
#endif
    if (f.begun) _longjmp(f.here, 1);
    f.begun = true;
    setcontext(&f.start);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
}

static bool run_block(std::mt19937* shuffle) {
  std::vector<int> order(threads);
  for (int i = 0; i < threads; i++) {
    order[i] = i;
    Fiber& f = fibers[i];
    f.state = READY;
    f.begun = false;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = STACK;
    f.start.uc_link = nullptr;
    makecontext(&f.start, begin, 0);
  }
  memset(parity, 0, sizeof parity);
  if (__start_shim_shared) memset(__start_shim_shared, 0xff, __stop_shim_shared - __start_shim_shared);
  for (;;) {
    if (shuffle) std::shuffle(order.begin(), order.end(), *shuffle);
    bool moved = false;
    // Warps run at speeds of their own: in a round each one rests with an even chance.
    unsigned rest = shuffle ? (unsigned)(*shuffle)() : 0;
    for (int i : order)
      if (fibers[i].state == READY) {
        if (!(rest >> (i / 32) & 1)) resume(i);
        moved = true;
      }
    int done = 0, waiting = 0;
    for (int w = 0; w < threads; w += 32) {
      int lanes = std::min(32, threads - w), exchanging = 0;
      for (int l = 0; l < lanes; l++) exchanging += fibers[w + l].state == AT_EXCHANGE;
      if (exchanging == lanes) {
        for (int l = 0; l < lanes; l++) fibers[w + l].state = READY;
        moved = true;
      }
      for (int l = 0; l < lanes; l++) {
        done += fibers[w + l].state == DONE;
        waiting += fibers[w + l].state == AT_BARRIER;
      }
    }
    if (done == threads) return true;
    if (waiting == threads) {
      for (Fiber& f : fibers)
        if (f.state == AT_BARRIER) f.state = READY;
      moved = true;
    }
    if (!moved) {
      trouble = waiting ? "some threads of a block do not reach a barrier" : "some lanes of a warp miss an exchange";
      return false;
    }
  }
}

// Runs every block of a grid; a negative seed keeps the threads in order.
static const char* run(void (*kernel)(void*), void* args, const unsigned grid[3], unsigned block, long seed) {
  body = kernel;
  arguments = args;
  threads = (int)block;
  trouble = nullptr;
  while (fibers.size() < block) {
    fibers.emplace_back();
    fibers.back().stack = (char*)malloc(STACK);
  }
  std::mt19937 shuffle((unsigned)seed);
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {block, 1, 1};
  std::vector<unsigned> blocks(grid[0] * grid[1] * grid[2]);
  for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
  if (seed >= 0) std::shuffle(blocks.begin(), blocks.end(), shuffle);
  for (unsigned i : blocks) {
    blockIdx = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    if (!run_block(seed >= 0 ? &shuffle : nullptr)) break;
  }
  return trouble;
}

// Each lane lays down its numbers and, once all of its warp have, may read the others'. Two sets in turn: a lane that
// runs ahead to the next exchange writes into the other one.
typedef double Lane[4];
static Lane* exchange(double a, double b = 0.0) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, set = parity[warp][lane];
  parity[warp][lane] ^= 1;
  slots[set][warp][lane][0] = a;
  slots[set][warp][lane][1] = b;
  give_way(AT_EXCHANGE);
  return slots[set][warp];
}

}  // namespace shim

static inline void __syncthreads() { shim::give_way(shim::AT_BARRIER); }
template <class T>
static inline T __shfl_xor_sync(unsigned, T x, int distance) {
  int lane = threadIdx.x % 32;
  return (T)shim::exchange((double)x)[lane ^ distance][0];
}
static inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
static inline unsigned __float_as_uint(float x) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  return bits;
}
static inline long long __double_as_longlong(double x) {
  long long bits;
  memcpy(&bits, &x, 8);
  return bits;
}
static inline double __longlong_as_double(long long bits) {
  double x;
  memcpy(&x, &bits, 8);
  return x;
}
template <class T>
static inline T atomicMax(T* p, T x) {
  T old = *p;
  *p = std::max(old, x);
  return old;
}
template <class T>
static inline T atomicMin(T* p, T x) {
  T old = *p;
  *p = std::min(old, x);
  return old;
}
static inline int atomicOr(int* p, int x) {
  int old = *p;
  *p |= x;
  return old;
}

static inline float from_f16(unsigned short h) {
  int exponent = h >> 10 & 31, mantissa = h & 1023;
  float x = exponent == 31 ? (mantissa ? NAN : INFINITY)
            : exponent     ? ldexpf((float)(mantissa + 1024), exponent - 25)
                           : ldexpf((float)mantissa, -24);
  return h & 0x8000 ? -x : x;
}
// To nearest, ties to even, as nearbyint rounds.
static inline unsigned short to_f16(float x) {
  unsigned short sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return sign | 0x7e00;
  float a = fabsf(x);
  if (a >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(a, &exponent);
  int shift = std::max(exponent - 11, -24);
  long mantissa = (long)nearbyintf(ldexpf(a, -shift));
  if (a < 6.103515625e-05f) return sign | (unsigned short)mantissa;
  if (mantissa == 2048) {
    mantissa = 1024;
    shift++;
  }
  return sign | (unsigned short)((shift + 25) << 10 | (mantissa - 1024));
}

// The double-precision tensor core, by the layout that its documentation gives.
static inline void multiply_8x8x4(double& c0, double& c1, double a, double b) {
  shim::Lane* lanes = shim::exchange(a, b);
  int lane = threadIdx.x % 32, row = lane / 4, col = lane % 4 * 2;
  for (int k = 0; k < 4; k++) {
    c0 += lanes[row * 4 + k][0] * lanes[col * 4 + k][1];
    c1 += lanes[row * 4 + k][0] * lanes[(col + 1) * 4 + k][1];
  }
}
