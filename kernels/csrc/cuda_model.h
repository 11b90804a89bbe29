// A packed model on a card, and how its calls fail.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "cuda_gemm.h"
#include "mcheads_cuda.h"

namespace trivium::card {

constexpr int kMaxHeads = 64;
constexpr int64_t kMaxPasses = 65535, kMaxExtent = 1 << 24;
constexpr int64_t kMaxSlab = 256;
constexpr int64_t kUnitMultiple = 8, kClassMultiple = 4;

// Remember a line for mcheads_cuda_error and return the status.
int fail(int status, const char* format, ...) __attribute__((format(printf, 2, 3)));
int call_failed(cudaError_t error, const char* what);
const char* last_error();

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// [B, K, C], [B, K], [B, K], [B, K, K], [B, K], in device memory.
struct Outputs {
  float* probabilities;
  float* predictive_entropy;
  float* mutual_information;
  float* divergence;
  float* energy;
};

}  // namespace trivium::card

#define TRIVIUM_TRY(call)                           \
  do {                                              \
    const int status_ = (call);                     \
    if (status_ != MCHEADS_CUDA_OK) return status_; \
  } while (0)

#define TRIVIUM_CUDA_TRY(call)                                                     \
  do {                                                                             \
    const cudaError_t error_ = (call);                                             \
    if (error_ != cudaSuccess) return ::trivium::card::call_failed(error_, #call); \
  } while (0)

#define TRIVIUM_GEMM_TRY(library, call)                                            \
  do {                                                                             \
    const int status_ = (call);                                                    \
    if (status_ != kCublasOk)                                                      \
      return ::trivium::card::fail(MCHEADS_CUDA_FAILED, "cuBLASLt, %s: %s", #call, \
                                   (library)->status_text(status_));               \
  } while (0)

struct mcheads_cuda_model {
  int64_t heads, feature_heads, classes, units, passes, rows;
  int64_t padded_units;    // D up to a multiple of 8: 16-byte rows of bfloat16
  int64_t padded_classes;  // C up to a multiple of 4: 16-byte rows of float32
  float keep;
  int arithmetic, device = -1;
  bool antithetic = false, clustered = false;
  int64_t slab = 1, gemm_bytes = 0;

  void *weights = nullptr, *bias = nullptr, *inverse_temperature = nullptr, *masks = nullptr;  // device memory

  // The product for one number of pictures: logits^T = weights^T-stored-by-rows x operand, column-major as cuBLAS
  // counts, one batch entry per head where heads own their features.
  struct Plan {
    const trivium::CublasLt* library;
    trivium::GemmLayout weights = nullptr, operand = nullptr, logits = nullptr;
    trivium::GemmAlgorithm algorithm{};
    explicit Plan(const trivium::CublasLt* lt) : library(lt) {}
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan() {
      for (trivium::GemmLayout layout : {weights, operand, logits})
        if (layout != nullptr) library->layout_destroy(layout);
    }
  };
  const trivium::CublasLt* library = nullptr;
  trivium::GemmHandle gemm = nullptr;
  trivium::GemmDescription product = nullptr;
  std::mutex planning;
  std::unique_ptr<const Plan> owned_plans[trivium::card::kMaxSlab + 1];
  std::atomic<const Plan*> plans[trivium::card::kMaxSlab + 1] = {};

  int64_t element_bytes() const { return arithmetic == MCHEADS_CUDA_FLOAT32 ? 4 : 2; }
  int64_t operand_bytes(int64_t batch) const { return feature_heads * batch * rows * padded_units * element_bytes(); }
  int64_t logits_bytes(int64_t batch) const { return batch * rows * heads * padded_classes * 4; }
  bool resident() const;  // one kernel computes all statistics, in shared memory

  int pack(const float* weights, const float* bias, const float* temperature, const uint8_t* masks,
           cudaStream_t stream);
  int upload(void** target, const void* source, size_t bytes, cudaStream_t stream);
  int load_kernels(int compute_major);
  int plan(int64_t batch, const Plan** found);
  int make_plan(int64_t batch, Plan& plan) const;
  int run_slab(int stages, const void* features, int type, int64_t batch, const trivium::card::Outputs& outputs,
               unsigned char* workspace, cudaStream_t stream);
  int free_all();

  // Offsets into the workspace of a slab.
  struct Workspace {
    int64_t operand, logits, poison, pass_energy, pass_entropy, gemm, bytes;
  };
  Workspace layout(int64_t batch) const;
};
