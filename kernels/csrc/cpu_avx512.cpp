// The CPU kernels for AVX-512 (foundation alone): sixteen floats at a time.
#include <immintrin.h>

#include "cpu_hybrid.h"

namespace trivium {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  static constexpr int kPairs = 8;
  __m512 v;

  Avx512() = default;
  TRIVIUM_INLINE explicit Avx512(float x) : v(_mm512_set1_ps(x)) {}
  TRIVIUM_INLINE explicit Avx512(__m512 x) : v(x) {}
  TRIVIUM_INLINE static Avx512 load(const float* p) { return Avx512(_mm512_load_ps(p)); }
  TRIVIUM_INLINE void store(float* p) const { _mm512_store_ps(p, v); }
  TRIVIUM_INLINE static Pair<Avx512> load_bfloat16(const uint32_t* words) {
    const __m512i both = _mm512_load_si512(words);
    return {Avx512(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))),
            Avx512(_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))))};
  }
  TRIVIUM_INLINE static Avx512 fma(Avx512 a, Avx512 b, Avx512 c) { return Avx512(_mm512_fmadd_ps(a.v, b.v, c.v)); }
  TRIVIUM_INLINE static Avx512 max(Avx512 a, Avx512 b) { return Avx512(_mm512_max_ps(a.v, b.v)); }
  TRIVIUM_INLINE static Avx512 root(Avx512 a) { return Avx512(_mm512_sqrt_ps(a.v)); }
  TRIVIUM_INLINE static Avx512 where_greater(Avx512 x, Avx512 bound, Avx512 then) {
    return Avx512(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, bound.v, _CMP_GT_OQ), then.v));
  }
  TRIVIUM_INLINE static Avx512 two_to_low_bits(Avx512 x) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(x.v), 23);
    return Avx512(_mm512_castsi512_ps(_mm512_add_epi32(exponent, _mm512_set1_epi32(0x3F800000))));
  }
  TRIVIUM_INLINE static Avx512 split(Avx512 x, Avx512& exponent) {
    const __m512i root = _mm512_set1_epi32(0x3F3504F3);
    const __m512i moved = _mm512_sub_epi32(_mm512_castps_si512(x.v), root);
    exponent = Avx512(_mm512_cvtepi32_ps(_mm512_srai_epi32(moved, 23)));
    const __m512i mantissa = _mm512_and_si512(moved, _mm512_set1_epi32(0x007FFFFF));
    return Avx512(_mm512_castsi512_ps(_mm512_add_epi32(mantissa, root)));
  }
  TRIVIUM_INLINE float maximum() const { return _mm512_reduce_max_ps(v); }
  TRIVIUM_INLINE double total() const {
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm512_reduce_add_pd(
        _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(v)), _mm512_cvtps_pd(upper)));
  }
};

TRIVIUM_INLINE Avx512 operator+(Avx512 a, Avx512 b) { return Avx512(_mm512_add_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx512 operator-(Avx512 a, Avx512 b) { return Avx512(_mm512_sub_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx512 operator*(Avx512 a, Avx512 b) { return Avx512(_mm512_mul_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx512 operator/(Avx512 a, Avx512 b) { return Avx512(_mm512_div_ps(a.v, b.v)); }

}  // namespace

const CpuKernels* avx512_kernels() {
  using K = Kernels<Avx512>;
  using H = Hybrid<Avx512>;
  static const CpuKernels table = {"avx512", K::logits, K::statistics, K::divergences, H::moments, H::hybrid};
  return &table;
}

}  // namespace trivium
