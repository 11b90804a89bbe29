// Running a packed model over a batch.
#pragma once

#include "model.h"

namespace trivium {

// Who computes the parts of a run: `run` calls task(context, i) for each i below `tasks` and returns when all are done.
struct Parallel {
  int64_t threads = 1;
  void (*run)(void* self, int64_t tasks, void (*task)(void* context, size_t index), void* context) = nullptr;
  void* self = nullptr;
};

struct Statistics {
  float* probabilities;
  float* predictive_entropy;
  float* mutual_information;
  float* divergence;
  float* energy;
};

int64_t scratch_bytes(const Model& model, int64_t feature_heads, int64_t batch, int64_t threads);

// scratch: scratch_bytes(...) bytes, aligned to kAlignment.
void run(const Model& model, const float* features, int64_t feature_heads, int64_t batch, const Statistics& out,
         void* scratch, const Parallel& parallel);

void count_operator();
mcheads_counts counts();

}  // namespace trivium
