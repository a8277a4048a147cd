#include "sampling.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace wasat {

void check_options(const wasat_options &o) {
  auto refuse = [](const std::string &name, double value, const std::string &want) {
    std::string said = std::to_string(value);
    throw Error(WASAT_INPUT, name + " is " + said + "; it must be " + want);
  };
  if (!(std::isfinite(o.temperature) && o.temperature >= 0)) refuse("temperature", o.temperature, "a finite number, 0 or above");
  if (!(o.top_p > 0 && o.top_p <= 1)) refuse("top_p", o.top_p, "a number above 0 and at most 1");
  if (!(o.min_p >= 0 && o.min_p <= 1)) refuse("min_p", o.min_p, "a number from 0 to 1");
  if (!(o.repetition_penalty >= 1e-250 && o.repetition_penalty <= 1e250))
    refuse("repetition_penalty", o.repetition_penalty, "a finite number above 0, from 1e-250 to 1e+250");
  if (o.top_k < 0) refuse("top_k", double(o.top_k), "a whole number, at least 0");
  if (o.max_tokens < 0) refuse("max_tokens", double(o.max_tokens), "a whole number, at least 1, or 0 for all that fit");
}

// -- random numbers --------------------------------------------------------------------------------------------------------
using u128 = unsigned __int128;
constexpr u128 MULTIPLIER = u128(0x2360ED051FC65DA4) << 64 | 0x4385DF649FCCF645;

Generator::Generator(uint64_t seed) {
  // SeedSequence([seed, 0]): each number as its 32-bit words, mixed into a pool of four
  std::vector<uint32_t> entropy{uint32_t(seed)};
  if (seed >> 32) entropy.push_back(seed >> 32);
  entropy.push_back(0);
  uint32_t pool[4], hash = 0x43b0d7e5;
  auto hashed = [&](uint32_t value) {
    value ^= hash;
    hash *= 0x931e8875;
    value *= hash;
    return value ^ value >> 16;
  };
  auto mixed = [](uint32_t x, uint32_t y) {
    uint32_t r = 0xca01f9dd * x - 0x4973f715 * y;
    return r ^ r >> 16;
  };
  for (size_t i = 0; i < 4; i++) pool[i] = hashed(i < entropy.size() ? entropy[i] : 0);
  for (size_t from = 0; from < 4; from++)
    for (size_t to = 0; to < 4; to++)
      if (from != to) pool[to] = mixed(pool[to], hashed(pool[from]));
  uint64_t words[4] = {};
  uint32_t output = 0x8b51f9dd;
  for (size_t i = 0; i < 8; i++) {
    uint32_t value = pool[i % 4] ^ output;
    output *= 0x58f38ded;
    value *= output;
    value ^= value >> 16;
    words[i / 2] |= uint64_t(value) << 32 * (i % 2);
  }
  increment_ = (u128(words[2]) << 64 | words[3]) << 1 | 1;
  state_ = 0;
  step();
  state_ += u128(words[0]) << 64 | words[1];
  step();
}

void Generator::step() { state_ = state_ * MULTIPLIER + increment_; }

double Generator::random() {
  step();
  uint64_t x = uint64_t(state_ >> 64) ^ uint64_t(state_);
  unsigned turn = unsigned(state_ >> 122);
  x = x >> turn | x << (-turn & 63);
  return double(x >> 11) * 0x1p-53;
}

// -- filters ---------------------------------------------------------------------------------------------------------------
// As NumPy sums: in pairs of halves, of at most 128 in eight running sums.
static double sum(const double *x, size_t n) {
  if (n < 8) {
    double s = 0;
    for (size_t i = 0; i < n; i++) s += x[i];
    return s;
  }
  if (n > 128) {
    size_t half = n / 2;
    half -= half % 8;
    return sum(x, half) + sum(x + half, n - half);
  }
  double r[8];
  std::copy(x, x + 8, r);
  size_t i = 8;
  for (; i < n - n % 8; i += 8)
    for (size_t k = 0; k < 8; k++) r[k] += x[i + k];
  double s = ((r[0] + r[1]) + (r[2] + r[3])) + ((r[4] + r[5]) + (r[6] + r[7]));
  for (; i < n; i++) s += x[i];
  return s;
}

static void normalize(std::vector<double> &p) {
  double total = sum(p.data(), p.size());
  for (double &x : p) x /= total;
}

// Keeps of ids and x what `good(i)` says.
template <class F>
static void keep(std::vector<int64_t> &ids, std::vector<double> &x, F &&good) {
  size_t n = 0;
  for (size_t i = 0; i < ids.size(); i++)
    if (good(i)) ids[n] = ids[i], x[n] = x[i], n++;
  ids.resize(n);
  x.resize(n);
}

// The smallest set of largest p that sums to `mass`; of equal ones the lower index goes first.
static void nucleus(std::vector<int64_t> &ids, std::vector<double> &p, double mass) {
  double most = *std::max_element(p.begin(), p.end()), floor = std::min((1 - mass) / double(p.size()), most);
  std::vector<double> ordered;
  for (double x : p)
    if (x >= floor) ordered.push_back(x);
  std::sort(ordered.begin(), ordered.end(), std::greater<>());
  size_t count = 0;
  for (double total = 0; count < ordered.size(); count++)
    if ((total += ordered[count]) >= mass) break;
  count = std::min(count + 1, ordered.size());
  double least = ordered[count - 1];
  size_t equal = count - std::count_if(p.begin(), p.end(), [&](double x) { return x > least; });
  std::vector<double> all = p;
  keep(ids, p, [&](size_t i) { return all[i] > least || (all[i] == least && equal && equal--); });
}

Sampler::Sampler(const wasat_options &options, const std::vector<int64_t> &prompt)
    : options_(options), generator_(options.seed), seen_(prompt.begin(), prompt.end()) {}

int64_t Sampler::sample(const float *logits, size_t count) {
  const wasat_options &o = options_;
  if (!count) throw Error(WASAT_MODEL, "the model returned no logits; the artifact is damaged");
  std::vector<double> x(logits, logits + count);
  if (o.repetition_penalty != 1) {
    bool mild = o.repetition_penalty > 1e-4 && o.repetition_penalty < 1e4;  // f32 neither overflows nor becomes 0
    float small = float(o.repetition_penalty);
    for (int64_t t : seen_) {
      if (t < 0 || size_t(t) >= count) throw Error(WASAT_INPUT, "token " + std::to_string(t) + " has no logit");
      float v = logits[t];
      if (mild) x[t] = v > 0 ? v / small : v * small;
      else x[t] = v > 0 ? double(v) / o.repetition_penalty : double(v) * o.repetition_penalty;
    }
  }
  size_t token = 0;
  for (size_t i = 0; i < count && !std::isnan(x[token]); i++)  // NaN counts as largest
    if (!(x[i] <= x[token])) token = i;
  if (!std::isfinite(x[token]))
    throw Error(WASAT_MODEL, "the model returned " + std::to_string(x[token]) + " among its logits; its weights or inputs are damaged");
  if (o.temperature > 0) {
    std::vector<int64_t> ids(count);
    for (size_t i = 0; i < count; i++) ids[i] = int64_t(i);
    double peak = x[token];
    if (o.top_k > 0 && size_t(o.top_k) < count) {
      std::vector<double> order = x;
      std::nth_element(order.begin(), order.begin() + (o.top_k - 1), order.end(), std::greater<>());
      double least = order[o.top_k - 1];
      std::vector<double> all = x;
      keep(ids, x, [&](size_t i) { return all[i] >= least; });
    }
    for (double &v : x) v = std::exp((v - peak) / o.temperature);
    normalize(x);
    if (o.top_p < 1) nucleus(ids, x, o.top_p);
    if (o.min_p > 0) {
      std::vector<double> all = x;
      double least = o.min_p * *std::max_element(x.begin(), x.end());
      keep(ids, x, [&](size_t i) { return all[i] >= least; });
    }
    normalize(x);
    double total = 0;
    for (double &v : x) v = total += v;
    size_t at = std::upper_bound(x.begin(), x.end(), generator_.random() * x.back()) - x.begin();
    token = size_t(ids[std::min(at, ids.size() - 1)]);
  }
  seen_.insert(int64_t(token));
  return int64_t(token);
}

}  // namespace wasat
