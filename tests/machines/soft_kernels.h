// CUDA C++ as C++ for the processor: what kernels' sources name, a workgroup's threads taking turns at its barriers.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(n)
#define __shared__ static
#define alignas(n) __attribute__((aligned(n)))
#define __align__(n) __attribute__((aligned(n)))
#define CUDART_INF_F __builtin_inff()
#define CUDART_INF __builtin_inf()
#define CUDART_NAN_F __builtin_nanf("")
#define CUDART_NAN __builtin_nan("")

// 16 bytes that are read at once: the compiler takes it that they lie at a multiple of 16
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

struct soft_index { unsigned x, y, z; };
extern "C" soft_index threadIdx, blockIdx, blockDim, gridDim;
extern "C" void soft_barrier();
extern "C" uint64_t soft_exchange(uint64_t, int);
extern "C" int soft_lane();
#define __syncthreads soft_barrier

template <class T> T soft_shuffle(T v, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  bits = soft_exchange(bits, lane);
  memcpy(&v, &bits, sizeof v);
  return v;
}
inline unsigned __activemask() { return 0xffffffffu; }
inline void __syncwarp(unsigned = 0xffffffffu) { soft_exchange(0, 0); }
// of a group of `width` lanes: one beyond its ends gives the lane's own
template <class T> T __shfl_sync(unsigned, T v, int lane, int width = 32) {
  return soft_shuffle(v, soft_lane() / width * width + lane % width);
}
template <class T> T __shfl_xor_sync(unsigned, T v, int mask, int = 32) { return soft_shuffle(v, soft_lane() ^ mask); }
template <class T> T __shfl_down_sync(unsigned, T v, unsigned by, int width = 32) {
  int lane = soft_lane(), to = lane + (int)by;
  return soft_shuffle(v, to / width == lane / width ? to : lane);
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned by, int width = 32) {
  int lane = soft_lane(), to = lane - (int)by;
  return soft_shuffle(v, to >= 0 && to / width == lane / width ? to : lane);
}

typedef float soft_f32x4 __attribute__((vector_size(16)));
typedef short soft_i16x8 __attribute__((vector_size(16)));
// half: each operation is done in f32 and rounded, which is exact for + - * / and sqrt
struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits((uint16_t)__builtin_ia32_vcvtps2ph(soft_f32x4{x}, 0)[0]) {}
  __half(double x) : __half((float)x) {}
  __half(int x) : __half((float)x) {}
  __half(unsigned x) : __half((float)x) {}
  __half(long x) : __half((float)x) {}
  __half(unsigned long x) : __half((float)x) {}
  operator float() const { return __builtin_ia32_vcvtph2ps(soft_i16x8{(short)bits})[0]; }
};
typedef __half half;
struct __half2 { half x, y; };
#define SOFT_OPERATOR(op) inline half operator op(half a, half b) { return half((float)a op (float)b); }
SOFT_OPERATOR(+) SOFT_OPERATOR(-) SOFT_OPERATOR(*) SOFT_OPERATOR(/)
#undef SOFT_OPERATOR
#define SOFT_COMPARE(op) inline bool operator op(half a, half b) { return (float)a op (float)b; }
SOFT_COMPARE(<) SOFT_COMPARE(>) SOFT_COMPARE(<=) SOFT_COMPARE(>=) SOFT_COMPARE(==) SOFT_COMPARE(!=)
#undef SOFT_COMPARE
inline half operator-(half a) { a.bits ^= 0x8000; return a; }
inline float __half2float(half x) { return x; }
inline half __float2half(float x) { return half(x); }
inline half __float2half_rn(float x) { return half(x); }
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }
inline bool __hisnan(half a) { return isnan((float)a); }
inline half __habs(half a) { a.bits &= 0x7fff; return a; }
#define SOFT_UNARY(name, f) inline half name(half x) { return half(f((float)x)); }
SOFT_UNARY(hexp, expf) SOFT_UNARY(hexp2, exp2f) SOFT_UNARY(hexp10, exp10f) SOFT_UNARY(hlog, logf) SOFT_UNARY(hlog2, log2f)
SOFT_UNARY(hlog10, log10f) SOFT_UNARY(hsqrt, sqrtf) SOFT_UNARY(hsin, sinf) SOFT_UNARY(hcos, cosf) SOFT_UNARY(htan, tanf)
SOFT_UNARY(htanh, tanhf) SOFT_UNARY(hatan, atanf) SOFT_UNARY(herf, erff) SOFT_UNARY(hfloor, floorf) SOFT_UNARY(hceil, ceilf)
SOFT_UNARY(htrunc, truncf) SOFT_UNARY(hrint, rintf)
SOFT_UNARY(hrsqrt, 1.0f / sqrtf)
#undef SOFT_UNARY
inline half hpow(half x, half y) { return half(powf(x, y)); }

#define SOFT_ORDER(T) \
  inline T max(T a, T b) { return a > b ? a : b; } \
  inline T min(T a, T b) { return a < b ? a : b; }
SOFT_ORDER(int) SOFT_ORDER(unsigned) SOFT_ORDER(int64_t) SOFT_ORDER(uint64_t)
#undef SOFT_ORDER
// of a number and one that is none, CUDA takes the number
inline float max(float a, float b) { return fmaxf(a, b); }
inline float min(float a, float b) { return fminf(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
template <class T> T __ldg(const T* p) { return *p; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float __uint_as_float(unsigned x) { float y; memcpy(&y, &x, 4); return y; }
