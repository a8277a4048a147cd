/* Wasat's C API: a compiled model is loaded, given a prompt, and streams its continuation.
 *
 * Every function that can fail returns a wasat_status; wasat_error() says in words what is wrong and what to do about it.
 * A model may be used by one thread at a time. Texts are UTF-8. */
#ifndef WASAT_H
#define WASAT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  WASAT_OK = 0,
  WASAT_ARTIFACT = 1, /* a folder that is no artifact, is damaged, or was made by other versions */
  WASAT_MACHINE = 2,  /* an artifact for another machine */
  WASAT_INPUT = 3,    /* a prompt or an option that the model cannot take */
  WASAT_CONTEXT = 4,  /* more positions than the model has room for */
  WASAT_MODEL = 5,    /* the model returned numbers that are none */
  WASAT_SYSTEM = 6    /* no memory, an unreadable file, a fault of the runtime */
} wasat_status;

typedef struct wasat_model wasat_model;

/* What the last call on this thread that failed has to say; "" if none did. */
const char *wasat_error(void);

typedef struct {
  int threads; /* how many compute; 0: TVM_NUM_THREADS where it is set, else the CPUs that this process may use */
  int trust;   /* 1: files are not hashed (sizes, versions and the machine are checked all the same) */
} wasat_load_options;

/* The model of an artifact folder. `options` may be NULL. */
wasat_status wasat_load(const char *folder, const wasat_load_options *options, wasat_model **model);
void wasat_free(wasat_model *model); /* NULL is fine */

/* Token ids of a text, with those that the tokenizer puts around it if `special`. Writes at most `room` of them and says in
 * `count` how many there are: call it with room 0 to ask. */
wasat_status wasat_encode(wasat_model *model, const char *text, size_t bytes, int special, int32_t *ids, size_t room,
                          size_t *count);
/* The text of tokens, without special ones. Writes at most `room` bytes, no final 0; `bytes`: how many there are. */
wasat_status wasat_decode(wasat_model *model, const int32_t *ids, size_t count, char *text, size_t room, size_t *bytes);

typedef struct {
  int64_t max_tokens;        /* most tokens; 0: as many as the context holds */
  double temperature;        /* 0: the likeliest token */
  int64_t top_k;             /* 0: all */
  double top_p;              /* in (0, 1]; 1: all */
  double min_p;              /* from 0 to 1; 0: all */
  double repetition_penalty; /* 1: none */
  uint64_t seed;
  const int32_t *stop_tokens; /* tokens that end the text, beside the model's own */
  size_t stop_token_count;
  const char *const *stops; /* texts before which it ends; special tokens count as they are written */
  size_t stop_count;
} wasat_options;

/* What Python's SamplingOptions() has. */
wasat_options wasat_defaults(void);

/* Receives each token as it is chosen (-1: none, only text) and the text that is certain by then: whole characters, perhaps
 * none. Another result than 0 ends the text. It must not use the model. */
typedef int (*wasat_stream)(void *context, int32_t token, const char *text, size_t bytes);

typedef enum { WASAT_EOS, WASAT_STOP, WASAT_LENGTH, WASAT_CALLER } wasat_finish;

typedef struct {
  wasat_finish finish; /* the model's own end; a stop text or token; max_tokens; the stream's wish */
  size_t prompt_tokens, tokens;
  double prefill_seconds, decode_seconds;
} wasat_result;

/* Continues a text, or tokens, which are fed as they are. `options`, `stream` and `result` may be NULL. The same prompt, options
 * and seed give the tokens that Python's model.generate gives. */
wasat_status wasat_generate(wasat_model *model, const char *text, size_t bytes, const wasat_options *options,
                            wasat_stream stream, void *context, wasat_result *result);
wasat_status wasat_generate_tokens(wasat_model *model, const int32_t *ids, size_t count, const wasat_options *options,
                                   wasat_stream stream, void *context, wasat_result *result);

#ifdef __cplusplus
}
#endif
#endif
