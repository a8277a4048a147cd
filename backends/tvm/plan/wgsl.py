"""Functions that WGSL lacks, or promises too little of, as text: appended to the kernels that call them."""

from __future__ import annotations

INFINITY, NAN, BITS, HALF = "wasat_infinity", "wasat_nan", "wasat_f16_bits", "wasat_f16"

# constants that are no finite numbers are refused, so that these are none
_HELPERS = {
    INFINITY: "fn wasat_infinity() -> f32 { var bits = 0x7f800000u; return bitcast<f32>(bits); }",
    NAN: "fn wasat_nan() -> f32 { var bits = 0x7fc00000u; return bitcast<f32>(bits); }",
    BITS: "fn wasat_f16_bits(x : f32) -> u32 { return pack2x16float(vec2<f32>(x, 0.0)) & 0xffffu; }",
    HALF: "fn wasat_f16(bits : u32) -> f32 { return unpack2x16float(bits).x; }",
    # an angle by both of its legs: more exact than acos and asin have to be
    "wasat_asin": "fn wasat_asin(x : f32) -> f32 { return atan2(x, sqrt((1.0 - x) * (1.0 + x))); }",
    "wasat_acos": "fn wasat_acos(x : f32) -> f32 { return atan2(sqrt((1.0 - x) * (1.0 + x)), x); }",
    "wasat_expm1": """fn wasat_expm1(x : f32) -> f32 {
  if (abs(x) >= 0.5) { return exp(x) - 1.0; }
  var sum = 1.0;
  for (var i = 10.0; i > 1.0; i -= 1.0) { sum = 1.0 + x / i * sum; }
  return x * sum;
}""",
    "wasat_log1p": """fn wasat_log1p(x : f32) -> f32 {
  if (!(abs(x) < 0.5)) { return log(1.0 + x); }
  let s = x / (2.0 + x);
  var sum = 0.0;
  for (var i = 17.0; i > 0.0; i -= 2.0) { sum = 1.0 / i + s * s * sum; }
  return 2.0 * s * sum;
}""",
    # exact, by long division, as the C library's
    "wasat_fmod": """fn wasat_fmod(x : f32, y : f32) -> f32 {
  var a = bitcast<u32>(x) & 0x7fffffffu;
  var b = bitcast<u32>(y) & 0x7fffffffu;
  let sign = bitcast<u32>(x) & 0x80000000u;
  if (b == 0u || b > 0x7f800000u || a >= 0x7f800000u) { return wasat_nan(); }
  if (a < b) { return x; }
  var ea = i32(a >> 23u);
  var eb = i32(b >> 23u);
  if (ea == 0) { ea = 1; } else { a = (a & 0x7fffffu) | 0x800000u; }
  if (eb == 0) { eb = 1; } else { b = (b & 0x7fffffu) | 0x800000u; }
  while (a < 0x800000u && ea > eb) { a = a << 1u; ea -= 1; }
  while (b < 0x800000u && eb > 1 - 24) { b = b << 1u; eb -= 1; }
  while (a < 0x800000u && a != 0u) { a = a << 1u; ea -= 1; }
  while (ea > eb) {
    if (a >= b) { a -= b; }
    a = a << 1u;
    ea -= 1;
  }
  if (ea == eb && a >= b) { a -= b; }
  if (a == 0u) { return bitcast<f32>(sign); }
  while (a < 0x800000u) { a = a << 1u; ea -= 1; }
  if (ea > 0) { a = (a - 0x800000u) | (u32(ea) << 23u); } else { a = a >> u32(1 - ea); }
  return bitcast<f32>(a | sign);
}""",
}

NAMES = {
    **{f"{n}f": n for n in ("atan", "sinh", "cosh", "asinh", "acosh", "atanh", "atan2")},
    **{f"{n}f": f"wasat_{n}" for n in ("asin", "acos", "expm1", "log1p", "fmod")},
}
"""Functions of the C library, of f32, by what they are here."""


def helpers(source: str) -> str:
    """The functions that a kernel calls, and those that these call."""
    found = {name: text for name, text in _HELPERS.items() if f"{name}(" in source}
    found |= {name: text for name, text in _HELPERS.items() if any(f"{name}(" in t for t in list(found.values()))}
    return "".join(f"{text}\n" for text in found.values())
