/* C ABI of the CPU kernels of MCHeads; the definition of what they compute is kernels/reference.py.
 *
 * B pictures, K heads, C classes, D units, T passes. Arrays are dense, last axis fastest. Functions that return int
 * return an mcheads_status; on anything but MCHEADS_OK, mcheads_error() holds one line about it.
 *
 * mcheads_create packs weights and masks; mcheads_run allocates nothing unless it is asked for more than one thread.
 * Any number of threads may run one model at once, each with a scratch of its own. A picture's answer is the same bit
 * for bit whatever batch, place in the batch and number of threads it is computed with.
 */
#ifndef TRIVIUM_MCHEADS_H
#define TRIVIUM_MCHEADS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define MCHEADS_API __attribute__((visibility("default")))
#else
#define MCHEADS_API
#endif

enum mcheads_status {
  MCHEADS_OK = 0,
  MCHEADS_INVALID = 1, /* an argument out of its range, or an instruction set this machine lacks */
  MCHEADS_MEMORY = 2   /* out of memory */
};

/* How weights are kept; the arithmetic is float32 always. bfloat16 rounds them and halves what must be read from
 * memory; MCHEADS_AUTO takes bfloat16 where every weight is one already, so that nothing is lost, else float32. */
enum mcheads_weights { MCHEADS_FLOAT32 = 0, MCHEADS_BFLOAT16 = 1, MCHEADS_AUTO = 2 };

/* MCHEADS_EXACT computes every logit of every pass. MCHEADS_HYBRID does so for the MCHEADS_TOP likeliest classes of
 * each head and stands the moments of their logits in for the others; where these, each weighed by one plus its
 * variance, hold more than MCHEADS_TAIL of the probability, the picture is computed exactly after all. */
enum mcheads_mode { MCHEADS_EXACT = 0, MCHEADS_HYBRID = 1 };
#define MCHEADS_TOP 32
#define MCHEADS_TAIL 0.5f

typedef struct mcheads_model mcheads_model;

/* What this process has computed so far, over all models. */
typedef struct mcheads_counts {
  uint64_t runs;      /* calls of mcheads_run and of the ONNX Runtime operator */
  uint64_t pictures;  /* pictures in them */
  uint64_t poisoned;  /* pictures answered with NaN */
  uint64_t fallbacks; /* pictures that MCHEADS_HYBRID computed exactly */
  uint64_t operators; /* runs that came from ONNX Runtime */
} mcheads_counts;

/* Pack a model.
 *
 * weights float32 [K, C, D], bias float32 [K, C], temperature float32 [K] (positive), masks uint8 [T, D] of 0 and 1;
 * none is needed after the call. keep in (0, 1]. weight_type: mcheads_weights; mode: mcheads_mode.
 * The environment variable TRIVIUM_ISA (scalar, avx2 or avx512) overrides the choice of the instruction set.
 */
MCHEADS_API int mcheads_create(mcheads_model** model, int64_t heads, int64_t classes, int64_t units, int64_t passes,
                               float keep, int weight_type, int mode, const float* weights, const float* bias,
                               const float* temperature, const uint8_t* masks);

/* Free a model that no thread runs any more. NULL is ignored. */
MCHEADS_API void mcheads_destroy(mcheads_model* model);

/* Bytes of scratch that a run of these arguments needs. */
MCHEADS_API int64_t mcheads_scratch(const mcheads_model* model, int64_t feature_heads, int64_t batch, int64_t threads);

/* The statistics of `batch` pictures.
 *
 * features: float32 [B, D] with feature_heads = 1, or [B, K, D] with feature_heads = K.
 * Outputs, float32: probabilities [B, K, C]; predictive_entropy [B, K], mutual_information [B, K] and divergence
 *   [B, K, K] in nats; energy [B, K]. A picture with a NaN or infinite feature, or whose logits leave float32, gets NaN
 *   in all of them.
 * scratch: mcheads_scratch(model, feature_heads, batch, threads) bytes, aligned to 64; its contents are undefined before and after.
 * threads: how many threads compute, the caller's among them; the others live for this call alone.
 */
MCHEADS_API int mcheads_run(const mcheads_model* model, const float* features, int64_t feature_heads, int64_t batch,
                            float* probabilities, float* predictive_entropy, float* mutual_information,
                            float* divergence, float* energy, void* scratch, int64_t scratch_bytes, int64_t threads);

/* How a model keeps its weights: MCHEADS_FLOAT32 or MCHEADS_BFLOAT16. */
MCHEADS_API int mcheads_weight_type(const mcheads_model* model);

/* The instruction set a model runs with: "scalar", "avx2" or "avx512". */
MCHEADS_API const char* mcheads_isa(const mcheads_model* model);

/* The instruction set that mcheads_create would choose now; NULL, with an mcheads_error(), where TRIVIUM_ISA names one
 * that is unknown or that this machine lacks. */
MCHEADS_API const char* mcheads_default_isa(void);

MCHEADS_API void mcheads_get_counts(mcheads_counts* counts);

/* One line about this thread's last failure; empty before the first. Valid until the thread's next failure. */
MCHEADS_API const char* mcheads_error(void);

struct OrtApiBase;

/* Entry point for ONNX Runtime (SessionOptions.register_custom_ops_library): registers ai.trivium::MCHeads.
 * The session's configuration entries trivium.mcheads.weights (float32, bfloat16 or auto, the default),
 * trivium.mcheads.mode (exact, the default, or hybrid) and trivium.mcheads.threads (1 by default) must be set before. Returns an OrtStatus*, NULL for success. */
MCHEADS_API void* RegisterCustomOps(void* session_options, const struct OrtApiBase* base);

#ifdef __cplusplus
}
#endif

#endif
