// From logits to a token: runtime/sampling.py, number for number.
#pragma once
#include <cstdint>
#include <set>
#include <vector>

#include "errors.h"

namespace wasat {

void check_options(const wasat_options &options);  // throws Error

// NumPy's default_rng([seed, 0]): PCG64 (O'Neill, XSL-RR 128/64), seeded by SeedSequence.
class Generator {
 public:
  explicit Generator(uint64_t seed);
  double random();  // [0, 1)

 private:
  unsigned __int128 state_, increment_;
  void step();
};

class Sampler {
 public:
  Sampler(const wasat_options &options, const std::vector<int64_t> &prompt);
  int64_t sample(const float *logits, size_t count);

 private:
  wasat_options options_;
  Generator generator_;
  std::set<int64_t> seen_;
};

}  // namespace wasat
