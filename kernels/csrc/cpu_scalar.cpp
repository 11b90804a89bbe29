// The CPU kernels for any machine: one float at a time, and what the compiler makes of it.
#include "cpu_hybrid.h"

namespace trivium {
namespace {

struct Scalar {
  static constexpr int kWidth = 1;
  static constexpr int kPairs = 16;
  float v;

  Scalar() = default;
  TRIVIUM_INLINE explicit Scalar(float x) : v(x) {}
  TRIVIUM_INLINE static Scalar load(const float* p) { return Scalar(*p); }
  TRIVIUM_INLINE void store(float* p) const { *p = v; }
  TRIVIUM_INLINE static Pair<Scalar> load_bfloat16(const uint32_t* words) {
    return {Scalar(from_bits(*words << 16)), Scalar(from_bits(*words & 0xFFFF0000u))};
  }
  TRIVIUM_INLINE static Scalar fma(Scalar a, Scalar b, Scalar c) { return Scalar(a.v * b.v + c.v); }
  TRIVIUM_INLINE static Scalar max(Scalar a, Scalar b) { return Scalar(a.v > b.v ? a.v : b.v); }
  TRIVIUM_INLINE static Scalar root(Scalar a) { return Scalar(__builtin_sqrtf(a.v)); }
  TRIVIUM_INLINE static Scalar where_greater(Scalar x, Scalar bound, Scalar then) {
    return Scalar(x.v > bound.v ? then.v : 0.f);
  }
  TRIVIUM_INLINE static Scalar two_to_low_bits(Scalar x) { return Scalar(from_bits((bits(x.v) << 23) + 0x3F800000u)); }
  TRIVIUM_INLINE static Scalar split(Scalar x, Scalar& exponent) {
    const int32_t moved = static_cast<int32_t>(bits(x.v) - 0x3F3504F3u);
    exponent = Scalar(static_cast<float>(moved >> 23));
    return Scalar(from_bits((static_cast<uint32_t>(moved) & 0x007FFFFFu) + 0x3F3504F3u));
  }
  TRIVIUM_INLINE float maximum() const { return v; }
  TRIVIUM_INLINE double total() const { return v; }

  TRIVIUM_INLINE static uint32_t bits(float x) {
    uint32_t word;
    std::memcpy(&word, &x, sizeof word);
    return word;
  }
  TRIVIUM_INLINE static float from_bits(uint32_t word) {
    float x;
    std::memcpy(&x, &word, sizeof x);
    return x;
  }
};

TRIVIUM_INLINE Scalar operator+(Scalar a, Scalar b) { return Scalar(a.v + b.v); }
TRIVIUM_INLINE Scalar operator-(Scalar a, Scalar b) { return Scalar(a.v - b.v); }
TRIVIUM_INLINE Scalar operator*(Scalar a, Scalar b) { return Scalar(a.v * b.v); }
TRIVIUM_INLINE Scalar operator/(Scalar a, Scalar b) { return Scalar(a.v / b.v); }

}  // namespace

const CpuKernels* scalar_kernels() {
  using K = Kernels<Scalar>;
  using H = Hybrid<Scalar>;
  static const CpuKernels table = {"scalar", K::logits, K::statistics, K::divergences, H::moments, H::hybrid};
  return &table;
}

}  // namespace trivium
