// Stands in for cuBLASLt: the calls the kernels make, the product by three loops, refusing what cuBLASLt would refuse.
#include <cstdint>
#include <cstring>

namespace {

enum { kOk = 0, kInvalid = 7 };

struct Layout {
  int type;
  uint64_t rows, columns;
  int64_t leading;
  int32_t batch = 1;
  int64_t stride = 0;
};

struct Description {
  int compute, scale;
  int32_t transpose_a = 0;
};

struct Preference {
  uint64_t workspace = 0;
  uint32_t alignment[4] = {256, 256, 256, 256};
};

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

double element(const void* data, int type, int64_t index) {
  if (type == 0) return static_cast<const float*>(data)[index];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[index]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

bool aligned(const void* data, const Layout* layout) {
  const int64_t bytes = layout->type == 0 ? 4 : 2;
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && layout->leading * bytes % 16 == 0 &&
         layout->stride * bytes % 16 == 0;
}

}  // namespace

#define EMULATED extern "C" __attribute__((visibility("default")))

EMULATED size_t cublasLtGetVersion() { return 130000; }
EMULATED const char* cublasLtGetStatusString(int status) { return status == kOk ? "success" : "an invalid value"; }
EMULATED int cublasLtCreate(void** handle) {
  *handle = new int(0);
  return kOk;
}
EMULATED int cublasLtDestroy(void* handle) {
  delete static_cast<int*>(handle);
  return kOk;
}
EMULATED int cublasLtMatmulDescCreate(void** description, int compute, int scale) {
  *description = new Description{compute, scale};
  return compute == 68 && scale == 0 ? kOk : kInvalid;
}
EMULATED int cublasLtMatmulDescSetAttribute(void* description, int attribute, const void* value, size_t bytes) {
  if (attribute != 3 || bytes != 4) return kInvalid;
  std::memcpy(&static_cast<Description*>(description)->transpose_a, value, bytes);
  return kOk;
}
EMULATED int cublasLtMatmulDescDestroy(void* description) {
  delete static_cast<Description*>(description);
  return kOk;
}
EMULATED int cublasLtMatrixLayoutCreate(void** layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
  *layout = new Layout{type, rows, columns, leading};
  return (type == 0 || type == 14) && leading >= static_cast<int64_t>(rows) ? kOk : kInvalid;
}
EMULATED int cublasLtMatrixLayoutSetAttribute(void* layout, int attribute, const void* value, size_t bytes) {
  auto* const target = static_cast<Layout*>(layout);
  if (attribute == 5 && bytes == 4) return std::memcpy(&target->batch, value, 4), kOk;
  if (attribute == 6 && bytes == 8) return std::memcpy(&target->stride, value, 8), kOk;
  return kInvalid;
}
EMULATED int cublasLtMatrixLayoutDestroy(void* layout) {
  delete static_cast<Layout*>(layout);
  return kOk;
}
EMULATED int cublasLtMatmulPreferenceCreate(void** preference) {
  *preference = new Preference;
  return kOk;
}
EMULATED int cublasLtMatmulPreferenceSetAttribute(void* preference, int attribute, const void* value, size_t bytes) {
  auto* const target = static_cast<Preference*>(preference);
  if (attribute == 1 && bytes == 8) return std::memcpy(&target->workspace, value, 8), kOk;
  if (attribute >= 5 && attribute <= 8 && bytes == 4)
    return std::memcpy(&target->alignment[attribute - 5], value, 4), kOk;
  return kInvalid;
}
EMULATED int cublasLtMatmulPreferenceDestroy(void* preference) {
  delete static_cast<Preference*>(preference);
  return kOk;
}
EMULATED int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void* preference, int requested,
                                            Heuristic* results, int* found) {
  if (requested < 1) return kInvalid;
  const auto* const wanted = static_cast<const Preference*>(preference);
  for (uint32_t alignment : wanted->alignment)
    if (alignment > 16) return kInvalid;  // what the kernels promise, and no more
  results[0] = Heuristic{};
  results[0].algorithm[0] = 42;
  results[0].workspace = wanted->workspace;
  *found = 1;
  return kOk;
}
EMULATED int cublasLtMatmul(void*, void* description, const float* alpha, const void* a, const Layout* a_layout,
                            const void* b, const Layout* b_layout, const float* beta, const void* c,
                            const Layout* c_layout, float* d, const Layout* d_layout, const uint64_t* algorithm,
                            void* workspace, size_t workspace_bytes, void*) {
  if (static_cast<Description*>(description)->transpose_a != 1 || *alpha != 1.f || *beta != 0.f || c != d ||
      c_layout != d_layout || d_layout->type != 0 || a_layout->type != b_layout->type || algorithm[0] != 42)
    return kInvalid;
  if (a_layout->rows != b_layout->rows || a_layout->columns != d_layout->rows ||
      b_layout->columns != d_layout->columns || a_layout->batch != d_layout->batch ||
      b_layout->batch != d_layout->batch)
    return kInvalid;
  if (!aligned(a, a_layout) || !aligned(b, b_layout) || !aligned(d, d_layout)) return kInvalid;
  std::memset(workspace, 0x5a, workspace_bytes);  // it belongs to the product, all of it
  for (int64_t batch = 0; batch < d_layout->batch; ++batch)
    for (uint64_t column = 0; column < d_layout->columns; ++column)
      for (uint64_t row = 0; row < d_layout->rows; ++row) {
        double sum = 0.0;
        const int64_t a_first = batch * a_layout->stride + static_cast<int64_t>(row) * a_layout->leading;
        const int64_t b_first = batch * b_layout->stride + static_cast<int64_t>(column) * b_layout->leading;
        for (int64_t i = 0; i < static_cast<int64_t>(a_layout->rows); ++i)
          sum += element(a, a_layout->type, a_first + i) * element(b, b_layout->type, b_first + i);
        d[batch * d_layout->stride + static_cast<int64_t>(column) * d_layout->leading + static_cast<int64_t>(row)] =
            static_cast<float>(sum);
      }
  return kOk;
}
