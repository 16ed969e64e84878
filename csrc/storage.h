// How a value is stored: one codec per storage format, `load` to the type a rule computes in and `store` back, rounding
// once, to nearest even. A new format (split master weight, Kahan pair, 8-bit block) is a new codec, not a new kernel.
#pragma once

#include <cstdint>

#include "rules/math.h"

namespace fusedopt {

// By the names that torch gives them.
enum class DType : int8_t { float32, float64, bfloat16, float16 };
constexpr int num_dtypes = 4;
constexpr const char* dtype_names[num_dtypes] = {"float32", "float64", "bfloat16", "float16"};
constexpr int itemsize(DType dtype) { return dtype == DType::float32 ? 4 : dtype == DType::float64 ? 8 : 2; }

FO_HD uint32_t bits_of(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

FO_HD float float_of(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

struct Float32 {
  using stored = float;
  static FO_HD float load(float value) { return value; }
  static FO_HD float store(float value) { return value; }
};

struct Float64 {
  using stored = double;
  static FO_HD double load(double value) { return value; }
  static FO_HD double store(double value) { return value; }
};

struct BFloat16 {
  using stored = uint16_t;
  static FO_HD float load(uint16_t value) { return float_of(uint32_t(value) << 16); }
  static FO_HD uint16_t store(float value) {
    const uint32_t bits = bits_of(value);
    const uint32_t nearest_even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const uint32_t quiet_nan = (bits >> 16) | 0x40;
    return uint16_t(value != value ? quiet_nan : nearest_even);
  }
};

// Integer arithmetic instead of F16C: the same bits on every CPU and under flush-to-zero, and it vectorises.
struct Float16 {
  using stored = uint16_t;
  static FO_HD float load(uint16_t value) {
    const uint32_t magnitude = value & 0x7fff;
    const uint32_t shifted = magnitude << 13;
    const float subnormal = float(int32_t(magnitude)) * 0x1p-24f;
    const float normal = float_of(shifted + (112u << 23));
    const float inf_or_nan = float_of(shifted | 0x7f800000);
    const float result = magnitude < 0x400 ? subnormal : (magnitude >= 0x7c00 ? inf_or_nan : normal);
    return float_of(bits_of(result) | (uint32_t(value & 0x8000) << 16));
  }
  static FO_HD uint16_t store(float value) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
    const uint32_t rebased = magnitude - (112u << 23);
    const uint32_t normal = (rebased + 0xfff + ((rebased >> 13) & 1)) >> 13;
    // Adding 2^23 leaves the integer nearest to value * 2^24 in the low bits: rounded to even by the addition itself.
    const uint32_t subnormal = bits_of(float_of(magnitude) * 0x1p24f + 0x1p23f) - 0x4b000000;
    const uint32_t inf_or_nan = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    const uint32_t result = magnitude < 0x38800000 ? subnormal : (magnitude >= 0x47800000 ? inf_or_nan : normal);
    return uint16_t(result | ((bits >> 16) & 0x8000));
  }
};

}  // namespace fusedopt
