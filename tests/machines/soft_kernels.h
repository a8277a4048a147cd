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

// -- PTX: what soft_cuda.py makes of `asm`. Operands come in the order in which they are written.
extern "C" const uint64_t* soft_warp(uint64_t);  // what all lanes give, until soft_warp_done
extern "C" void soft_warp_done();
static char soft_anchor;  // memory of workgroups is known by 32 bits: how far it is from here
inline size_t __cvta_generic_to_shared(const void* p) { return (const char*)p - &soft_anchor; }
inline char* soft_place(unsigned at) { return &soft_anchor + (int)at; }
inline void soft_aligned(const void* p) { if ((uintptr_t)p % 16) *(volatile int*)8 = 0; }

struct soft_pending { char* to; const char* from; int bytes; };
static soft_pending soft_pendings[1024][64];
static int soft_count[1024];
inline void soft_cp_async_cg_shared_global(unsigned at, const char* from, int size, int bytes) {
  char* to = soft_place(at);
  soft_aligned(to), soft_aligned(from);
  memset(to, 0xff, size);  // until it is waited for, it is anything: NaN, say
  soft_pendings[threadIdx.x][soft_count[threadIdx.x]++ % 64] = {to, from, bytes};
}
inline void soft_cp_async_wait_all() {
  int& count = soft_count[threadIdx.x];
  if (count > 64) soft_aligned((void*)1);
  for (int i = 0; i < count; i++) {
    soft_pending& p = soft_pendings[threadIdx.x][i];
    memset(p.to, 0, 16);
    if (p.bytes) memcpy(p.to, p.from, p.bytes);
  }
  count = 0;
}
inline void soft_ldmatrix_sync_aligned_m8n8_x4_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned at) {
  soft_aligned(soft_place(at));
  const uint64_t* rows = soft_warp(at);
  int lane = soft_lane();
  unsigned* to[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; i++) memcpy(to[i], soft_place((unsigned)rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
  soft_warp_done();
}
inline void soft_ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(unsigned& a, unsigned& b, unsigned& c, unsigned& d, unsigned at) {
  soft_aligned(soft_place(at));
  const uint64_t* rows = soft_warp(at);
  int lane = soft_lane();
  unsigned* to[] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; i++)
    for (int e = 0; e < 2; e++) memcpy((char*)to[i] + 2 * e, soft_place((unsigned)rows[8 * i + lane % 4 * 2 + e]) + lane / 4 * 2, 2);
  soft_warp_done();
}
// 2^x within two units of the last place, as the ISA has it (here it is off by one); no subnormal numbers
inline void soft_ex2_approx_ftz_f32(float& d, float x) {
  d = nextafterf(exp2f(x), x > 0 ? 0.0f : 1.0f);
  if (d < 0x1p-126f) d = 0;
}
inline float soft_f16(unsigned bits) { __half h; h.bits = (uint16_t)bits; return h; }
inline float soft_bf16(unsigned bits) { unsigned wide = bits << 16; float y; memcpy(&y, &wide, 4); return y; }
struct soft_fragments { unsigned a[4], b[2]; };
// element (row, k) of a, (k, column) of b and (row, column) of c and d, as the PTX ISA has the fragments of mma.m16n8k16
template <float widened(unsigned)> void soft_mma(float* d[4], const soft_fragments& own, const float c[4]) {
  const uint64_t* warp = soft_warp((uint64_t)&own);
  int lane = soft_lane();
  float out[4];
  for (int e = 0; e < 4; e++) {
    int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    float sum = c[e];
    for (int k = 0; k < 16; k++) {
      const soft_fragments& of_a = *(const soft_fragments*)warp[row % 8 * 4 + k % 8 / 2];
      const soft_fragments& of_b = *(const soft_fragments*)warp[column * 4 + k % 8 / 2];
      sum += widened(of_a.a[row / 8 + k / 8 * 2] >> k % 2 * 16 & 0xffff) * widened(of_b.b[k / 8] >> k % 2 * 16 & 0xffff);
    }
    out[e] = sum;
  }
  for (int e = 0; e < 4; e++) *d[e] = out[e];
  soft_warp_done();
}
#define SOFT_MMA(t) \
  inline void soft_mma_sync_aligned_m16n8k16_row_col_f32_##t##_##t##_f32( \
      float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, \
      float c0, float c1, float c2, float c3) { \
    float* d[] = {&d0, &d1, &d2, &d3}; \
    float c[] = {c0, c1, c2, c3}; \
    soft_mma<soft_##t>(d, {{a0, a1, a2, a3}, {b0, b1}}, c); \
  }
SOFT_MMA(f16) SOFT_MMA(bf16)
#undef SOFT_MMA
inline unsigned soft_bf16_bits(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return isnan(x) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline void soft_cvt_rn_f16x2_f32(unsigned& d, float high, float low) { d = (unsigned)half(high).bits << 16 | half(low).bits; }
inline void soft_cvt_rn_bf16x2_f32(unsigned& d, float high, float low) { d = soft_bf16_bits(high) << 16 | soft_bf16_bits(low); }
