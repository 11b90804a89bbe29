// ai.trivium::MCHeads for ONNX Runtime's CUDA provider: inputs and outputs lie on the card, work goes to its stream.
#include "ort_cuda.h"

#include <cuda_runtime.h>

#include <mutex>
#include <new>

#include "mcheads_cuda.h"
#include "ort_tensor.h"
#include "run.h"

namespace trivium::ort {
namespace {

struct Operator : CustomOp {
  int arithmetic;
  const char* provider;
  Operator* next;
};

// A stream's workspace: runs on one stream follow each other, so they may share it.
struct Workspace {
  void* stream;
  void* memory = nullptr;
  int64_t bytes = 0;
  Workspace* next;
};

struct Kernel {
  Api api;
  int arithmetic;
  float keep;
  bool constant = true;                 // all but the features: packed at the first call, else at every one
  mcheads_cuda_model* model = nullptr;
  int64_t feature_heads = 0;            // of the packed model
  Workspace* workspaces = nullptr;
  // Held while a run is enqueued: two on one stream must not interleave, they share a workspace.
  std::mutex mutex;

  ~Kernel() {
    mcheads_cuda_destroy(model);
    while (workspaces != nullptr) {
      Workspace* const first = workspaces;
      workspaces = first->next;
      cudaFree(first->memory);
      delete first;
    }
  }
};

Status last_failure(Api api) { return status_of(api, kFail, mcheads_cuda_error()); }

Status pack(const Kernel& kernel, const Tensor* inputs, int64_t feature_heads, void* stream,
            mcheads_cuda_model** model) {
  const Tensor &w = inputs[kWeights], &b = inputs[kBias], &tau = inputs[kTemperature], &m = inputs[kMasks];
  const int result = mcheads_cuda_create(
      model, w.shape[0], feature_heads, w.shape[1], w.shape[2], m.shape[0], kernel.keep, kernel.arithmetic,
      static_cast<const float*>(w.data), static_cast<const float*>(b.data), static_cast<const float*>(tau.data),
      static_cast<const uint8_t*>(m.data), stream);
  return result == MCHEADS_CUDA_OK ? nullptr : last_failure(kernel.api);
}

Status workspace_of(Kernel& kernel, void* stream, int64_t bytes, void** memory) {
  Workspace* found = kernel.workspaces;
  while (found != nullptr && found->stream != stream) found = found->next;
  if (found == nullptr) {
    found = new (std::nothrow) Workspace{stream, nullptr, 0, kernel.workspaces};
    if (found == nullptr) return status_of(kernel.api, kFail, "MCHeads: no memory");
    kernel.workspaces = found;
  }
  if (found->bytes < bytes) {
    // cudaFree waits for what still runs in the old one.
    if (cudaFree(found->memory) != cudaSuccess) return status_of(kernel.api, kFail, "MCHeads: the card has failed");
    found->memory = nullptr;
    found->bytes = 0;
    if (cudaMalloc(&found->memory, static_cast<size_t>(bytes)) != cudaSuccess) {
      cudaGetLastError();
      return status_of(kernel.api, kFail, "MCHeads: no memory on the card for its workspace");
    }
    found->bytes = bytes;
  }
  *memory = found->memory;
  return nullptr;
}

Status enqueue(Kernel& kernel, mcheads_cuda_model* model, const Tensor& features, float* const* out, void* stream) {
  const int64_t batch = features.shape[0];
  int64_t bytes = 0;
  void* memory = nullptr;
  if (mcheads_cuda_workspace(model, batch, &bytes) != MCHEADS_CUDA_OK) return last_failure(kernel.api);
  if (Status status = workspace_of(kernel, stream, bytes, &memory)) return status;
  const int result = mcheads_cuda_run(model, features.data, MCHEADS_CUDA_FLOAT32, batch, out[0], out[1], out[2], out[3],
                                      out[4], memory, bytes, stream);
  return result == MCHEADS_CUDA_OK ? nullptr : last_failure(kernel.api);
}

Status compute(void* self, void* context) {
  Kernel& kernel = *static_cast<Kernel*>(self);
  Tensor inputs[kInputs];
  for (size_t i = 0; i < kInputs; ++i)
    if (Status status = Call<Status(const void*, size_t, const void**)>::at(kernel.api, Slot::kKernelContextGetInput,
                                                                            context, i, &inputs[i].value))
      return status;
  if (Status status = look_at(kernel.api, kFloat, "features", inputs[kFeatures])) return status;
  if (Status status = look_at_model(kernel.api, inputs)) return status;
  const Tensor &features = inputs[kFeatures], &w = inputs[kWeights];
  int64_t feature_heads = 0;
  float* out[kOutputs];
  void* stream = nullptr;
  if (Status status = heads_of_features(kernel.api, features, w.shape[0], w.shape[2], &feature_heads)) return status;
  if (Status status = make_outputs(kernel.api, context, features.shape[0], w.shape[0], w.shape[1], out)) return status;
  if (Status status = Call<Status(const void*, void**)>::at(kernel.api, Slot::kKernelContextGetGpuComputeStream,
                                                            context, &stream))
    return status;
  if (features.shape[0] == 0) return nullptr;

  const std::lock_guard<std::mutex> lock(kernel.mutex);
  if (!kernel.constant || kernel.feature_heads != feature_heads) {
    // What still runs may use the old model.
    if (cudaStreamSynchronize(static_cast<cudaStream_t>(stream)) != cudaSuccess)
      return status_of(kernel.api, kFail, "MCHeads: the card has failed");
    mcheads_cuda_destroy(kernel.model);
    kernel.model = nullptr;
    kernel.feature_heads = 0;
    if (Status status = pack(kernel, inputs, feature_heads, stream, &kernel.model)) return status;
    kernel.feature_heads = feature_heads;
  }
  if (Status status = enqueue(kernel, kernel.model, features, out, stream)) return status;
  count_operator();
  return nullptr;
}

Status create(const CustomOp* op, Api api, const void* info, void** out) {
  Kernel* kernel = new (std::nothrow) Kernel;
  if (kernel == nullptr) return status_of(api, kFail, "MCHeads: no memory");
  kernel->api = api;
  kernel->arithmetic = static_cast<const Operator*>(op)->arithmetic;
  Status status = Call<Status(const void*, const char*, float*)>::at(api, Slot::kKernelInfoGetAttributeFloat, info,
                                                                     "keep", &kernel->keep);
  for (size_t i = kWeights; status == nullptr && kernel->constant && i < kInputs; ++i) {
    int constant = 0;
    const void* value = nullptr;
    status = Call<Status(const void*, size_t, int*, const void**)>::at(api, Slot::kKernelInfoGetConstantInputTensor,
                                                                       info, i, &constant, &value);
    kernel->constant = constant != 0;
  }
  if (status != nullptr) {
    delete kernel;
    return status;
  }
  *out = kernel;
  return nullptr;
}

void destroy(void* kernel) { delete static_cast<Kernel*>(kernel); }

}  // namespace

Status add_cuda_operator(Api api, void* domain, bool bfloat16, const char* provider) {
  static std::mutex mutex;
  static Operator* first = nullptr;  // for as long as the process lives: sessions keep their addresses
  const std::lock_guard<std::mutex> lock(mutex);
  const int arithmetic = bfloat16 ? MCHEADS_CUDA_BFLOAT16 : MCHEADS_CUDA_FLOAT32;
  Operator* op = first;
  while (op != nullptr && (op->arithmetic != arithmetic || op->provider != provider)) op = op->next;
  if (op == nullptr) {
    op = new (std::nothrow) Operator{};
    if (op == nullptr) return status_of(api, kFail, "MCHeads: no memory");
    describe_inputs(*op);
    op->arithmetic = arithmetic;
    op->provider = provider;
    op->GetExecutionProviderType = [](const CustomOp* self) { return static_cast<const Operator*>(self)->provider; };
    op->KernelDestroy = destroy;
    op->CreateKernelV2 = create;
    op->KernelComputeV2 = compute;
    op->next = first;
    first = op;
  }
  return Call<Status(void*, const CustomOp*)>::at(api, Slot::kCustomOpDomainAdd, domain, op);
}

}  // namespace trivium::ort
