"""What kernels for CUDA call that is no C++: instructions of NVIDIA's PTX, as small functions before the kernels.

The fragments are those of the PTX ISA 9.0: `Matrix Fragments for mma.m16n8k16
<https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-fragment-mma-16816-float>`_ and `ldmatrix
<https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix>`_. All of them ask for sm_80.
"""

from __future__ import annotations

import re

_HEAD = "static __device__ __forceinline__ void"
_FUNCTIONS = {
    # four matrices of 8 by 8: lane 8 i + j gives the address of row j of matrix i; each gets two elements of row lane / 4
    "wasat_fragments": f"""{_HEAD} wasat_fragments(unsigned* to, const void* from) {{
  unsigned at = (unsigned)__cvta_generic_to_shared(from);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}}""",
    # the same, each matrix turned: a lane gets two elements of column lane / 4
    "wasat_fragments_across": f"""{_HEAD} wasat_fragments_across(unsigned* to, const void* from) {{
  unsigned at = (unsigned)__cvta_generic_to_shared(from);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{%0, %1, %2, %3}}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at) : "memory");
}}""",
    **{f"wasat_mma_{t}": f"""{_HEAD} wasat_mma_{t}(float* d, const unsigned* a, const unsigned* b) {{
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 "
               "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%0, %1, %2, %3}};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}}""" for t in ("f16", "bf16")},
    # the first operand is the upper half
    **{f"wasat_pair_{t}": f"""static __device__ __forceinline__ unsigned wasat_pair_{t}(float low, float high) {{
  unsigned both;
  asm("cvt.rn.{t}x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}}""" for t in ("f16", "bf16")},
    # over the four lanes that have a row of a product; of a number and NaN, the largest is the number
    **{f"wasat_quad_{name}": f"""static __device__ __forceinline__ float wasat_quad_{name}(float x) {{
  for (int by = 1; by < 4; by *= 2) {{
    float y = __shfl_xor_sync(0xffffffffu, x, by);
    x = {join};
  }}
  return x;
}}""" for name, join in (("max", "fmaxf(x, y)"), ("sum", "x + y"))},
    "wasat_exp2": """static __device__ __forceinline__ float wasat_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}""",
    # element `at`, of 16 bits, and seven more to workgroup memory, behind the thread's back; zeros where `there` is 0
    "wasat_copy": f"""{_HEAD} wasat_copy(void* to, const void* from, long long at, int there) {{
  unsigned place = (unsigned)__cvta_generic_to_shared(to);
  const char* source = (const char*)from + 2 * at;
  int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: "r"(place), "l"(source), "r"(bytes) : "memory");
}}""",
    "wasat_copied": f"""{_HEAD} wasat_copied() {{
  asm volatile("cp.async.wait_all;" ::: "memory");
}}""",
    "wasat_words": f"""{_HEAD} wasat_words(void* to, unsigned a, unsigned b, unsigned c, unsigned d) {{
  uint4 all = {{a, b, c, d}};
  *(uint4*)to = all;
}}""",
}  # fmt: skip


def functions(source: str) -> str:
    """The functions that a source calls, to be put before it."""
    called = set(re.findall(r"\bwasat_\w+", source))
    return "".join(f"{text}\n" for name, text in _FUNCTIONS.items() if name in called)
