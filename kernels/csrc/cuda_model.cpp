// Packing a model, planning its matrix product, freeing it.
#include "cuda_model.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <vector>

#include "cuda_bits.h"

namespace trivium::card {
namespace {

thread_local char last_line[512] = "";

}  // namespace

int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(last_line, sizeof last_line, format, values);
  va_end(values);
  return status;
}

int call_failed(cudaError_t error, const char* what) {
  cudaGetLastError();  // the error is reported here, the caller's next check shall not meet it again
  const int status = error == cudaErrorMemoryAllocation ? MCHEADS_CUDA_MEMORY : MCHEADS_CUDA_FAILED;
  return fail(status, "%s: %s", what, cudaGetErrorString(error));
}

const char* last_error() { return last_line; }

}  // namespace trivium::card

using namespace trivium;
using card::fail;
using card::round_up;

mcheads_cuda_model::Workspace mcheads_cuda_model::layout(int64_t batch) const {
  Workspace w{};
  const auto take = [&w](int64_t bytes) {
    const int64_t offset = w.bytes;
    w.bytes += round_up(bytes, 256);
    return offset;
  };
  w.operand = take(operand_bytes(batch));
  w.logits = take(logits_bytes(batch));
  w.poison = take(batch * feature_heads * 4);
  w.pass_energy = take(resident() ? 0 : batch * heads * passes * 4);
  w.pass_entropy = take(resident() ? 0 : batch * heads * passes * 4);
  w.gemm = take(gemm_bytes);
  return w;
}

int mcheads_cuda_model::upload(void** target, const void* source, size_t bytes, cudaStream_t stream) {
  TRIVIUM_CUDA_TRY(cudaMalloc(target, bytes));
  TRIVIUM_CUDA_TRY(cudaMemcpyAsync(*target, source, bytes, cudaMemcpyDefault, stream));
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_model::pack(const float* weights_in, const float* bias_in, const float* temperature_in,
                             const uint8_t* masks_in, cudaStream_t stream) {
  std::vector<float> w(static_cast<size_t>(heads * classes * units)), b(static_cast<size_t>(heads * classes)),
      tau(static_cast<size_t>(heads));
  std::vector<uint8_t> m(static_cast<size_t>(passes * units));
  TRIVIUM_CUDA_TRY(cudaMemcpyAsync(w.data(), weights_in, w.size() * 4, cudaMemcpyDefault, stream));
  TRIVIUM_CUDA_TRY(cudaMemcpyAsync(b.data(), bias_in, b.size() * 4, cudaMemcpyDefault, stream));
  TRIVIUM_CUDA_TRY(cudaMemcpyAsync(tau.data(), temperature_in, tau.size() * 4, cudaMemcpyDefault, stream));
  TRIVIUM_CUDA_TRY(cudaMemcpyAsync(m.data(), masks_in, m.size(), cudaMemcpyDefault, stream));
  TRIVIUM_CUDA_TRY(cudaStreamSynchronize(stream));
  for (float value : tau)
    if (!(value > 0.f) || std::isinf(value))
      return fail(MCHEADS_CUDA_INVALID, "temperatures must be positive and finite, got %g", static_cast<double>(value));
  if (std::any_of(m.begin(), m.end(), [](uint8_t value) { return value > 1; }))
    return fail(MCHEADS_CUDA_INVALID, "masks must hold 0 and 1 only");

  const size_t half = m.size() / 2;
  antithetic = passes % 2 == 0;
  for (size_t i = 0; antithetic && i < half; ++i) antithetic = m[i] != m[half + i];
  rows = antithetic ? passes / 2 + 1 : passes;

  std::vector<uint8_t> padded_masks(static_cast<size_t>(rows * padded_units), 0);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < units; ++d)
      padded_masks[r * padded_units + d] = antithetic && r == rows - 1 ? 1 : m[r * units + d];
  std::vector<float> scaled_bias(static_cast<size_t>(heads * padded_classes), 0.f), inverse(tau.size());
  for (int64_t k = 0; k < heads; ++k) {
    inverse[k] = 1.f / tau[k];
    for (int64_t c = 0; c < classes; ++c) scaled_bias[k * padded_classes + c] = b[k * classes + c] / tau[k];
  }
  const bool narrow = arithmetic == MCHEADS_CUDA_BFLOAT16;
  const size_t elements = static_cast<size_t>(heads * padded_classes * padded_units);
  std::vector<uint16_t> narrow_weights(narrow ? elements : 0, 0);
  std::vector<float> wide_weights(narrow ? 0 : elements, 0.f);
  for (int64_t k = 0; k < heads; ++k)
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t d = 0; d < units; ++d) {
        const float value = w[(k * classes + c) * units + d];
        const size_t at = static_cast<size_t>((k * padded_classes + c) * padded_units + d);
        if (narrow) {
          narrow_weights[at] = bfloat16_bits(value);
        } else {
          wide_weights[at] = value;
        }
      }
  const void* const packed =
      narrow ? static_cast<const void*>(narrow_weights.data()) : static_cast<const void*>(wide_weights.data());
  TRIVIUM_TRY(upload(&weights, packed, elements * static_cast<size_t>(element_bytes()), stream));
  TRIVIUM_TRY(upload(&bias, scaled_bias.data(), scaled_bias.size() * 4, stream));
  TRIVIUM_TRY(upload(&inverse_temperature, inverse.data(), inverse.size() * 4, stream));
  TRIVIUM_TRY(upload(&masks, padded_masks.data(), padded_masks.size(), stream));
  TRIVIUM_CUDA_TRY(cudaStreamSynchronize(stream));
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_model::make_plan(int64_t batch, Plan& plan) const {
  const int type = arithmetic == MCHEADS_CUDA_FLOAT32 ? kReal32 : kRealBfloat16;
  const uint64_t depth = static_cast<uint64_t>(padded_units), columns = static_cast<uint64_t>(batch * rows);
  const bool shared = feature_heads == 1;
  const uint64_t outputs = static_cast<uint64_t>(shared ? heads * padded_classes : padded_classes);
  TRIVIUM_GEMM_TRY(library, library->layout_create(&plan.weights, type, depth, outputs, padded_units));
  TRIVIUM_GEMM_TRY(library, library->layout_create(&plan.operand, type, depth, columns, padded_units));
  TRIVIUM_GEMM_TRY(library,
                   library->layout_create(&plan.logits, kReal32, outputs, columns, heads * padded_classes));
  if (!shared) {
    const struct {
      GemmLayout layout;
      int64_t stride;
    } batched[] = {{plan.weights, padded_classes * padded_units},
                   {plan.operand, batch * rows * padded_units},
                   {plan.logits, padded_classes}};
    const int32_t count = static_cast<int32_t>(heads);
    for (const auto& b : batched) {
      TRIVIUM_GEMM_TRY(library, library->layout_set(b.layout, kBatchCount, &count, sizeof count));
      TRIVIUM_GEMM_TRY(library, library->layout_set(b.layout, kBatchStride, &b.stride, sizeof b.stride));
    }
  }
  struct Preference {
    const CublasLt* library;
    GemmPreference value = nullptr;
    ~Preference() {
      if (value != nullptr) library->preference_destroy(value);
    }
  } preference{library};
  TRIVIUM_GEMM_TRY(library, library->preference_create(&preference.value));
  const size_t room = static_cast<size_t>(gemm_bytes);
  TRIVIUM_GEMM_TRY(library, library->preference_set(preference.value, kMaxWorkspace, &room, sizeof room));
  const uint32_t alignment = 16;
  for (int operand = 0; operand < 4; ++operand)
    TRIVIUM_GEMM_TRY(
        library, library->preference_set(preference.value, kAlignmentA + operand, &alignment, sizeof alignment));
  GemmHeuristic best{};
  int found = 0;
  TRIVIUM_GEMM_TRY(library, library->heuristic(gemm, product, plan.weights, plan.operand, plan.logits, plan.logits,
                                               preference.value, 1, &best, &found));
  if (found < 1) return fail(MCHEADS_CUDA_FAILED, "cuBLASLt knows no algorithm for this product");
  TRIVIUM_GEMM_TRY(library, best.status);
  plan.algorithm = best.algorithm;
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_model::plan(int64_t batch, const Plan** found) {
  *found = plans[batch].load(std::memory_order_acquire);
  if (*found != nullptr) return MCHEADS_CUDA_OK;
  const std::lock_guard<std::mutex> lock(planning);
  if (owned_plans[batch] == nullptr) {
    auto fresh = std::make_unique<Plan>(library);
    TRIVIUM_TRY(make_plan(batch, *fresh));
    owned_plans[batch] = std::move(fresh);
    plans[batch].store(owned_plans[batch].get(), std::memory_order_release);
  }
  *found = owned_plans[batch].get();
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_model::free_all() {
  for (auto& plan : owned_plans) plan.reset();
  if (product != nullptr) library->description_destroy(product);
  if (gemm != nullptr) library->destroy(gemm);
  for (void* memory : {weights, bias, inverse_temperature, masks})
    if (memory != nullptr) TRIVIUM_CUDA_TRY(cudaFree(memory));
  return MCHEADS_CUDA_OK;
}
