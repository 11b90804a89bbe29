// The few slots of ONNX Runtime's C API that the operator needs, declared by hand: no wheel ships the headers.
//
// The API is a table of functions that only ever grows at its end, so a slot's number holds for every later version.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtApiBase {
  const void* const* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

namespace trivium::ort {

constexpr uint32_t kApiVersion = 17;

using Api = const void* const*;
using Status = void*;  // nullptr is success

enum class Slot : int {
  kCreateStatus = 0,
  kCreateCustomOpDomain = 26,
  kCustomOpDomainAdd = 27,
  kAddCustomOpDomain = 28,
  kGetTensorMutableData = 51,
  kGetTensorElementType = 60,
  kGetDimensionsCount = 61,
  kGetDimensions = 62,
  kGetTensorTypeAndShape = 65,
  kKernelInfoGetAttributeFloat = 85,
  kKernelContextGetInput = 90,
  kKernelContextGetOutput = 91,
  kReleaseTensorTypeAndShapeInfo = 99,
  kKernelContextGetGpuComputeStream = 193,
  kHasSessionConfigEntry = 237,
  kGetSessionConfigEntry = 238,
  kKernelInfoGetConstantInputTensor = 249,
  kKernelContextParallelFor = 274,
};

constexpr int kFail = 1, kInvalidArgument = 2;             // OrtErrorCode
constexpr int kFloat = 1, kUint8 = 2;                      // ONNXTensorElementDataType

// Call a slot: call<Result(Arguments...)>(api, slot, arguments...).
template <class Signature>
struct Call;
template <class Result, class... Arguments>
struct Call<Result(Arguments...)> {
  static Result at(Api api, Slot slot, Arguments... arguments) {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[static_cast<int>(slot)]))(arguments...);
  }
};

// OrtCustomOp as of API version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, Api, const void* info);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, void* context);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t);
  int (*GetInputMemoryType)(const CustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status (*CreateKernelV2)(const CustomOp*, Api, const void* info, void** kernel);
  Status (*KernelComputeV2)(void* kernel, void* context);
  Status (*InferOutputShapeFn)(const CustomOp*, void*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
};

}  // namespace trivium::ort
