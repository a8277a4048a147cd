// The matrix unit in software, to the bit: what a driver and its device would do. A product must not be fused with the sum
// after it: g++ -O2 -ffp-contract=off -shared -fPIC driver.cpp -o libmatrix_unit.so
#include <atomic>
#include <cstdint>

static std::atomic<int64_t> tiles;

extern "C" {

// c[16, 16] += a[16, 64] @ b[16, 64]^T, exactly
int32_t matrix_unit_multiply(const int8_t* a, const int8_t* b, int32_t* c) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j)
      for (int k = 0; k < 64; ++k) c[16 * i + j] += int32_t(a[64 * i + k]) * int32_t(b[64 * j + k]);
  ++tiles;
  return 0;
}

// y[16, 16] += c * (rows[16, 1] * columns[1, 16]) in f32, each operation rounded
int32_t matrix_unit_scale(const int32_t* c, const float* rows, const float* columns, float* y) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) y[16 * i + j] += float(c[16 * i + j]) * (rows[i] * columns[j]);
  return 0;
}

// Tiles multiplied so far
int64_t matrix_unit_tiles() { return tiles; }
}
