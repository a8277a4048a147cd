#include "regex.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <optional>
#include <stdexcept>

#include "unicode.h"
#include "utf8.h"

namespace wasat {
namespace {

constexpr size_t NONE = size_t(-1), MANY = size_t(-1);
constexpr int DEEPEST = 5000;     // of what is being matched at once
constexpr size_t LARGEST = 20000;  // nodes

struct Set {
  std::vector<std::pair<char32_t, char32_t>> ranges;
  uint32_t categories = 0, without = 0;  // a bit for each; of \P{..}, for each that does not count
  bool word = false, no_word = false, space = false, no_space = false, negated = false, caseless = false;
  std::vector<Set> others;

  bool has(char32_t c) const {
    bool found = plain(c);
    if (!found && caseless) {
      char32_t f = unicode::folded(c);
      found = plain(f) || (f < 0x80 && f >= 'a' && f <= 'z' && (plain(f - 32) || (f == 's' && plain(0x17F)) || (f == 'k' && plain(0x212A))));
    }
    return found != negated;
  }

 private:
  bool plain(char32_t c) const {
    for (auto &[a, b] : ranges)
      if (c >= a && c <= b) return true;
    if (categories || without) {
      uint32_t bit = 1u << unicode::category(c);
      if ((categories & bit) || (without && !(without & bit))) return true;
    }
    if ((word && unicode::is(unicode::Word, c)) || (no_word && !unicode::is(unicode::Word, c))) return true;
    if ((space && unicode::is(unicode::Space, c)) || (no_space && !unicode::is(unicode::Space, c))) return true;
    return std::any_of(others.begin(), others.end(), [&](const Set &s) { return s.has(c); });
  }
};

struct Tree {
  enum Kind { Seq, Alt, One, Repeat, Ahead, NotAhead, Behind, NotBehind, Start, End, LineStart, LineEnd } kind;
  std::vector<Tree> items;
  Set set;
  size_t least = 0, most = 0;
  enum Mode { Greedy, Lazy, Possessive } mode = Greedy;
};

class Parser {
 public:
  explicit Parser(const std::u32string &text) : text_(text) {}
  Tree whole() {
    Tree t = alternatives(0);
    if (at_ != text_.size()) fail();
    return t;
  }

 private:
  const std::u32string &text_;
  size_t at_ = 0;
  bool caseless_ = false;

  [[noreturn]] void fail() const {
    throw std::runtime_error("the regular expression " + bytes(text_) + " has at " + std::to_string(at_) + " what this host does not know");
  }
  char32_t peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : 0; }
  bool take(const char32_t *word) {
    std::u32string w(word);
    if (text_.compare(at_, w.size(), w)) return false;
    at_ += w.size();
    return true;
  }

  Tree alternatives(int depth) {
    if (depth > 100) fail();
    bool outer = caseless_;
    Tree out{Tree::Alt, {}, {}};
    do {
      Tree seq{Tree::Seq, {}, {}};
      while (at_ < text_.size() && peek() != '|' && peek() != ')') seq.items.push_back(repeated(depth));
      out.items.push_back(std::move(seq));
    } while (take(U"|"));
    caseless_ = outer;
    return out;
  }

  Tree repeated(int depth) {
    Tree t = atom(depth);
    for (int again = 0;; again++) {
      if (again > 10) fail();  // a tree that deep is walked no more
      Tree r{Tree::Repeat, {}, {}};
      bool braces = false;
      if (take(U"?")) r.least = 0, r.most = 1;
      else if (take(U"*")) r.least = 0, r.most = MANY;
      else if (take(U"+")) r.least = 1, r.most = MANY;
      else if (peek() == '{') braces = true, counts(r);
      else return t;
      if (t.kind >= Tree::Ahead) fail();
      if (take(U"?")) r.mode = Tree::Lazy;
      else if (!braces && take(U"+")) r.mode = Tree::Possessive;
      r.items.push_back(std::move(t));
      t = std::move(r);
    }
  }
  void counts(Tree &r) {
    at_++;
    auto number = [&](size_t otherwise) {
      size_t start = at_, n = 0;
      while (peek() >= '0' && peek() <= '9' && n < 10000) n = n * 10 + (text_[at_++] - '0');
      return at_ == start ? otherwise : n;
    };
    size_t start = at_;
    r.least = number(0);
    bool open = at_ == start;
    if (take(U",")) r.most = number(MANY);
    else if (open) fail();
    else r.most = r.least;
    if (!take(U"}") || r.most < r.least || (open && r.most == MANY)) fail();
  }

  Tree atom(int depth) {
    if (take(U"(")) {
      Tree::Kind look = Tree::Seq;
      bool outer = caseless_;
      if (take(U"?=")) look = Tree::Ahead;
      else if (take(U"?!")) look = Tree::NotAhead;
      else if (take(U"?<=")) look = Tree::Behind;
      else if (take(U"?<!")) look = Tree::NotBehind;
      else if (take(U"?i:")) caseless_ = true;
      else if (take(U"?:")) look = Tree::Seq;
      else if (take(U"?i)")) return caseless_ = true, alternatives(depth + 1);  // to the end of what it stands in
      else if (peek() == '?' || peek() == '*') fail();
      Tree inner = alternatives(depth + 1);
      caseless_ = outer;
      if (!take(U")")) fail();
      if (look == Tree::Seq) return inner;
      Tree t{look, {}, {}};
      t.items.push_back(std::move(inner));
      return t;
    }
    if (take(U"\\A")) return {Tree::Start, {}, {}};
    if (take(U"\\z")) return {Tree::End, {}, {}};
    if (take(U"^")) return {Tree::LineStart, {}, {}};
    if (take(U"$")) return {Tree::LineEnd, {}, {}};
    Tree one{Tree::One, {}, {}};
    if (take(U"[")) one.set = brackets(0);
    else if (take(U".")) one.set.ranges = {{'\n', '\n'}}, one.set.negated = true;
    else if (peek() == '\\') escape(one.set);
    else if (std::u32string_view(U"?*+{").find(peek()) != NONE) fail();
    else one.set.ranges = {{peek(), peek()}}, at_++;
    one.set.caseless = caseless_;
    return one;
  }

  Set brackets(int depth) {
    if (depth > 10) fail();
    Set s;
    s.caseless = caseless_;
    s.negated = take(U"^");
    bool first = true;
    while (first || peek() != ']') {
      if (at_ >= text_.size()) fail();
      first = false;
      if (peek() == '&' && peek(1) == '&') fail();
      if (peek() == '[') {
        if (peek(1) == ':') fail();
        at_++;
        s.others.push_back(brackets(depth + 1));
        continue;
      }
      std::optional<char32_t> low = member(s);
      if (peek() == '-' && peek(1) != ']') {
        if (!low) fail();
        at_++;
        if (peek() == '[') fail();
        std::optional<char32_t> high = member(s);
        if (!high || *high < *low) fail();
        s.ranges.push_back({*low, *high});
      } else if (low) {
        s.ranges.push_back({*low, *low});
      }
    }
    at_++;
    return s;
  }
  // A character, or nothing where a class was added to the set.
  std::optional<char32_t> member(Set &s) {
    if (at_ >= text_.size()) fail();
    if (peek() != '\\') return text_[at_++];
    Set inner;
    escape(inner);
    if (inner.ranges.size() == 1 && inner.ranges[0].first == inner.ranges[0].second) return inner.ranges[0].first;
    s.others.push_back(inner);
    return {};
  }

  void escape(Set &s) {
    at_++;
    if (at_ >= text_.size()) fail();
    char32_t c = text_[at_++];
    switch (c) {
      case 's': s.space = true; return;
      case 'S': s.no_space = true; return;
      case 'w': s.word = true; return;
      case 'W': s.no_word = true; return;
      case 'd': s.categories = 1u << 9; return;
      case 'D': s.without = 1u << 9; return;
      case 'p':
      case 'P': return property(s, c == 'P');
      case 'x': return single(s, hex(peek() == '{', 2));
      case 'u': return single(s, hex(false, 4));
      default: break;
    }
    static const std::u32string_view from = U"nrtfvae", to = U"\n\r\t\f\v\a\033";
    if (size_t i = from.find(c); i != NONE) return single(s, to[i]);
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) at_--, fail();
    single(s, c);
  }
  static void single(Set &s, char32_t c) { s.ranges = {{c, c}}; }
  char32_t hex(bool braces, size_t digits) {
    if (braces) at_++, digits = 8;
    char32_t n = 0;
    size_t i = 0;
    for (; i < digits; i++, at_++) {
      char32_t c = peek();
      int d = c >= '0' && c <= '9' ? int(c) - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? int(c | 32) - 'a' + 10 : -1;
      if (d < 0) break;
      n = n * 16 + char32_t(d);
    }
    if (!i || (braces && !take(U"}")) || n > 0x10FFFF || (!braces && n > 0x7F && digits == 2)) fail();
    return n;
  }
  void property(Set &s, bool negated) {
    if (!take(U"{")) fail();
    if (take(U"^")) negated = !negated;
    size_t end = text_.find('}', at_);
    if (end == NONE) fail();
    std::u32string name = text_.substr(at_, end - at_);
    static const std::u32string_view names[] = {U"Cn", U"Lu", U"Ll", U"Lt", U"Lm", U"Lo", U"Mn", U"Mc", U"Me", U"Nd",
                                                U"Nl", U"No", U"Pc", U"Pd", U"Ps", U"Pe", U"Pi", U"Pf", U"Po", U"Sm",
                                                U"Sc", U"Sk", U"So", U"Zs", U"Zl", U"Zp", U"Cc", U"Cf", U"Cs", U"Co"};
    uint32_t bits = 0;
    for (size_t i = 0; i < std::size(names); i++)
      if (names[i] == name || (name.size() == 1 && names[i][0] == name[0])) bits |= 1u << i;
    if (!bits) fail();
    (negated ? s.without : s.categories) = bits;
    at_ = end + 1;
  }
};

struct Node {
  enum Kind { Accept, One, Span, Alt, Loop, Atomic, Look, Place } kind;
  const Node *next = nullptr;
  Set set;
  size_t least = 0, most = 0;
  Tree::Mode mode = Tree::Greedy;
  std::vector<const Node *> ways;
  Tree::Kind what = Tree::Seq;  // of looks and places
  size_t loop = 0;
};

}  // namespace

struct Regex::Program {
  std::vector<std::unique_ptr<Node>> nodes;
  const Node *first = nullptr;
  size_t loops = 0;

  Node *made(Node::Kind kind, const Node *next) {
    if (nodes.size() > LARGEST) throw std::runtime_error("a regular expression is too large");
    nodes.push_back(std::make_unique<Node>());
    nodes.back()->kind = kind, nodes.back()->next = next;
    return nodes.back().get();
  }

  const Node *compile(const Tree &t, const Node *next) {
    switch (t.kind) {
      case Tree::Seq:
        for (size_t i = t.items.size(); i-- > 0;) next = compile(t.items[i], next);
        return next;
      case Tree::Alt: {
        if (t.items.size() == 1) return compile(t.items[0], next);
        Node *n = made(Node::Alt, next);
        for (auto &x : t.items) n->ways.push_back(compile(x, next));
        return n;
      }
      case Tree::One: {
        Node *n = made(Node::One, next);
        n->set = t.set;
        return n;
      }
      case Tree::Repeat: return repeat(t, next);
      case Tree::Ahead:
      case Tree::NotAhead:
      case Tree::Behind:
      case Tree::NotBehind: {
        Node *n = made(Node::Look, next);
        n->what = t.kind;
        n->ways = {compile(t.items[0], made(Node::Accept, nullptr))};
        return n;
      }
      default: {
        Node *n = made(Node::Place, next);
        n->what = t.kind;
        return n;
      }
    }
  }

  const Node *repeat(const Tree &t, const Node *next) {
    const Tree *child = &t.items[0];
    while ((child->kind == Tree::Seq || child->kind == Tree::Alt) && child->items.size() == 1) child = &child->items[0];
    if (child->kind == Tree::One) {
      Node *n = made(Node::Span, next);
      n->set = child->set, n->least = t.least, n->most = t.most, n->mode = t.mode;
      return n;
    }
    if (t.mode == Tree::Possessive) {
      Tree greedy = t;
      greedy.mode = Tree::Greedy;
      Node *n = made(Node::Atomic, next);
      n->ways = {compile(greedy, made(Node::Accept, nullptr))};
      return n;
    }
    const Node *tail = next;
    auto order = [&](Node *n, const Node *more) {
      n->ways = t.mode == Tree::Lazy ? std::vector<const Node *>{next, more} : std::vector<const Node *>{more, next};
    };
    if (t.most == MANY) {
      Node *loop = made(Node::Loop, next);
      loop->loop = loops++;
      order(loop, compile(*child, loop));
      tail = loop;
    } else {
      for (size_t i = t.least; i < t.most; i++) {
        Node *maybe = made(Node::Alt, next);
        order(maybe, compile(*child, tail));
        tail = maybe;
      }
    }
    for (size_t i = 0; i < t.least; i++) tail = compile(*child, tail);
    return tail;
  }
};

namespace {

class Match {
 public:
  Match(const std::u32string &text, size_t loops) : text_(text), entered_(loops, NONE) {}

  size_t run(const Node *n, size_t i) {  // where the match ends
    struct Depth {
      int &d;
      explicit Depth(int &d) : d(d) {
        if (++d > DEEPEST) throw std::runtime_error("the text is too long for the tokenizer's regular expression");
      }
      ~Depth() { d--; }
    } depth(depth_);
    for (;; n = n->next) {
      switch (n->kind) {
        case Node::Accept: return target_ == NONE || target_ == i ? i : NONE;
        case Node::One:
          if (i >= text_.size() || !n->set.has(text_[i])) return NONE;
          i++;
          break;
        case Node::Span: {
          size_t most = n->most == MANY ? text_.size() - i : std::min(n->most, text_.size() - i), count = 0;
          if (n->mode == Tree::Lazy) {
            for (;; count++) {
              if (count >= n->least)
                if (size_t end = run(n->next, i + count); end != NONE) return end;
              if (count >= most || !n->set.has(text_[i + count])) return NONE;
            }
          }
          while (count < most && n->set.has(text_[i + count])) count++;
          if (count < n->least) return NONE;
          if (n->mode == Tree::Possessive) {
            i += count;
            break;
          }
          for (; count > n->least; count--)
            if (size_t end = run(n->next, i + count); end != NONE) return end;
          i += count;
          break;
        }
        case Node::Alt:
          for (const Node *way : n->ways)
            if (size_t end = run(way, i); end != NONE) return end;
          return NONE;
        case Node::Loop: {
          size_t before = entered_[n->loop];
          bool moved = before != i;
          for (const Node *way : n->ways) {
            if (way != n->next && !moved) continue;
            entered_[n->loop] = way == n->next ? NONE : i;
            size_t end = run(way, i);
            entered_[n->loop] = before;
            if (end != NONE) return end;
          }
          return NONE;
        }
        case Node::Atomic: {
          size_t end = inner(n->ways[0], i, NONE);
          if (end == NONE) return NONE;
          i = end;
          break;
        }
        case Node::Look: {
          bool behind = n->what == Tree::Behind || n->what == Tree::NotBehind, found = false;
          if (!behind) found = inner(n->ways[0], i, NONE) != NONE;
          for (size_t start = i + 1; behind && !found && start-- > 0;) found = inner(n->ways[0], start, i) != NONE;
          if (found != (n->what == Tree::Ahead || n->what == Tree::Behind)) return NONE;
          break;
        }
        case Node::Place: {
          bool start = i == 0, end = i == text_.size();
          bool good = n->what == Tree::Start       ? start
                      : n->what == Tree::End       ? end
                      : n->what == Tree::LineStart ? start || (text_[i - 1] == '\n' && !end)
                                                   : end || text_[i] == '\n';
          if (!good) return NONE;
          break;
        }
      }
    }
  }

 private:
  const std::u32string &text_;
  std::vector<size_t> entered_;
  size_t target_ = NONE;
  int depth_ = 0;

  size_t inner(const Node *n, size_t i, size_t target) {
    std::swap(target_, target);
    size_t end = run(n, i);
    std::swap(target_, target);
    return end;
  }
};

}  // namespace

Regex::Regex(const std::u32string &pattern) : p_(std::make_unique<Program>()) {
  p_->first = p_->compile(Parser(pattern).whole(), p_->made(Node::Accept, nullptr));
}
Regex::~Regex() = default;
Regex::Regex(Regex &&) noexcept = default;

std::vector<Regex::Part> Regex::parts(const std::u32string &text) const {
  std::vector<Part> out;
  Match match(text, p_->loops);
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    size_t end = match.run(p_->first, i);
    if (end == NONE || end == i) {
      i++;
      continue;
    }
    if (done < i) out.push_back({done, i, false});
    out.push_back({i, end, true});
    i = done = end;
  }
  if (done < text.size()) out.push_back({done, text.size(), false});
  return out;
}

}  // namespace wasat
