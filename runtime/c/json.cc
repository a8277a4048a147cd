#include "json.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

#include "utf8.h"

namespace wasat {
namespace {

constexpr int DEEPEST = 200;

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Json whole() {
    Json value = read(0);
    space();
    if (at_ != text_.size()) fail("something follows the value");
    return value;
  }

 private:
  std::string_view text_;
  size_t at_ = 0;

  [[noreturn]] void fail(const char *why) const {
    size_t line = 1 + std::count(text_.begin(), text_.begin() + std::min(at_, text_.size()), '\n');
    throw std::runtime_error("line " + std::to_string(line) + ": " + why);
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\n' || peek() == '\t' || peek() == '\r')) at_++;
  }
  bool take(char c) {
    space();
    if (at_ >= text_.size() || peek() != c) return false;
    at_++;
    return true;
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  Json read(int depth) {
    if (depth > DEEPEST) fail("it is nested too deeply");
    space();
    Json v;
    switch (peek()) {
      case '{':
        at_++;
        v.kind = Json::Object;
        if (!take('}')) {
          do {
            space();
            std::string name = string();
            if (!take(':')) fail("a colon is missing");
            v.fields.emplace_back(std::move(name), read(depth + 1));
          } while (take(','));
          if (!take('}')) fail("an object does not end");
        }
        check_names(v);
        return v;
      case '[':
        at_++;
        v.kind = Json::List;
        if (!take(']')) {
          do v.items.push_back(read(depth + 1));
          while (take(','));
          if (!take(']')) fail("a list does not end");
        }
        return v;
      case '"':
        v.kind = Json::String;
        v.text = string();
        return v;
      case 't':
      case 'f':
        v.kind = Json::Bool;
        v.truth = peek() == 't';
        if (!word(v.truth ? "true" : "false")) fail("a word is unknown");
        return v;
      case 'n':
        if (!word("null")) fail("a word is unknown");
        return v;
      default:
        v.kind = Json::Number;
        v.text = number();
        return v;
    }
  }

  void check_names(const Json &v) const {
    std::vector<std::string_view> names;
    for (auto &f : v.fields) names.push_back(f.first);
    std::sort(names.begin(), names.end());
    if (std::adjacent_find(names.begin(), names.end()) != names.end()) fail("an object has a name twice");
  }

  bool digits() {
    size_t start = at_;
    while (peek() >= '0' && peek() <= '9') at_++;
    return at_ > start;
  }
  std::string number() {
    size_t start = at_;
    if (peek() == '-') at_++;
    if (word("Infinity")) return std::string(text_.substr(start, at_ - start));  // as Python writes what a cache begins as
    if (peek() == '0') at_++;
    else if (!digits()) fail("a value is expected");
    if (peek() == '.' && (at_++, !digits())) fail("a number lacks digits");
    if (peek() == 'e' || peek() == 'E') {
      at_++;
      if (peek() == '+' || peek() == '-') at_++;
      if (!digits()) fail("a number lacks digits");
    }
    return std::string(text_.substr(start, at_ - start));
  }

  uint32_t hex4() {
    uint32_t n = 0;
    for (int i = 0; i < 4; i++, at_++) {
      char c = peek();
      int d = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
      if (d < 0) fail("\\u wants four hexadecimal digits");
      n = n * 16 + d;
    }
    return n;
  }
  std::string string() {
    if (peek() != '"') fail("a string is expected");
    at_++;
    std::string out;
    for (;;) {
      if (at_ >= text_.size()) fail("a string does not end");
      unsigned char c = text_[at_];
      if (c == '"') return at_++, out;
      if (c < 0x20) fail("a string holds a control character");
      if (c != '\\') {
        size_t start = at_;
        if (decode_utf8(text_, at_) == INVALID) fail("a string is not UTF-8");
        out.append(text_, start, at_ - start);
        continue;
      }
      at_++;
      char e = peek();
      at_++;
      static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
      if (const char *p = e ? std::char_traits<char>::find(from, 8, e) : nullptr) {
        out += to[p - from];
        continue;
      }
      if (e != 'u') fail("an escape is unknown");
      uint32_t u = hex4();
      if (u >= 0xD800 && u < 0xDC00 && word("\\u")) {
        uint32_t low = hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail("half of a character");
        u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
      }
      if (u >= 0xD800 && u <= 0xDFFF) fail("half of a character");
      append_utf8(out, u);
    }
  }
};

void write_string(std::string &out, std::string_view s) {
  static const char hex[] = "0123456789abcdef";
  auto unit = [&](uint32_t u) {
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += hex[(u >> shift) & 15];
  };
  out += '"';
  for (size_t at = 0; at < s.size();) {
    uint32_t c = decode_utf8(s, at);
    static const char from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *p = c && c < 0x80 ? std::char_traits<char>::find(from, 7, char(c)) : nullptr;
    if (p) out += '\\', out += to[p - from];
    else if (c >= 0x20 && c < 0x7F) out += char(c);
    else if (c >= 0x10000) unit(0xD800 + ((c - 0x10000) >> 10)), unit(0xDC00 + ((c - 0x10000) & 0x3FF));
    else unit(c);
  }
  out += '"';
}

void write(std::string &out, const Json &v) {
  switch (v.kind) {
    case Json::Null: out += "null"; break;
    case Json::Bool: out += v.truth ? "true" : "false"; break;
    case Json::Number: out += v.text; break;
    case Json::String: write_string(out, v.text); break;
    case Json::List:
      out += '[';
      for (size_t i = 0; i < v.items.size(); i++) {
        if (i) out += ',';
        write(out, v.items[i]);
      }
      out += ']';
      break;
    case Json::Object: {
      std::vector<const std::pair<std::string, Json> *> fields;
      for (auto &f : v.fields) fields.push_back(&f);
      std::sort(fields.begin(), fields.end(), [](auto a, auto b) { return a->first < b->first; });
      out += '{';
      for (size_t i = 0; i < fields.size(); i++) {
        if (i) out += ',';
        write_string(out, fields[i]->first);
        out += ':';
        write(out, fields[i]->second);
      }
      out += '}';
    }
  }
}

}  // namespace

Json Json::parse(std::string_view text) { return Parser(text).whole(); }

const Json *Json::find(std::string_view name) const {
  for (auto &f : fields)
    if (f.first == name) return &f.second;
  return nullptr;
}

bool Json::is_whole() const {
  return kind == Number && text.find_first_not_of("-0123456789") == std::string::npos && text.size() <= 18;
}

int64_t Json::whole() const { return std::strtoll(text.c_str(), nullptr, 10); }
double Json::number() const { return std::strtod(text.c_str(), nullptr); }

std::string Json::sorted() const {
  std::string out;
  write(out, *this);
  return out;
}

}  // namespace wasat
