#include "wasat.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <new>

#include "errors.h"
#include "sampling.h"
#include "session.h"
#include "system.h"
#include "text.h"
#include "utf8.h"

using namespace wasat;

struct wasat_model {
  std::shared_ptr<Engine> engine;
  std::unique_ptr<Session> session;
  std::unique_ptr<Tokenizer> words;
  std::string folder;
  bool busy = false;

  const Manifest &manifest() const { return manifest_of(*engine); }
  const Tokenizer &tokenizer() {
    if (words) return *words;
    if (!manifest().files.count("tokenizer.json"))
      throw Error(WASAT_ARTIFACT, folder + " holds no tokenizer.json: give token ids instead of text, or " + AGAIN + " with its tokenizer");
    words = std::make_unique<Tokenizer>(Mapped(folder + "/tokenizer.json").data());
    return *words;
  }
  Session &row() {
    if (!session) session = std::make_unique<Session>(engine);
    return *session;
  }
};

namespace {

thread_local std::string said;

wasat_status reported(const std::function<void()> &work) {
  try {
    work();
    return WASAT_OK;
  } catch (const Error &e) {
    said = e.what();
    return e.code;
  } catch (const std::bad_alloc &) {
    said = "there is not enough memory";
  } catch (const std::exception &e) {
    said = e.what();
  }
  return WASAT_SYSTEM;
}

template <class T>
T &given(T *p, const char *what) {
  if (!p) throw Error(WASAT_INPUT, std::string(what) + " is NULL");
  return *p;
}

std::string text_of(const char *text, size_t count) {
  if (!text && count) throw Error(WASAT_INPUT, "a text of " + std::to_string(count) + " bytes is NULL");
  std::string out(text ? text : "", count);
  if (!is_utf8(out)) throw Error(WASAT_INPUT, "the text is not UTF-8");
  return out;
}

// One prompt being continued: _Row of runtime/generate.py.
class Row {
 public:
  Row(wasat_model &model, const wasat_options &o, std::vector<int64_t> prompt, wasat_stream stream, void *context)
      : model_(model), o_(o), sampler_(o, prompt), stops_(texts(o)), stream_(stream), context_(context) {
    if (model.manifest().files.count("tokenizer.json")) text_ = std::make_unique<TextStream>(model.tokenizer(), prompt);
    else if (stops_.any()) throw Error(WASAT_INPUT, "stop strings need a tokenizer, which the artifact lacks: use stop tokens");
  }

  size_t count = 0;
  wasat_finish finish = WASAT_LENGTH;

  // Chooses the next token; returns whether more may follow.
  bool take(const std::vector<float> &logits, int64_t limit, int64_t &token) {
    token = sampler_.sample(logits.data(), logits.size());
    auto &eos = model_.manifest().eos;
    bool own = std::count(eos.begin(), eos.end(), token), asked = std::count(o_.stop_tokens, o_.stop_tokens + o_.stop_token_count, token);
    if (own || asked) return end(own ? WASAT_EOS : WASAT_STOP);
    count++;
    bool hit = text_ && advance(token);
    if (!text_) tell(token, "");
    if (caller_) return finish = WASAT_CALLER, false;
    if (hit || int64_t(count) == limit) return end(hit ? WASAT_STOP : WASAT_LENGTH);
    return true;
  }

 private:
  wasat_model &model_;
  const wasat_options &o_;
  Sampler sampler_;
  StopStrings stops_;
  std::unique_ptr<TextStream> text_;
  wasat_stream stream_;
  void *context_;
  bool caller_ = false;

  static std::vector<std::u32string> texts(const wasat_options &o) {
    std::vector<std::u32string> out;
    for (size_t i = 0; i < o.stop_count; i++) {
      out.push_back(points(text_of(o.stops[i], o.stops[i] ? std::strlen(o.stops[i]) : 0)));
      if (out.back().empty()) throw Error(WASAT_INPUT, "an empty stop string would stop everything; leave it out");
    }
    return out;
  }
  void tell(int64_t token, const std::string &text) {
    if (stream_ && !caller_) caller_ = stream_(context_, int32_t(token), text.data(), text.size()) != 0;
  }
  bool advance(int64_t token) {
    auto written = stops_.any() ? model_.tokenizer().special(token) : std::nullopt;
    std::pair<std::u32string, bool> shown;
    if (!written) {
      shown = stops_.push(text_->push(token));
    } else if (shown = stops_.push(text_->settle()); !shown.second) {
      auto more = stops_.push(points(*written), false, true);
      shown = {shown.first + more.first, more.second};
    }
    tell(token, bytes(shown.first));
    return shown.second;
  }
  bool end(wasat_finish why) {
    finish = why;
    if (text_) {
      auto shown = stops_.push(text_->flush(), true);
      if (shown.second) finish = WASAT_STOP;
      if (!shown.first.empty()) tell(-1, bytes(shown.first));
    }
    return false;
  }
};

void generate(wasat_model &model, std::vector<int64_t> ids, const wasat_options *options, wasat_stream stream, void *context,
              wasat_result *result) {
  wasat_options o = options ? *options : wasat_defaults();
  check_options(o);
  if (o.stop_token_count) given(o.stop_tokens, "stop_tokens");
  if (o.stop_count) given(o.stops, "stops");
  const Manifest &m = model.manifest();
  if (ids.empty() && m.bos) ids.push_back(*m.bos);
  if (ids.empty()) throw Error(WASAT_INPUT, "the prompt is empty, and the model has no token to begin a text with");
  int64_t limit = o.max_tokens, used = int64_t(ids.size());
  if (!m.context && !limit) throw Error(WASAT_INPUT, "the model states no context limit: give max_tokens");
  if (m.context && *m.context - used < std::max<int64_t>(limit, 1))
    throw Error(WASAT_CONTEXT, "the prompt has " + std::to_string(used) + " tokens and " +
                                   (limit ? std::to_string(limit) + " more do not fit" : "nothing can follow it") +
                                   "; the model's context is " + std::to_string(*m.context) + ": shorten the prompt, or ask for fewer");
  limit = limit ? std::min(limit, int64_t(1) << 48) : *m.context - used;  // what no memory holds, sums of it do
  if (model.busy) throw Error(WASAT_INPUT, "the model is generating: a stream cannot ask for another text of it");
  struct Busy {
    bool &set;
    explicit Busy(bool &flag) : set(flag) { set = true; }
    ~Busy() { set = false; }
  } busy(model.busy);
  Session &session = model.row();
  Row row(model, o, ids, stream, context);
  session.open(used + limit);
  using Clock = std::chrono::steady_clock;
  auto started = Clock::now();
  const std::vector<float> *logits = &session.step(ids);
  auto read = Clock::now();
  for (int64_t token; row.take(*logits, limit, token);) logits = &session.step({token});
  if (result) {
    auto seconds = [](auto a, auto b) { return std::chrono::duration<double>(b - a).count(); };
    *result = {row.finish, ids.size(), row.count, seconds(started, read), seconds(read, Clock::now())};
  }
}

}  // namespace

extern "C" {

const char *wasat_error(void) { return said.c_str(); }

wasat_status wasat_load(const char *folder, const wasat_load_options *options, wasat_model **model) {
  return reported([&] {
    wasat_model *&out = given(model, "model");
    out = nullptr;
    wasat_load_options o = options ? *options : wasat_load_options{};
    auto made = std::make_unique<wasat_model>();
    made->folder = &given(folder, "folder");
    if (made->folder.empty()) throw Error(WASAT_ARTIFACT, "the name of the artifact's folder is empty; give a folder that wasat compile wrote");
    made->folder = std::filesystem::absolute(std::filesystem::u8path(made->folder)).u8string();
    made->engine = start(made->folder, o);
    out = made.release();
  });
}

void wasat_free(wasat_model *model) { delete model; }

wasat_status wasat_encode(wasat_model *model, const char *text, size_t bytes, int special, int32_t *ids, size_t room, size_t *count) {
  return reported([&] {
    auto found = given(model, "model").tokenizer().encode(text_of(text, bytes), special != 0);
    given(count, "count") = found.size();
    for (size_t i = 0; i < found.size() && i < room; i++) (&given(ids, "ids"))[i] = int32_t(found[i]);
  });
}

wasat_status wasat_decode(wasat_model *model, const int32_t *ids, size_t count, char *text, size_t room, size_t *bytes) {
  return reported([&] {
    if (count) given(ids, "ids");
    std::string found = given(model, "model").tokenizer().decode(std::vector<int64_t>(ids, ids + count));
    given(bytes, "bytes") = found.size();
    if (room && !found.empty()) std::memcpy(&given(text, "text"), found.data(), std::min(room, found.size()));
  });
}

wasat_options wasat_defaults(void) {
  wasat_options o{};
  o.top_p = o.repetition_penalty = 1;
  return o;
}

wasat_status wasat_generate(wasat_model *model, const char *text, size_t bytes, const wasat_options *options, wasat_stream stream,
                            void *context, wasat_result *result) {
  return reported([&] {
    wasat_model &m = given(model, "model");  // first: arguments are evaluated in any order
    generate(m, m.tokenizer().encode(text_of(text, bytes)), options, stream, context, result);
  });
}

wasat_status wasat_generate_tokens(wasat_model *model, const int32_t *ids, size_t count, const wasat_options *options,
                                   wasat_stream stream, void *context, wasat_result *result) {
  return reported([&] {
    wasat_model &m = given(model, "model");
    if (count) given(ids, "ids");
    generate(m, std::vector<int64_t>(ids, ids + count), options, stream, context, result);
  });
}
}
