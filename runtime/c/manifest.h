// What manifest.json says, as runtime/manifest.py reads it: as much of it as generating text needs.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "errors.h"
#include "json.h"

namespace wasat {

using Sizes = std::map<std::string, int64_t>;

// A size: a number, or an expression over symbols in Python's notation.
class Dim {
 public:
  Dim(int64_t n) : number_(n) {}
  explicit Dim(const std::string &text);  // throws Error

  std::optional<int64_t> at(const Sizes &sizes) const;  // nothing: a symbol is unknown, or the value is none
  bool fixed() const { return text_.empty(); }
  bool mentions(const std::string &symbol) const;
  const std::string &text() const { return text_; }  // empty for a number

 private:
  struct Step;
  int64_t number_ = 0;
  std::string text_;
  std::vector<Step> steps_;  // in postfix order
  friend class DimParser;
};

struct Dim::Step {
  enum Kind { Number, Symbol, Add, Sub, Mul, Div, Mod, Neg, Max, Min } kind;
  int64_t number = 0;
  std::string symbol;
};

struct TensorSpec {
  std::string name, dtype;
  std::vector<Dim> shape;
  std::optional<std::vector<int64_t>> sizes(const Sizes &symbols) const;
};

struct State : TensorSpec {
  std::string kind, cut;
  std::optional<int64_t> rows, positions, capacity, window;
  std::optional<double> empty;  // every element of it before the first token
  std::string begin;            // or the weight that is one row
  bool grows() const { return positions && !capacity; }
};

struct Check {
  Dim left, right;
  std::string needs, where;
};

struct Indices {
  std::string input;
  Dim low, high;
  std::string where;
};

struct Entry {
  std::vector<TensorSpec> inputs, outputs;
  std::vector<std::string> states, weights;
  std::vector<Check> checks;
  std::vector<Indices> indices;
  const TensorSpec *input(const std::string &name) const;
};

struct Media {
  int64_t vocab, dim;
};

struct FileSpec {
  std::string sha256;
  int64_t bytes;
};

struct Manifest {
  std::string tvm, tvm_ffi;
  std::map<std::string, Entry> entries;
  std::string tokens, cut, no_cache;
  std::optional<int64_t> context, chunk, vocab, bos;
  int64_t granule = 1;
  std::vector<int64_t> eos;
  std::optional<Media> media;
  std::vector<State> states;
  std::vector<std::string> libraries;  // files of the artifact that the library calls, in the order in which they are loaded
  std::vector<TensorSpec> weights;
  std::map<std::string, FileSpec> files;
};

// The manifest of the artifact at `folder`, if this machine can run it and its files have the sizes they should have.
Manifest read_manifest(const std::string &folder);
void check_hash(const std::string &folder, const std::string &name, const Manifest &manifest);

// Where in a safetensors file the arrays that `specs` describe lie, by name. Throws Error where it says anything else.
std::map<std::string, size_t> array_places(const std::string &path, std::string_view file, const std::vector<TensorSpec> &specs);
size_t item_size(const std::string &dtype);  // throws Error

}  // namespace wasat
