// One run: pictures in slabs, each slab through logits, statistics and divergences.
#include <atomic>
#include <cstring>

#include "run.h"

namespace trivium {
namespace {

// Logits of a slab should stay in the second-level cache.
constexpr int64_t kSlabFloats = 1 << 19;

struct Counters {
  std::atomic<uint64_t> runs{0}, pictures{0}, poisoned{0}, fallbacks{0}, operators{0};
};
Counters counters;

int64_t padded_floats(int64_t floats) { return (floats + 15) / 16 * 16; }

struct Layout {
  int pictures;
  int64_t head_count;
  int64_t packed, logits, mean, moments, masked, flags, total;  // offsets in floats
};

Layout lay_out(const Model& m, int64_t feature_heads, int64_t batch, int64_t threads) {
  Layout l{};
  // With one thread a head at a time keeps logits close; several threads need all heads to share.
  l.head_count = threads > 1 ? m.heads : 1;
  const int64_t row = (m.padded + kRowPadding) * m.passes * l.head_count;
  int64_t pictures = kSlabFloats / row;
  if (pictures > kMaxPicturesAtOnce) pictures = kMaxPicturesAtOnce;
  if (pictures > batch) pictures = batch;
  l.pictures = pictures < 1 ? 1 : static_cast<int>(pictures);
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t offset = at;
    at += padded_floats(floats);
    return offset;
  };
  l.packed = take(feature_heads * l.pictures * m.units);
  // In hybrid mode the likeliest logits, one row per pass and one more, take the place of all.
  l.logits = take(l.pictures * row);
  l.mean = take(2 * l.pictures * m.heads * m.padded);
  l.moments = take(m.hybrid ? 2 * l.pictures * m.heads * m.padded : 0);
  l.masked = take(m.hybrid ? l.pictures * feature_heads * (m.grouped_passes + 1) * m.padded_units : 0);
  l.flags = take(2 * l.pictures * m.heads);
  l.total = at;
  return l;
}

bool is_finite(const float* values, int64_t count) {
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t word;
    std::memcpy(&word, values + i, sizeof word);
    found |= (word & 0x7F800000u) == 0x7F800000u;
  }
  return found == 0;
}

// Features in the order of packed rows; a picture with one that is not finite is poisoned and goes on with zeros.
void prepare(const Slab& s) {
  const Model& m = *s.model;
  const int64_t picture_features = s.feature_heads * m.units;
  for (int x = 0; x < s.pictures; ++x) {
    const float* features = s.features + x * picture_features;
    const bool finite = is_finite(features, picture_features);
    for (int64_t k = 0; k < m.heads; ++k) {
      s.poisoned[x * m.heads + k] = !finite;
      s.heavy_tail[x * m.heads + k] = false;
    }
    const int32_t* units = m.units_of_rows.data();
    for (int64_t f = 0; f < s.feature_heads; ++f) {
      float* out = s.packed + (f * s.pictures + x) * m.units;
      for (int64_t i = 0; i < m.units; ++i) out[i] = finite ? features[f * m.units + units[i]] : 0.f;
    }
  }
}

void mask_features(const Slab& s) {
  const Model& m = *s.model;
  const int64_t rows = m.grouped_passes + 1;
  for (int64_t f = 0; f < s.pictures * s.feature_heads; ++f) {
    const float* features = s.features + f * m.units;
    const bool poisoned = s.poisoned[f / s.feature_heads * m.heads];
    float* out = s.masked + f * rows * m.padded_units;
    std::memset(out, 0, sizeof(float) * rows * m.padded_units);
    if (poisoned) continue;
    for (int64_t t = 0; t < m.grouped_passes; ++t)
      for (int64_t d = 0; d < m.units; ++d)
        out[t * m.padded_units + d] = features[d] * m.pass_masks[t * m.padded_units + d];
    std::memcpy(out + m.grouped_passes * m.padded_units, features, sizeof(float) * m.units);
  }
}

void logits_task(void* slab, size_t i) {
  const Slab& s = *static_cast<const Slab*>(slab);
  s.model->kernels->logits(s, s.first_head * s.model->blocks + static_cast<int64_t>(i));
}

void statistics_task(void* slab, size_t i) {
  const Slab& s = *static_cast<const Slab*>(slab);
  const int64_t task = static_cast<int64_t>(i);
  s.model->kernels->statistics(s, static_cast<int>(task / s.head_count), s.first_head + task % s.head_count);
}

void moments_task(void* slab, size_t i) {
  const Slab& s = *static_cast<const Slab*>(slab);
  s.model->kernels->moments(s, s.first_head * s.model->blocks + static_cast<int64_t>(i));
}

void hybrid_task(void* slab, size_t i) {
  const Slab& s = *static_cast<const Slab*>(slab);
  const int64_t task = static_cast<int64_t>(i);
  s.model->kernels->hybrid(s, static_cast<int>(task / s.head_count), s.first_head + task % s.head_count);
}

void divergences_task(void* slab, size_t i) {
  const Slab& s = *static_cast<const Slab*>(slab);
  s.model->kernels->divergences(s, static_cast<int>(i));
}

void spread(const Parallel& parallel, int64_t tasks, void (*task)(void*, size_t), Slab& slab) {
  if (parallel.threads > 1 && tasks > 1) {
    parallel.run(parallel.self, tasks, task, &slab);
    return;
  }
  for (int64_t i = 0; i < tasks; ++i) task(&slab, static_cast<size_t>(i));
}

void heads_of(Slab& slab, const Parallel& parallel, void (*blocks)(void*, size_t), void (*head)(void*, size_t)) {
  const Model& m = *slab.model;
  for (slab.first_head = 0; slab.first_head < m.heads; slab.first_head += slab.head_count) {
    spread(parallel, slab.head_count * m.blocks, blocks, slab);
    spread(parallel, slab.pictures * slab.head_count, head, slab);
  }
}

bool any(const bool* flags, int64_t count) {
  bool found = false;
  for (int64_t i = 0; i < count; ++i) found |= flags[i];
  return found;
}

void run_hybrid(Slab& slab, const Parallel& parallel) {
  const Model& m = *slab.model;
  mask_features(slab);
  heads_of(slab, parallel, moments_task, hybrid_task);
  for (int x = 0; x < slab.pictures; ++x) {
    bool* heavy = slab.heavy_tail + x * m.heads;
    if (any(slab.poisoned + x * m.heads, m.heads) || !any(heavy, m.heads)) continue;
    // Exactly after all, alone in a slab whose features are packed anew.
    Slab one = slab;
    one.pictures = 1;
    one.features += x * slab.feature_heads * m.units;
    one.mean += x * m.heads * m.padded;
    one.log_mean += x * m.heads * m.padded;
    one.poisoned += x * m.heads;
    one.heavy_tail += x * m.heads;
    one.probabilities += x * m.heads * m.classes;
    one.predictive_entropy += x * m.heads;
    one.mutual_information += x * m.heads;
    one.energy += x * m.heads;
    prepare(one);
    heads_of(one, parallel, logits_task, statistics_task);
    counters.fallbacks.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace

int64_t scratch_bytes(const Model& model, int64_t feature_heads, int64_t batch, int64_t threads) {
  return lay_out(model, feature_heads, batch, threads).total * static_cast<int64_t>(sizeof(float));
}

void run(const Model& m, const float* features, int64_t feature_heads, int64_t batch, const Statistics& out,
         void* scratch, const Parallel& parallel) {
  const Layout l = lay_out(m, feature_heads, batch, parallel.threads);
  float* base = static_cast<float*>(scratch);
  uint64_t poisoned = 0;
  for (int64_t first = 0; first < batch; first += l.pictures) {
    Slab s{};
    s.model = &m;
    s.features = features + first * feature_heads * m.units;
    s.feature_heads = feature_heads;
    s.pictures = static_cast<int>(batch - first < l.pictures ? batch - first : l.pictures);
    s.head_count = l.head_count;
    s.packed = base + l.packed;
    s.logits = base + l.logits;
    s.mean = base + l.mean;
    s.log_mean = s.mean + s.pictures * m.heads * m.padded;
    s.moments = base + l.moments;
    s.masked = base + l.masked;
    s.poisoned = reinterpret_cast<bool*>(base + l.flags);
    s.heavy_tail = s.poisoned + s.pictures * m.heads;
    s.probabilities = out.probabilities + first * m.heads * m.classes;
    s.predictive_entropy = out.predictive_entropy + first * m.heads;
    s.mutual_information = out.mutual_information + first * m.heads;
    s.divergence = out.divergence + first * m.heads * m.heads;
    s.energy = out.energy + first * m.heads;
    prepare(s);
    if (m.hybrid)
      run_hybrid(s, parallel);
    else
      heads_of(s, parallel, logits_task, statistics_task);
    spread(parallel, s.pictures, divergences_task, s);
    for (int x = 0; x < s.pictures; ++x) poisoned += any(s.poisoned + x * m.heads, m.heads);
  }
  counters.runs.fetch_add(1, std::memory_order_relaxed);
  counters.pictures.fetch_add(static_cast<uint64_t>(batch), std::memory_order_relaxed);
  counters.poisoned.fetch_add(poisoned, std::memory_order_relaxed);
}

void count_operator() { counters.operators.fetch_add(1, std::memory_order_relaxed); }

mcheads_counts counts() {
  mcheads_counts c;
  c.runs = counters.runs.load(std::memory_order_relaxed);
  c.pictures = counters.pictures.load(std::memory_order_relaxed);
  c.poisoned = counters.poisoned.load(std::memory_order_relaxed);
  c.fallbacks = counters.fallbacks.load(std::memory_order_relaxed);
  c.operators = counters.operators.load(std::memory_order_relaxed);
  return c;
}

}  // namespace trivium
