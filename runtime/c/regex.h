// The regular expressions of tokenizer files, in Oniguruma's notation, over code points; by backtracking.
#pragma once
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace wasat {

class Regex {
 public:
  explicit Regex(const std::u32string &pattern);  // throws std::runtime_error for what it does not know
  ~Regex();
  Regex(Regex &&) noexcept;

  // The parts of a text, in order, and whether each matches. Empty matches are none.
  struct Part {
    size_t start, end;
    bool match;
  };
  std::vector<Part> parts(const std::u32string &text) const;

 private:
  struct Program;
  std::unique_ptr<Program> p_;
};

}  // namespace wasat
