#include "unicode.h"

#include <algorithm>
#include <array>
#include <iterator>

namespace wasat::unicode {
namespace {

#include "unicode_tables.inc"

template <size_t N>
uint32_t run_at(const uint32_t (&runs)[N], char32_t c, int shift) {
  auto end = std::upper_bound(runs, runs + N, uint32_t(c) << shift | ((1u << shift) - 1));
  return end == runs ? 0 : end[-1] & ((1u << shift) - 1);
}

template <size_t N>
bool within(const uint32_t (&bounds)[N], char32_t c) {
  return (std::upper_bound(bounds, bounds + N, uint32_t(c)) - bounds) % 2;
}

// Appends what a table has for c; returns whether it has anything.
template <size_t N, size_t M, size_t K>
bool mapped(const uint32_t (&keys)[N], const uint16_t (&starts)[M], const char32_t (&pool)[K], char32_t c, std::u32string &out) {
  auto key = std::lower_bound(keys, keys + N, uint32_t(c));
  if (key == keys + N || *key != c) return false;
  size_t i = size_t(key - keys);
  out.append(pool + starts[i], pool + starts[i + 1]);
  return true;
}

constexpr char32_t S = 0xAC00, L = 0x1100, V = 0x1161, T = 0x11A7;  // Hangul, which is computed
constexpr char32_t LS = 19, VS = 21, TS = 28, SS = LS * VS * TS;

char32_t composed_of(char32_t a, char32_t b) {
  if (a - L < LS && b - V < VS) return S + ((a - L) * VS + (b - V)) * TS;
  if (a - S < SS && (a - S) % TS == 0 && b > T && b - T < TS) return a + (b - T);
  size_t low = 0, high = std::size(COMPOSED) / 3;
  while (low < high) {
    size_t mid = (low + high) / 2;
    const uint32_t *at = COMPOSED + 3 * mid;
    if (at[0] < a || (at[0] == a && at[1] < b)) low = mid + 1;
    else high = mid;
  }
  const uint32_t *at = COMPOSED + 3 * low;
  return low < std::size(COMPOSED) / 3 && at[0] == a && at[1] == b ? at[2] : 0;
}

}  // namespace

int category(char32_t c) { return int(run_at(CATEGORY, c, 5)); }

bool is(Class which, char32_t c) {
  switch (which) {
    case Word: return within(WORD, c);
    case Space: return within(SPACE, c);
    case RustWord: return within(RUST_WORD, c);
    case RustSpace: return within(RUST_SPACE, c);
    case BertPunctuation: return within(BERT_PUNCTUATION, c);
    case BertSpace: return within(BERT_SPACE, c);
    case BertRemoved: return within(BERT_REMOVED, c);
    case BertBlank: return within(BERT_BLANK, c);
    case BertChinese: return within(BERT_CHINESE, c);
    case Punctuation: return within(PUNCTUATION, c);
    case Digit: return within(DIGIT, c);
    case Accent: return within(ACCENT, c);
    case BertAccent: return within(BERT_ACCENT, c);
  }
  return false;
}

std::u32string lower(std::u32string_view s) {
  std::u32string out;
  for (char32_t c : s)
    if (!mapped(LOWER_KEYS, LOWER_STARTS, LOWER_POOL, c, out)) out += c;
  return out;
}

char32_t folded(char32_t c) {
  if (c == 0x17F) return U's';
  std::u32string out;
  return mapped(LOWER_KEYS, LOWER_STARTS, LOWER_POOL, c, out) && out.size() == 1 ? out[0] : c;
}

std::u32string normalized(std::u32string_view s, bool compatible, bool composed) {
  std::u32string out;
  for (char32_t c : s) {
    if (c < 0x80) out += c;
    else if (c - S < SS) {
      out += L + (c - S) / (VS * TS);
      out += V + (c - S) % (VS * TS) / TS;
      if ((c - S) % TS) out += T + (c - S) % TS;
    } else if (!(compatible && mapped(COMPATIBLE_KEYS, COMPATIBLE_STARTS, COMPATIBLE_POOL, c, out)) &&
               !mapped(CANONICAL_KEYS, CANONICAL_STARTS, CANONICAL_POOL, c, out)) {
      out += c;
    }
  }
  auto combining = [](char32_t c) { return run_at(COMBINING, c, 8); };
  for (size_t i = 0; i < out.size(); i++) {
    size_t end = i;
    while (end < out.size() && combining(out[end])) end++;
    std::stable_sort(out.begin() + i, out.begin() + end, [&](char32_t a, char32_t b) { return combining(a) < combining(b); });
    i = end;
  }
  if (!composed) return out;
  std::u32string made;
  size_t starter = std::u32string::npos;
  uint32_t last = 0;  // the class of what stands between the starter and here
  for (char32_t c : out) {
    uint32_t k = combining(c);
    bool open = starter != std::u32string::npos && (starter + 1 == made.size() || (last && last < k));
    if (char32_t both = open ? composed_of(made[starter], c) : 0) {
      made[starter] = both;
      continue;
    }
    if (!k) starter = made.size();
    last = k;
    made += c;
  }
  return made;
}

}  // namespace wasat::unicode
