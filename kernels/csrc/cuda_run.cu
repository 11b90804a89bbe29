// The kernels of a run, and their launches.
#include <algorithm>

#include "cuda_expand.h"
#include "cuda_model.h"
#include "cuda_statistics.h"

using namespace trivium;
using card::fail;
using card::round_up;

namespace {

constexpr int64_t kMaxClusteredHeads = 8;

static_assert(kUnitsPerThread == card::kUnitMultiple);
static_assert(4 * resident_floats(kResidentQuads, kMaxWarps, card::kMaxHeads) <= 48 * 1024,
              "more shared memory would have to be asked for");

using StatisticsKernel = void (*)(StatisticsArguments);

int resident_quads(const mcheads_cuda_model& m) { return m.classes <= resident_row(1) ? 1 : kResidentQuads; }

StatisticsKernel resident_kernel(const mcheads_cuda_model& m) {
  return resident_quads(m) == 1 ? statistics_kernel<1> : statistics_kernel<kResidentQuads>;
}

int resident_warps(const mcheads_cuda_model& m) {
  return static_cast<int>(std::min<int64_t>(kMaxWarps, m.antithetic ? m.passes / 2 : m.passes));
}

int64_t resident_bytes(const mcheads_cuda_model& m) {
  return 4 * resident_floats(resident_quads(m), resident_warps(m), static_cast<int>(m.heads));
}

template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, int threads, int64_t shared_bytes, int cluster,
                   cudaStream_t stream, const Arguments& arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace

bool mcheads_cuda_model::resident() const { return classes <= resident_row(kResidentQuads); }

// Touching the attributes of every kernel here also loads it, so that a first run may already be captured.
int mcheads_cuda_model::load_kernels(int compute_major) {
  cudaFuncAttributes attributes{};
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(expand_kernel<float>)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(expand_kernel<uint16_t>)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(rows_kernel)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(means_kernel)));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(divergence_kernel)));
  if (!resident()) return MCHEADS_CUDA_OK;
  const void* const kernel = reinterpret_cast<const void*>(resident_kernel(*this));
  TRIVIUM_CUDA_TRY(cudaFuncGetAttributes(&attributes, kernel));
  if (compute_major < 9 || heads > kMaxClusteredHeads) return MCHEADS_CUDA_OK;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(heads);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(heads));
  config.blockDim = dim3(static_cast<unsigned>(32 * resident_warps(*this)));
  config.dynamicSmemBytes = static_cast<size_t>(resident_bytes(*this));
  config.attrs = &attribute;
  config.numAttrs = 1;
  int active = 0;
  TRIVIUM_CUDA_TRY(cudaOccupancyMaxActiveClusters(&active, kernel, &config));
  clustered = active > 0;  // a slice of a card may be too small for a cluster
  return MCHEADS_CUDA_OK;
}

int mcheads_cuda_model::run_slab(int stages, const void* features, int type, int64_t batch,
                                 const card::Outputs& outputs, unsigned char* workspace, cudaStream_t stream) {
  const Workspace at = layout(batch);
  float* const poison = reinterpret_cast<float*>(workspace + at.poison);
  if (stages & MCHEADS_CUDA_EXPAND) {
    const ExpandArguments arguments{features,      type,
                                    static_cast<const uint8_t*>(masks),
                                    1.f / keep,    batch,
                                    feature_heads, units,
                                    padded_units,  rows,
                                    workspace + at.operand, poison};
    const int threads = static_cast<int>(std::min<int64_t>(256, round_up(padded_units / kUnitsPerThread, 32)));
    const dim3 grid(static_cast<unsigned>(batch * feature_heads),
                    static_cast<unsigned>((rows + kRowsPerBlock - 1) / kRowsPerBlock));
    const auto kernel = arithmetic == MCHEADS_CUDA_FLOAT32 ? expand_kernel<float> : expand_kernel<uint16_t>;
    TRIVIUM_CUDA_TRY(launch(kernel, grid, threads, 0, 1, stream, arguments));
  }
  if (stages & MCHEADS_CUDA_PRODUCT) {
    const Plan* chosen = nullptr;
    TRIVIUM_TRY(plan(batch, &chosen));
    const float one = 1.f, zero = 0.f;
    void* const logits = workspace + at.logits;
    TRIVIUM_GEMM_TRY(library, library->matmul(gemm, product, &one, weights, chosen->weights, workspace + at.operand,
                                              chosen->operand, &zero, logits, chosen->logits, logits, chosen->logits,
                                              &chosen->algorithm, workspace + at.gemm,
                                              static_cast<size_t>(gemm_bytes), stream));
  }
  if (!(stages & MCHEADS_CUDA_STATISTICS)) return MCHEADS_CUDA_OK;

  StatisticsArguments statistics{};
  statistics.probabilities = outputs.probabilities;
  statistics.predictive_entropy = outputs.predictive_entropy;
  statistics.mutual_information = outputs.mutual_information;
  statistics.divergence = outputs.divergence;
  statistics.energy = outputs.energy;
  statistics.logits = reinterpret_cast<const float*>(workspace + at.logits);
  statistics.bias = static_cast<const float*>(bias);
  statistics.inverse_temperature = static_cast<const float*>(inverse_temperature);
  statistics.poison = poison;
  statistics.heads = static_cast<int>(heads);
  statistics.feature_heads = static_cast<int>(feature_heads);
  statistics.classes = static_cast<int>(classes);
  statistics.stride = static_cast<int>(padded_classes);
  statistics.passes = static_cast<int>(passes);
  statistics.rows = static_cast<int>(rows);
  statistics.antithetic = antithetic;
  statistics.clustered = clustered;
  statistics.pass_energy = resident() ? nullptr : reinterpret_cast<float*>(workspace + at.pass_energy);
  statistics.pass_entropy = resident() ? nullptr : reinterpret_cast<float*>(workspace + at.pass_entropy);
  const unsigned pairs = static_cast<unsigned>(batch * heads);
  const int64_t slot_bytes = 4 * (3 + heads) * kMaxWarps;
  if (resident()) {
    const int warps = resident_warps(*this);
    TRIVIUM_CUDA_TRY(launch(resident_kernel(*this), dim3(pairs), 32 * warps, resident_bytes(*this),
                            clustered ? static_cast<int>(heads) : 1, stream, statistics));
    if (clustered) return MCHEADS_CUDA_OK;
  } else {
    const unsigned leaders = static_cast<unsigned>(antithetic ? passes / 2 : passes);
    const unsigned runs = static_cast<unsigned>((classes + 4 * kMeanThreads - 1) / (4 * kMeanThreads));
    TRIVIUM_CUDA_TRY(launch(rows_kernel, dim3(pairs, leaders), kStreamThreads, slot_bytes, 1, stream, statistics));
    TRIVIUM_CUDA_TRY(launch(means_kernel, dim3(pairs, runs), kMeanThreads, 0, 1, stream, statistics));
  }
  TRIVIUM_CUDA_TRY(launch(divergence_kernel, dim3(pairs), kStreamThreads, slot_bytes, 1, stream, statistics));
  return MCHEADS_CUDA_OK;
}
