// BPE, Unigram, WordPiece, WordLevel.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <queue>
#include <unordered_map>

#include "tokenizer_parts.h"
#include "utf8.h"

namespace wasat {
namespace {

class Vocabulary : public Model {
 public:
  int64_t id(const std::string &token) const override {
    auto found = ids_.find(token);
    return found == ids_.end() ? -1 : int64_t(found->second);
  }
  const std::string *token(int64_t id) const override {
    return id >= 0 && id < int64_t(tokens_.size()) ? tokens_[size_t(id)] : nullptr;
  }

 protected:
  void add(const Part &p, const std::string &token, int64_t id) {
    if (id >= 1 << 26) p.fail("has the id " + std::to_string(id));
    auto at = ids_.insert_or_assign(token, uint32_t(id)).first;
    if (tokens_.size() <= size_t(id)) tokens_.resize(size_t(id) + 1);
    tokens_[size_t(id)] = &at->first;
  }
  void read(const Part &p) {
    auto &fields = p.get("vocab", Json::Object).fields;
    ids_.reserve(fields.size());
    for (auto &f : fields) add(p, f.first, p.whole(f.second));
  }
  // The ids of <0xNN> for the bytes of s, if there are all of them.
  std::optional<std::vector<int64_t>> fallback(const std::string &s) const {
    std::vector<int64_t> out;
    for (unsigned char b : s) {
      static const char hex[] = "0123456789ABCDEF";
      out.push_back(id(std::string("<0x") + hex[b >> 4] + hex[b & 15] + ">"));
      if (out.back() < 0) return {};
    }
    return out;
  }

  std::unordered_map<std::string, uint32_t> ids_;
  std::vector<const std::string *> tokens_;
};

class Bpe : public Vocabulary {
 public:
  explicit Bpe(const Part &p)
      : unknown_(p.text_or("unk_token")), prefix_(p.text_or("continuing_subword_prefix")), suffix_(p.text_or("end_of_word_suffix")),
        fuse_(p.flag("fuse_unk")), bytes_(p.flag("byte_fallback")), whole_(p.flag("ignore_merges")) {
    if (const Json *d = p.find("dropout"); d && d->number() != 0) p.unknown("dropout");
    read(p);
    auto &merges = p.items("merges");
    merges_.reserve(merges.size());
    for (uint32_t rank = 0; rank < merges.size(); rank++) {
      auto &m = merges[rank];
      std::string a, b;
      if (m.kind == Json::List && m.items.size() == 2) a = m.items[0].text, b = m.items[1].text;
      else if (size_t space = m.text.find(' '); space != std::string::npos) a = m.text.substr(0, space), b = m.text.substr(space + 1);
      int64_t left = id(a), right = id(b), both = b.size() < prefix_.size() ? -1 : id(a + b.substr(prefix_.size()));
      if (left < 0 || right < 0 || both < 0) p.fail("has the merge " + std::to_string(rank) + " of what is no token");
      merges_[key(left, right)] = {rank, uint32_t(both)};
    }
  }

  void tokenize(const Text &piece, std::vector<int64_t> &ids) const override {
    if (whole_)
      if (int64_t found = id(wasat::bytes(piece)); found >= 0) return ids.push_back(found);
    std::vector<Symbol> word;
    auto put = [&](int64_t id) { word.push_back({uint32_t(id), int(word.size()) - 1, int(word.size()) + 1}); };
    bool pending = false;  // an unknown token, which the next ones may join
    for (size_t i = 0; i < piece.size(); i++) {
      std::string s = wasat::bytes(piece.substr(i, 1));
      if (i && !prefix_.empty()) s = prefix_ + s;
      if (i + 1 == piece.size()) s += suffix_;
      if (int64_t found = id(s); found >= 0) {
        if (pending) put(id(unknown_));
        pending = false;
        put(found);
        continue;
      }
      if (bytes_)
        if (auto all = fallback(s)) {
          for (int64_t b : *all) put(b);
          continue;
        }
      if (unknown_.empty()) continue;
      if (id(unknown_) < 0) throw Error(WASAT_INPUT, "the tokenizer cannot encode the text (its unknown token is no token)");
      if (pending && !fuse_) put(id(unknown_));
      pending = true;
    }
    if (pending) put(id(unknown_));
    if (!word.empty()) word.back().next = -1;
    merge(word);
    for (auto &s : word)
      if (!s.gone) ids.push_back(s.id);
  }

 private:
  struct Symbol {
    uint32_t id;
    int previous, next;
    bool gone = false;
  };
  struct Merge {
    uint32_t rank, id;
  };
  struct Chance {
    uint32_t rank;
    int at;
    uint32_t id;
    bool operator<(const Chance &o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };

  std::string unknown_, prefix_, suffix_;
  bool fuse_, bytes_, whole_;
  std::unordered_map<uint64_t, Merge> merges_;

  static uint64_t key(uint64_t a, uint64_t b) { return a << 32 | b; }

  void merge(std::vector<Symbol> &word) const {
    std::priority_queue<Chance> queue;
    auto consider = [&](int at) {
      if (at < 0 || word[at].next < 0) return;
      auto found = merges_.find(key(word[at].id, word[word[at].next].id));
      if (found != merges_.end()) queue.push({found->second.rank, at, found->second.id});
    };
    for (size_t i = 0; i < word.size(); i++) consider(int(i));
    while (!queue.empty()) {
      Chance c = queue.top();
      queue.pop();
      Symbol &left = word[c.at];
      if (left.gone || left.next < 0) continue;
      Symbol &right = word[left.next];
      auto found = merges_.find(key(left.id, right.id));
      if (found == merges_.end() || found->second.id != c.id) continue;
      left.id = c.id, left.next = right.next, right.gone = true;
      if (left.next >= 0) word[left.next].previous = c.at;
      consider(left.previous);
      consider(c.at);
    }
  }
};

class Unigram : public Vocabulary {
 public:
  explicit Unigram(const Part &p) : bytes_(p.flag("byte_fallback")) {
    for (auto &item : p.items("vocab")) {
      if (item.kind != Json::List || item.items.size() != 2 || item.items[0].kind != Json::String) p.fail("has a token without a score");
      add(p, item.items[0].text, int64_t(scores_.size()));
      scores_.push_back(item.items[1].number());
      longest_ = std::max(longest_, item.items[0].text.size());
      least_ = std::min(least_, scores_.back());
    }
    if (const Json *unk = p.find("unk_id")) unknown_ = p.whole(*unk);
    if (unknown_ >= int64_t(scores_.size())) p.fail("has an unk_id that is no token's");
    tails_.emplace_back();
    for (auto &t : ids_) {
      uint32_t node = 0;
      for (unsigned char b : t.first) {
        auto found = tails_[node].next.find(b);
        if (found == tails_[node].next.end()) {
          found = tails_[node].next.emplace(b, uint32_t(tails_.size())).first;
          uint32_t made = found->second;
          tails_.emplace_back();
          node = made;
        } else {
          node = found->second;
        }
      }
      tails_[node].id = int64_t(t.second);
    }
  }

  void tokenize(const Text &piece, std::vector<int64_t> &ids) const override {
    std::string s = wasat::bytes(piece);
    struct Best {
      int64_t id = 0, from = -1;
      double score = 0;
    };
    std::vector<Best> best(s.size() + 1);
    for (size_t at = 0; at < s.size();) {
      size_t end = at;
      decode_utf8(s, end);
      bool single = false;
      auto offer = [&](size_t to, int64_t id, double score) {
        Best &b = best[to];
        if (b.from < 0 || score > b.score) b = {id, int64_t(at), score};
      };
      uint32_t node = 0;
      for (size_t i = at; i < s.size(); i++) {
        auto next = tails_[node].next.find(uint8_t(s[i]));
        if (next == tails_[node].next.end()) break;
        node = next->second;
        if (int64_t id = tails_[node].id; id >= 0) {
          offer(i + 1, id, scores_[size_t(id)] + best[at].score);
          single = single || i + 1 == end;
        }
      }
      if (!single) {
        if (unknown_ < 0) throw Error(WASAT_INPUT, "the tokenizer cannot encode the text (it has no unknown token)");
        offer(end, unknown_, least_ - 10 + best[at].score);
      }
      at = end;
    }
    std::vector<std::string> words;
    std::string joined;  // unknown ones are one
    for (size_t end = s.size(); end > 0;) {
      size_t from = size_t(best[end].from);
      std::string word = s.substr(from, end - from);
      if (best[end].id == unknown_) joined = word + joined;
      else {
        if (!joined.empty()) words.push_back(joined), joined.clear();
        words.push_back(word);
      }
      end = from;
    }
    if (!joined.empty()) words.push_back(joined);
    for (size_t i = words.size(); i-- > 0;) {
      if (int64_t found = id(words[i]); found >= 0) ids.push_back(found);
      else if (auto all = bytes_ ? fallback(words[i]) : std::nullopt) ids.insert(ids.end(), all->begin(), all->end());
      else ids.push_back(unknown_);
    }
  }

 private:
  struct Tail {
    std::unordered_map<uint8_t, uint32_t> next;
    int64_t id = -1;
  };
  bool bytes_;
  int64_t unknown_ = -1;
  size_t longest_ = 0;
  double least_ = INFINITY;
  std::vector<double> scores_;
  std::vector<Tail> tails_;
};

class WordPiece : public Vocabulary {
 public:
  explicit WordPiece(const Part &p)
      : unknown_(p.text("unk_token")), prefix_(p.text_or("continuing_subword_prefix", "##")),
        most_(p.find("max_input_chars_per_word") ? size_t(p.whole(*p.find("max_input_chars_per_word"))) : 100) {
    read(p);
  }

  void tokenize(const Text &piece, std::vector<int64_t> &ids) const override {
    std::vector<int64_t> found;
    bool known = piece.size() <= most_;
    for (size_t at = 0; known && at < piece.size();) {
      size_t end = piece.size();
      for (; end > at; end--) {
        int64_t i = id((at ? prefix_ : "") + wasat::bytes(piece.substr(at, end - at)));
        if (i < 0) continue;
        found.push_back(i);
        break;
      }
      known = end > at;
      at = end;
    }
    if (known) return void(ids.insert(ids.end(), found.begin(), found.end()));
    if (id(unknown_) < 0) throw Error(WASAT_INPUT, "the tokenizer cannot encode the text (its unknown token is no token)");
    ids.push_back(id(unknown_));
  }

 private:
  std::string unknown_, prefix_;
  size_t most_;
};

class WordLevel : public Vocabulary {
 public:
  explicit WordLevel(const Part &p) : unknown_(p.text("unk_token")) { read(p); }

  void tokenize(const Text &piece, std::vector<int64_t> &ids) const override {
    int64_t found = id(wasat::bytes(piece));
    if (found < 0) found = id(unknown_);
    if (found < 0) throw Error(WASAT_INPUT, "the tokenizer cannot encode the text (its unknown token is no token)");
    ids.push_back(found);
  }

 private:
  std::string unknown_;
};

}  // namespace

std::unique_ptr<Model> token_model(const Part &p) {
  std::string type = p.text_or("type");
  if (type.empty()) {  // old files do not say
    const Json *vocab = p.find("vocab");
    type = p.find("merges") ? "BPE" : vocab && vocab->kind == Json::List ? "Unigram" : p.find("max_input_chars_per_word") ? "WordPiece" : "WordLevel";
  }
  if (type == "BPE") return std::make_unique<Bpe>(p);
  if (type == "Unigram") return std::make_unique<Unigram>(p);
  if (type == "WordPiece") return std::make_unique<WordPiece>(p);
  if (type == "WordLevel") return std::make_unique<WordLevel>(p);
  p.unknown("the type " + type);
}

}  // namespace wasat
