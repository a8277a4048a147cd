#include "text.h"

#include <algorithm>

#include "utf8.h"

namespace wasat {

constexpr char32_t BROKEN = 0xFFFD;  // what decoding puts where bytes are no UTF-8 (yet)
constexpr size_t OVERLAP = 8;        // tokens that decoding looks back on: more than a character of four one-byte tokens

TextStream::TextStream(const Tokenizer &tokenizer, const std::vector<int64_t> &prompt) : tokenizer_(tokenizer) {
  for (size_t i = prompt.size(); i-- > 0;) {
    if (!tokenizer.is_text(prompt[i])) continue;
    window_.insert(window_.begin(), prompt[i]);
    if (window_.size() >= OVERLAP && tokenizer.byte_of(prompt[i]) < 0) break;
  }
  while (run_ < window_.size() && tokenizer.byte_of(window_[window_.size() - 1 - run_]) >= 0) run_++;
  given_ = run_;
  std::u32string before = decoded(window_.size() - run_);
  broken_ = !before.empty() && before.back() == BROKEN;
  shown_ = before.size() - broken_;
}

std::u32string TextStream::decoded(size_t end) const {
  return points(tokenizer_.decode(std::vector<int64_t>(window_.begin(), window_.begin() + end)));
}

std::string TextStream::run_bytes() const {
  std::string out;
  for (size_t i = window_.size() - run_; i < window_.size(); i++) out += char(tokenizer_.byte_of(window_[i]));
  return out;
}

std::u32string TextStream::push(int64_t token) {
  if (!tokenizer_.is_text(token)) return U"";
  if (tokenizer_.byte_of(token) >= 0) {
    window_.push_back(token);
    run_++;
    return U"";
  }
  if (run_) end_run();
  window_.push_back(token);
  std::u32string text = decoded(window_.size());
  bool held = !text.empty() && text.back() == BROKEN;
  std::u32string out = piece(text, held);
  if (!held) {
    window_ = {token};  // what was new is the context of what follows
    shown_ = decoded(1).size();
  } else if (window_.size() > 2 * OVERLAP) {  // bytes that become no character, one after the other
    window_.erase(window_.begin(), window_.end() - OVERLAP);
    shown_ = std::max<size_t>(decoded(OVERLAP).size(), 1) - 1;
  }
  return out;
}

std::u32string TextStream::settle() { return run_ && is_utf8(run_bytes()) ? flush() : U""; }

std::u32string TextStream::flush() {
  if (run_) end_run();
  return piece(decoded(window_.size()), false);
}

std::u32string TextStream::piece(const std::u32string &text, bool held) {
  size_t end = text.size() - held;
  if (broken_ && end > shown_) {
    shown_ += text[shown_] == BROKEN;
    broken_ = false;
  }
  std::u32string out = shown_ < end ? text.substr(shown_, end - shown_) : U"";
  shown_ = std::max(shown_, end);
  return out;
}

void TextStream::end_run() {
  size_t start = window_.size() - run_;
  if (given_) {
    std::string run = run_bytes();
    if (!is_utf8(run)) {
      shown_ = decoded(start).size() + given_;
    } else {
      size_t whole = 0;  // bytes of the whole characters that the prompt has
      for (size_t at = 0; at < run.size();) {
        decode_utf8(run, at);
        if (at <= given_) whole = at;
      }
      shown_ = decoded(start + whole).size();
    }
  }
  run_ = given_ = 0;
}

// Length of the longest end of `text` that begins `stop`.
static size_t overlap(const std::u32string &text, const std::u32string &stop) {
  for (size_t n = std::min(text.size(), stop.size() - 1); n > 0; n--)
    if (!text.compare(text.size() - n, n, stop, 0, n)) return n;
  return 0;
}

std::pair<std::u32string, bool> StopStrings::push(const std::u32string &piece, bool last, bool hidden) {
  if (reached_) return {U"", true};
  std::u32string text = held_ + piece, read;
  hidden_.resize(text.size(), hidden);
  std::vector<size_t> places;
  for (size_t i = 0; i < text.size(); i++)
    if (!hidden_[i]) read += text[i], places.push_back(i);
  size_t found = std::u32string::npos, start = text.size();
  auto search = [&](const std::u32string &view, auto &&place) {  // as it is written, and as it is read
    for (auto &s : stops_) {
      if (size_t at = view.find(s); at != std::u32string::npos) found = std::min(found, place(at));
      if (size_t n = overlap(view, s)) start = std::min(start, place(view.size() - n));
    }
  };
  search(text, [](size_t i) { return i; });
  if (read.size() < text.size()) search(read, [&](size_t i) { return places[i]; });
  reached_ = found != std::u32string::npos;
  size_t end = reached_ ? found : last ? text.size() : start;
  std::u32string shown;
  for (size_t i = 0; i < end; i++)
    if (!hidden_[i]) shown += text[i];
  if (!reached_) held_ = text.substr(end), hidden_.erase(hidden_.begin(), hidden_.begin() + end);
  return {shown, reached_};
}

}  // namespace wasat
