// JSON, read strictly: RFC 8259 (and Python's infinities), UTF-8, no object with a name twice. Numbers keep their spelling, which
// a manifest's digest is made of.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace wasat {

class Json {
 public:
  enum Kind { Null, Bool, Number, String, List, Object };
  Kind kind = Null;
  bool truth = false;
  std::string text;  // of a string; a number's spelling
  std::vector<Json> items;
  std::vector<std::pair<std::string, Json>> fields;

  static Json parse(std::string_view text);  // throws std::runtime_error

  const Json *find(std::string_view name) const;  // of an object; nullptr: no such field, or no object
  bool is_whole() const;                          // a number without fraction and exponent that an int64 holds
  int64_t whole() const;
  double number() const;
  std::string sorted() const;  // as Python's json.dumps(sort_keys=True, separators=(",", ":")) writes it
};

}  // namespace wasat
