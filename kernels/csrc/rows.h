// Row functions of MCHeads, shared by the CPU and the CUDA kernels: one source for g++, clang and nvcc.
//
// The term functions are templates over a number: float on a device, a vector of floats on a CPU. All are inlined
// without exception, so that no instruction set leaks from one translation unit into another.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define TRIVIUM_ROW __host__ __device__ __forceinline__
#else
#define TRIVIUM_ROW inline __attribute__((always_inline))
#endif

namespace trivium {

// log p is taken of max(p, kProbabilityFloor).
constexpr float kProbabilityFloor = 1e-30f;
// Below every logit, and finite, so that a difference of two is never NaN.
constexpr float kLowestLogit = -1e38f;

// One softmax row in one sweep: with top = max z, sum = sum e^(z - top), weighted = sum (z - top) e^(z - top).
struct SoftmaxRow {
  float top = kLowestLogit;
  float sum = 0.f;
  float weighted = 0.f;

  TRIVIUM_ROW void push(float z) {
    if (z > top) {
      rescale(z);
      sum += 1.f;
    } else {
      const float shifted = z - top;
      const float e = expf(shifted);
      sum += e;
      weighted += shifted * e;
    }
  }

  TRIVIUM_ROW void merge(SoftmaxRow other) {
    const float common = other.top > top ? other.top : top;
    rescale(common);
    other.rescale(common);
    sum += other.sum;
    weighted += other.weighted;
  }

  // Refer the sums to another top, at least as high as the present one.
  TRIVIUM_ROW void rescale(float higher) {
    const float shift = top - higher;
    const float factor = expf(shift);
    weighted = (weighted + shift * sum) * factor;
    sum *= factor;
    top = higher;
  }

  TRIVIUM_ROW float log_sum_exp() const { return top + logf(sum); }

  // H(softmax z) in nats: two terms of one sign, nothing cancels.
  TRIVIUM_ROW float entropy() const { return logf(sum) - weighted / sum; }
};

// A class's share of H(p); log_p = log max(p, kProbabilityFloor).
template <class Number>
TRIVIUM_ROW Number entropy_term(Number p, Number log_p) {
  return Number(0.f) - p * log_p;
}

// A class's share of KL(p || q), in nats.
template <class Number>
TRIVIUM_ROW Number divergence_term(Number p, Number log_p, Number log_q) {
  return p * (log_p - log_q);
}

// Entropies and divergences are never negative; rounding alone makes them so. NaN stays NaN.
TRIVIUM_ROW float not_negative(float nats) { return nats < 0.f ? 0.f : nats; }

}  // namespace trivium
