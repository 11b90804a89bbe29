// Reading and making the tensors of MCHeads through ONNX Runtime's C API.
#include "ort_tensor.h"

#include "error.h"
#include "mcheads.h"

namespace trivium::ort {

Status status_of(Api api, int code, const char* line) {
  return Call<Status(int, const char*)>::at(api, Slot::kCreateStatus, code, line);
}

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

Status look_at_model(Api api, Tensor* inputs) {
  static const char* const names[kInputs] = {"features", "weights", "bias", "temperature", "masks"};
  for (size_t i = kWeights; i < kInputs; ++i)
    if (Status status = look_at(api, i == kMasks ? kUint8 : kFloat, names[i], inputs[i])) return status;
  const Tensor &w = inputs[kWeights], &b = inputs[kBias], &tau = inputs[kTemperature], &m = inputs[kMasks];
  const int64_t heads = w.shape[0], classes = w.shape[1], units = w.shape[2];
  if (w.rank != 3 || b.rank != 2 || tau.rank != 1 || m.rank != 2 || b.shape[0] != heads || b.shape[1] != classes ||
      tau.shape[0] != heads || m.shape[1] != units)
    return status_of(api, kInvalidArgument, "MCHeads: the shapes of its inputs do not fit together");
  return nullptr;
}

Status heads_of_features(Api api, const Tensor& features, int64_t heads, int64_t units, int64_t* feature_heads) {
  const bool shared = features.rank == 2 && features.shape[1] == units;
  const bool own = features.rank == 3 && features.shape[1] == heads && features.shape[2] == units;
  if (!shared && !own) return status_of(api, kInvalidArgument, "MCHeads: features must be [B, D] or [B, K, D]");
  *feature_heads = own ? heads : 1;
  return nullptr;
}

Status make_outputs(Api api, void* context, int64_t batch, int64_t heads, int64_t classes, float** out) {
  const int64_t shapes[kOutputs][3] = {{batch, heads, classes}, {batch, heads}, {batch, heads}, {batch, heads, heads},
                                       {batch, heads}};
  const size_t ranks[kOutputs] = {3, 2, 2, 3, 2};
  for (size_t i = 0; i < kOutputs; ++i) {
    void *value = nullptr, *data = nullptr;
    Status status = Call<Status(void*, size_t, const int64_t*, size_t, void**)>::at(
        api, Slot::kKernelContextGetOutput, context, i, shapes[i], ranks[i], &value);
    if (status == nullptr)
      status = Call<Status(const void*, void**)>::at(api, Slot::kGetTensorMutableData, value, &data);
    if (status != nullptr) return status;
    out[i] = static_cast<float*>(data);
  }
  return nullptr;
}

void describe_inputs(CustomOp& op) {
  const auto required = [](const CustomOp*, size_t) { return 0; };
  op.version = kApiVersion;
  op.GetName = [](const CustomOp*) { return "MCHeads"; };
  op.GetInputType = [](const CustomOp*, size_t i) { return i == kMasks ? kUint8 : kFloat; };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetOutputType = [](const CustomOp*, size_t) { return kFloat; };
  op.GetOutputTypeCount = [](const CustomOp*) { return kOutputs; };
  op.GetInputCharacteristic = required;
  op.GetOutputCharacteristic = required;
  op.GetInputMemoryType = required;
}

}  // namespace trivium::ort
