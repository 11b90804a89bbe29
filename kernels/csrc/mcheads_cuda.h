/* C ABI of the CUDA kernels of MCHeads; the definition of what they compute is kernels/reference.py.
 *
 * B pictures, K heads, C classes, D units, T passes. Arrays are dense, last axis fastest. Every function returns an
 * mcheads_cuda_status; on anything but MCHEADS_CUDA_OK, mcheads_cuda_error() holds one line about it.
 *
 * mcheads_cuda_create allocates, copies and synchronises; mcheads_cuda_run does neither: per slab of pictures it
 * enqueues two to four kernels and one matrix product on the caller's stream, and may be captured in a CUDA graph. Any
 * number of threads may run one model at once, each with a workspace of its own. The device that is current at creation
 * is the model's device and must be current whenever it runs.
 */
#ifndef TRIVIUM_MCHEADS_CUDA_H
#define TRIVIUM_MCHEADS_CUDA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MCHEADS_CUDA_API __attribute__((visibility("default")))
#else
#define MCHEADS_CUDA_API
#endif

enum mcheads_cuda_status {
  MCHEADS_CUDA_OK = 0,
  MCHEADS_CUDA_INVALID = 1,   /* an argument out of its range */
  MCHEADS_CUDA_NO_DEVICE = 2, /* no usable card, or one older than compute capability 8.0 */
  MCHEADS_CUDA_NO_CUBLAS = 3, /* libcublasLt cannot be loaded */
  MCHEADS_CUDA_MEMORY = 4,    /* out of host or device memory */
  MCHEADS_CUDA_FAILED = 5     /* the CUDA runtime or cuBLASLt reported an error */
};

enum mcheads_cuda_type { MCHEADS_CUDA_FLOAT32 = 0, MCHEADS_CUDA_FLOAT16 = 1, MCHEADS_CUDA_BFLOAT16 = 2 };

enum mcheads_cuda_stage {
  MCHEADS_CUDA_EXPAND = 1,     /* features x masks / keep */
  MCHEADS_CUDA_PRODUCT = 2,    /* the logits, by cuBLASLt */
  MCHEADS_CUDA_STATISTICS = 4, /* softmax, means, entropies, divergences */
  MCHEADS_CUDA_ALL = 7
};

typedef struct mcheads_cuda_model mcheads_cuda_model;

/* Number of CUDA devices of compute capability 8.0 or newer that this process can use; 0 where there is no driver. */
MCHEADS_CUDA_API int mcheads_cuda_devices(void);

/* Pack a model onto the current device.
 *
 * feature_heads: 1 where all heads share features [B, D], K where each owns its own in [B, K, D].
 * arithmetic: MCHEADS_CUDA_BFLOAT16 rounds weights and scaled features to bfloat16 for the tensor cores and adds in
 *   float32; MCHEADS_CUDA_FLOAT32 multiplies in float32 as well (never TF32).
 * weights float32 [K, C, D], bias float32 [K, C], temperature float32 [K], masks uint8 [T, D] of 0 and 1: host or
 *   device memory, read in the order of `stream` before this returns and not needed afterwards.
 * keep in (0, 1]; 1 <= K <= 64; C, D, T >= 1.
 * stream: a cudaStream_t (NULL is the default stream) that is not being captured.
 */
MCHEADS_CUDA_API int mcheads_cuda_create(mcheads_cuda_model** model, int64_t heads, int64_t feature_heads,
                                         int64_t classes, int64_t units, int64_t passes, float keep, int arithmetic,
                                         const float* weights, const float* bias, const float* temperature,
                                         const uint8_t* masks, void* stream);

/* Free the model; no run of it may still be on its way. NULL is ignored. */
MCHEADS_CUDA_API int mcheads_cuda_destroy(mcheads_cuda_model* model);

/* Bytes of device memory, aligned to 256, that a run over `batch` pictures needs as its workspace. */
MCHEADS_CUDA_API int mcheads_cuda_workspace(const mcheads_cuda_model* model, int64_t batch, int64_t* bytes);

/* Enqueue the statistics of `batch` pictures on `stream`.
 *
 * features: device memory of feature_type, [B, D] or [B, K, D] as feature_heads says.
 * Outputs, float32 in device memory: probabilities [B, K, C]; predictive_entropy [B, K], mutual_information [B, K],
 *   divergence [B, K, K] in nats; energy [B, K]. A picture with a NaN or infinite feature gets NaN in all of them.
 * workspace: at least mcheads_cuda_workspace(model, batch) bytes; its contents are undefined before and after.
 * The first run of a batch size asks cuBLASLt for an algorithm and keeps the answer; do it before capturing if the
 * time of the capture matters.
 */
MCHEADS_CUDA_API int mcheads_cuda_run(mcheads_cuda_model* model, const void* features, int feature_type, int64_t batch,
                                      float* probabilities, float* predictive_entropy, float* mutual_information,
                                      float* divergence, float* energy, void* workspace, int64_t workspace_bytes,
                                      void* stream);

/* The same, but only the stages of the bit mask: for timing one alone after a whole run with the same workspace. A
 * batch whose workspace is that of a smaller one runs in slabs, which share it: stages alone mean nothing there. */
MCHEADS_CUDA_API int mcheads_cuda_run_stages(mcheads_cuda_model* model, int stages, const void* features,
                                             int feature_type, int64_t batch, float* probabilities,
                                             float* predictive_entropy, float* mutual_information, float* divergence,
                                             float* energy, void* workspace, int64_t workspace_bytes, void* stream);

/* One line about this thread's last failure; empty before the first. Valid until the thread's next failure. */
MCHEADS_CUDA_API const char* mcheads_cuda_error(void);

#ifdef __cplusplus
}
#endif

#endif
