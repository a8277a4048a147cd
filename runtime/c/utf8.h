// UTF-8 and code points.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>

namespace wasat {

constexpr uint32_t INVALID = 0xFFFFFFFF;

// The code point at `at`, which moves behind it; INVALID where there is none: `at` then moves behind what may have begun one,
// as Rust's from_utf8_lossy and Python's errors="replace" do.
inline uint32_t decode_utf8(std::string_view s, size_t &at) {
  auto byte = [&](size_t i) -> uint32_t { return i < s.size() ? uint8_t(s[i]) : 0; };
  uint32_t c = byte(at++);
  if (c < 0x80) return c;
  int more = c >= 0xC2 && c < 0xE0 ? 1 : c >= 0xE0 && c < 0xF0 ? 2 : c >= 0xF0 && c < 0xF5 ? 3 : 0;
  if (!more) return INVALID;
  uint32_t low = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80, high = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
  uint32_t u = c & (0x3F >> more);
  for (; more; more--, low = 0x80, high = 0xBF) {
    uint32_t b = byte(at);
    if (b < low || b > high) return INVALID;
    u = u << 6 | (b & 0x3F), at++;
  }
  return u;
}

inline void append_utf8(std::string &out, uint32_t c) {
  if (c < 0x80) out += char(c);
  else if (c < 0x800) out += char(0xC0 | c >> 6), out += char(0x80 | (c & 0x3F));
  else if (c < 0x10000) out += char(0xE0 | c >> 12), out += char(0x80 | (c >> 6 & 0x3F)), out += char(0x80 | (c & 0x3F));
  else
    out += char(0xF0 | c >> 18), out += char(0x80 | (c >> 12 & 0x3F)), out += char(0x80 | (c >> 6 & 0x3F)),
        out += char(0x80 | (c & 0x3F));
}

// Code points of bytes; what is no UTF-8 becomes U+FFFD.
inline std::u32string points(std::string_view s) {
  std::u32string out;
  for (size_t at = 0; at < s.size();) {
    uint32_t c = decode_utf8(s, at);
    out += c == INVALID ? U'\uFFFD' : char32_t(c);
  }
  return out;
}

inline std::string bytes(std::u32string_view s) {
  std::string out;
  for (char32_t c : s) append_utf8(out, c);
  return out;
}

inline bool is_utf8(std::string_view s) {
  for (size_t at = 0; at < s.size();)
    if (decode_utf8(s, at) == INVALID) return false;
  return true;
}

}  // namespace wasat
