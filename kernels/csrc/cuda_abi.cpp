// The C ABI of mcheads_cuda.h: what it refuses, and in which slabs it runs.
#include <algorithm>
#include <memory>
#include <new>

#include "cuda_model.h"

using namespace trivium;
using namespace trivium::card;

// A slab's operand and logits should stay near the level-2 cache, and bound the workspace whatever B, C and T are.
constexpr int64_t kSlabBytes = int64_t{256} << 20;

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
    fresh->padded_units = round_up(units, kUnitMultiple);
    fresh->padded_classes = round_up(classes, kClassMultiple);
    TRIVIUM_TRY(fresh->pack(weights, bias, temperature, masks, static_cast<cudaStream_t>(stream)));
    TRIVIUM_TRY(fresh->load_kernels(major));
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
      card::Outputs outputs{};
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

const char* mcheads_cuda_error(void) { return card::last_error(); }

}  // extern "C"
