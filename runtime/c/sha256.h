// SHA-256 (FIPS 180-4).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace wasat {

class Sha256 {
 public:
  void update(std::string_view data) {
    total_ += data.size();
    while (!data.empty()) {
      if (!held_ && data.size() >= 64) {
        block(reinterpret_cast<const uint8_t *>(data.data()));
        data.remove_prefix(64);
        continue;
      }
      size_t n = std::min<size_t>(64 - held_, data.size());
      std::memcpy(buffer_ + held_, data.data(), n);
      data.remove_prefix(n);
      if ((held_ += n) == 64) block(buffer_), held_ = 0;
    }
  }

  std::string hex() {
    uint64_t bits = total_ * 8;
    std::string tail("\x80", 1);
    tail.resize(1 + (119 - total_ % 64) % 64, '\0');
    for (int shift = 56; shift >= 0; shift -= 8) tail += char(bits >> shift);
    update(tail);
    std::string out;
    for (uint32_t h : state_)
      for (int shift = 28; shift >= 0; shift -= 4) out += "0123456789abcdef"[h >> shift & 15];
    return out;
  }

 private:
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t buffer_[64];
  size_t held_ = 0;
  uint64_t total_ = 0;

  static uint32_t turn(uint32_t x, int n) { return x >> n | x << (32 - n); }

  void block(const uint8_t *p) {
    static const uint32_t k[64] = {
        0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5, 0xd807aa98, 0x12835b01,
        0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174, 0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
        0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da, 0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147,
        0x06ca6351, 0x14292967, 0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
        0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070, 0x19a4c116, 0x1e376c08,
        0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3, 0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
        0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
    uint32_t w[64], s[8];
    for (int i = 0; i < 16; i++, p += 4) w[i] = uint32_t(p[0]) << 24 | p[1] << 16 | p[2] << 8 | p[3];
    for (int i = 16; i < 64; i++)
      w[i] = w[i - 16] + (turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
             (turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10);
    std::memcpy(s, state_, sizeof s);
    for (int i = 0; i < 64; i++) {
      uint32_t a = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
      uint32_t b = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
      std::memmove(s + 1, s, 28);
      s[4] += a;
      s[0] = a + b;
    }
    for (int i = 0; i < 8; i++) state_[i] += s[i];
  }
};

}  // namespace wasat
