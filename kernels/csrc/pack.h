// What a model is packed from.
#pragma once

#include "model.h"

namespace trivium {

struct Source {
  int64_t heads, classes, units, passes;
  float keep;
  int weight_type, mode;
  const float* weights;
  const float* bias;
  const float* temperature;
  const uint8_t* masks;
};

// Fill a fresh model. Returns an mcheads_status.
int pack(const Source& source, Model& model);

}  // namespace trivium
