// Stands in for the CUDA runtime where there is no card: kernels run as coroutines, one per thread, on the CPU.
//
// Barriers, shuffles and clusters behave as on a card, memory of cudaMalloc ends at a page that may not be touched and
// starts poisoned, the order in which threads run is drawn from a seed, and any call can be made to fail.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Of the thread that runs now; the scheduler sets them whenever it lets one go on.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

void sync_block();
int sync_block_and(int predicate);
float shuffle_xor(float value, int offset);
void run(dim3 grid, dim3 threads, size_t shared_bytes, unsigned cluster, const std::function<void()>& kernel);
int next_call();

}  // namespace emulation

inline void __syncthreads() { emulation::sync_block(); }
inline int __syncthreads_and(int predicate) { return emulation::sync_block_and(predicate); }
inline float __shfl_xor_sync(unsigned, float value, int offset) { return emulation::shuffle_xor(value, offset); }

namespace trivium {
float* shared_floats();
void sync_cluster();
const float* peer_shared(float* own, int rank);
inline float quick_exp2(float x) {
  const float power = std::exp2(x);
  return power < 1.17549435e-38f ? 0.f : power;
}
}  // namespace trivium

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorMemoryAllocation = 2, cudaErrorNoDevice = 100, cudaErrorUnknown = 999 };
enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaFuncAttributes {
  int unused;
};
union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* kernel, const cudaLaunchConfig_t* config);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

template <typename... Parameters, typename... Values>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Values&&... values) {
  if (emulation::next_call() != 0) return cudaErrorUnknown;
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, cluster, [&] { kernel(values...); });
  return cudaSuccess;
}
