// The parts that a tokenizer.json is made of.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "errors.h"
#include "json.h"

namespace wasat {

using Text = std::u32string;

// A stretch of the text on its way to the model.
struct Piece {
  Text text;
  bool first = false;  // it begins where the text does
};

using Normalize = std::function<Text(const Text &)>;
using PreTokenize = std::function<void(std::vector<Piece> &)>;
using Decode = std::function<void(std::vector<std::string> &)>;

// The ids of a piece.
struct Model {
  virtual ~Model() = default;
  virtual void tokenize(const Text &piece, std::vector<int64_t> &ids) const = 0;
  virtual int64_t id(const std::string &token) const = 0;       // -1: none
  virtual const std::string *token(int64_t id) const = 0;       // nullptr: none
};

// A part of the file, whose fields are read with their types; what is wrong names the part.
class Part {
 public:
  Part(const Json &json, std::string name) : json_(json), name_(std::move(name)) {
    if (json.kind != Json::Object) fail("is no object");
  }
  const Json &json() const { return json_; }
  [[noreturn]] void fail(const std::string &what) const {
    throw Error(WASAT_ARTIFACT, "tokenizer.json: " + name_ + " " + what);
  }
  [[noreturn]] void unknown(const std::string &what) const { fail("has " + what + ", which this host does not know"); }
  const Json *find(const std::string &key) const {
    const Json *v = json_.find(key);
    return v && v->kind != Json::Null ? v : nullptr;
  }
  const Json &get(const std::string &key, Json::Kind kind) const {
    const Json *v = find(key);
    if (!v || v->kind != kind) fail("lacks " + key);
    return *v;
  }
  std::string text(const std::string &key) const { return get(key, Json::String).text; }
  std::string text_or(const std::string &key, const std::string &otherwise = "") const { return find(key) ? text(key) : otherwise; }
  bool flag(const std::string &key, bool otherwise = false) const { return find(key) ? get(key, Json::Bool).truth : otherwise; }
  std::string type() const { return text("type"); }
  Part part(const std::string &key) const { return Part(get(key, Json::Object), key); }
  const std::vector<Json> &items(const std::string &key) const { return get(key, Json::List).items; }
  int64_t whole(const Json &v) const {
    if (!v.is_whole() || v.whole() < 0 || v.whole() > UINT32_MAX) fail("has an id that is none");
    return v.whole();
  }

 private:
  const Json &json_;
  std::string name_;
};

Normalize normalizer(const Part &part);
PreTokenize pre_tokenizer(const Part &part);
Decode decoder(const Part &part);
std::unique_ptr<Model> token_model(const Part &part);

}  // namespace wasat
