// The host's parts for tests, built with sanitizers: reads commands from standard input, answers with a line each.
//   e N TEXT       token ids            d N ids        text, after its size
//   s N ids GIVEN  text as it streams   r SEED         four random numbers
//   m N FOLDER     reads a manifest     j N TEXT       JSON, sorted
#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>

#include "manifest.h"
#include "sampling.h"
#include "system.h"
#include "text.h"
#include "utf8.h"

using namespace wasat;

static std::string stretch(size_t n) {
  std::string text(n, '\0');
  if (fread(text.data(), 1, n, stdin) != n) throw std::runtime_error("the input ends too early");
  return text;
}

static std::vector<int64_t> numbers(size_t n) {
  std::vector<int64_t> out(n);
  for (auto &x : out) {
    long long read;
    if (scanf("%lld", &read) != 1) throw std::runtime_error("the input ends too early");
    x = read;
  }
  return out;
}

static std::string streamed(const Tokenizer &tokenizer, const std::vector<int64_t> &ids, size_t given) {
  TextStream stream(tokenizer, {ids.begin(), ids.begin() + long(given)});
  std::string out;
  for (size_t i = given; i < ids.size(); i++) out += bytes(stream.push(ids[i])) + "|";
  return out + bytes(stream.flush());
}

int main(int argc, char **argv) {
  std::unique_ptr<Tokenizer> tokenizer;
  try {
    if (argc > 1) {
      std::ifstream file(argv[1], std::ios::binary);
      tokenizer = std::make_unique<Tokenizer>(std::string(std::istreambuf_iterator<char>(file), {}));
    }
  } catch (const Error &e) {
    return printf("refused %s\n", e.what()), 0;
  }
  char kind;
  unsigned long long n;
  while (scanf(" %c %llu", &kind, &n) == 2) {
    getchar();
    try {
      std::string out;
      if (kind == 'e') {
        for (int64_t id : tokenizer->encode(stretch(n))) printf("%lld ", (long long)id);
      } else if (kind == 'r') {
        for (Generator g(n); out.size() < 4; out += ' ') printf("%.17g ", g.random());
        out.clear();
      } else if (kind == 'd') {
        out = tokenizer->decode(numbers(n));
      } else if (kind == 's') {
        auto ids = numbers(n);
        out = streamed(*tokenizer, ids, size_t(numbers(1)[0]));
      } else if (kind == 'm') {
        std::string folder = stretch(n);
        Manifest m = read_manifest(folder);
        Mapped weights(folder + "/weights.safetensors");
        out = std::to_string(array_places("weights", weights.data(), m.weights).size());
      } else if (kind == 'j') {
        out = Json::parse(stretch(n)).sorted();
      }
      if (kind != 'e' && kind != 'r') printf("%zu ", out.size()), fwrite(out.data(), 1, out.size(), stdout);
      puts("");
    } catch (const std::runtime_error &e) {
      printf("refused %s\n", e.what());
    }
  }
}
