// Registers the CUDA operator with ONNX Runtime's CPU provider: the emulated card's memory is the CPU's.
#include <cstdarg>
#include <cstdio>

#include "error.h"
#include "ort_cuda.h"
#include "ort_tensor.h"

namespace {

thread_local char line[512] = "";
int64_t operators = 0;

}  // namespace

namespace trivium {

int fail(int status, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(line, sizeof line, format, values);
  va_end(values);
  return status;
}
const char* last_error() { return line; }
void count_operator() { ++operators; }

}  // namespace trivium

extern "C" __attribute__((visibility("default"))) int64_t emulation_operators() { return operators; }

extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(void* options, const OrtApiBase* base) {
  using namespace trivium::ort;
  const Api api = base->GetApi(kApiVersion);
  static void* domain = nullptr;
  if (domain == nullptr) {
    if (Status s = Call<Status(const char*, void**)>::at(api, Slot::kCreateCustomOpDomain, "ai.trivium", &domain))
      return s;
    if (Status s = add_cuda_operator(api, domain, false, nullptr)) return s;
  }
  return Call<Status(void*, void*)>::at(api, Slot::kAddCustomOpDomain, options, domain);
}
