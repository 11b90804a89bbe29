// Drives the CPU kernels through their C ABI under the address and undefined-behaviour sanitizers (make sanitize).
//
// Every array is a heap block of its exact size, so that a read or write beyond one is found. Beside that it checks
// that a run allocates nothing, that probabilities sum to one, and that threads and batches leave the bits alone.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "mcheads.h"

// Of the sanitizers' runtime; its header is not always installed.
extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*on_malloc)(const volatile void*, size_t),
                                                         void (*on_free)(const volatile void*));

namespace {

std::atomic<long> allocations{0};
int failures = 0;

void expect(bool holds, const char* what, const char* where) {
  if (holds) return;
  std::printf("%s: %s\n", where, what);
  ++failures;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

struct Outputs {
  std::vector<float> probabilities, entropy, information, divergence, energy;

  Outputs(int64_t b, int64_t k, int64_t c)
      : probabilities(b * k * c), entropy(b * k), information(b * k), divergence(b * k * k), energy(b * k) {}
};

struct Case {
  int64_t batch, heads, classes, units, passes;
  double keep;
  bool antithetic, own_features;
  int weight_type, mode;
};

int run(const mcheads_model* model, const Case& c, const float* features, int64_t batch, int64_t threads, Outputs& out) {
  const int64_t feature_heads = c.own_features ? c.heads : 1;
  const int64_t bytes = mcheads_scratch(model, feature_heads, batch, threads);
  const std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, bytes));
  std::memset(scratch.get(), 0xFF, bytes);  // NaN: nothing may be read before it is written
  const long before = allocations;
  const int status = mcheads_run(model, features, feature_heads, batch, out.probabilities.data(), out.entropy.data(),
                                 out.information.data(), out.divergence.data(), out.energy.data(), scratch.get(), bytes,
                                 threads);
  if (threads == 1) expect(allocations == before, "a run allocated memory", "run");
  return status;
}

void check(const Case& c, const char* isa, std::mt19937& random) {
  char name[160];
  std::snprintf(name, sizeof name, "%s B %ld K %ld C %ld D %ld T %ld type %d mode %d", isa, long(c.batch),
                long(c.heads), long(c.classes), long(c.units), long(c.passes), c.weight_type, c.mode);
  std::uniform_real_distribution<float> uniform(-1.f, 1.f);
  std::bernoulli_distribution kept(c.keep);
  std::vector<float> weights(c.heads * c.classes * c.units), bias(c.heads * c.classes), temperature(c.heads, 1.25f);
  std::vector<float> features(c.batch * (c.own_features ? c.heads : 1) * c.units);
  std::vector<uint8_t> masks(c.passes * c.units);
  for (float& x : weights) x = uniform(random) * 8.f / std::sqrt(float(c.units));
  for (float& x : bias) x = uniform(random);
  for (float& x : features) x = uniform(random);
  for (uint8_t& m : masks) m = kept(random);
  if (c.antithetic)
    for (int64_t i = 0; i < c.passes / 2 * c.units; ++i) masks[c.passes / 2 * c.units + i] = 1 - masks[i];

  mcheads_model* model = nullptr;
  const int status =
      mcheads_create(&model, c.heads, c.classes, c.units, c.passes, float(c.keep), c.weight_type, c.mode,
                     weights.data(), bias.data(), temperature.data(), masks.data());
  expect(status == MCHEADS_OK, mcheads_error(), name);
  if (status != MCHEADS_OK) return;
  Outputs whole(c.batch, c.heads, c.classes), threaded(c.batch, c.heads, c.classes), last(1, c.heads, c.classes);
  expect(run(model, c, features.data(), c.batch, 1, whole) == MCHEADS_OK, mcheads_error(), name);
  for (int64_t row = 0; row < c.batch * c.heads; ++row) {
    double sum = 0;
    for (int64_t i = 0; i < c.classes; ++i) sum += whole.probabilities[row * c.classes + i];
    expect(std::fabs(sum - 1) < 1e-4, "probabilities do not sum to one", name);
  }
  expect(run(model, c, features.data(), c.batch, 3, threaded) == MCHEADS_OK, mcheads_error(), name);
  expect(whole.probabilities == threaded.probabilities && whole.divergence == threaded.divergence,
         "threads change the answer", name);
  const int64_t stride = features.size() / c.batch;
  expect(run(model, c, features.data() + (c.batch - 1) * stride, 1, 1, last) == MCHEADS_OK, mcheads_error(), name);
  expect(std::memcmp(last.probabilities.data(), whole.probabilities.data() + (c.batch - 1) * c.heads * c.classes,
                     last.probabilities.size() * sizeof(float)) == 0,
         "the batch changes the answer", name);

  // What no model answers well must still not be undefined.
  const float bad[] = {NAN, INFINITY, -INFINITY, 3e38f, 1e-42f};
  for (float value : bad) {
    features[0] = value;
    expect(run(model, c, features.data(), c.batch, 1, whole) == MCHEADS_OK, mcheads_error(), name);
    if (!std::isfinite(value)) expect(std::isnan(whole.entropy[0]), "a poisoned picture got an answer", name);
  }
  mcheads_destroy(model);
}

}  // namespace

int main() {
  __sanitizer_install_malloc_and_free_hooks([](const volatile void*, size_t) { ++allocations; },
                                            [](const volatile void*) {});
  const std::unique_ptr<int> probe(new int(0));
  expect(allocations > 0, "allocations are not seen", "main");
  int instruction_sets = 0, cases = 0;
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    setenv("TRIVIUM_ISA", isa, 1);
    if (mcheads_default_isa() == nullptr) {
      std::printf("%s: skipped (%s)\n", isa, mcheads_error());
      continue;
    }
    ++instruction_sets;
    std::mt19937 random(1);
    for (int type : {MCHEADS_FLOAT32, MCHEADS_BFLOAT16, MCHEADS_AUTO})
      for (int mode : {MCHEADS_EXACT, MCHEADS_HYBRID})
        for (const Case& shape : {Case{1, 1, 1, 1, 1, 1.0, false, false, 0, 0}, Case{5, 3, 10, 33, 32, .5, true, false, 0, 0},
                                  Case{7, 2, 32, 16, 7, .8, false, true, 0, 0}, Case{3, 4, 33, 65, 64, .5, true, true, 0, 0},
                                  Case{4, 3, 130, 97, 37, .5, false, false, 0, 0},
                                  Case{2, 1, 65, 1100, 12, 1.0, false, false, 0, 0},
                                  Case{1, 2, 200, 300, 128, .5, true, false, 0, 0}}) {
          Case c = shape;
          c.weight_type = type;
          c.mode = mode;
          check(c, isa, random);
          ++cases;
        }
  }
  std::printf("%d cases on %d instruction sets, %d failures\n", cases, instruction_sets, failures);
  return failures != 0;
}
