// The C ABI: arguments checked, the instruction set chosen, threads lent for a call.
#include "mcheads.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <system_error>
#include <thread>

#include "error.h"
#include "pack.h"
#include "run.h"

namespace trivium {
namespace {

constexpr int64_t kMaxThreads = 256;
thread_local char error_line[256] = "";

bool supported(const char* isa) {
  if (std::strcmp(isa, "scalar") == 0) return true;
#if defined(TRIVIUM_X86)
  __builtin_cpu_init();
  if (std::strcmp(isa, "avx2") == 0) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (std::strcmp(isa, "avx512") == 0) return __builtin_cpu_supports("avx512f");
#endif
  return false;
}

const CpuKernels* kernels_of(const char* isa) {
#if defined(TRIVIUM_X86)
  if (std::strcmp(isa, "avx512") == 0) return avx512_kernels();
  if (std::strcmp(isa, "avx2") == 0) return avx2_kernels();
#endif
  return std::strcmp(isa, "scalar") == 0 ? scalar_kernels() : nullptr;
}

struct Work {
  std::atomic<int64_t> next{0};
  int64_t tasks;
  void (*task)(void*, size_t);
  void* context;

  void drain() {
    for (int64_t i = next++; i < tasks; i = next++) task(context, static_cast<size_t>(i));
  }
};

// self points to the number of threads. Where the system lends fewer threads, those there are do all the work.
void on_threads(void* self, int64_t tasks, void (*task)(void*, size_t), void* context) {
  int64_t helpers = *static_cast<const int64_t*>(self) - 1;
  if (helpers > tasks - 1) helpers = tasks - 1;
  Work work;
  work.tasks = tasks;
  work.task = task;
  work.context = context;
  std::thread team[kMaxThreads];
  int64_t started = 0;
  try {
    for (; started < helpers; ++started) team[started] = std::thread([&work] { work.drain(); });
  } catch (const std::system_error&) {
    helpers = started;
  }
  work.drain();
  for (int64_t i = 0; i < started; ++i) team[i].join();
}

}  // namespace

int fail(int status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_line, sizeof error_line, format, arguments);
  va_end(arguments);
  return status;
}

const char* last_error() { return error_line; }

const CpuKernels* choose_kernels() {
  const char* wanted = std::getenv("TRIVIUM_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    const CpuKernels* kernels = kernels_of(wanted);
    if (kernels == nullptr) {
      fail(MCHEADS_INVALID, "TRIVIUM_ISA: no kernels for %.40s in this build", wanted);
      return nullptr;
    }
    if (!supported(wanted)) {
      fail(MCHEADS_INVALID, "TRIVIUM_ISA: this machine has no %s", wanted);
      return nullptr;
    }
    return kernels;
  }
  for (const char* isa : {"avx512", "avx2"})
    if (supported(isa)) return kernels_of(isa);
  return scalar_kernels();
}

}  // namespace trivium

using namespace trivium;

int mcheads_create(mcheads_model** model, int64_t heads, int64_t classes, int64_t units, int64_t passes, float keep,
                   int weight_type, int mode, const float* weights, const float* bias, const float* temperature,
                   const uint8_t* masks) {
  if (model == nullptr || weights == nullptr || bias == nullptr || temperature == nullptr || masks == nullptr)
    return fail(MCHEADS_INVALID, "an argument is NULL");
  mcheads_model* fresh = new (std::nothrow) mcheads_model;
  if (fresh == nullptr) return fail(MCHEADS_MEMORY, "no memory for a model");
  const Source source = {heads, classes, units, passes, keep, weight_type, mode, weights, bias, temperature, masks};
  const int status = pack(source, *fresh);
  if (status != MCHEADS_OK) {
    delete fresh;
    return status;
  }
  *model = fresh;
  return MCHEADS_OK;
}

void mcheads_destroy(mcheads_model* model) { delete model; }

int64_t mcheads_scratch(const mcheads_model* model, int64_t feature_heads, int64_t batch, int64_t threads) {
  return scratch_bytes(*model, feature_heads, batch, threads);
}

int mcheads_run(const mcheads_model* model, const float* features, int64_t feature_heads, int64_t batch,
                float* probabilities, float* predictive_entropy, float* mutual_information, float* divergence,
                float* energy, void* scratch, int64_t scratch_bytes, int64_t threads) {
  if (model == nullptr) return fail(MCHEADS_INVALID, "an argument is NULL");
  if (batch < 0) return fail(MCHEADS_INVALID, "batch must not be negative");
  if (feature_heads != 1 && feature_heads != model->heads)
    return fail(MCHEADS_INVALID, "features of %lld heads for a model of %lld", static_cast<long long>(feature_heads),
                static_cast<long long>(model->heads));
  if (threads < 1 || threads > kMaxThreads)
    return fail(MCHEADS_INVALID, "threads must be 1 to %d", static_cast<int>(kMaxThreads));
  if (batch == 0) return MCHEADS_OK;
  if (features == nullptr || probabilities == nullptr || predictive_entropy == nullptr ||
      mutual_information == nullptr || divergence == nullptr || energy == nullptr || scratch == nullptr)
    return fail(MCHEADS_INVALID, "an argument is NULL");
  if (reinterpret_cast<uintptr_t>(scratch) % kAlignment != 0)
    return fail(MCHEADS_INVALID, "scratch must be aligned to %d bytes", static_cast<int>(kAlignment));
  if (scratch_bytes < mcheads_scratch(model, feature_heads, batch, threads))
    return fail(MCHEADS_INVALID, "scratch is too small");
  Parallel parallel;
  parallel.threads = threads;
  parallel.run = on_threads;
  parallel.self = &threads;
  run(*model, features, feature_heads, batch,
      {probabilities, predictive_entropy, mutual_information, divergence, energy}, scratch, parallel);
  return MCHEADS_OK;
}

int mcheads_weight_type(const mcheads_model* model) { return model->bfloat16 ? MCHEADS_BFLOAT16 : MCHEADS_FLOAT32; }

const char* mcheads_isa(const mcheads_model* model) { return model->kernels->name; }

const char* mcheads_default_isa(void) {
  const CpuKernels* kernels = choose_kernels();
  return kernels == nullptr ? nullptr : kernels->name;
}

void mcheads_get_counts(mcheads_counts* out) { *out = counts(); }

const char* mcheads_error(void) { return last_error(); }
