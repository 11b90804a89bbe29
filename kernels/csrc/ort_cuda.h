// ai.trivium::MCHeads for ONNX Runtime's CUDA provider.
#pragma once

#include "ort_abi.h"

namespace trivium::ort {

// Add the operator to a domain. bfloat16: tensor cores over rounded weights and features, else float32 throughout.
// provider: the execution provider's name; nullptr is the CPU's.
Status add_cuda_operator(Api api, void* domain, bool bfloat16, const char* provider);

}  // namespace trivium::ort
