// A tokenizer.json of the tokenizers library: text to token ids and back. The parts it knows stand in tokenizer.cc and
// tokenizer_parts.cc; a file with another one is refused by its name.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace wasat {

class Tokenizer {
 public:
  explicit Tokenizer(std::string_view json);  // throws Error
  ~Tokenizer();

  std::vector<int64_t> encode(const std::string &text, bool special = true) const;
  std::string decode(const std::vector<int64_t> &ids) const;  // special tokens left out
  bool is_text(int64_t id) const;                             // neither special nor unknown
  int byte_of(int64_t id) const;                              // the byte that <0xNN> stands for; -1: none
  std::optional<std::string> special(int64_t id) const;       // how a special token is written

 private:
  struct Parts;
  std::unique_ptr<Parts> p_;
};

}  // namespace wasat
