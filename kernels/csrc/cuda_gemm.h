// The slice of cuBLASLt that the kernels use: its frozen C ABI declared here, the library loaded at first use, so that
// libtrivium builds without its headers and loads on a machine without it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trivium {

// Values of the enums of cublas_api.h, cublasLt.h and library_types.h.
enum : int {
  kCublasOk = 0,
  kReal32 = 0,        // CUDA_R_32F
  kRealBfloat16 = 14, // CUDA_R_16BF
  kCompute32 = 68,    // CUBLAS_COMPUTE_32F: float32 products and sums, no TF32
  kTransposeA = 3,    // CUBLASLT_MATMUL_DESC_TRANSA
  kBatchCount = 5,    // CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT
  kBatchStride = 6,   // CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET
  kMaxWorkspace = 1,  // CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES
  kAlignmentA = 5,    // CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, then B, C, D
};

using GemmHandle = void*;
using GemmDescription = void*;
using GemmLayout = void*;
using GemmPreference = void*;

struct GemmAlgorithm {
  uint64_t opaque[8];
};

struct GemmHeuristic {
  GemmAlgorithm algorithm;
  size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

struct CublasLt {
  size_t (*version)();
  const char* (*status_text)(int);
  int (*create)(GemmHandle*);
  int (*destroy)(GemmHandle);
  int (*description_create)(GemmDescription*, int compute, int scale_type);
  int (*description_set)(GemmDescription, int attribute, const void*, size_t);
  int (*description_destroy)(GemmDescription);
  int (*layout_create)(GemmLayout*, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_set)(GemmLayout, int attribute, const void*, size_t);
  int (*layout_destroy)(GemmLayout);
  int (*preference_create)(GemmPreference*);
  int (*preference_set)(GemmPreference, int attribute, const void*, size_t);
  int (*preference_destroy)(GemmPreference);
  int (*heuristic)(GemmHandle, GemmDescription, GemmLayout a, GemmLayout b, GemmLayout c, GemmLayout d, GemmPreference,
                   int requested, GemmHeuristic*, int* found);
  int (*matmul)(GemmHandle, GemmDescription, const void* alpha, const void* a, GemmLayout, const void* b, GemmLayout,
                const void* beta, const void* c, GemmLayout, void* d, GemmLayout, const GemmAlgorithm*,
                void* workspace, size_t workspace_bytes, void* stream);
};

// The library, loaded once per process and never unloaded; null where it cannot be, with the reason in `problem`.
// TRIVIUM_CUBLASLT names the file to load; without it the loader's search path is asked for versions 13 and 12.
const CublasLt* cublaslt(const char** problem);

}  // namespace trivium
