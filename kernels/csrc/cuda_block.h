// What a kernel asks of its block, warp and cluster. A host build brings its own (tests/kernels/emulation): the same
// kernels then run without a card, one coroutine per thread.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDACC__)

#include <cooperative_groups.h>

namespace trivium {

// The block's dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ float* shared_floats() {
  extern __shared__ float4 shared_memory[];
  return reinterpret_cast<float*>(shared_memory);
}

// A barrier over all threads of the cluster; shared memory of every block is visible to the others behind it.
__device__ __forceinline__ void sync_cluster() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
}

// The address of another block's copy of a shared variable.
__device__ __forceinline__ const float* peer_shared(float* own, int rank) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(own, rank);
#else
  return own;
#endif
}

// 2^x in one instruction, to two units in the last place; 0 below 2^-126.
__device__ __forceinline__ float quick_exp2(float x) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
}

}  // namespace trivium

#endif

namespace trivium {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kMaxWarps = 8;

__device__ __forceinline__ float warp_sum(float value) {
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(kWholeWarp, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
  for (int offset = 16; offset > 0; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, offset));
  return value;
}

// Sums of the warps' partial sums, in the same order in every thread: slots [kMaxWarps], filled before a barrier.
__device__ __forceinline__ float slot_sum(const float* slots, int warps) {
  float sum = 0.f;
  for (int w = 0; w < warps; ++w) sum += slots[w];
  return sum;
}

}  // namespace trivium
