// Loading cuBLASLt.
#include "cuda_gemm.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <initializer_list>

namespace trivium {
namespace {

struct Loaded {
  CublasLt functions{};
  bool usable = false;
  char problem[400] = "";
};

template <typename Function>
bool find(void* library, const char* name, Function& function, Loaded& loaded) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) std::snprintf(loaded.problem, sizeof loaded.problem, "libcublasLt lacks %s", name);
  return function != nullptr;
}

Loaded load() {
  Loaded loaded;
  const char* const chosen = std::getenv("TRIVIUM_CUBLASLT");
  void* library = nullptr;
  if (chosen != nullptr && *chosen != '\0') {
    library = dlopen(chosen, RTLD_NOW | RTLD_LOCAL);
  } else {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
      if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (library == nullptr) {
    const char* const reason = dlerror();
    std::snprintf(loaded.problem, sizeof loaded.problem,
                  "cuBLASLt 12 or 13 cannot be loaded (%s); install CUDA's cublas, import torch first, or name the "
                  "file in TRIVIUM_CUBLASLT",
                  reason != nullptr ? reason : "no reason given");
    return loaded;
  }
  CublasLt& f = loaded.functions;
  loaded.usable = find(library, "cublasLtGetVersion", f.version, loaded) &&
                  find(library, "cublasLtGetStatusString", f.status_text, loaded) &&
                  find(library, "cublasLtCreate", f.create, loaded) &&
                  find(library, "cublasLtDestroy", f.destroy, loaded) &&
                  find(library, "cublasLtMatmulDescCreate", f.description_create, loaded) &&
                  find(library, "cublasLtMatmulDescSetAttribute", f.description_set, loaded) &&
                  find(library, "cublasLtMatmulDescDestroy", f.description_destroy, loaded) &&
                  find(library, "cublasLtMatrixLayoutCreate", f.layout_create, loaded) &&
                  find(library, "cublasLtMatrixLayoutSetAttribute", f.layout_set, loaded) &&
                  find(library, "cublasLtMatrixLayoutDestroy", f.layout_destroy, loaded) &&
                  find(library, "cublasLtMatmulPreferenceCreate", f.preference_create, loaded) &&
                  find(library, "cublasLtMatmulPreferenceSetAttribute", f.preference_set, loaded) &&
                  find(library, "cublasLtMatmulPreferenceDestroy", f.preference_destroy, loaded) &&
                  find(library, "cublasLtMatmulAlgoGetHeuristic", f.heuristic, loaded) &&
                  find(library, "cublasLtMatmul", f.matmul, loaded);
  // Versions count as 10000 * major from 12 on, 1000 * major before.
  if (loaded.usable && (f.version() < 120000 || f.version() >= 140000)) {
    std::snprintf(loaded.problem, sizeof loaded.problem, "cuBLASLt is version %zu, only 12 and 13 are known",
                  f.version());
    loaded.usable = false;
  }
  return loaded;
}

}  // namespace

const CublasLt* cublaslt(const char** problem) {
  static const Loaded loaded = load();
  *problem = loaded.problem;
  return loaded.usable ? &loaded.functions : nullptr;
}

}  // namespace trivium
