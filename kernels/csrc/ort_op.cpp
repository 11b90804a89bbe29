// ai.trivium::MCHeads for ONNX Runtime's CPU provider.
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#include "error.h"
#include "ort_abi.h"
#include "pack.h"
#include "run.h"

namespace trivium::ort {
namespace {

constexpr size_t kInputs = 5, kOutputs = 5;
enum Input : size_t { kFeatures, kWeights, kBias, kTemperature, kMasks };
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

struct Tensor {
  const void* value;
  int64_t shape[3] = {};
  size_t rank = 0;
  const void* data = nullptr;
};

struct Kernel {
  Api api;
  Settings settings;
  float keep;
  mcheads_model* model = nullptr;  // packed once, where all but the features is constant
};

Status status_of(Api api, int code, const char* line) {
  return Call<Status(int, const char*)>::at(api, Slot::kCreateStatus, code, line);
}

Status last_failure(Api api) { return status_of(api, kFail, last_error()); }

// Fill shape, rank and data of tensor.value; refuses other element types and ranks.
Status look_at(Api api, int element_type, const char* name, Tensor& tensor) {
  void* info = nullptr;
  Status status = Call<Status(const void*, void**)>::at(api, Slot::kGetTensorTypeAndShape, tensor.value, &info);
  if (status != nullptr) return status;
  int type = 0;
  status = Call<Status(const void*, int*)>::at(api, Slot::kGetTensorElementType, info, &type);
  if (status == nullptr)
    status = Call<Status(const void*, size_t*)>::at(api, Slot::kGetDimensionsCount, info, &tensor.rank);
  if (status == nullptr && (type != element_type || tensor.rank < 1 || tensor.rank > 3)) {
    fail(MCHEADS_INVALID, "MCHeads: %s has the wrong type or rank", name);
    status = status_of(api, kInvalidArgument, last_error());
  }
  if (status == nullptr)
    status = Call<Status(const void*, int64_t*, size_t)>::at(api, Slot::kGetDimensions, info, tensor.shape,
                                                             tensor.rank);
  Call<void(void*)>::at(api, Slot::kReleaseTensorTypeAndShapeInfo, info);
  if (status != nullptr) return status;
  void* data = nullptr;
  status = Call<Status(const void*, void**)>::at(api, Slot::kGetTensorMutableData, tensor.value, &data);
  tensor.data = data;
  return status;
}

// Pack a model from the inputs behind the features; `inputs` hold their values.
Status pack_inputs(const Kernel& kernel, Tensor* inputs, mcheads_model** model) {
  static const char* const names[kInputs] = {"features", "weights", "bias", "temperature", "masks"};
  for (size_t i = kWeights; i < kInputs; ++i)
    if (Status status = look_at(kernel.api, i == kMasks ? kUint8 : kFloat, names[i], inputs[i])) return status;
  const Tensor &w = inputs[kWeights], &b = inputs[kBias], &tau = inputs[kTemperature], &m = inputs[kMasks];
  const int64_t heads = w.shape[0], classes = w.shape[1], units = w.shape[2];
  if (w.rank != 3 || b.rank != 2 || tau.rank != 1 || m.rank != 2 || b.shape[0] != heads || b.shape[1] != classes ||
      tau.shape[0] != heads || m.shape[1] != units)
    return status_of(kernel.api, kInvalidArgument, "MCHeads: the shapes of its inputs do not fit together");
  const int result =
      mcheads_create(model, heads, classes, units, m.shape[0], kernel.keep, kernel.settings.weight_type,
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
  const bool shared = features.rank == 2 && features.shape[1] == model.units;
  const bool own = features.rank == 3 && features.shape[1] == heads && features.shape[2] == model.units;
  if (!shared && !own)
    return status_of(kernel.api, kInvalidArgument, "MCHeads: features must be [B, D] or [B, K, D]");
  const int64_t shapes[kOutputs][3] = {{batch, heads, classes}, {batch, heads}, {batch, heads}, {batch, heads, heads},
                                       {batch, heads}};
  const size_t ranks[kOutputs] = {3, 2, 2, 3, 2};
  float* out[kOutputs];
  for (size_t i = 0; i < kOutputs; ++i) {
    void *value = nullptr, *data = nullptr;
    Status status = Call<Status(void*, size_t, const int64_t*, size_t, void**)>::at(
        kernel.api, Slot::kKernelContextGetOutput, context, i, shapes[i], ranks[i], &value);
    if (status == nullptr)
      status = Call<Status(const void*, void**)>::at(kernel.api, Slot::kGetTensorMutableData, value, &data);
    if (status != nullptr) return status;
    out[i] = static_cast<float*>(data);
  }
  if (batch == 0) return nullptr;
  SessionThreads lent = {kernel.api, context};
  Parallel parallel;
  parallel.threads = kernel.settings.threads;
  parallel.run = on_session_threads;
  parallel.self = &lent;
  const int64_t feature_heads = own ? heads : 1;
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

int required(const CustomOp*, size_t) { return 0; }

void describe(Operator& op) {
  op.version = kApiVersion;
  op.GetName = [](const CustomOp*) { return "MCHeads"; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return nullptr; };
  op.GetInputType = [](const CustomOp*, size_t i) { return i == kMasks ? kUint8 : kFloat; };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const CustomOp*) { return kOutputs; };
  op.KernelDestroy = destroy;
  op.GetInputCharacteristic = required;
  op.GetOutputCharacteristic = required;
  op.GetInputMemoryType = required;
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
