/* wasat-generate: continues a prompt, streaming, as `wasat generate` does. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#include <windows.h>

#include <shellapi.h>
#endif

#include "wasat.h"

static const char USAGE[] =
    "usage: wasat-generate ARTIFACT PROMPT [options]\n"
    "PROMPT: the text to continue; - reads standard input\n"
    "  --max-tokens N          most tokens to write (200)\n"
    "  --temperature T         0 takes the likeliest token (0)\n"
    "  --top-k K  --top-p P  --min-p P  --repetition-penalty R  --seed N\n"
    "  --stop TEXT             stop before this text or special token; repeatable\n"
    "  --stop-token ID         stop at this token; repeatable\n"
    "  --threads N             how many compute\n"
    "  --no-verify             do not hash the artifact's files\n"
    "  --ids                   the prompt is token ids; the new ones are printed, not their text\n"
    "  --encode                print the token ids of the prompt, and no more\n"
    "  --quiet                 only the text\n";

enum { MOST = 64 };

static int fail(const char *message) {
  fprintf(stderr, "error: %s\n", message);
  return 1;
}

static int out_of_options(const char *option) {
  fprintf(stderr, "error: %s: see wasat-generate --help\n", option);
  exit(2);
}

static double real(const char *option, const char *text) {
  char *end;
  double x = strtod(text, &end);
  return *text && !*end ? x : out_of_options(option);
}

static unsigned long long whole(const char *option, const char *text, unsigned long long most) {
  char *end;
  errno = 0;
  unsigned long long x = strtoull(text, &end, 10);
  return *text >= '0' && *text <= '9' && !*end && !errno && x <= most ? x : (unsigned long long)out_of_options(option);
}

static char *standard_input(size_t *bytes) {
  size_t room = 1 << 16;
  char *text = (char *)malloc(room);
  *bytes = 0;
  while (text) {
    size_t n = fread(text + *bytes, 1, room - *bytes - 1, stdin);
    if (!n) break;
    *bytes += n;
    if (room - *bytes < 2) text = (char *)realloc(text, room *= 2);
  }
  if (text) {
    if (*bytes && text[*bytes - 1] == '\n') --*bytes; /* the line's end is echo's */
    if (*bytes && text[*bytes - 1] == '\r') --*bytes;
    text[*bytes] = 0;
  }
  return text;
}

static int show_text(void *context, int32_t token, const char *text, size_t bytes) {
  (void)context, (void)token;
  fwrite(text, 1, bytes, stdout);
  return fflush(stdout) != 0;
}

static int show_token(void *context, int32_t token, const char *text, size_t bytes) {
  (void)context, (void)text, (void)bytes;
  if (token >= 0) printf("%d ", token);
  return fflush(stdout) != 0;
}

static int32_t *numbers(const char *text, size_t *count) {
  int32_t *ids = (int32_t *)malloc((strlen(text) / 2 + 1) * sizeof *ids);
  *count = 0;
  while (ids) {
    char *end;
    long x = strtol(text, &end, 10);
    if (end == text) break;
    if (x < 0 || x > INT32_MAX) break;
    ids[(*count)++] = (int32_t)x;
    text = end;
  }
  if (!ids || text[strspn(text, " \n")]) out_of_options("--ids wants whole numbers");
  return ids;
}

#ifdef _WIN32
/* Text is UTF-8, in and out, with line ends as they are. */
static char **arguments(int *count) {
  LPWSTR *wide = CommandLineToArgvW(GetCommandLineW(), count);
  char **all = wide ? (char **)calloc((size_t)*count + 1, sizeof *all) : NULL;
  for (int i = 0; all && i < *count; i++) {
    int size = WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, NULL, 0, NULL, NULL);
    if ((all[i] = (char *)malloc((size_t)size))) WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, all[i], size, NULL, NULL);
  }
  if (!all) exit(fail("there is not enough memory"));
  _setmode(_fileno(stdin), _O_BINARY), _setmode(_fileno(stdout), _O_BINARY);
  SetConsoleOutputCP(CP_UTF8);
  return all;
}
#endif

int main(int argc, char **argv) {
#ifdef _WIN32
  argv = arguments(&argc);
#endif
  wasat_load_options load = {0, 0};
  wasat_options options = wasat_defaults();
  const char *stops[MOST], *places[2];
  int32_t stop_tokens[MOST];
  int given = 0, ids_only = 0, encode_only = 0, quiet = 0;
  options.max_tokens = 200, options.stops = stops, options.stop_tokens = stop_tokens;
  for (int i = 1; i < argc; i++) {
    const char *a = argv[i];
    if (!strcmp(a, "--help")) return fputs(USAGE, stdout), 0;
    else if (!strcmp(a, "--no-verify")) load.trust = 1;
    else if (!strcmp(a, "--ids")) ids_only = 1;
    else if (!strcmp(a, "--encode")) encode_only = 1;
    else if (!strcmp(a, "--quiet")) quiet = 1;
    else if (strncmp(a, "--", 2) || !a[2]) given < 2 ? (void)(places[given++] = a) : (void)out_of_options(a);
    else if (i + 1 == argc) out_of_options(a);
    else {
      const char *v = argv[++i];
      if (!strcmp(a, "--max-tokens")) options.max_tokens = (int64_t)whole(a, v, INT64_MAX);
      else if (!strcmp(a, "--temperature")) options.temperature = real(a, v);
      else if (!strcmp(a, "--top-k")) options.top_k = (int64_t)whole(a, v, INT64_MAX);
      else if (!strcmp(a, "--top-p")) options.top_p = real(a, v);
      else if (!strcmp(a, "--min-p")) options.min_p = real(a, v);
      else if (!strcmp(a, "--repetition-penalty")) options.repetition_penalty = real(a, v);
      else if (!strcmp(a, "--seed")) options.seed = whole(a, v, UINT64_MAX);
      else if (!strcmp(a, "--threads")) load.threads = (int)whole(a, v, INT32_MAX);
      else if (!strcmp(a, "--stop") && options.stop_count < MOST) stops[options.stop_count++] = v;
      else if (!strcmp(a, "--stop-token") && options.stop_token_count < MOST)
        stop_tokens[options.stop_token_count++] = (int32_t)whole(a, v, INT32_MAX);
      else out_of_options(a);
    }
  }
  if (given < 2) return fputs(USAGE, stderr), 2;
  size_t bytes = strlen(places[1]);
  const char *prompt = strcmp(places[1], "-") ? places[1] : standard_input(&bytes);
  if (!prompt) return fail("there is not enough memory");
  wasat_model *model;
  if (wasat_load(places[0], &load, &model)) return fail(wasat_error());
  if (encode_only) {
    size_t count, most = 0;
    if (wasat_encode(model, prompt, bytes, 1, NULL, 0, &most)) return fail(wasat_error());
    int32_t *ids = (int32_t *)malloc((most + 1) * sizeof *ids);
    if (!ids) return fail("there is not enough memory");
    if (wasat_encode(model, prompt, bytes, 1, ids, most, &count)) return fail(wasat_error());
    for (size_t i = 0; i < count; i++) printf("%d ", ids[i]);
    free(ids);
    wasat_free(model);
    return puts(""), 0;
  }
  wasat_result r;
  wasat_status status;
  if (ids_only) {
    size_t count;
    int32_t *ids = numbers(prompt, &count);
    status = wasat_generate_tokens(model, ids, count, &options, show_token, NULL, &r);
    free(ids);
  } else {
    status = wasat_generate(model, prompt, bytes, &options, show_text, NULL, &r);
  }
  if (status) return fail(wasat_error());
  puts("");
  static const char *const why[] = {"eos", "stop", "length", "the reader's end"};
  if (!quiet)
    fprintf(stderr, "%zu prompt tokens in %.3f s, %zu tokens in %.3f s, finished by %s\n", r.prompt_tokens, r.prefill_seconds,
            r.tokens, r.decode_seconds, why[r.finish]);
  wasat_free(model);
  return 0;
}
