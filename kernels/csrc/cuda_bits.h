// Conversions between float32 and the 16-bit floating-point types, as bits.
#pragma once

#include <cstdint>

#include "rows.h"

namespace trivium {

TRIVIUM_ROW uint32_t float_bits(float value) {
  union {
    float f;
    uint32_t u;
  } word;
  word.f = value;
  return word.u;
}

TRIVIUM_ROW float bits_float(uint32_t bits) {
  union {
    uint32_t u;
    float f;
  } word;
  word.u = bits;
  return word.f;
}

// bfloat16 bits, rounded to nearest even; a NaN stays one.
TRIVIUM_ROW uint16_t bfloat16_bits(float value) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

TRIVIUM_ROW float half_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Scaling by 2^112 moves the exponent's bias from 15 to 127 and makes subnormal halves normal on the way.
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 5.192296858534828e33f));
}

}  // namespace trivium
