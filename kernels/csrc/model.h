// A packed MCHeads model, the work of one run, and the table of kernels that an instruction set provides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "mcheads.h"
#include "rows.h"

namespace trivium {

constexpr int kMaxPicturesAtOnce = 4;
// Passes whose masks are looked at together: a feature enters one of 2^k sums by its pattern over k passes.
constexpr int kMaxGroupPasses = 6;
// Rows that may be added up one after the other: rounding grows with their number.
constexpr int64_t kLongestChain = 256;
constexpr int kMinBlock = 32, kMaxBlock = 64;
constexpr size_t kAlignment = 64;
// Floats between logit rows beyond their length: rows at multiples of 4096 bytes would share one cache set.
constexpr int64_t kRowPadding = 16;
// The logit of a padding class.
constexpr float kNoClass = -1e30f;

// Aligned numbers that live as long as the model. Inlined always: see cpu_kernels.h for why.
template <class T>
class Array {
 public:
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(); }

  // False where there is no memory. The items are zero.
  bool resize(int64_t count);
  TRIVIUM_ROW T* data() const { return items_; }
  TRIVIUM_ROW T& operator[](int64_t i) const { return items_[i]; }

 private:
  void release();

  T* items_ = nullptr;
  void* mapped_ = nullptr;  // of large arrays, the mapping in which the items lie
  size_t mapped_bytes_ = 0;
};

// Consecutive passes and the packed rows sorted by their units' mask pattern over them; rows of one pattern keep their
// order. Rows themselves are in the order of the first group.
struct Group {
  int64_t first_pass = 0;
  int passes = 0;
  Array<int32_t> offsets;  // [2^passes + 1], where a pattern's rows begin
  Array<int32_t> rows;     // [D]
  Array<int32_t> sums;     // [D], by row: where the row's sum begins, pattern * block
};

struct CpuKernels;

// Weights lie in blocks of `block` classes, a row of them per unit, rows sorted by the first group's patterns. Word i
// of a 32-class line of bfloat16 holds classes i and i + 16.
struct Model {
  const CpuKernels* kernels = nullptr;
  int64_t heads = 0, classes = 0, units = 0, passes = 0;
  int64_t block = 0;           // classes in a block, 32 or 64
  int64_t blocks = 0;          // of one head
  int64_t padded = 0;          // classes rounded up to whole blocks
  int64_t grouped_passes = 0;  // passes whose logits are summed; the antithetic half follows by subtraction
  bool antithetic = false;
  bool short_chains = true;  // no pattern of any group but the first has more rows than kLongestChain
  bool bfloat16 = false;
  bool hybrid = false;
  int64_t group_count = 0;
  Array<Group*> groups;
  Array<int32_t> units_of_rows;  // [D]
  Array<char> weights;  // [K * blocks][D][block]
  Array<float> bias;    // [K][padded], over temperature; far below every logit where there is no class
  Array<float> scale;   // [K], 1 / (keep * temperature)

  // Hybrid alone.
  int64_t padded_units = 0;   // units rounded up to whole lines of 32
  Array<char> class_rows;     // [K * C][padded_units], in the lines of a packed row
  Array<float> pass_masks;    // [grouped_passes][padded_units]
  Array<float> kept;          // [D] by packed row, the mean of the unit's masks

  ~Model();
};

// A slab of pictures on its way through the kernels.
struct Slab {
  const Model* model;
  const float* features;  // first picture's
  int64_t feature_heads;
  int pictures;
  int64_t first_head, head_count;  // whose logits are held
  float* packed;       // [feature_heads][pictures][D], features in the order of packed rows
  float* logits;       // [pictures][head_count][T][padded + kRowPadding]
  float* mean;         // [pictures][K][padded]
  float* log_mean;     // [pictures][K][padded]
  float* moments;      // hybrid: [pictures][K][2][padded], mean and variance of each logit
  float* masked;       // hybrid: [pictures][feature_heads][grouped_passes + 1][padded_units], at last h itself
  bool* poisoned;      // [pictures][K]
  bool* heavy_tail;    // [pictures][K]
  float* probabilities;  // outputs, first picture's
  float* predictive_entropy;
  float* mutual_information;
  float* divergence;
  float* energy;

  int64_t row_stride() const { return model->padded + kRowPadding; }
};

struct CpuKernels {
  const char* name;
  // The logits of block `index` (counted over all heads) for all pictures of the slab and all passes.
  void (*logits)(const Slab&, int64_t index);
  // One picture's and one head's mean probabilities and statistics from its logits.
  void (*statistics)(const Slab&, int picture, int64_t head);
  // One picture's divergences between heads.
  void (*divergences)(const Slab&, int picture);
  // Hybrid: mean and variance over passes of the logits of block `index`; then one picture's head from them.
  void (*moments)(const Slab&, int64_t index);
  void (*hybrid)(const Slab&, int picture, int64_t head);
};

const CpuKernels* scalar_kernels();
#if defined(TRIVIUM_X86)
const CpuKernels* avx2_kernels();
const CpuKernels* avx512_kernels();
#endif

// The kernels that TRIVIUM_ISA or the machine chooses; nullptr, with the error set, where TRIVIUM_ISA asks in vain.
const CpuKernels* choose_kernels();

}  // namespace trivium

struct mcheads_model : trivium::Model {};
