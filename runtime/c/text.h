// Text of tokens as they come, and where it ends: TextStream and StopStrings of runtime/tokenizer.py.
#pragma once
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer.h"

namespace wasat {

// Whole characters only, and spaces as they stand after the prompt. Decoders look at neighbours, so a token's text is the
// difference between decoding a short window with and without it. Tokens <0xNN> are decoded when the run of them is over.
class TextStream {
 public:
  TextStream(const Tokenizer &tokenizer, const std::vector<int64_t> &prompt);
  std::u32string push(int64_t token);
  std::u32string settle();  // the text of a run of tokens <0xNN>, as if it were over, if it is UTF-8
  std::u32string flush();

 private:
  const Tokenizer &tokenizer_;
  std::vector<int64_t> window_;
  size_t run_ = 0, given_ = 0, shown_ = 0;
  bool broken_ = false;

  std::u32string decoded(size_t end) const;
  std::string run_bytes() const;
  std::u32string piece(const std::u32string &text, bool held);
  void end_run();
};

// Cuts a text, as it comes in pieces, before the first of some strings. Special tokens are written out for the comparison, and
// are no part of the text.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::u32string> stops) : stops_(std::move(stops)) {}
  bool any() const { return !stops_.empty(); }
  // What is certain now, and whether a stop string was reached.
  std::pair<std::u32string, bool> push(const std::u32string &piece, bool last = false, bool hidden = false);

 private:
  std::vector<std::u32string> stops_;
  std::u32string held_;
  std::vector<bool> hidden_;  // which of what is held are of special tokens
  bool reached_ = false;
};

}  // namespace wasat
