// Normalizers, pre-tokenizers and decoders, as the tokenizers library has them.
#include "tokenizer_parts.h"

#include <algorithm>
#include <array>
#include <memory>

#include "regex.h"
#include "unicode.h"
#include "utf8.h"

namespace wasat {
namespace {

using unicode::is;

// -- bytes as characters, as GPT-2 writes them ---------------------------------------------------------------------------------
const std::array<char32_t, 256> &byte_characters() {
  static const std::array<char32_t, 256> made = [] {
    std::array<char32_t, 256> out{};
    char32_t next = 256;
    for (int b = 0; b < 256; b++) out[b] = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE ? char32_t(b) : next++;
    return out;
  }();
  return made;
}

Text as_characters(const Text &text) {
  Text out;
  for (unsigned char b : bytes(text)) out += byte_characters()[b];
  return out;
}

int byte_of_character(char32_t c) {
  auto &all = byte_characters();
  auto found = std::find(all.begin(), all.end(), c);
  return c < 0x144 && found != all.end() ? int(found - all.begin()) : -1;
}

// -- patterns ------------------------------------------------------------------------------------------------------------------
using Parts = std::vector<Regex::Part>;
using Find = std::function<Parts(const Text &)>;

// Each character that matches is a part, and what is between them.
Find characters(const std::function<bool(char32_t)> &test) {
  return [test](const Text &text) {
    Parts out;
    for (size_t i = 0; i < text.size(); i++) {
      bool match = test(text[i]);
      if (!match && !out.empty() && !out.back().match) out.back().end = i + 1;
      else out.push_back({i, i + 1, match});
    }
    return out;
  };
}
Find characters(unicode::Class which) {
  return characters([which](char32_t c) { return is(which, c); });
}

Find pattern(const Part &p) {
  const Json &json = p.get("pattern", Json::Object);
  if (json.fields.size() != 1 || json.fields[0].second.kind != Json::String) p.unknown("another pattern");
  Text text = points(json.fields[0].second.text);
  if (json.fields[0].first == "Regex") {
    std::shared_ptr<Regex> regex;
    try {
      regex = std::make_shared<Regex>(text);
    } catch (const std::runtime_error &e) {
      p.fail(e.what());
    }
    return [regex](const Text &t) { return regex->parts(t); };
  }
  if (json.fields[0].first != "String" || text.empty()) p.unknown("another pattern");
  return [text](const Text &t) {
    Parts out;
    size_t done = 0;
    for (size_t at; (at = t.find(text, done)) != Text::npos; done = at + text.size()) {
      if (at > done) out.push_back({done, at, false});
      out.push_back({at, at + text.size(), true});
    }
    if (done < t.size()) out.push_back({done, t.size(), false});
    return out;
  };
}

Text replaced(const Text &text, const Find &find, const Text &content) {
  Text out;
  for (auto &p : find(text)) out += p.match ? content : text.substr(p.start, p.end - p.start);
  return out;
}

enum Behavior { Removed, Isolated, WithPrevious, WithNext, Contiguous };

Behavior behavior(const Part &p, const std::string &name) {
  static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return Behavior(i);
  p.unknown("the behavior " + name);
}

void split(std::vector<Piece> &pieces, const Find &find, Behavior b, bool invert = false) {
  std::vector<Piece> out;
  for (auto &piece : pieces) {
    Parts parts = find(piece.text), kept;
    if (invert)
      for (auto &p : parts) p.match = !p.match;
    bool previous = false;
    if (b == WithNext) {
      for (size_t i = parts.size(); i-- > 0; previous = parts[i].match)
        if (parts[i].match && !previous && !kept.empty()) kept.back().start = parts[i].start;
        else kept.push_back(parts[i]);
      std::reverse(kept.begin(), kept.end());
    } else {
      for (auto &p : parts) {
        bool joins = b == WithPrevious ? p.match && !previous : b == Contiguous && p.match == previous;
        if (joins && !kept.empty()) kept.back().end = p.end;
        else if (b != Removed || !p.match) kept.push_back(p);
        previous = p.match;
      }
    }
    for (auto &p : kept) out.push_back({piece.text.substr(p.start, p.end - p.start), piece.first && p.start == 0});
  }
  pieces = std::move(out);
}

Text trimmed(const Text &t, bool left, bool right) {
  size_t start = 0, end = t.size();
  while (left && start < end && is(unicode::RustSpace, t[start])) start++;
  while (right && end > start && is(unicode::RustSpace, t[end - 1])) end--;
  return t.substr(start, end - start);
}

Text without(const Text &t, unicode::Class which) {
  Text out;
  for (char32_t c : t)
    if (!is(which, c)) out += c;
  return out;
}

Text bert_cleaned(const Text &t) {
  Text out;
  for (char32_t c : t)
    if (!is(unicode::BertRemoved, c)) out += is(unicode::BertBlank, c) ? U' ' : c;
  return out;
}

void replace_all(std::string &s, const std::string &from, const std::string &to) {
  for (size_t at = 0; !from.empty() && (at = s.find(from, at)) != std::string::npos; at += to.size()) s.replace(at, from.size(), to);
}

}  // namespace

Normalize normalizer(const Part &p) {
  std::string type = p.type();
  if (type == "Sequence") {
    std::vector<Normalize> all;
    for (auto &item : p.items("normalizers")) all.push_back(normalizer(Part(item, "normalizer")));
    return [all](Text t) {
      for (auto &n : all) t = n(t);
      return t;
    };
  }
  if (type == "NFD" || type == "NFC" || type == "NFKD" || type == "NFKC") {
    bool compatible = type[2] == 'K', composed = type.back() == 'C';
    return [=](const Text &t) { return unicode::normalized(t, compatible, composed); };
  }
  if (type == "Lowercase") return [](const Text &t) { return unicode::lower(t); };
  if (type == "StripAccents") return [](const Text &t) { return without(t, unicode::Accent); };
  if (type == "ByteLevel") return as_characters;
  if (type == "Strip") {
    bool left = p.flag("strip_left", true), right = p.flag("strip_right", true);
    return [=](const Text &t) { return trimmed(t, left, right); };
  }
  if (type == "Prepend") {
    Text before = points(p.text("prepend"));
    return [=](const Text &t) { return t.empty() ? t : before + t; };
  }
  if (type == "Replace") {
    Find find = pattern(p);
    Text content = points(p.text("content"));
    return [=](const Text &t) { return replaced(t, find, content); };
  }
  if (type == "BertNormalizer") {
    bool clean = p.flag("clean_text", true), chinese = p.flag("handle_chinese_chars", true), lower = p.flag("lowercase", true);
    bool strip = p.flag("strip_accents", lower);
    return [=](Text t) {
      if (clean) t = bert_cleaned(t);
      if (chinese) {
        Text apart;
        for (char32_t c : t) apart += is(unicode::BertChinese, c) ? Text{U' ', c, U' '} : Text{c};
        t = apart;
      }
      if (strip) t = without(unicode::normalized(t, false, false), unicode::BertAccent);
      return lower ? unicode::lower(t) : t;
    };
  }
  p.unknown("the type " + type);
}

PreTokenize pre_tokenizer(const Part &p) {
  std::string type = p.type();
  if (type == "Sequence") {
    std::vector<PreTokenize> all;
    for (auto &item : p.items("pretokenizers")) all.push_back(pre_tokenizer(Part(item, "pre_tokenizer")));
    return [all](std::vector<Piece> &pieces) {
      for (auto &one : all) one(pieces);
    };
  }
  auto splitting = [](Find find, Behavior b, bool invert = false) {
    return [=](std::vector<Piece> &pieces) { split(pieces, find, b, invert); };
  };
  if (type == "Split") return splitting(pattern(p), behavior(p, p.text("behavior")), p.flag("invert"));
  if (type == "ByteLevel") {
    bool space = p.flag("add_prefix_space", true), regex = p.flag("use_regex", true);
    auto words = std::make_shared<Regex>(U"'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+");
    return [=](std::vector<Piece> &pieces) {
      for (auto &piece : pieces)
        if (space && piece.text[0] != U' ') piece.text = U" " + piece.text;
      if (regex) split(pieces, [&](const Text &t) { return words->parts(t); }, Isolated);
      for (auto &piece : pieces) piece.text = as_characters(piece.text);
    };
  }
  if (type == "Metaspace") {
    Text mark = points(p.text("replacement"));
    if (mark.size() != 1) p.unknown("a replacement of several characters");
    std::string scheme = p.text_or("prepend_scheme", p.flag("add_prefix_space", true) ? "always" : "never");
    if (scheme != "always" && scheme != "first" && scheme != "never") p.unknown("the prepend_scheme " + scheme);
    bool apart = p.flag("split", true);
    return [=](std::vector<Piece> &pieces) {
      for (auto &piece : pieces) {
        std::replace(piece.text.begin(), piece.text.end(), U' ', mark[0]);
        if ((scheme == "always" || (scheme == "first" && piece.first)) && piece.text[0] != mark[0]) piece.text = mark + piece.text;
      }
      if (apart) split(pieces, characters([&](char32_t c) { return c == mark[0]; }), WithNext);
    };
  }
  if (type == "BertPreTokenizer")
    return [=](std::vector<Piece> &pieces) {
      split(pieces, characters(unicode::BertSpace), Removed);
      split(pieces, characters(unicode::BertPunctuation), Isolated);
    };
  if (type == "Whitespace")
    return [](std::vector<Piece> &pieces) {
      std::vector<Piece> out;
      for (auto &piece : pieces) {
        int last = 2;
        for (char32_t c : piece.text) {
          int kind = is(unicode::RustSpace, c) ? 2 : is(unicode::RustWord, c);
          if (kind < 2 && kind == last) out.back().text += c;
          else if (kind < 2) out.push_back({Text{c}, piece.first && &piece.text[0] == &c});
          last = kind;
        }
      }
      pieces = std::move(out);
    };
  if (type == "WhitespaceSplit") return splitting(characters(unicode::RustSpace), Removed);
  if (type == "CharDelimiterSplit") {
    Text mark = points(p.text("delimiter"));
    if (mark.size() != 1) p.unknown("a delimiter of several characters");
    return splitting(characters([mark](char32_t c) { return c == mark[0]; }), Removed);
  }
  if (type == "Digits") return splitting(characters(unicode::Digit), p.flag("individual_digits") ? Isolated : Contiguous);
  if (type == "Punctuation") return splitting(characters(unicode::Punctuation), behavior(p, p.text_or("behavior", "Isolated")));
  p.unknown("the type " + type);
}

Decode decoder(const Part &p) {
  std::string type = p.type();
  if (type == "Sequence") {
    std::vector<Decode> all;
    for (auto &item : p.items("decoders")) all.push_back(decoder(Part(item, "decoder")));
    return [all](std::vector<std::string> &tokens) {
      for (auto &one : all) one(tokens);
    };
  }
  if (type == "ByteLevel")
    return [](std::vector<std::string> &tokens) {
      std::string all;
      for (auto &token : tokens) {
        std::string own;
        bool known = true;
        for (char32_t c : points(token)) {
          int b = byte_of_character(c);
          known = known && b >= 0;
          own += char(b);
        }
        all += known ? own : token;
      }
      tokens = {bytes(points(all))};
    };
  if (type == "Replace") {
    Find find = pattern(p);
    Text content = points(p.text("content"));
    return [=](std::vector<std::string> &tokens) {
      for (auto &token : tokens) token = bytes(replaced(points(token), find, content));
    };
  }
  if (type == "ByteFallback")
    return [](std::vector<std::string> &tokens) {
      std::vector<std::string> out;
      std::string run;
      auto end = [&] {
        if (is_utf8(run)) out.push_back(run);
        else out.insert(out.end(), run.size(), "\xEF\xBF\xBD");
        run.clear();
      };
      auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : (c | 32) >= 'a' && (c | 32) <= 'f' ? (c | 32) - 'a' + 10 : -1; };
      for (auto &token : tokens) {
        bool byte = token.size() == 6 && !token.compare(0, 3, "<0x") && token[5] == '>';
        int high = byte ? token[3] == '+' ? 0 : digit(token[3]) : -1, low = byte ? digit(token[4]) : -1;
        if (high >= 0 && low >= 0) {
          run += char(high * 16 + low);
          continue;
        }
        if (!run.empty()) end();
        out.push_back(token);
      }
      if (!run.empty()) end();
      tokens = std::move(out);
    };
  if (type == "Fuse")
    return [](std::vector<std::string> &tokens) {
      std::string all;
      for (auto &token : tokens) all += token;
      tokens = {all};
    };
  if (type == "Strip") {
    Text content = points(p.text("content"));
    size_t start = size_t(p.whole(p.get("start", Json::Number))), stop = size_t(p.whole(p.get("stop", Json::Number)));
    if (content.size() != 1) p.unknown("a content of several characters");
    return [=](std::vector<std::string> &tokens) {
      for (auto &token : tokens) {
        Text t = points(token);
        size_t from = 0, to = t.size();
        while (from < start && from < t.size() && t[from] == content[0]) from++;
        while (t.size() - to < stop && to > from && t[to - 1] == content[0]) to--;
        token = bytes(t.substr(from, to - from));
      }
    };
  }
  if (type == "Metaspace") {
    Text mark = points(p.text("replacement"));
    if (mark.size() != 1) p.unknown("a replacement of several characters");
    bool never = p.text_or("prepend_scheme", p.flag("add_prefix_space", true) ? "always" : "never") == "never";
    return [=](std::vector<std::string> &tokens) {
      for (size_t i = 0; i < tokens.size(); i++) {
        Text out;
        for (char32_t c : points(tokens[i]))
          if (c != mark[0]) out += c;
          else if (i || never) out += U' ';
        tokens[i] = bytes(out);
      }
    };
  }
  if (type == "WordPiece") {
    std::string prefix = p.text_or("prefix", "##");
    bool cleanup = p.flag("cleanup", true);
    return [=](std::vector<std::string> &tokens) {
      static const std::pair<const char *, const char *> cleaner[] = {
          {" .", "."}, {" ?", "?"}, {" !", "!"}, {" ,", ","}, {" ' ", "'"}, {" n't", "n't"}, {" 'm", "'m"},
          {" do not", " don't"}, {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"}};
      for (size_t i = 0; i < tokens.size(); i++) {
        std::string &t = tokens[i];
        if (i && t.compare(0, prefix.size(), prefix) == 0) t.erase(0, prefix.size());
        else if (i) t = " " + t;
        if (cleanup)
          for (auto &[from, to] : cleaner) replace_all(t, from, to);
      }
    };
  }
  if (type == "BPEDecoder") {
    std::string suffix = p.text_or("suffix", "</w>");
    return [=](std::vector<std::string> &tokens) {
      for (size_t i = 0; i < tokens.size(); i++) replace_all(tokens[i], suffix, i + 1 == tokens.size() ? "" : " ");
    };
  }
  p.unknown("the type " + type);
}

}  // namespace wasat
