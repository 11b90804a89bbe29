// Features x masks / keep: the left operand of the product that gives all passes' logits.
#pragma once

#include "cuda_bits.h"
#include "cuda_block.h"

namespace trivium {

constexpr int kUnitsPerThread = 8;
constexpr int kRowsPerBlock = 4;

struct ExpandArguments {
  const void* features;  // [B, H, D], H heads own features (1 where they are shared)
  int type;              // mcheads_cuda_type
  const uint8_t* masks;  // [R, padded], 0 or 1, zero beyond D
  float inverse_keep;
  int64_t batch, feature_heads, units, padded, rows;
  void* expanded;   // [H, B, R, padded]
  float* poison;    // [B, H]: NaN where the features hold a NaN or an infinity, else 0
};

__device__ __forceinline__ float load_feature(const void* features, int type, int64_t index) {
  if (type == 0) return static_cast<const float*>(features)[index];
  const uint16_t word = static_cast<const uint16_t*>(features)[index];
  return type == 1 ? half_float(word) : bits_float(static_cast<uint32_t>(word) << 16);
}

template <typename Element>
__device__ __forceinline__ Element as_element(float value);
template <>
__device__ __forceinline__ float as_element<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ uint16_t as_element<uint16_t>(float value) {
  return bfloat16_bits(value);
}

// One block per picture and feature head (x) and kRowsPerBlock rows of masks (y). Element: float, or bfloat16 bits.
template <typename Element>
__global__ void __launch_bounds__(256, 4) expand_kernel(const ExpandArguments a) {
  const int64_t source = blockIdx.x, picture = source / a.feature_heads, head = source % a.feature_heads;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kRowsPerBlock;
  const int64_t last = first + kRowsPerBlock < a.rows ? first + kRowsPerBlock : a.rows;
  Element* const out = static_cast<Element*>(a.expanded) + (head * a.batch + picture) * a.rows * a.padded;
  bool finite = true;
  for (int64_t d = threadIdx.x * kUnitsPerThread; d < a.padded; d += blockDim.x * kUnitsPerThread) {
    alignas(16) Element scaled[kUnitsPerThread];
#pragma unroll
    for (int i = 0; i < kUnitsPerThread; ++i) {
      const float feature = d + i < a.units ? load_feature(a.features, a.type, source * a.units + d + i) : 0.f;
      finite = finite && fabsf(feature) < INFINITY;
      scaled[i] = as_element<Element>(feature * a.inverse_keep);
    }
    for (int64_t r = first; r < last; ++r) {
      const uint2 kept = *reinterpret_cast<const uint2*>(a.masks + r * a.padded + d);
      alignas(16) Element row[kUnitsPerThread];
#pragma unroll
      for (int i = 0; i < kUnitsPerThread; ++i)
        row[i] = ((i < 4 ? kept.x : kept.y) >> (8 * (i % 4)) & 1u) ? scaled[i] : Element(0);
      uint4* const target = reinterpret_cast<uint4*>(out + r * a.padded + d);
#pragma unroll
      for (int v = 0; v < kUnitsPerThread * static_cast<int>(sizeof(Element)) / 16; ++v)
        target[v] = reinterpret_cast<const uint4*>(row)[v];
    }
  }
  const int all_finite = __syncthreads_and(finite);
  if (blockIdx.y == 0 && threadIdx.x == 0) a.poison[source] = all_finite ? 0.f : NAN;
}

}  // namespace trivium
