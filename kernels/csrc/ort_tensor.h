// MCHeads' inputs and outputs as ONNX Runtime hands them over; the same for every execution provider.
#pragma once

#include "ort_abi.h"

namespace trivium::ort {

constexpr size_t kInputs = 5, kOutputs = 5;
enum Input : size_t { kFeatures, kWeights, kBias, kTemperature, kMasks };

struct Tensor {
  const void* value;
  int64_t shape[3] = {};
  size_t rank = 0;
  const void* data = nullptr;
};

Status status_of(Api api, int code, const char* line);

// Fill shape, rank and data of tensor.value; refuses other element types and ranks.
Status look_at(Api api, int element_type, const char* name, Tensor& tensor);

// The same for all inputs behind the features; refuses shapes that do not fit together.
Status look_at_model(Api api, Tensor* inputs);

// 1 for features [B, D], K for [B, K, D]; anything else is refused.
Status heads_of_features(Api api, const Tensor& features, int64_t heads, int64_t units, int64_t* feature_heads);

// The outputs' memory, in the order of HeadStatistics.
Status make_outputs(Api api, void* context, int64_t batch, int64_t heads, int64_t classes, float** out);

// What every provider's operator answers about itself; the rest is left to the caller.
void describe_inputs(CustomOp& op);

}  // namespace trivium::ort
