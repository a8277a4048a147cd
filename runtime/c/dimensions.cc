// Sizes as a manifest has them, read without running them.
#include <algorithm>
#include <cctype>

#include "manifest.h"

namespace wasat {

constexpr size_t LONGEST = 10000;
constexpr int DEEPEST = 200;

class DimParser {
 public:
  DimParser(const std::string &text, Dim &out) : text_(text), out_(out) {}

  void read() {
    if (text_.size() > LONGEST) fail();
    sum(0);
    space();
    if (at_ != text_.size()) fail();
  }

 private:
  using Step = Dim::Step;
  const std::string &text_;
  Dim &out_;
  size_t at_ = 0;

  [[noreturn]] void fail() const { damaged("manifest.json: '" + text_.substr(0, 80) + "' is no dimension"); }
  void space() {
    while (at_ < text_.size() && text_[at_] == ' ') at_++;
  }
  bool take(const char *word) {
    space();
    std::string w(word);
    if (text_.compare(at_, w.size(), w)) return false;
    at_ += w.size();
    return true;
  }
  void put(Step::Kind kind) { out_.steps_.push_back({kind, 0, ""}); }

  void sum(int depth) {
    if (depth > DEEPEST) fail();
    product(depth);
    for (;;) {
      if (take("+")) product(depth), put(Step::Add);
      else if (take("-")) product(depth), put(Step::Sub);
      else return;
    }
  }
  void product(int depth) {
    factor(depth);
    for (;;) {
      if (take("*")) factor(depth), put(Step::Mul);
      else if (take("//")) factor(depth), put(Step::Div);
      else if (take("%")) factor(depth), put(Step::Mod);
      else return;
    }
  }
  void factor(int depth) {
    if (depth > DEEPEST) fail();
    if (take("-")) return factor(depth + 1), put(Step::Neg);
    if (take("(")) {
      sum(depth + 1);
      if (!take(")")) fail();
      return;
    }
    space();
    size_t start = at_;
    auto c = [&] { return at_ < text_.size() ? uint8_t(text_[at_]) : 0; };
    while (std::isalnum(c()) || c() == '_' || c() >= 0x80) at_++;
    std::string word = text_.substr(start, at_ - start);
    if (word.empty()) fail();
    if (std::isdigit(uint8_t(word[0]))) {
      if (word.size() > 19 || (word.size() == 19 && word > "9223372036854775807") || !std::all_of(word.begin(), word.end(), [](uint8_t d) { return std::isdigit(d); })) fail();
      return out_.steps_.push_back({Step::Number, std::stoll(word), ""});
    }
    if (!take("(")) return out_.steps_.push_back({Step::Symbol, 0, word});
    if (word != "max" && word != "min") fail();
    sum(depth + 1);
    if (!take(",")) fail();
    sum(depth + 1);
    if (!take(")")) fail();
    put(word == "max" ? Step::Max : Step::Min);
  }
};

Dim::Dim(const std::string &text) : text_(text) { DimParser(text, *this).read(); }

std::optional<int64_t> Dim::at(const Sizes &sizes) const {
  if (fixed()) return number_;
  std::vector<int64_t> stack;
  for (const Step &s : steps_) {
    if (s.kind == Step::Number) {
      stack.push_back(s.number);
      continue;
    }
    if (s.kind == Step::Symbol) {
      auto found = sizes.find(s.symbol);
      if (found == sizes.end()) return {};
      stack.push_back(found->second);
      continue;
    }
    int64_t b = stack.back(), r = 0;
    stack.pop_back();
    if (s.kind == Step::Neg) {
      if (__builtin_sub_overflow(int64_t(0), b, &r)) return {};
      stack.push_back(r);
      continue;
    }
    int64_t a = stack.back();
    stack.pop_back();
    bool bad = false;
    switch (s.kind) {
      case Step::Add: bad = __builtin_add_overflow(a, b, &r); break;
      case Step::Sub: bad = __builtin_sub_overflow(a, b, &r); break;
      case Step::Mul: bad = __builtin_mul_overflow(a, b, &r); break;
      case Step::Max: r = std::max(a, b); break;
      case Step::Min: r = std::min(a, b); break;
      default:  // as Python divides: towards minus infinity
        if (b == 0 || (b == -1 && a == INT64_MIN)) return {};
        int64_t q = a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
        r = s.kind == Step::Div ? q : a - q * b;
    }
    if (bad) return {};
    stack.push_back(r);
  }
  return stack.back();
}

bool Dim::mentions(const std::string &symbol) const {
  return std::any_of(steps_.begin(), steps_.end(), [&](const Step &s) { return s.kind == Step::Symbol && s.symbol == symbol; });
}

std::optional<std::vector<int64_t>> TensorSpec::sizes(const Sizes &symbols) const {
  std::vector<int64_t> out;
  for (const Dim &d : shape) {
    auto n = d.at(symbols);
    if (!n) return {};
    out.push_back(*n);
  }
  return out;
}

}  // namespace wasat
