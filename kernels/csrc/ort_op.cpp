// ai.trivium::MCHeads for ONNX Runtime's CPU provider.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "error.h"
#include "ort_abi.h"
#include "ort_tensor.h"
#include "pack.h"
#include "run.h"
#if defined(TRIVIUM_CUDA)
#include "mcheads_cuda.h"
#include "ort_cuda.h"
#endif

namespace trivium::ort {
namespace {

constexpr int64_t kMaxThreads = 256;

struct Settings {
  int weight_type = MCHEADS_AUTO;
  int mode = MCHEADS_EXACT;
  int64_t threads = 1;

  bool operator==(const Settings& o) const {
    return weight_type == o.weight_type && mode == o.mode && threads == o.threads;
  }
};

// One of each kind of settings, for as long as the process lives: a session keeps the address of its operators.
struct Operator : CustomOp {
  Settings settings;
  void* domain = nullptr;
  Operator* next = nullptr;
};

struct Kernel {
  Api api;
  Settings settings;
  float keep;
  mcheads_model* model = nullptr;  // packed once, where all but the features is constant
};

Status last_failure(Api api) { return status_of(api, kFail, last_error()); }

// Pack a model from the inputs behind the features; `inputs` hold their values.
Status pack_inputs(const Kernel& kernel, Tensor* inputs, mcheads_model** model) {
  if (Status status = look_at_model(kernel.api, inputs)) return status;
  const Tensor &w = inputs[kWeights], &b = inputs[kBias], &tau = inputs[kTemperature], &m = inputs[kMasks];
  const int result =
      mcheads_create(model, w.shape[0], w.shape[1], w.shape[2], m.shape[0], kernel.keep, kernel.settings.weight_type,
                     kernel.settings.mode, static_cast<const float*>(w.data), static_cast<const float*>(b.data),
                     static_cast<const float*>(tau.data), static_cast<const uint8_t*>(m.data));
  return result == MCHEADS_OK ? nullptr : last_failure(kernel.api);
}

Status create(const CustomOp* op, Api api, const void* info, void** out) {
  Kernel* kernel = new (std::nothrow) Kernel;
  if (kernel == nullptr) return status_of(api, kFail, "MCHeads: no memory");
  kernel->api = api;
  kernel->settings = static_cast<const Operator*>(op)->settings;
  *out = kernel;
  Status status = Call<Status(const void*, const char*, float*)>::at(api, Slot::kKernelInfoGetAttributeFloat, info,
                                                                     "keep", &kernel->keep);
  Tensor inputs[kInputs];
  bool constant = true;
  for (size_t i = kWeights; status == nullptr && constant && i < kInputs; ++i) {
    int is_constant = 0;
    status = Call<Status(const void*, size_t, int*, const void**)>::at(api, Slot::kKernelInfoGetConstantInputTensor,
                                                                       info, i, &is_constant, &inputs[i].value);
    constant = is_constant != 0;
  }
  if (status == nullptr && constant) status = pack_inputs(*kernel, inputs, &kernel->model);
  if (status != nullptr) {
    delete kernel;
    *out = nullptr;
  }
  return status;
}

void destroy(void* kernel) {
  mcheads_destroy(static_cast<Kernel*>(kernel)->model);
  delete static_cast<Kernel*>(kernel);
}

// Scratch of this thread; grows and never shrinks.
void* scratch_of_thread(int64_t bytes) {
  struct Buffer {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(memory); }
  };
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    std::free(buffer.memory);
    buffer.memory = std::aligned_alloc(kAlignment, static_cast<size_t>((bytes + kAlignment - 1) / kAlignment * kAlignment));
    buffer.bytes = buffer.memory == nullptr ? 0 : bytes;
  }
  return buffer.memory;
}

struct SessionThreads {
  Api api;
  void* context;
};

// The session's own threads; should it fail to lend them, the work is done here.
void on_session_threads(void* self, int64_t tasks, void (*task)(void*, size_t), void* context) {
  const SessionThreads& threads = *static_cast<SessionThreads*>(self);
  const Status status = Call<Status(const void*, void (*)(void*, size_t), size_t, size_t, void*)>::at(
      threads.api, Slot::kKernelContextParallelFor, threads.context, task, static_cast<size_t>(tasks), 0, context);
  if (status != nullptr)
    for (int64_t i = 0; i < tasks; ++i) task(context, static_cast<size_t>(i));
}

Status compute_with(const Kernel& kernel, const mcheads_model& model, const Tensor& features, void* context) {
  const int64_t batch = features.shape[0], heads = model.heads, classes = model.classes;
  int64_t feature_heads = 0;
  float* out[kOutputs];
  if (Status status = heads_of_features(kernel.api, features, heads, model.units, &feature_heads)) return status;
  if (Status status = make_outputs(kernel.api, context, batch, heads, classes, out)) return status;
  if (batch == 0) return nullptr;
  SessionThreads lent = {kernel.api, context};
  Parallel parallel;
  parallel.threads = kernel.settings.threads;
  parallel.run = on_session_threads;
  parallel.self = &lent;
  void* scratch = scratch_of_thread(scratch_bytes(model, feature_heads, batch, parallel.threads));
  if (scratch == nullptr) return status_of(kernel.api, kFail, "MCHeads: no memory for its scratch");
  run(model, static_cast<const float*>(features.data), feature_heads, batch, {out[0], out[1], out[2], out[3], out[4]},
      scratch, parallel);
  count_operator();
  return nullptr;
}

Status compute(void* self, void* context) {
  const Kernel& kernel = *static_cast<Kernel*>(self);
  Tensor inputs[kInputs];
  for (size_t i = 0; i < (kernel.model == nullptr ? kInputs : 1); ++i)
    if (Status status = Call<Status(const void*, size_t, const void**)>::at(kernel.api, Slot::kKernelContextGetInput,
                                                                            context, i, &inputs[i].value))
      return status;
  if (Status status = look_at(kernel.api, kFloat, "features", inputs[kFeatures])) return status;
  if (kernel.model != nullptr) return compute_with(kernel, *kernel.model, inputs[kFeatures], context);
  mcheads_model* model = nullptr;
  if (Status status = pack_inputs(kernel, inputs, &model)) return status;
  const Status status = compute_with(kernel, *model, inputs[kFeatures], context);
  mcheads_destroy(model);
  return status;
}

void describe(Operator& op) {
  describe_inputs(op);
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.KernelDestroy = destroy;
  op.CreateKernelV2 = create;
  op.KernelComputeV2 = compute;
}

// A session's configuration entry; false where there is none.
Status entry_of(Api api, const void* options, const char* key, char* value, size_t size, bool& found) {
  int has = 0;
  Status status = Call<Status(const void*, const char*, int*)>::at(api, Slot::kHasSessionConfigEntry, options, key,
                                                                   &has);
  found = status == nullptr && has != 0;
  if (!found) return status;
  return Call<Status(const void*, const char*, char*, size_t*)>::at(api, Slot::kGetSessionConfigEntry, options, key,
                                                                    value, &size);
}

// The number of the word that an entry holds, or a refusal that lists `words`.
template <int kWords>
Status choice_of(Api api, const void* options, const char* key, const char* const (&words)[kWords], const char* list,
                 int& choice) {
  char value[32] = "";
  bool found = false;
  if (Status status = entry_of(api, options, key, value, sizeof value, found)) return status;
  if (!found) return nullptr;
  for (int i = 0; i < kWords; ++i)
    if (std::strcmp(value, words[i]) == 0) {
      choice = i;
      return nullptr;
    }
  fail(MCHEADS_INVALID, "%s must be %s, got %s", key, list, value);
  return status_of(api, kInvalidArgument, last_error());
}

Status read_settings(Api api, const void* options, Settings& settings) {
  static const char* const types[] = {"float32", "bfloat16", "auto"};
  static const char* const modes[] = {"exact", "hybrid"};
  if (Status status = choice_of(api, options, "trivium.mcheads.weights", types, "float32, bfloat16 or auto",
                                settings.weight_type))
    return status;
  if (Status status = choice_of(api, options, "trivium.mcheads.mode", modes, "exact or hybrid", settings.mode))
    return status;
  char value[32] = "";
  bool found = false;
  if (Status status = entry_of(api, options, "trivium.mcheads.threads", value, sizeof value, found)) return status;
  if (!found) return nullptr;
  char* end = nullptr;
  settings.threads = std::strtoll(value, &end, 10);
  if (end != value && *end == '\0' && settings.threads >= 1 && settings.threads <= kMaxThreads) return nullptr;
  fail(MCHEADS_INVALID, "trivium.mcheads.threads must be 1 to %d, got %s", static_cast<int>(kMaxThreads), value);
  return status_of(api, kInvalidArgument, last_error());
}

Status operator_for(Api api, const Settings& settings, Operator** out) {
  static std::mutex mutex;
  static Operator* first = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  for (Operator* op = first; op != nullptr; op = op->next)
    if (op->settings == settings) {
      *out = op;
      return nullptr;
    }
  Operator* op = new (std::nothrow) Operator{};
  if (op == nullptr) return status_of(api, kFail, "MCHeads: no memory");
  op->settings = settings;
  describe(*op);
  Status status =
      Call<Status(const char*, void**)>::at(api, Slot::kCreateCustomOpDomain, "ai.trivium", &op->domain);
  if (status == nullptr)
    status = Call<Status(void*, const CustomOp*)>::at(api, Slot::kCustomOpDomainAdd, op->domain, op);
#if defined(TRIVIUM_CUDA)
  if (status == nullptr && mcheads_cuda_devices() > 0)
    status = add_cuda_operator(api, op->domain, settings.weight_type == MCHEADS_BFLOAT16, "CUDAExecutionProvider");
#endif
  if (status != nullptr) {
    delete op;
    return status;
  }
  op->next = first;
  first = op;
  *out = op;
  return nullptr;
}

}  // namespace
}  // namespace trivium::ort

void* RegisterCustomOps(void* session_options, const OrtApiBase* base) {
  using namespace trivium;
  using namespace trivium::ort;
  const char* version = base->GetVersionString();
  const bool known = version != nullptr && std::strncmp(version, "1.", 2) == 0;
  const Api api = known ? base->GetApi(kApiVersion) : nullptr;
  if (api == nullptr) {
    // Slot 0 of any version of the interface makes a status.
    const Api oldest = base->GetApi(1);
    fail(MCHEADS_INVALID, "MCHeads knows ONNX Runtime 1.17 and later 1.x, not %.40s", version ? version : "this one");
    return oldest == nullptr ? nullptr : status_of(oldest, kFail, last_error());
  }
  Settings settings;
  if (Status status = read_settings(api, session_options, settings)) return status;
  Operator* op = nullptr;
  if (Status status = operator_for(api, settings, &op)) return status;
  return Call<Status(void*, void*)>::at(api, Slot::kAddCustomOpDomain, session_options, op->domain);
}
