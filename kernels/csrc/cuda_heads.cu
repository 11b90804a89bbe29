// The C ABI of mcheads_cuda.h: packing a model, planning the matrix product, enqueueing a run.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cuda_expand.h"
#include "cuda_gemm.h"
#include "cuda_statistics.h"
#include "mcheads_cuda.h"

namespace trivium {
namespace {

constexpr int kMaxHeads = 64;
constexpr int64_t kMaxClusteredHeads = 8, kMaxPasses = 65535, kMaxExtent = 1 << 24;
constexpr int64_t kMaxSlab = 256;
// A slab's operand and logits should stay near the level-2 cache, and bound the workspace whatever B, C and T are.
constexpr int64_t kSlabBytes = int64_t{256} << 20;

thread_local char last_error[512] = "";

int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(last_error, sizeof last_error, format, values);
  va_end(values);
  return status;
}

int cuda_failure(cudaError_t error, const char* what) {
  cudaGetLastError();  // the error is reported here, the caller's next check shall not meet it again
  const int status = error == cudaErrorMemoryAllocation ? MCHEADS_CUDA_MEMORY : MCHEADS_CUDA_FAILED;
  return fail(status, "%s: %s", what, cudaGetErrorString(error));
}

#define TRIVIUM_TRY(call)                         \
  do {                                            \
    const int status_ = (call);                   \
    if (status_ != MCHEADS_CUDA_OK) return status_; \
  } while (0)

#define TRIVIUM_CUDA_TRY(call)                                                \
  do {                                                                        \
    const cudaError_t error_ = (call);                                        \
    if (error_ != cudaSuccess) return ::trivium::cuda_failure(error_, #call); \
  } while (0)

#define TRIVIUM_GEMM_TRY(library, call)                                                                       \
  do {                                                                                                        \
    const int status_ = (call);                                                                               \
    if (status_ != kCublasOk)                                                                                 \
      return ::trivium::fail(MCHEADS_CUDA_FAILED, "cuBLASLt, %s: %s", #call, (library)->status_text(status_)); \
  } while (0)

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes, int cluster,
                   cudaStream_t stream, const Arguments& arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

static_assert(4 * resident_floats(kResidentQuads, kMaxWarps, kMaxHeads) <= 48 * 1024,
              "more shared memory would have to be asked for");

using StatisticsKernel = void (*)(StatisticsArguments);

}  // namespace
}  // namespace trivium

using namespace trivium;

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
    const CublasLt* library;
    GemmLayout weights = nullptr, operand = nullptr, logits = nullptr;
    GemmAlgorithm algorithm{};
    explicit Plan(const CublasLt* lt) : library(lt) {}
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;
    ~Plan() {
      for (GemmLayout layout : {weights, operand, logits})
        if (layout != nullptr) library->layout_destroy(layout);
    }
  };
  const CublasLt* library = nullptr;
  GemmHandle gemm = nullptr;
  GemmDescription product = nullptr;
  std::mutex planning;
  std::unique_ptr<const Plan> owned_plans[kMaxSlab + 1];
  std::atomic<const Plan*> plans[kMaxSlab + 1] = {};

  int64_t element_bytes() const { return arithmetic == MCHEADS_CUDA_FLOAT32 ? 4 : 2; }
  int64_t operand_bytes(int64_t batch) const { return feature_heads * batch * rows * padded_units * element_bytes(); }
  int64_t logits_bytes(int64_t batch) const { return batch * rows * heads * padded_classes * 4; }
  bool resident() const { return classes <= resident_row(kResidentQuads); }
  int resident_quads() const { return classes <= resident_row(1) ? 1 : kResidentQuads; }
  StatisticsKernel resident_kernel() const {
    return resident_quads() == 1 ? statistics_kernel<1> : statistics_kernel<kResidentQuads>;
  }
  int64_t resident_bytes() const {
    return 4 * resident_floats(resident_quads(), resident_warps(), static_cast<int>(heads));
  }
  int resident_warps() const {
    return static_cast<int>(std::min<int64_t>(kMaxWarps, antithetic ? passes / 2 : passes));
  }

  int pack(const float* weights, const float* bias, const float* temperature, const uint8_t* masks,
           cudaStream_t stream);
  int upload(void** target, const void* source, size_t bytes, cudaStream_t stream);
  int choose_clusters(int compute_major);
  int plan(int64_t batch, const Plan** found);
  int make_plan(int64_t batch, Plan& plan) const;
  int run_slab(int stages, const void* features, int type, int64_t batch, StatisticsArguments outputs,
               unsigned char* workspace, cudaStream_t stream);
  int free_all();

  // Offsets into the workspace of a slab.
  struct Workspace {
    int64_t operand, logits, poison, pass_energy, pass_entropy, gemm, bytes;
  };
  Workspace layout(int64_t batch) const {
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
};

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

// Touching the attributes of every kernel here also loads it, so that a first run may already be captured.
int mcheads_cuda_model::choose_clusters(int compute_major) {
  cudaFuncAttributes attributes{};
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(expand_kernel<float>)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(expand_kernel<uint16_t>)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(rows_kernel)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(means_kernel)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(divergence_kernel)));
  if (!resident()) return MCHEADS_CUDA_OK;
  const void* const kernel = reinterpret_cast<const void*>(resident_kernel());
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernel));
  if (compute_major < 9 || heads > kMaxClusteredHeads) return MCHEADS_CUDA_OK;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(heads);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(heads));
  config.blockDim = dim3(static_cast<unsigned>(32 * resident_warps()));
  config.dynamicSmemBytes = static_cast<size_t>(resident_bytes());
  config.attrs = &attribute;
  config.numAttrs = 1;
  int active = 0;
  TRIVIUM_CUDA_TRY(cudaOccupancyMaxActiveClusters(&active, kernel, &config));
  clustered = active > 0;  // a slice of a card may be too small for a cluster
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

int mcheads_cuda_model::run_slab(int stages, const void* features, int type, int64_t batch,
                                 StatisticsArguments statistics, unsigned char* workspace, cudaStream_t stream) {
  const Workspace at = layout(batch);
  float* const poison = reinterpret_cast<float*>(workspace + at.poison);
  if (stages & MCHEADS_CUDA_EXPAND) {
    const ExpandArguments arguments{features,      type,
                                    static_cast<const uint8_t*>(masks),
                                    1.f / keep,    batch,
                                    feature_heads, units,
                                    padded_units,  rows,
                                    workspace + at.operand, poison};
    const int threads = static_cast<int>(std::min<int64_t>(256, round_up(padded_units / kUnitsPerThread, 32)));
    const dim3 grid(static_cast<unsigned>(batch * feature_heads),
                    static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock));
    const auto kernel = arithmetic == MCHEADS_CUDA_FLOAT32 ? expand_kernel<float> : expand_kernel<uint16_t>;
    TRIVIUM_CUDA_TRY(launch(kernel, grid, threads, 0, 1, stream, arguments));
  }
  if (stages & MCHEADS_CUDA_PRODUCT) {
    const Plan* chosen = nullptr;
    TRIVIUM_TRY(plan(batch, &chosen));
    const float one = 1.f, zero = 0.f;
    void* const logits = workspace + at.logits;
    TRIVIUM_GEMM_TRY(library, library->matmul(gemm, product, &one, weights, chosen->weights, workspace + at.operand,
                                              chosen->operand, &zero, logits, chosen->logits, logits, chosen->logits,
                                              &chosen->algorithm, workspace + at.gemm,
                                              static_cast<size_t>(gemm_bytes), stream));
  }
  if (!(stages & MCHEADS_CUDA_STATISTICS)) return MCHEADS_CUDA_OK;

  statistics.logits = reinterpret_cast<const float*>(workspace + at.logits);
  statistics.bias = static_cast<const float*>(bias);
  statistics.inverse_temperature = static_cast<const float*>(inverse_temperature);
  statistics.poison = poison;
  statistics.heads = static_cast<int>(heads);
  statistics.feature_heads = static_cast<int>(feature_heads);
  statistics.classes = static_cast<int>(classes);
  statistics.stride = static_cast<int>(padded_classes);
  statistics.passes = static_cast<int>(passes);
  statistics.rows = static_cast<int>(rows);
  statistics.antithetic = antithetic;
  statistics.clustered = clustered;
  statistics.pass_energy = resident() ? nullptr : reinterpret_cast<float*>(workspace + at.pass_energy);
  statistics.pass_entropy = resident() ? nullptr : reinterpret_cast<float*>(workspace + at.pass_entropy);
  const unsigned pairs = static_cast<unsigned>(batch * heads);
  const int64_t slot_bytes = 4 * (3 + heads) * kMaxWarps;
  if (resident()) {
    const int warps = resident_warps();
    TRIVIUM_CUDA_TRY(launch(resident_kernel(), dim3(pairs), 32 * warps, resident_bytes(),
                            clustered ? static_cast<int>(heads) : 1, stream, statistics));
    if (clustered) return MCHEADS_CUDA_OK;
  } else {
    const unsigned leaders = static_cast<unsigned>(antithetic ? passes / 2 : passes);
    const unsigned runs = static_cast<unsigned>((classes + 4 * kMeanThreads - 1) / (4 * kMeanThreads));
    TRIVIUM_CUDA_TRY(launch(rows_kernel, dim3(pairs, leaders), kStreamThreads, slot_bytes, 1, stream, statistics));
    TRIVIUM_CUDA_TRY(launch(means_kernel, dim3(pairs, runs), kMeanThreads, 0, 1, stream, statistics));
  }
  TRIVIUM_CUDA_TRY(launch(divergence_kernel, dim3(pairs), kStreamThreads, slot_bytes, 1, stream, statistics));
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

extern "C" {

int mcheads_cuda_devices(void) {
  int count = 0, usable = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  for (int device = 0; device < count; ++device) {
    int major = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error == cudaSuccess && major >= 8) ++usable;
  }
  return usable;
}

int mcheads_cuda_create(mcheads_cuda_model** model, int64_t heads, int64_t feature_heads, int64_t classes,
                        int64_t units, int64_t passes, float keep, int arithmetic, const float* weights,
                        const float* bias, const float* temperature, const uint8_t* masks, void* stream) {
  if (model == nullptr || weights == nullptr || bias == nullptr || temperature == nullptr || masks == nullptr)
    return fail(MCHEADS_CUDA_INVALID, "a pointer is null");
  *model = nullptr;
  if (heads < 1 || heads > kMaxHeads || classes < 1 || classes > kMaxExtent || units < 1 || units > kMaxExtent ||
      passes < 1 || passes > kMaxPasses)
    return fail(MCHEADS_CUDA_INVALID,
                "heads must lie in [1, 64], passes in [1, 65535], classes and units in [1, 2^24]");
  if (feature_heads != 1 && feature_heads != heads)
    return fail(MCHEADS_CUDA_INVALID, "feature_heads must be 1 or the number of heads");
  if (!(keep > 0.f && keep <= 1.f)) return fail(MCHEADS_CUDA_INVALID, "keep must lie in (0, 1]");
  if (arithmetic != MCHEADS_CUDA_FLOAT32 && arithmetic != MCHEADS_CUDA_BFLOAT16)
    return fail(MCHEADS_CUDA_INVALID, "arithmetic must be float32 or bfloat16");

  int device = 0, major = 0;
  const cudaError_t found = cudaGetDevice(&device);
  if (found != cudaSuccess) {
    cudaGetLastError();
    return fail(MCHEADS_CUDA_NO_DEVICE, "no CUDA device: %s", cudaGetErrorString(found));
  }
  TRIVIUM_CUDA_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major < 8)
    return fail(MCHEADS_CUDA_NO_DEVICE, "compute capability 8.0 is needed, device %d has %d", device, major);
  const char* problem = "";
  const CublasLt* const library = cublaslt(&problem);
  if (library == nullptr) return fail(MCHEADS_CUDA_NO_CUBLAS, "%s", problem);

  try {
    struct Release {
      void operator()(mcheads_cuda_model* m) const {
        m->free_all();
        delete m;
      }
    };
    std::unique_ptr<mcheads_cuda_model, Release> fresh(new mcheads_cuda_model);
    fresh->heads = heads;
    fresh->feature_heads = feature_heads;
    fresh->classes = classes;
    fresh->units = units;
    fresh->passes = passes;
    fresh->keep = keep;
    fresh->arithmetic = arithmetic;
    fresh->device = device;
    fresh->library = library;
    fresh->padded_units = round_up(units, kUnitsPerThread);
    fresh->padded_classes = round_up(classes, 4);
    TRIVIUM_TRY(fresh->pack(weights, bias, temperature, masks, static_cast<cudaStream_t>(stream)));
    TRIVIUM_TRY(fresh->choose_clusters(major));
    fresh->slab = std::clamp<int64_t>(kSlabBytes / (fresh->operand_bytes(1) + fresh->logits_bytes(1)), 1, kMaxSlab);
    fresh->gemm_bytes = int64_t{major >= 9 ? 32 : 4} << 20;  // what cuBLAS advises for these cards
    TRIVIUM_GEMM_TRY(library, library->create(&fresh->gemm));
    TRIVIUM_GEMM_TRY(library, library->description_create(&fresh->product, kCompute32, kReal32));
    const int32_t transpose = 1;  // CUBLAS_OP_T
    TRIVIUM_GEMM_TRY(library,
                     library->description_set(fresh->product, kTransposeA, &transpose, sizeof transpose));
    *model = fresh.release();
  } catch (const std::bad_alloc&) {
    return fail(MCHEADS_CUDA_MEMORY, "out of host memory");
  }
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_destroy(mcheads_cuda_model* model) {
  if (model == nullptr) return MCHEADS_CUDA_OK;
  const int status = model->free_all();
  delete model;
  return status;
}

int mcheads_cuda_workspace(const mcheads_cuda_model* model, int64_t batch, int64_t* bytes) {
  if (model == nullptr || bytes == nullptr || batch < 0)
    return fail(MCHEADS_CUDA_INVALID, "no model, or a batch below 0");
  *bytes = model->layout(std::min(batch, model->slab)).bytes;
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_run_stages(mcheads_cuda_model* model, int stages, const void* features, int feature_type,
                            int64_t batch, float* probabilities, float* predictive_entropy, float* mutual_information,
                            float* divergence, float* energy, void* workspace, int64_t workspace_bytes, void* stream) {
  int64_t needed = 0;
  TRIVIUM_TRY(mcheads_cuda_workspace(model, batch, &needed));
  if (batch == 0) return MCHEADS_CUDA_OK;
  if (features == nullptr || probabilities == nullptr || predictive_entropy == nullptr ||
      mutual_information == nullptr || divergence == nullptr || energy == nullptr || workspace == nullptr)
    return fail(MCHEADS_CUDA_INVALID, "a pointer is null");
  if (feature_type < MCHEADS_CUDA_FLOAT32 || feature_type > MCHEADS_CUDA_BFLOAT16)
    return fail(MCHEADS_CUDA_INVALID, "features must be float32, float16 or bfloat16");
  if (workspace_bytes < needed || reinterpret_cast<uintptr_t>(workspace) % 256 != 0)
    return fail(MCHEADS_CUDA_INVALID, "the workspace must hold %lld bytes and be aligned to 256",
                static_cast<long long>(needed));
  int device = -1;
  TRIVIUM_CUDA_TRY(cudaGetDevice(&device));
  if (device != model->device)
    return fail(MCHEADS_CUDA_INVALID, "the model lies on device %d, the current one is %d", model->device, device);

  const int64_t heads = model->heads, classes = model->classes;
  const int64_t picture_bytes = model->feature_heads * model->units * (feature_type == MCHEADS_CUDA_FLOAT32 ? 4 : 2);
  try {
    for (int64_t first = 0; first < batch; first += model->slab) {
      StatisticsArguments outputs{};
      outputs.probabilities = probabilities + first * heads * classes;
      outputs.predictive_entropy = predictive_entropy + first * heads;
      outputs.mutual_information = mutual_information + first * heads;
      outputs.divergence = divergence + first * heads * heads;
      outputs.energy = energy + first * heads;
      TRIVIUM_TRY(model->run_slab(stages, static_cast<const unsigned char*>(features) + first * picture_bytes,
                                  feature_type, std::min(model->slab, batch - first), outputs,
                                  static_cast<unsigned char*>(workspace), static_cast<cudaStream_t>(stream)));
    }
  } catch (const std::bad_alloc&) {
    return fail(MCHEADS_CUDA_MEMORY, "out of host memory");
  }
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_run(mcheads_cuda_model* model, const void* features, int feature_type, int64_t batch,
                     float* probabilities, float* predictive_entropy, float* mutual_information, float* divergence,
                     float* energy, void* workspace, int64_t workspace_bytes, void* stream) {
  return mcheads_cuda_run_stages(model, MCHEADS_CUDA_ALL, features, feature_type, batch, probabilities,
                                 predictive_entropy, mutual_information, divergence, energy, workspace,
                                 workspace_bytes, stream);
}

const char* mcheads_cuda_error(void) { return last_error; }

}  // extern "C"
