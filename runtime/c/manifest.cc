#include "manifest.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>
#include <tuple>

#include "sha256.h"
#include "system.h"

namespace wasat {
namespace {

constexpr int64_t FORMAT = 3;
constexpr int64_t MOST = int64_t(1) << 62;

// A JSON object whose fields are taken with their types; errors name the field's path.
class Fields {
 public:
  Fields(const Json &data, std::string path) : path_(std::move(path)), data_(data) {
    if (data.kind != Json::Object) fail(path_.empty() ? "the whole" : path_, data, "an object");
  }
  const Json &json() const { return data_; }
  const Json *optional(const std::string &name) const {
    const Json *v = data_.find(name);
    return v && v->kind != Json::Null ? v : nullptr;
  }
  const Json &get(const std::string &name) const {
    const Json *v = data_.find(name);
    if (!v) damaged("manifest.json: " + at(name) + " is missing");
    return *v;
  }
  std::string text(const std::string &name) const { return text(get(name), at(name)); }
  std::string text_or(const std::string &name) const { return optional(name) ? text(name) : ""; }
  int64_t whole(const std::string &name) const { return whole(get(name), at(name)); }
  std::optional<int64_t> whole_or(const std::string &name) const {
    if (optional(name)) return whole(name);
    return {};
  }
  bool flag(const std::string &name) const {
    const Json *v = data_.find(name);
    if (v && v->kind != Json::Bool) fail(at(name), *v, "true or false");
    return v && v->truth;
  }
  Dim dim(const Json &v, const std::string &where) const {
    if (v.kind == Json::String) return Dim(v.text);
    return whole(v, where);
  }
  Dim dim(const std::string &name) const { return dim(Json(get(name)), at(name)); }
  Fields section(const std::string &name) const { return Fields(get(name), at(name)); }
  template <class F>
  void each(const std::string &name, F &&take, bool may_lack = false) const {
    if (may_lack && !optional(name)) return;
    const Json &v = get(name);
    if (v.kind != Json::List) fail(at(name), v, "a list");
    for (size_t i = 0; i < v.items.size(); i++) take(v.items[i], at(name) + "." + std::to_string(i));
  }
  std::vector<std::string> texts(const std::string &name, bool may_lack = false) const {
    std::vector<std::string> out;
    each(name, [&](const Json &v, const std::string &where) { out.push_back(text(v, where)); }, may_lack);
    return out;
  }
  static std::string text(const Json &v, const std::string &where) {
    if (v.kind != Json::String) fail(where, v, "text");
    return v.text;
  }
  static int64_t whole(const Json &v, const std::string &where) {
    if (!v.is_whole()) fail(where, v, "a whole number");
    if (v.whole() < 0) damaged("manifest.json: " + where + " is " + v.text + "; it cannot be negative");
    return v.whole();
  }

 private:
  std::string path_;
  const Json &data_;

  std::string at(const std::string &name) const { return path_.empty() ? name : path_ + "." + name; }
  [[noreturn]] static void fail(const std::string &where, const Json &v, const std::string &want) {
    static const char *kinds[] = {"null", "a truth value", "", "text", "a list", "an object"};
    std::string found = v.kind == Json::Number ? v.text : kinds[v.kind];
    damaged("manifest.json: " + where + " is " + found + ", not " + want);
  }
};

TensorSpec read_tensor(const Fields &f) {
  TensorSpec t{f.text("name"), f.text("dtype"), {}};
  f.each("shape", [&](const Json &v, const std::string &where) { t.shape.push_back(f.dim(v, where)); });
  return t;
}

State read_state(const Fields &f) {
  State s;
  static_cast<TensorSpec &>(s) = read_tensor(f);
  s.kind = f.text("kind"), s.cut = f.text("cut");
  s.rows = f.whole_or("rows"), s.positions = f.whole_or("positions");
  s.capacity = f.whole_or("capacity"), s.window = f.whole_or("window");
  if (const Json *empty = f.optional("empty")) {
    if (empty->kind == Json::Number) s.empty = empty->number();
    else s.begin = f.text("empty");
  }
  return s;
}

template <class T, class F>
std::vector<T> sections(const Fields &f, const std::string &name, F &&read) {
  std::vector<T> out;
  f.each(name, [&](const Json &v, const std::string &where) { out.push_back(read(Fields(v, where))); });
  return out;
}

Entry read_entry(const Fields &f) {
  Entry e;
  e.inputs = sections<TensorSpec>(f, "inputs", read_tensor);
  e.outputs = sections<TensorSpec>(f, "outputs", read_tensor);
  e.states = f.texts("states"), e.weights = f.texts("weights");
  e.checks = sections<Check>(f, "checks", [](const Fields &c) {
    return Check{Dim(c.text("left")), Dim(c.text("right")), c.text("needs"), c.text("where")};
  });
  e.indices = sections<Indices>(f, "indices", [](const Fields &i) {
    return Indices{i.text("input"), Dim(i.text("low")), Dim(i.text("high")), i.text("where")};
  });
  return e;
}

template <class List>
auto named(const List &list, const std::string &name) {
  return std::find_if(list.begin(), list.end(), [&](auto &x) { return x.name == name; });
}

std::string shown(const std::vector<Dim> &shape) {
  std::string out = "[";
  for (auto &d : shape) out += (out.size() > 1 ? ", " : "") + (d.fixed() ? std::to_string(*d.at({})) : d.text());
  return out + "]";
}

std::string shown(const std::optional<int64_t> &n) { return n ? std::to_string(*n) : "None"; }

// A state that grows has as many positions as it is asked for, or a multiple of that, and perhaps some more.
void check_capacity(const State &s, int64_t granule, int64_t most) {
  using Wide = __int128;  // what a manifest claims may be anything
  std::map<int64_t, Wide> found;
  for (int64_t c : {granule, 2 * granule, 3 * granule, 16 * granule, 64 * granule, most}) {
    auto shape = s.sizes({{"b", 3}, {"c", c}});
    found[c] = shape && *std::min_element(shape->begin(), shape->end()) > 0 ? (*shape)[*s.positions] : 0;
  }
  Wide span = found[2 * granule] - found[granule], step = span / granule, more = found[granule] - step * granule;
  bool good = span % granule == 0 && step >= 1 && more >= 0 && more % granule == 0;
  for (auto &[c, n] : found) good = good && n == step * c + more;
  if (!good) damaged("manifest.json: full cache " + s.name + " of shape " + shown(s.shape) + " does not hold c positions");
}

// What a state that is too small, or sized by nothing, would do is write outside its memory.
void check_state(const State &s, const Manifest &m) {
  if (!s.sizes({{"b", 1}, {"c", m.granule}}))
    damaged("manifest.json: the shape " + shown(s.shape) + " of state " + s.name + " is not one over b and c");
  auto outside = [&](auto &axis) { return axis && *axis >= int64_t(s.shape.size()); };
  bool cut = s.cut == "anywhere" || s.cut == "window" || s.cut == "never";
  if (outside(s.rows) || outside(s.positions) || (s.rows && s.rows == s.positions) || !cut)
    damaged("manifest.json: state " + s.name + " of shape " + shown(s.shape) + " has rows along " + shown(s.rows) +
            ", positions along " + shown(s.positions) + ", and is cut " + s.cut);
  if (s.rows && (*s.rows || (!s.shape[0].fixed() && s.shape[0].text() != "b")))
    damaged("manifest.json: state " + s.name + " of shape " + shown(s.shape) + " has rows along " + shown(s.rows) + ", and not first");
  if (s.grows()) {
    for (size_t i = 0; i < s.shape.size(); i++)
      if (int64_t(i) != *s.positions && s.shape[i].mentions("c"))
        damaged("manifest.json: the shape " + shown(s.shape) + " of state " + s.name + " grows along more than its positions");
    int64_t most = std::min<int64_t>(m.context.value_or(1 << 20), int64_t(1) << 31);
    check_capacity(s, m.granule, (most + m.granule - 1) / m.granule * m.granule);
  } else if (std::any_of(s.shape.begin(), s.shape.end(), [](auto &d) { return d.mentions("c"); })) {
    damaged("manifest.json: the shape " + shown(s.shape) + " of state " + s.name + ", which does not grow, has c");
  }
  if (s.cut == "window" && (!s.capacity || !s.window || !*s.window || *s.capacity < *s.window + m.chunk.value_or(1) - 1))
    damaged("manifest.json: ring cache " + s.name + " has capacity " + shown(s.capacity) + "; window " + shown(s.window) +
            " and chunk " + shown(m.chunk) + " need more");
}

void check(const Manifest &m) {
  for (auto &[what, n] : {std::pair{"limits.context", m.context}, {"limits.chunk", m.chunk}, {"interface.vocab", m.vocab},
                          {"limits.granule", std::optional<int64_t>(m.granule)}})
    if (n && !(0 < *n && *n < (*what == 'l' && what[7] == 'g' ? int64_t(1) << 31 : MOST)))
      damaged(std::string("manifest.json: ") + what + " is " + std::to_string(*n) + "; it must be at least 1");
  for (auto &[name, e] : m.entries) {
    for (auto list : {&e.inputs, &e.outputs}) {
      std::set<std::string> names;
      for (auto &t : *list) names.insert(t.name);
      if (names.size() < list->size()) damaged("manifest.json: entry " + name + " has two inputs or outputs of one name");
    }
    if (e.outputs.empty()) damaged("manifest.json: entry " + name + " has no outputs");
    for (auto &i : e.indices)
      if (!e.input(i.input)) damaged("manifest.json: entry " + name + " takes no input " + i.input + " to hold indices");
    for (auto &s : e.states)
      if (named(m.states, s) == m.states.end())
        damaged("manifest.json: entry " + name + " has a state " + s + " that is not described");
    for (auto &w : e.weights)
      if (named(m.weights, w) == m.weights.end())
        damaged("manifest.json: entry " + name + " reads a weight " + w + " that is not described");
  }
  for (auto &s : m.states) {
    check_state(s, m);
    if (!s.begin.empty() && named(m.weights, s.begin) == m.weights.end())
      damaged("manifest.json: state " + s.name + " begins as " + s.begin + ", which is no weight");
  }
  for (auto &w : m.weights)
    if (std::any_of(w.shape.begin(), w.shape.end(), [](auto &d) { return !d.fixed(); }))
      damaged("manifest.json: weight " + w.name + " has the shape " + shown(w.shape) + ", not whole numbers");
  for (auto &name : m.libraries)
    if (!m.files.count(name)) damaged("manifest.json: target.libraries names '" + name + "', which is no file of the artifact");
  for (auto &[name, spec] : m.files) {
    bool good = !name.empty() && name.size() <= 200 && name != "." && name != ".." && name != "manifest.json";
    for (unsigned char c : name) good = good && (std::isalnum(c) || std::strchr("_.+-", c) || c >= 0x80);
    if (!good) damaged("manifest.json: '" + name + "' is no name for a file of an artifact");
  }
}

Manifest parse(const Json &data) {
  Fields top(data, "");
  Manifest m;
  m.tvm = top.text("tvm"), m.tvm_ffi = top.text("tvm_ffi"), m.no_cache = top.text_or("no_cache");
  Fields entries = top.section("entries"), limits = top.section("limits"), face = top.section("interface");
  for (auto &f : entries.json().fields) m.entries.emplace(f.first, read_entry(entries.section(f.first)));
  m.context = limits.whole_or("context"), m.chunk = limits.whole_or("chunk"), m.granule = limits.whole("granule");
  m.vocab = face.whole_or("vocab"), m.tokens = face.text("tokens"), m.cut = face.text_or("cut");
  if (face.optional("generation")) {
    Fields g = face.section("generation");
    m.bos = g.whole_or("bos");
    g.each("eos", [&](const Json &v, const std::string &where) { m.eos.push_back(Fields::whole(v, where)); }, true);
  }
  if (face.optional("media")) {
    Fields f = face.section("media");
    m.media = Media{f.whole("vocab"), f.whole("dim")};
  }
  m.states = sections<State>(top, "states", read_state);
  m.weights = sections<TensorSpec>(top, "weights", read_tensor);
  Fields files = top.section("files");
  for (auto &f : files.json().fields) {
    Fields spec = files.section(f.first);
    m.files.emplace(f.first, FileSpec{spec.text("sha256"), spec.whole("bytes")});
  }
  m.libraries = top.section("target").texts("libraries", true);
  check(m);
  return m;
}

void check_format(const Json &data) {
  Fields top(data, "");
  int64_t number = top.whole("format");
  if (number == FORMAT) return;
  const Json *by = data.find("wasat");
  std::string found = "the artifact has format " + std::to_string(number), reads = "this runtime reads format " + std::to_string(FORMAT);
  if (number < FORMAT) damaged(found + "; " + reads);
  damaged(found + " (made by wasat " + (by ? by->text : "?") + ") and " + reads + ": export it again with that version, or");
}

bool is_file(const std::string &path) {
  std::error_code none;
  return std::filesystem::is_regular_file(std::filesystem::u8path(path), none);
}

void check_machine(const Json &data) {
  Fields target = Fields(data, "").section("target");
  std::string kind = target.text("kind"), arch = target.text("arch"), os = target.text("os");
  if (kind != "llvm")
    throw Error(WASAT_MACHINE, "the artifact is compiled for " + kind + "; this runtime runs CPU artifacts: compile with the target cpu");
  if (os != SYSTEM)
    throw Error(WASAT_MACHINE, "the artifact is compiled for " + os + ", this is " + SYSTEM + "; " + AGAIN + " for such a system");
  if (std::string here = processor(); arch != here)
    throw Error(WASAT_MACHINE, "the artifact is compiled for " + arch + " processors, this is " + here + "; " + AGAIN + " for it");
  std::set<std::string> have = cpu_features();
  std::string lacking;
  for (auto &f : target.texts("features"))
    if (!have.empty() && !have.count(f)) lacking += (lacking.empty() ? "" : ", ") + f;
  if (!lacking.empty())
    throw Error(WASAT_MACHINE, "this processor lacks " + lacking + ", which the artifact uses; " + AGAIN +
                                   " here, or with a target such as cpu:x86-64-v3");
}

}  // namespace

const TensorSpec *Entry::input(const std::string &name) const {
  auto found = named(inputs, name);
  return found == inputs.end() ? nullptr : &*found;
}

Manifest read_manifest(const std::string &folder) {
  std::string path = folder + "/manifest.json";
  if (!is_file(path))
    throw Error(WASAT_ARTIFACT, folder + " is no artifact: it holds no manifest.json; give a folder that wasat compile wrote");
  Json data;
  try {
    data = Json::parse(Mapped(path).data());
  } catch (const Error &) {
    throw;
  } catch (const std::runtime_error &e) {
    damaged(path + " is damaged (" + e.what() + "); copy the artifact again, or");
  }
  check_format(data);
  const Json *said = data.find("digest");
  Json bare = data;
  auto own = [](auto &f) { return f.first == "digest"; };
  bare.fields.erase(std::remove_if(bare.fields.begin(), bare.fields.end(), own), bare.fields.end());
  Sha256 hash;
  hash.update(bare.sorted());
  if (!said || said->text != hash.hex())
    damaged(path + " is not as it was written (its digest differs); copy the artifact again, or");
  Manifest m = parse(data);
  check_machine(data);
  for (const std::string &name : {std::string("model.so"), std::string("weights.safetensors"), library_file("tvm_runtime")})
    if (!m.files.count(name)) damaged(path + " does not list " + name);
  for (auto &[name, spec] : m.files) {
    std::string file = folder + "/" + name;
    if (!is_file(file)) damaged(file + " is missing; copy the whole folder again, or");
    if (int64_t size = std::filesystem::file_size(std::filesystem::u8path(file)); size != spec.bytes)
      damaged(file + " has " + std::to_string(size) + " bytes instead of " + std::to_string(spec.bytes) + "; copy it again, or");
  }
  return m;
}

void check_hash(const std::string &folder, const std::string &name, const Manifest &m) {
  std::string path = folder + "/" + name;
  Sha256 hash;
  hash.update(Mapped(path).data());
  if (hash.hex() != m.files.at(name).sha256)
    damaged(path + " is not the file that was compiled (its SHA-256 differs); copy it again, or");
}

// -- weights ---------------------------------------------------------------------------------------------------------------
static const std::map<std::string, std::pair<std::string, size_t>> DTYPES = {
    {"F64", {"float64", 8}},  {"F32", {"float32", 4}},        {"F16", {"float16", 2}},     {"BF16", {"bfloat16", 2}},
    {"I64", {"int64", 8}},    {"I32", {"int32", 4}},          {"I16", {"int16", 2}},       {"I8", {"int8", 1}},
    {"U64", {"uint64", 8}},   {"U32", {"uint32", 4}},         {"U16", {"uint16", 2}},      {"U8", {"uint8", 1}},
    {"BOOL", {"bool", 1}},    {"F8_E4M3", {"float8_e4m3fn", 1}}, {"F8_E5M2", {"float8_e5m2", 1}}};

size_t item_size(const std::string &dtype) {
  for (auto &[_, known] : DTYPES)
    if (known.first == dtype) return known.second;
  damaged("manifest.json: '" + dtype + "' is no element type");
}

static size_t size_of(const TensorSpec &t) {
  unsigned __int128 n = item_size(t.dtype);
  for (auto &d : t.shape)
    if ((n *= uint64_t(*d.at({}))) > uint64_t(MOST)) damaged("manifest.json: weight " + t.name + " of shape " + shown(t.shape) + " is too large");
  return n;
}

std::map<std::string, size_t> array_places(const std::string &path, std::string_view file, const std::vector<TensorSpec> &specs) {
  auto fail = [&](const std::string &why) { damaged(path + " is damaged: " + why + "; copy it again, or"); };
  uint64_t count = 0;
  for (int i = 7; i >= 0; i--) count = count << 8 | (size_t(i) < file.size() ? uint8_t(file[i]) : 0);
  if (file.size() < 8 || count > file.size() - 8) fail("its header would have " + std::to_string(count) + " bytes");
  Json header;
  try {
    header = Json::parse(file.substr(8, count));
  } catch (const std::runtime_error &e) {
    fail(std::string("its header cannot be read (") + e.what() + ")");
  }
  struct Part {
    uint64_t start, end;
    std::string name;
  };
  std::vector<Part> parts;
  for (auto &[name, x] : header.fields) {
    if (name == "__metadata__") continue;
    auto spec = named(specs, name);
    if (spec == specs.end()) fail("it has an array " + name + ", unlike manifest.json");
    const Json *dtype = x.find("dtype"), *shape = x.find("shape"), *ends = x.find("data_offsets");
    auto wholes = [](const Json *l) {
      return l && l->kind == Json::List && std::all_of(l->items.begin(), l->items.end(), [](auto &v) { return v.is_whole() && v.whole() >= 0; });
    };
    if (!dtype || !DTYPES.count(dtype->text) || !wholes(shape) || !wholes(ends) || ends->items.size() != 2)
      fail("its header says of the array " + name + " what cannot be read");
    std::vector<Dim> found;
    for (auto &d : shape->items) found.push_back(d.whole());
    if (DTYPES.at(dtype->text).first != spec->dtype || shown(found) != shown(spec->shape))
      fail("its array " + name + " is " + DTYPES.at(dtype->text).first + shown(found) + "; manifest.json says " + spec->dtype + shown(spec->shape));
    parts.push_back({uint64_t(ends->items[0].whole()), uint64_t(ends->items[1].whole()), name});
  }
  for (auto &s : specs)
    if (!header.find(s.name)) fail("it lacks an array " + s.name + ", unlike manifest.json");
  std::sort(parts.begin(), parts.end(), [](auto &a, auto &b) { return std::tie(a.start, a.end) < std::tie(b.start, b.end); });
  std::map<std::string, size_t> out;
  uint64_t at = 0;
  for (auto &p : parts) {
    if (p.start != at || p.end < p.start || p.end - p.start != size_of(*named(specs, p.name)))
      fail("its array " + p.name + " lies at " + std::to_string(p.start) + ".." + std::to_string(p.end) + ", which does not fit");
    out[p.name] = 8 + count + p.start;
    at = p.end;
  }
  if (8 + count + at != file.size())
    fail("its arrays have " + std::to_string(at) + " bytes, the file " + std::to_string(file.size() - 8 - count));
  return out;
}

}  // namespace wasat
