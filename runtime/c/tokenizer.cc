#include "tokenizer.h"

#include <algorithm>
#include <set>
#include <unordered_map>

#include "tokenizer_parts.h"
#include "unicode.h"
#include "utf8.h"

namespace wasat {
namespace {

struct Added {
  int64_t id;
  std::string content;
  bool single, left, right, normalized, special;
};

// Which added tokens a text holds: the leftmost, and of these the longest.
class Finder {
 public:
  void add(const Added *token, const Text &text) {
    if (text.empty()) return;
    auto &list = by_first_[text[0]];
    list.push_back({text, token});
    std::stable_sort(list.begin(), list.end(), [](auto &a, auto &b) { return a.first.size() > b.first.size(); });
  }

  // Calls back with each stretch of the text and the token that it is, nullptr for none.
  template <class F>
  void split(const Text &text, F &&take) const {
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
      const Added *token = nullptr;
      size_t start = at, stop = at;
      if (auto list = by_first_.find(text[at]); list != by_first_.end())
        for (auto &[content, found] : list->second)
          if (!text.compare(at, content.size(), content)) {
            token = found, stop = at + content.size();
            break;
          }
      if (!token) {
        at++;
        continue;
      }
      at = stop;
      auto word = [&](size_t i) { return unicode::is(unicode::RustWord, text[i]); };
      if (token->single && ((start && word(start - 1)) || (stop < text.size() && word(stop)))) continue;
      if (token->left)
        while (start > done && unicode::is(unicode::RustSpace, text[start - 1])) start--;
      start = std::max(start, done);
      if (token->right)
        while (stop < text.size() && unicode::is(unicode::RustSpace, text[stop])) stop++;
      if (done < start) take(done, start, nullptr);
      take(start, stop, token);
      done = stop;
    }
    if (done < text.size()) take(done, text.size(), nullptr);
  }

 private:
  std::unordered_map<char32_t, std::vector<std::pair<Text, const Added *>>> by_first_;
};

}  // namespace

struct Tokenizer::Parts {
  std::unique_ptr<Model> model;
  Normalize normalize;
  PreTokenize pre_tokenize;
  Decode decode;
  std::vector<Added> added;
  std::unordered_map<int64_t, const Added *> by_id;
  std::set<std::string> special;  // contents
  Finder raw, normalized;
  std::vector<int64_t> before, after;
  std::unordered_map<int64_t, int> bytes;

  explicit Parts(const Json &json) {
    Part top(json, "the whole");
    model = token_model(top.part("model"));
    if (top.find("normalizer")) normalize = normalizer(top.part("normalizer"));
    if (top.find("pre_tokenizer")) pre_tokenize = pre_tokenizer(top.part("pre_tokenizer"));
    if (top.find("decoder")) decode = decoder(top.part("decoder"));
    if (top.find("added_tokens"))
      for (auto &item : top.items("added_tokens")) {
        Part t(item, "an added token");
        std::string content = t.text("content");
        if (content.empty()) continue;
        int64_t own = model->id(content);
        added.push_back({own >= 0 ? own : t.whole(t.get("id", Json::Number)), content, t.flag("single_word"), t.flag("lstrip"),
                         t.flag("rstrip"), t.flag("normalized", !t.flag("special")), t.flag("special")});
      }
    for (auto &t : added) {
      by_id[t.id] = &t;
      if (t.special) special.insert(t.content);
      Text text = points(t.content);
      if (t.normalized) normalized.add(&t, normalize ? normalize(text) : text);
      else raw.add(&t, text);
    }
    if (top.find("post_processor")) surround(top.part("post_processor"));
    find_bytes();
  }

  const std::string *token(int64_t id) const {
    auto found = by_id.find(id);
    return found != by_id.end() ? &found->second->content : model->token(id);
  }

  void surround(const Part &p) {
    std::string type = p.type();
    if (type == "ByteLevel") return;
    if (type == "Sequence") {
      for (auto &item : p.items("processors")) surround(Part(item, "post_processor"));
      return;
    }
    std::vector<int64_t> left, right;
    if (type == "BertProcessing" || type == "RobertaProcessing") {
      for (auto [key, to] : {std::pair{"cls", &left}, {"sep", &right}}) {
        auto &pair = p.items(key);
        if (pair.size() != 2) p.fail("lacks " + std::string(key));
        to->push_back(p.whole(pair[1]));
      }
    } else if (type == "TemplateProcessing") {
      bool seen = false;
      for (auto &item : p.items("single")) {
        if (item.find("Sequence")) {
          if (seen) p.unknown("a text twice");
          seen = true;
          continue;
        }
        Part named(item, "the template");
        std::string name = named.part("SpecialToken").text("id");
        for (auto &id : p.part("special_tokens").part(name).items("ids")) (seen ? right : left).push_back(p.whole(id));
      }
      if (!seen) p.unknown("a template without a text");
    } else {
      p.unknown("the type " + type);
    }
    before.insert(before.begin(), left.begin(), left.end());
    after.insert(after.end(), right.begin(), right.end());
  }

  void find_bytes() {
    for (int b = 0; b < 256; b++)
      for (const char *hex : {"0123456789ABCDEF", "0123456789abcdef"}) {
        std::string name = std::string("<0x") + hex[b >> 4] + hex[b & 15] + ">";
        int64_t id = model->id(name);
        for (auto &t : added)
          if (t.content == name) id = t.id;
        if (id >= 0 && decoded({id}, false) != name) bytes[id] = b;
      }
  }

  std::string decoded(const std::vector<int64_t> &ids, bool skip) const {
    std::vector<std::string> tokens;
    for (int64_t id : ids)
      if (const std::string *t = token(id); t && !(skip && special.count(*t))) tokens.push_back(*t);
    if (decode && !tokens.empty()) decode(tokens);
    std::string out;
    for (size_t i = 0; i < tokens.size(); i++) out += (i && !decode ? " " : "") + tokens[i];
    return out;
  }

  void encode(const Text &text, bool first, std::vector<int64_t> &ids) const {
    std::vector<Piece> pieces{{text, first}};
    if (pre_tokenize) pre_tokenize(pieces);
    for (auto &piece : pieces)
      if (!piece.text.empty()) model->tokenize(piece.text, ids);
  }
};

Tokenizer::Tokenizer(std::string_view json) {
  Json data;
  try {
    data = Json::parse(json);
  } catch (const std::runtime_error &e) {
    throw Error(WASAT_ARTIFACT, std::string("tokenizer.json cannot be read (") + e.what() + "); compile the model again with its tokenizer");
  }
  p_ = std::make_unique<Parts>(data);
}
Tokenizer::~Tokenizer() = default;

std::vector<int64_t> Tokenizer::encode(const std::string &text, bool special) const {
  std::vector<int64_t> ids;
  if (special) ids = p_->before;
  try {
    Text whole = points(text);
    p_->raw.split(whole, [&](size_t start, size_t stop, const Added *token) {
      if (token) return ids.push_back(token->id);
      Text part = whole.substr(start, stop - start);
      if (p_->normalize) part = p_->normalize(part);
      p_->normalized.split(part, [&](size_t from, size_t to, const Added *inner) {
        if (inner) ids.push_back(inner->id);
        else p_->encode(part.substr(from, to - from), start == 0 && from == 0, ids);
      });
    });
  } catch (const Error &) {
    throw;
  } catch (const std::runtime_error &e) {
    throw Error(WASAT_INPUT, std::string("the tokenizer cannot encode the text (") + e.what() + ")");
  }
  if (special) ids.insert(ids.end(), p_->after.begin(), p_->after.end());
  return ids;
}

std::string Tokenizer::decode(const std::vector<int64_t> &ids) const { return p_->decoded(ids, true); }

bool Tokenizer::is_text(int64_t id) const { return !special(id) && p_->token(id); }

int Tokenizer::byte_of(int64_t id) const {
  auto found = p_->bytes.find(id);
  return found == p_->bytes.end() ? -1 : found->second;
}

std::optional<std::string> Tokenizer::special(int64_t id) const {
  auto found = p_->by_id.find(id);
  if (found == p_->by_id.end() || !found->second->special) return {};
  return found->second->content;
}

}  // namespace wasat
