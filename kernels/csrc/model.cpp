// Packing a model: antithetic masks found, features sorted by mask pattern, weights laid out in blocks.
#include "model.h"

#include <cmath>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "error.h"
#include "pack.h"

namespace trivium {
namespace {

constexpr size_t kHugePage = 2 << 20;

size_t rounded_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

template <class T>
bool Array<T>::resize(int64_t count) {
  release();
  const size_t bytes = rounded_up(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T), kAlignment);
#if defined(__linux__)
  if (bytes >= kHugePage) {
    // Weights are read from end to end for every picture; small pages would double the time that takes. Fresh pages,
    // because those that the heap gives again stay as small as they were.
    mapped_bytes_ = rounded_up(bytes, kHugePage) + kHugePage;
    void* mapping = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED) return false;
    mapped_ = mapping;
    char* aligned = reinterpret_cast<char*>(rounded_up(reinterpret_cast<uintptr_t>(mapping), kHugePage));
    madvise(aligned, rounded_up(bytes, kHugePage), MADV_HUGEPAGE);
    items_ = reinterpret_cast<T*>(aligned);
    return true;
  }
#endif
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (memory == nullptr) return false;
  std::memset(memory, 0, bytes);
  items_ = static_cast<T*>(memory);
  return true;
}

template <class T>
void Array<T>::release() {
#if defined(__linux__)
  if (mapped_ != nullptr) {
    munmap(mapped_, mapped_bytes_);
    mapped_ = nullptr;
    items_ = nullptr;
    return;
  }
#endif
  std::free(items_);
  items_ = nullptr;
}

namespace {

uint16_t to_bfloat16(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if ((word & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((word >> 16) | 0x40u);
  return static_cast<uint16_t>((word + 0x7FFFu + ((word >> 16) & 1u)) >> 16);
}

bool all_bfloat16(const float* values, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, values + i, sizeof word);
    found |= word;
  }
  return (found & 0xFFFFu) == 0;
}

// Place `count` values in lines of 32: float32 in order, bfloat16 so that a word holds values i and i + 16.
void pack_lines(const float* values, int64_t stride, int64_t count, int64_t padded, bool bfloat16, char* out) {
  for (int64_t i = 0; i < padded; ++i) {
    const float value = i < count ? values[i * stride] : 0.f;
    if (bfloat16) {
      const int64_t place = i / 32 * 32 + i % 16 * 2 + i / 16 % 2;
      const uint16_t rounded = to_bfloat16(value);
      std::memcpy(out + place * 2, &rounded, 2);
    } else {
      std::memcpy(out + i * 4, &value, 4);
    }
  }
}

bool is_antithetic(const uint8_t* masks, int64_t passes, int64_t units) {
  if (passes % 2 != 0) return false;
  const uint8_t* other = masks + passes / 2 * units;
  for (int64_t i = 0; i < passes / 2 * units; ++i)
    if (masks[i] + other[i] != 1) return false;
  return true;
}

int pattern_of(const uint8_t* masks, const Group& group, int64_t units, int64_t unit) {
  int pattern = 0;
  for (int bit = 0; bit < group.passes; ++bit) pattern |= masks[(group.first_pass + bit) * units + unit] << bit;
  return pattern;
}

// Counting sort of places by the pattern of the unit at each, stable. `unit_at` may be NULL for the units' own order.
bool sort_by_pattern(const uint8_t* masks, int64_t units, const int32_t* unit_at, const Group& group,
                     Array<int32_t>& offsets, Array<int32_t>& sorted) {
  const int patterns = 1 << group.passes;
  Array<int32_t> next;
  if (!offsets.resize(patterns + 1) || !sorted.resize(units) || !next.resize(patterns)) return false;
  const auto pattern_at = [&](int64_t i) { return pattern_of(masks, group, units, unit_at ? unit_at[i] : i); };
  for (int64_t i = 0; i < units; ++i) ++offsets[pattern_at(i) + 1];
  for (int p = 0; p < patterns; ++p) {
    offsets[p + 1] += offsets[p];
    next[p] = offsets[p];
  }
  for (int64_t i = 0; i < units; ++i) sorted[next[pattern_at(i)]++] = static_cast<int32_t>(i);
  return true;
}

bool make_groups(const uint8_t* masks, Model& model) {
  const int64_t passes = model.grouped_passes, units = model.units;
  const int64_t count = (passes + kMaxGroupPasses - 1) / kMaxGroupPasses;
  if (!model.groups.resize(count)) return false;
  int64_t first = 0;
  for (int64_t g = 0; g < count; ++g) {
    Group* group = new (std::nothrow) Group;
    if (group == nullptr) return false;
    model.groups[g] = group;
    model.group_count = g + 1;
    group->first_pass = first;
    group->passes = static_cast<int>((passes - first + count - g - 1) / (count - g));
    first += group->passes;
    if (g == 0 && !sort_by_pattern(masks, units, nullptr, *group, group->offsets, model.units_of_rows)) return false;
    const int32_t* unit_of_row = model.units_of_rows.data();
    if (!sort_by_pattern(masks, units, unit_of_row, *group, group->offsets, group->rows)) return false;
    for (int p = 0; g > 0 && p < 1 << group->passes; ++p)
      model.short_chains &= group->offsets[p + 1] - group->offsets[p] <= kLongestChain;
    if (!group->sums.resize(units)) return false;
    for (int64_t i = 0; i < units; ++i)
      group->sums[i] = static_cast<int32_t>(pattern_of(masks, *group, units, unit_of_row[i]) * model.block);
  }
  return true;
}

bool pack_weights(const float* weights, Model& model) {
  const int64_t element = model.bfloat16 ? 2 : 4, row_bytes = model.block * element;
  if (!model.weights.resize(model.heads * model.blocks * model.units * row_bytes)) return false;
  const int32_t* order = model.units_of_rows.data();
  char* out = model.weights.data();
  for (int64_t k = 0; k < model.heads; ++k)
    for (int64_t b = 0; b < model.blocks; ++b) {
      const int64_t first = b * model.block;
      const int64_t count = model.classes - first < model.block ? model.classes - first : model.block;
      for (int64_t i = 0; i < model.units; ++i, out += row_bytes)
        pack_lines(weights + (k * model.classes + first) * model.units + order[i], model.units, count, model.block,
                   model.bfloat16, out);
    }
  return true;
}

bool pack_hybrid(const float* weights, const uint8_t* masks, Model& model) {
  model.padded_units = (model.units + 31) / 32 * 32;
  const int64_t row_bytes = model.padded_units * (model.bfloat16 ? 2 : 4), rows = model.heads * model.classes;
  if (!model.class_rows.resize(rows * row_bytes) || !model.kept.resize(model.units) ||
      !model.pass_masks.resize(model.grouped_passes * model.padded_units))
    return false;
  for (int64_t r = 0; r < rows; ++r)
    pack_lines(weights + r * model.units, 1, model.units, model.padded_units, model.bfloat16,
               model.class_rows.data() + r * row_bytes);
  for (int64_t t = 0; t < model.grouped_passes; ++t)
    for (int64_t d = 0; d < model.units; ++d)
      model.pass_masks[t * model.padded_units + d] = masks[t * model.units + d];
  for (int64_t i = 0; i < model.units; ++i) {
    int64_t kept = 0;
    for (int64_t t = 0; t < model.passes; ++t) kept += masks[t * model.units + model.units_of_rows[i]];
    model.kept[i] = static_cast<float>(kept) / static_cast<float>(model.passes);
  }
  return true;
}

}  // namespace

Model::~Model() {
  for (int64_t g = 0; g < group_count; ++g) delete groups[g];
}

int pack(const Source& s, Model& model) {
  if (s.heads < 1 || s.classes < 1 || s.units < 1 || s.passes < 1)
    return fail(MCHEADS_INVALID, "heads, classes, units and passes must be at least 1");
  if (s.heads > 1024 || s.classes > (1 << 24) || s.units > (1 << 24) || s.passes > (1 << 16))
    return fail(MCHEADS_INVALID, "at most 1024 heads, 2^24 classes, 2^24 units and 65536 passes");
  if (!(s.keep > 0.f && s.keep <= 1.f)) return fail(MCHEADS_INVALID, "keep must lie in (0, 1]");
  if (s.weight_type < MCHEADS_FLOAT32 || s.weight_type > MCHEADS_AUTO)
    return fail(MCHEADS_INVALID, "unknown type of weights");
  if (s.mode != MCHEADS_EXACT && s.mode != MCHEADS_HYBRID) return fail(MCHEADS_INVALID, "unknown mode");
  for (int64_t k = 0; k < s.heads; ++k)
    if (!(s.temperature[k] > 0.f) || std::isinf(s.temperature[k]))
      return fail(MCHEADS_INVALID, "temperatures must be positive and finite");
  for (int64_t i = 0; i < s.passes * s.units; ++i)
    if (s.masks[i] > 1) return fail(MCHEADS_INVALID, "masks must be 0 or 1");
  model.kernels = choose_kernels();
  if (model.kernels == nullptr) return MCHEADS_INVALID;

  model.heads = s.heads;
  model.classes = s.classes;
  model.units = s.units;
  model.passes = s.passes;
  model.block = s.classes <= kMinBlock ? kMinBlock : kMaxBlock;
  model.blocks = (s.classes + model.block - 1) / model.block;
  model.padded = model.blocks * model.block;
  model.antithetic = is_antithetic(s.masks, s.passes, s.units);
  model.grouped_passes = model.antithetic ? s.passes / 2 : s.passes;
  model.bfloat16 = s.weight_type == MCHEADS_BFLOAT16 ||
                   (s.weight_type == MCHEADS_AUTO && all_bfloat16(s.weights, s.heads * s.classes * s.units));
  // With so few classes every one is among the likeliest.
  model.hybrid = s.mode == MCHEADS_HYBRID && s.classes > MCHEADS_TOP;

  bool fits = make_groups(s.masks, model) && pack_weights(s.weights, model) &&
              model.bias.resize(s.heads * model.padded) && model.scale.resize(s.heads);
  if (fits && model.hybrid) fits = pack_hybrid(s.weights, s.masks, model);
  if (!fits) return fail(MCHEADS_MEMORY, "no memory for the packed model");
  for (int64_t k = 0; k < s.heads; ++k) {
    model.scale[k] = static_cast<float>(1.0 / (static_cast<double>(s.keep) * s.temperature[k]));
    for (int64_t c = 0; c < model.padded; ++c)
      model.bias[k * model.padded + c] = c < s.classes ? s.bias[k * s.classes + c] / s.temperature[k] : kNoClass;
  }
  return MCHEADS_OK;
}

}  // namespace trivium
