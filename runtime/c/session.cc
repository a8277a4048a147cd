#include "session.h"

#if defined(_WIN32) && !defined(_MSC_VER)
#include <cerrno>
#include <cstddef>
// TVM's headers name it, for objects that need more than what malloc aligns: there are none here.
inline int posix_memalign(void **, size_t, size_t) { return ENOMEM; }
#endif

#include <tvm/ffi/tvm_ffi.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <future>
#include <mutex>

#include "system.h"

namespace wasat {
namespace ffi = tvm::ffi;
namespace {

constexpr int64_t FIRST = 256;           // capacity of growing states when a session opens; it doubles whenever it is used up
constexpr int64_t MOST_TOKENS = int64_t(1) << 31;

size_t bytes_of(const std::string &dtype, const std::vector<int64_t> &shape) {
  unsigned __int128 n = item_size(dtype);
  for (int64_t d : shape)
    if (d < 0 || (n *= uint64_t(d)) > uint64_t(INT64_MAX)) throw Error(WASAT_SYSTEM, "there is no memory for a tensor of that size");
  return size_t(n);
}

struct Zeros {
  void AllocData(DLTensor *t, size_t size) {
    size_t room = std::max<size_t>((size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, ALIGNMENT);
    t->data = allocate(room);
    std::memset(t->data, 0, room);
  }
  void FreeData(DLTensor *t) { release(t->data); }
};

struct Borrowed {
  std::shared_ptr<const void> keeper;
  void AllocData(DLTensor *t, const void *data) { t->data = const_cast<void *>(data); }
  void FreeData(DLTensor *) {}
};

size_t size_of(const ffi::Tensor &t) { return ffi::GetDataSize(size_t(t.numel()), t.dtype()); }

ffi::Tensor zeros(const std::string &dtype, const std::vector<int64_t> &shape) {
  return ffi::Tensor::FromNDAlloc(Zeros(), ffi::ShapeView(shape.data(), shape.size()), ffi::StringToDLDataType(dtype), {kDLCPU, 0},
                                  bytes_of(dtype, shape));
}

// The TVM runtime of this process, with its threads set up: there is one, whose version stays.
void load_runtime(const std::string &folder, const Manifest &m, int threads) {
  static std::mutex lock;
  static std::string loaded;
  std::lock_guard<std::mutex> guard(lock);
  if (threads < 0 || threads > 4096) throw Error(WASAT_INPUT, "threads is " + std::to_string(threads) + "; it must be 0 to 4096");
  (threads ? set_variable : set_default)("TVM_NUM_THREADS", std::to_string(threads ? threads : cpu_count()));
  set_default("TVM_BIND_THREADS", "0");  // else the first launch pins the calling thread to core 0
  auto release = [](const std::string &v) { return v.substr(0, v.find(".post")); };
  if (!loaded.empty()) {
    if (release(loaded) != release(m.tvm))
      throw Error(WASAT_ARTIFACT, "this process already runs TVM " + loaded + " and the artifact needs " + m.tvm + ": load it in a process of its own");
    return;
  }
  if (auto why = load_library(folder + "/" + library_file("tvm_runtime"))) damaged("the TVM runtime cannot be loaded (" + *why + ")");
  loaded = m.tvm;
  ffi::Function::SetGlobal("wasat.outside", ffi::Function::FromTyped([](ffi::String where, int64_t index, int64_t low, int64_t high) {
    throw ffi::Error("IndexError", std::string(where) + ": index " + std::to_string(index) + " is outside " + std::to_string(low) +
                     " .. " + std::to_string(high - 1), "");
  }), true);
  ffi::Function::SetGlobal("wasat.equal", ffi::Function::FromTyped([](ffi::String where, ffi::String needs, int64_t left, int64_t right) {
    if (left != right)
      throw ffi::Error("IndexError", std::string(where) + ": needs " + std::string(needs) + ", and these are " + std::to_string(left) +
                       " and " + std::to_string(right), "");
  }), true);
}

// What compiled code raises, as ours.
template <class F>
auto guarded(wasat_status code, const std::string &what, F &&call) {
  try {
    return call();
  } catch (const ffi::Error &e) {
    if (e.kind() == "IndexError") throw Error(WASAT_INPUT, e.message());
    throw Error(code, what + " (" + e.message() + ")");
  }
}

}  // namespace

class Engine {
 public:
  Manifest manifest;
  std::map<std::string, ffi::Tensor> weights;

  Engine(const std::string &folder, const wasat_load_options &options) : manifest(read_manifest(folder)) {
    if (!options.trust) {
      std::vector<std::future<void>> jobs;
      for (auto &file : manifest.files)
        jobs.push_back(std::async(std::launch::async, [this, &folder, &file] { check_hash(folder, file.first, manifest); }));
      for (auto &job : jobs) job.get();
    }
    load_runtime(folder, manifest, options.threads);
    for (auto &name : manifest.libraries)
      if (auto why = load_library(folder + "/" + name))
        throw Error(WASAT_MACHINE, name + " of the artifact cannot be loaded here (" + *why + ")");
    read_weights(folder + "/weights.safetensors");
    guarded(WASAT_ARTIFACT, folder + "/model.so cannot be loaded", [&] {
      std::string path = plain_path(folder + "/model.so");
      ffi::ObjectRef file = ffi::Function::GetGlobalRequired("ffi.ModuleLoadFromFile")(path).cast<ffi::ObjectRef>();
      vm_ = function_of(file, "vm_load_executable")().cast<ffi::ObjectRef>();
      function_of(vm_, "vm_initialization")(int(kDLCPU), 0, 2);
    });
  }

  ffi::Function function(std::string entry) const {
    for (char &c : entry)
      if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') c = '_';
    return guarded(WASAT_ARTIFACT, "model.so has no entry " + entry, [&] { return function_of(vm_, entry); });
  }

 private:
  ffi::ObjectRef vm_;

  // Through functions with C's conventions: methods of a library may be called in another way than our compiler does.
  static ffi::Function function_of(const ffi::ObjectRef &module, const std::string &name) {
    return ffi::Function::GetGlobalRequired("ffi.ModuleGetFunction")(module, name, false).cast<ffi::Function>();
  }

  // Weights are mapped; those that do not lie aligned in the file are copied.
  void read_weights(const std::string &path) {
    auto file = std::make_shared<Mapped>(path);
    auto places = array_places(path, file->data(), manifest.weights);
    for (auto &w : manifest.weights) {
      auto shape = *w.sizes({});
      const char *data = file->data().data() + places.at(w.name);
      size_t size = bytes_of(w.dtype, shape);
      if (reinterpret_cast<uintptr_t>(data) % ALIGNMENT == 0) {
        weights.emplace(w.name, ffi::Tensor::FromNDAlloc(Borrowed{file}, ffi::ShapeView(shape.data(), shape.size()),
                                                         ffi::StringToDLDataType(w.dtype), {kDLCPU, 0}, data));
      } else {
        ffi::Tensor copy = zeros(w.dtype, shape);
        std::memcpy(copy.data_ptr(), data, size);
        weights.emplace(w.name, copy);
      }
    }
  }
};

std::shared_ptr<Engine> start(const std::string &folder, const wasat_load_options &options) {
  return std::make_shared<Engine>(folder, options);
}
const Manifest &manifest_of(const Engine &engine) { return engine.manifest; }

// -- the session -----------------------------------------------------------------------------------------------------------
struct Session::Parts {
  std::shared_ptr<Engine> engine;
  const Manifest &m;
  struct Step {
    const Entry *entry = nullptr;
    ffi::Function function;
    std::vector<ffi::Tensor> weights;
  };
  Step prefill, decode;
  std::map<std::string, ffi::Tensor> given;   // what entries take beside tokens and positions
  std::map<std::string, ffi::Tensor> states;
  size_t logits = 0;
  std::optional<size_t> cut;
  int64_t vocab = MOST_TOKENS, context = 0, most = 0, capacity = 0, past = 0;
  std::vector<float> found;

  explicit Parts(std::shared_ptr<Engine> e) : engine(std::move(e)), m(engine->manifest) {
    if (!m.entries.count("prefill") || !m.entries.count("decode"))
      throw Error(WASAT_INPUT, "the artifact has no entries prefill and decode" + (m.no_cache.empty() ? "" : ": " + m.no_cache));
    prefill = entry("prefill", {m.tokens, "past", "last"});
    decode = entry("decode", {m.tokens, "past"});
    find_outputs();
    if (m.media) vocab = m.media->vocab;
    else if (m.vocab) vocab = *m.vocab;
    for (auto &i : prefill.entry->indices)
      if (i.input == m.tokens)
        if (auto high = i.high.at({})) vocab = std::min(vocab, *high);
    give();
  }

  Step entry(const std::string &name, const std::vector<std::string> &own) {
    Step s;
    s.entry = &m.entries.at(name);
    for (auto &wanted : own)
      if (!s.entry->input(wanted)) damaged("entry " + name + " does not take " + wanted);
    for (auto &i : s.entry->inputs) {
      bool fed = std::count(own.begin(), own.end(), i.name);
      bool media = m.media && (i.name == "media" || i.name == "seen");
      const TensorSpec &tokens = *s.entry->input(m.tokens);
      if (tokens.shape.size() != 2 || (tokens.shape[0].fixed() && *tokens.shape[0].at({}) != 1))
        throw Error(WASAT_INPUT, "the program is not for one row at a time, as this host runs it");
      if (fed && i.dtype != "int64" && i.dtype != "int32") damaged("entry " + name + " takes " + i.name + " as " + i.dtype);
      if (fed && i.shape.size() != (i.name == m.tokens ? 2u : 1u)) damaged("entry " + name + " takes " + i.name + " of another shape");
      if (!fed && !media && !made_by_encoder(i.name))
        throw Error(WASAT_INPUT, "the model takes more than tokens (" + i.name + " " + i.dtype + "): this host feeds text alone");
    }
    s.function = engine->function(name);
    for (auto &w : s.entry->weights) s.weights.push_back(engine->weights.at(w));
    return s;
  }

  bool made_by_encoder(const std::string &name) const {
    auto encode = m.entries.find("encode");
    if (encode == m.entries.end() || !m.media) return false;
    for (auto &i : encode->second.inputs)
      if (i.name != "media" && i.name != "seen") return false;
    return std::any_of(encode->second.outputs.begin(), encode->second.outputs.end(), [&](auto &o) { return o.name == name; });
  }

  void find_outputs() {
    auto &outputs = prefill.entry->outputs;
    std::vector<size_t> others;
    std::optional<size_t> named;
    for (size_t i = 0; i < outputs.size(); i++) {
      if (!m.cut.empty() && outputs[i].name == m.cut) cut = i;
      else others.push_back(i);
      if (outputs[i].name == "logits") named = i;
    }
    if (!named && others.size() != 1) throw Error(WASAT_INPUT, "to sample from what the model returns, name one of its outputs logits");
    logits = named ? *named : others[0];
    auto &alike = decode.entry->outputs;
    for (size_t at : {logits, cut.value_or(logits)})
      if (alike.size() <= at || alike[at].name != outputs[at].name) damaged("entry decode does not return " + outputs[at].name + " where prefill does");
  }

  // Without media, a model that sees or hears is given one row that no token names.
  void give() {
    if (!m.media) return;
    given.emplace("media", zeros("float32", {1, m.media->dim}));
    ffi::Tensor seen = zeros("int64", {1, 1});
    *static_cast<int64_t *>(seen.data_ptr()) = -1;
    given.emplace("seen", seen);
    if (auto encode = m.entries.find("encode"); encode != m.entries.end()) {
      std::vector<ffi::AnyView> args;
      for (auto &i : encode->second.inputs) args.push_back(given.at(i.name));
      for (auto &w : encode->second.weights) args.push_back(engine->weights.at(w));
      auto out = call(engine->function("encode"), args);
      for (size_t i = 0; i < encode->second.outputs.size(); i++) given.emplace(encode->second.outputs[i].name, out.at(i));
    }
  }

  static std::vector<ffi::Tensor> call(const ffi::Function &f, const std::vector<ffi::AnyView> &args) {
    return guarded(WASAT_MODEL, "the compiled code failed", [&] {
      ffi::Any result;
      f.CallPacked(args.data(), int32_t(args.size()), &result);
      std::vector<ffi::Tensor> out;
      if (auto one = result.as<ffi::Tensor>()) out.push_back(*one);
      else
        for (auto &x : result.cast<ffi::Array<ffi::Any>>())
          if (auto tensor = x.as<ffi::Tensor>()) out.push_back(*tensor);
      return out;
    });
  }

  int64_t rounded(int64_t positions) const { return (positions + m.granule - 1) / m.granule * m.granule; }

  ffi::Tensor begun(const State &s, int64_t c) const {
    auto shape = s.sizes({{"b", 1}, {"c", c}});
    if (!shape) damaged("state " + s.name + " has no size");
    ffi::Tensor t = zeros(s.dtype, *shape);
    size_t size = bytes_of(s.dtype, *shape), item = item_size(s.dtype);
    char *data = static_cast<char *>(t.data_ptr());
    if (!s.begin.empty()) {
      const ffi::Tensor &row = engine->weights.at(s.begin);
      size_t whole = size_of(row);
      if (!whole || size % whole) damaged("state " + s.name + " does not begin as the weight " + s.begin);
      for (size_t at = 0; at < size; at += whole) std::memcpy(data + at, row.data_ptr(), whole);
    } else if (s.empty && *s.empty != 0) {
      std::vector<char> value = element(s, *s.empty);
      for (size_t at = 0; at < size; at += item) std::memcpy(data + at, value.data(), item);
    }
    return t;
  }

  static std::vector<char> element(const State &s, double x) {
    auto raw = [](auto v) { return std::vector<char>(reinterpret_cast<char *>(&v), reinterpret_cast<char *>(&v) + sizeof v); };
    if (s.dtype == "float32") return raw(float(x));
    if (s.dtype == "float64") return raw(x);
    if (s.dtype == "int64") return raw(int64_t(x));
    if (s.dtype == "int32") return raw(int32_t(x));
    if (s.dtype == "bool") return raw(uint8_t(x != 0));
    if (s.dtype == "bfloat16") {
      float f = float(x);
      uint32_t u;
      std::memcpy(&u, &f, 4);
      return raw(uint16_t(u >> 16));
    }
    if (s.dtype == "float16" && std::isinf(x)) return raw(uint16_t(x < 0 ? 0xFC00 : 0x7C00));
    damaged("state " + s.name + " begins as " + std::to_string(x) + " in " + s.dtype + ", which this host does not write");
  }

  void open(int64_t positions) {
    context = positions;
    most = rounded(m.context.value_or(positions));
    states.clear();
    past = 0, capacity = 0;
    reserve(std::min(rounded(FIRST), most));
  }

  // Room for so many positions; what growing states hold is copied to larger ones.
  void reserve(int64_t wanted) {
    if (wanted <= capacity && !states.empty()) return;
    for (auto &s : m.states) {
      auto old = states.find(s.name);
      if (old != states.end() && !s.grows()) continue;
      ffi::Tensor made = begun(s, wanted);
      if (old != states.end()) {
        size_t axis = size_t(*s.positions), outer = 1, inner = item_size(s.dtype);
        for (size_t i = 0; i < s.shape.size(); i++) (i < axis ? outer : inner) *= i == axis ? 1 : size_t(made.size(i));
        size_t from = inner * size_t(old->second.size(axis)), to = inner * size_t(made.size(axis));
        for (size_t i = 0; i < outer; i++)
          std::memcpy(static_cast<char *>(made.data_ptr()) + i * to, static_cast<char *>(old->second.data_ptr()) + i * from, std::min(from, to));
        states.erase(old);
      }
      states.emplace(s.name, made);
    }
    capacity = wanted;
  }

  static ffi::Tensor integers(const TensorSpec &spec, const std::vector<int64_t> &shape, const int64_t *values, size_t count) {
    ffi::Tensor t = zeros(spec.dtype, shape);
    for (size_t i = 0; i < count; i++)
      spec.dtype == "int64" ? static_cast<int64_t *>(t.data_ptr())[i] = values[i] : static_cast<int32_t *>(t.data_ptr())[i] = int32_t(values[i]);
    return t;
  }

  // At most `chunk` tokens.
  void feed(const int64_t *tokens, int64_t count) {
    int64_t needed = past + count;
    if (needed > context) throw Error(WASAT_CONTEXT, "the row holds " + std::to_string(past) + " tokens and has room for " + std::to_string(context));
    if (needed > capacity) reserve(std::min(rounded(std::max(needed, 2 * capacity)), most));
    const Step &step = count == 1 ? decode : prefill;
    const Entry &e = *step.entry;
    std::map<std::string, ffi::Tensor> own;
    own.emplace(m.tokens, integers(*e.input(m.tokens), {1, count}, tokens, size_t(count)));
    own.emplace("past", integers(*e.input("past"), {1}, &past, 1));
    int64_t last = count - 1;
    if (const TensorSpec *spec = e.input("last")) own.emplace("last", integers(*spec, {1}, &last, 1));
    check_sizes(e, count, own);
    std::vector<ffi::AnyView> args;
    for (auto &i : e.inputs) args.push_back(own.count(i.name) ? own.at(i.name) : given.at(i.name));
    for (auto &s : e.states) args.push_back(states.at(s));
    for (auto &w : step.weights) args.push_back(w);
    std::vector<ffi::Tensor> out = call(step.function, args);
    if (out.size() < e.outputs.size()) damaged("an entry returned too few outputs");
    if (cut && *static_cast<const uint8_t *>(out[*cut].data_ptr()))
      throw Error(WASAT_INPUT, "the row holds " + std::to_string(past) + " tokens, of which some see the new ones: what sees each other is to come in one step");
    for (size_t i = e.outputs.size(); i < out.size() && i - e.outputs.size() < e.states.size(); i++) {
      ffi::Tensor &kept = states.at(e.states[i - e.outputs.size()]);
      if (kept.data_ptr() == out[i].data_ptr()) continue;  // written in place
      size_t size = size_of(kept);
      if (size_of(out[i]) != size) damaged("an entry returned a state of another size");
      std::memcpy(kept.data_ptr(), out[i].data_ptr(), size);
    }
    read_logits(out[logits]);
    past += count;
  }

  void read_logits(const ffi::Tensor &x) {
    size_t n = size_of(x) / 4;
    if (x.dtype().code != kDLFloat || x.dtype().bits != 32) damaged("the logits are not float32");
    found.assign(static_cast<const float *>(x.data_ptr()), static_cast<const float *>(x.data_ptr()) + n);
  }

  // Holds sizes against what the entry takes for granted of them.
  void check_sizes(const Entry &e, int64_t, const std::map<std::string, ffi::Tensor> &own) const {
    if (e.checks.empty()) return;
    Sizes sizes{{"c", capacity}};
    for (auto &i : e.inputs) {
      const ffi::Tensor &t = own.count(i.name) ? own.at(i.name) : given.at(i.name);
      for (size_t a = 0; a < i.shape.size() && a < size_t(t.ndim()); a++)
        if (!i.shape[a].fixed()) sizes.emplace(i.shape[a].text(), t.size(a));
    }
    for (auto &c : e.checks) {
      auto left = c.left.at(sizes), right = c.right.at(sizes);
      if (!left || left != right) throw Error(WASAT_INPUT, "the step needs " + c.needs + ": " + c.where);
    }
  }
};

Session::Session(std::shared_ptr<Engine> engine) : p_(std::make_unique<Parts>(std::move(engine))) {}
Session::~Session() = default;
int64_t Session::limit() const { return p_->m.context.value_or(0); }
int64_t Session::vocab() const { return p_->vocab; }

void Session::open(int64_t context) { p_->open(context); }

const std::vector<float> &Session::step(const std::vector<int64_t> &tokens) {
  for (int64_t t : tokens)
    if (t < 0 || t >= p_->vocab)
      throw Error(WASAT_INPUT, "token " + std::to_string(t) + " is outside the vocabulary of " + std::to_string(p_->vocab));
  size_t chunk = size_t(p_->m.chunk.value_or(p_->context));
  for (size_t at = 0; at < tokens.size(); at += chunk) p_->feed(tokens.data() + at, int64_t(std::min(chunk, tokens.size() - at)));
  return p_->found;
}

}  // namespace wasat
