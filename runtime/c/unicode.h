// What the tokenizers library takes characters for.
#pragma once
#include <cstdint>
#include <string>

namespace wasat::unicode {

// Categories in the order of unicode_tables.py.
int category(char32_t c);

enum Class { Word, Space, RustWord, RustSpace, BertPunctuation, BertSpace, BertRemoved, BertBlank, BertChinese, Punctuation, Digit, Accent, BertAccent };
bool is(Class which, char32_t c);

std::u32string lower(std::u32string_view s);
std::u32string normalized(std::u32string_view s, bool compatible, bool composed);  // NFD, NFC, NFKD, NFKC
char32_t folded(char32_t c);                                                       // for comparing without case

}  // namespace wasat::unicode
