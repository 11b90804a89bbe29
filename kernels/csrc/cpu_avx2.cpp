// The CPU kernels for AVX2 with FMA: eight floats at a time.
#include <immintrin.h>

#include "cpu_hybrid.h"

namespace trivium {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  static constexpr int kPairs = 4;
  __m256 v;

  Avx2() = default;
  TRIVIUM_INLINE explicit Avx2(float x) : v(_mm256_set1_ps(x)) {}
  TRIVIUM_INLINE explicit Avx2(__m256 x) : v(x) {}
  TRIVIUM_INLINE static Avx2 load(const float* p) { return Avx2(_mm256_load_ps(p)); }
  TRIVIUM_INLINE void store(float* p) const { _mm256_store_ps(p, v); }
  TRIVIUM_INLINE static Pair<Avx2> load_bfloat16(const uint32_t* words) {
    const __m256i both = _mm256_load_si256(reinterpret_cast<const __m256i*>(words));
    return {Avx2(_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))),
            Avx2(_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u)))))};
  }
  TRIVIUM_INLINE static Avx2 fma(Avx2 a, Avx2 b, Avx2 c) { return Avx2(_mm256_fmadd_ps(a.v, b.v, c.v)); }
  TRIVIUM_INLINE static Avx2 max(Avx2 a, Avx2 b) { return Avx2(_mm256_max_ps(a.v, b.v)); }
  TRIVIUM_INLINE static Avx2 root(Avx2 a) { return Avx2(_mm256_sqrt_ps(a.v)); }
  TRIVIUM_INLINE static Avx2 where_greater(Avx2 x, Avx2 bound, Avx2 then) {
    return Avx2(_mm256_and_ps(_mm256_cmp_ps(x.v, bound.v, _CMP_GT_OQ), then.v));
  }
  TRIVIUM_INLINE static Avx2 two_to_low_bits(Avx2 x) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(x.v), 23);
    return Avx2(_mm256_castsi256_ps(_mm256_add_epi32(exponent, _mm256_set1_epi32(0x3F800000))));
  }
  TRIVIUM_INLINE static Avx2 split(Avx2 x, Avx2& exponent) {
    const __m256i root = _mm256_set1_epi32(0x3F3504F3);
    const __m256i moved = _mm256_sub_epi32(_mm256_castps_si256(x.v), root);
    exponent = Avx2(_mm256_cvtepi32_ps(_mm256_srai_epi32(moved, 23)));
    const __m256i mantissa = _mm256_and_si256(moved, _mm256_set1_epi32(0x007FFFFF));
    return Avx2(_mm256_castsi256_ps(_mm256_add_epi32(mantissa, root)));
  }
  TRIVIUM_INLINE float maximum() const {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  TRIVIUM_INLINE double total() const {
    const __m256d s = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                    _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d t = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(_mm_add_sd(t, _mm_unpackhi_pd(t, t)));
  }
};

TRIVIUM_INLINE Avx2 operator+(Avx2 a, Avx2 b) { return Avx2(_mm256_add_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx2 operator-(Avx2 a, Avx2 b) { return Avx2(_mm256_sub_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx2 operator*(Avx2 a, Avx2 b) { return Avx2(_mm256_mul_ps(a.v, b.v)); }
TRIVIUM_INLINE Avx2 operator/(Avx2 a, Avx2 b) { return Avx2(_mm256_div_ps(a.v, b.v)); }

}  // namespace

const CpuKernels* avx2_kernels() {
  using K = Kernels<Avx2>;
  using H = Hybrid<Avx2>;
  static const CpuKernels table = {"avx2", K::logits, K::statistics, K::divergences, H::moments, H::hybrid};
  return &table;
}

}  // namespace trivium
