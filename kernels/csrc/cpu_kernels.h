// The CPU kernels as templates over a vector of floats; included once by every translation unit of an instruction set.
//
// Everything has internal linkage: a function compiled for AVX-512 must never stand in for its scalar namesake. For
// the same reason no template of the standard library is used here.
#pragma once

#include <cstring>

#include "model.h"
#include "rows.h"

#define TRIVIUM_INLINE inline __attribute__((always_inline))

namespace trivium {
namespace {

template <class V>
struct Pair {
  V low, high;
};

template <class V>
TRIVIUM_INLINE V exponential(V x) {
  // x <= 0. Below -87 the result would be denormal: it is 0, and so it is for NaN.
  const V lowest(-87.f);
  const V magic(12582912.f);  // 1.5 * 2^23: adding it rounds to a whole number, which the low mantissa bits then hold
  const V clamped = V::max(x, lowest);
  const V shifted = V::fma(clamped, V(1.44269504f), magic);
  const V n = shifted - magic;
  V r = V::fma(n, V(-0.693145752f), clamped);
  r = V::fma(n, V(-1.42860677e-6f), r);
  V p = V(1.f / 5040);
  p = V::fma(p, r, V(1.f / 720));
  p = V::fma(p, r, V(1.f / 120));
  p = V::fma(p, r, V(1.f / 24));
  p = V::fma(p, r, V(1.f / 6));
  p = V::fma(p, r, V(0.5f));
  p = V::fma(p, r * r, r) + V(1.f);
  return V::where_greater(x, lowest, p * V::two_to_low_bits(shifted));
}

template <class V>
TRIVIUM_INLINE V logarithm(V x) {
  // x normal and positive: x = 2^e m with sqrt(1/2) <= m < sqrt(2), log m = 2 artanh((m - 1) / (m + 1)).
  V e(0.f);
  const V m = V::split(x, e);
  const V s = (m - V(1.f)) / (m + V(1.f));
  const V s2 = s * s;
  V p = V(2.f / 9);
  p = V::fma(p, s2, V(2.f / 7));
  p = V::fma(p, s2, V(2.f / 5));
  p = V::fma(p, s2, V(2.f / 3));
  const V tail = V::fma(s * s2, p, e * V(1.42860677e-6f));
  return V::fma(e, V(0.693145752f), V::fma(s, V(2.f), tail));
}

// Vectors of words [word, word + width) of a packed row: 32 classes share a line of 16 words.
template <class V, bool kBfloat16>
TRIVIUM_INLINE Pair<V> load_pair(const char* row, int64_t word) {
  if (kBfloat16) return V::load_bfloat16(reinterpret_cast<const uint32_t*>(row) + word);
  const float* line = reinterpret_cast<const float*>(row) + word / 16 * 32 + word % 16;
  return {V::load(line), V::load(line + 16)};
}

TRIVIUM_INLINE int64_t column_of_word(int64_t word) { return word / 16 * 32 + word % 16; }

// Ask the second-level cache for the row that a sweep reaches some rows later, beyond where the hardware looks ahead:
// it stops at every page of 4096 bytes. Past the weights' end this is harmless.
TRIVIUM_INLINE void prefetch_row(const char* row, int64_t row_bytes) {
  constexpr int64_t kDistance = 16384;
  for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(row + kDistance + byte, 0, 2);
}

// A sum over classes in 32 chains, however wide a vector is.
template <class V>
struct ClassSum {
  static constexpr int kVectors = 32 / V::kWidth;
  V chains[kVectors];

  TRIVIUM_INLINE ClassSum() {
    for (int j = 0; j < kVectors; ++j) chains[j] = V(0.f);
  }
  TRIVIUM_INLINE double total() const {
    double sum = 0;
    for (int j = 0; j < kVectors; ++j) sum += chains[j].total();
    return sum;
  }
};

template <class V>
struct Kernels {
  static constexpr int kWidth = V::kWidth;
  static constexpr int kVectors = 32 / kWidth;
  // Groups that one sweep serves: their sums share the first-level cache.
  static constexpr int kSweepGroups = 3;
  // Pairs of accumulators that fit the registers for 1, 2 or 4 pictures at once and divide a block of words.
  static constexpr int pairs_at_once(int pictures, int block) {
    const int all = V::kPairs / pictures < 1 ? 1 : V::kPairs / pictures;
    return all * kWidth > block / 2 ? block / 2 / kWidth : all;
  }

  // A sum of more rows than kLongestChain is a sum of chains.
  static void store_chain(V chain, float* sum, bool first) { (first ? chain : V::load(sum) + chain).store(sum); }

  // Several pictures, one group: sums [pictures][2^k][block] of weight times feature over the rows of each pattern.
  template <bool kBfloat16, int kBlock, int kPictures>
  static void sum_group(const Model& model, const Group& group, const char* weights, const float* features,
                        int first_pattern, float* sums) {
    constexpr int kPairs = pairs_at_once(kPictures, kBlock);
    constexpr int64_t block = kBlock, row_bytes = block * (kBfloat16 ? 2 : 4);
    const int64_t units = model.units;
    const int patterns = 1 << group.passes;
    const int32_t* rows = group.rows.data();
    const int32_t* offsets = group.offsets.data();
    for (int64_t word = 0; word < block / 2; word += kPairs * kWidth)
      for (int64_t pattern = first_pattern, begin = offsets[pattern]; pattern < patterns;) {
        V low[kPictures][kPairs], high[kPictures][kPairs];
        for (int x = 0; x < kPictures; ++x)
          for (int j = 0; j < kPairs; ++j) low[x][j] = high[x][j] = V(0.f);
        const int64_t last = offsets[pattern + 1], end = last - begin > kLongestChain ? begin + kLongestChain : last;
        for (int64_t i = begin; i < end; ++i) {
          const char* row = weights + rows[i] * row_bytes;
          Pair<V> w[kPairs];
          for (int j = 0; j < kPairs; ++j) w[j] = load_pair<V, kBfloat16>(row, word + j * kWidth);
          for (int x = 0; x < kPictures; ++x) {
            const V h(features[x * units + rows[i]]);
            for (int j = 0; j < kPairs; ++j) {
              low[x][j] = V::fma(h, w[j].low, low[x][j]);
              high[x][j] = V::fma(h, w[j].high, high[x][j]);
            }
          }
        }
        for (int x = 0; x < kPictures; ++x)
          for (int j = 0; j < kPairs; ++j) {
            float* sum = sums + (x * patterns + pattern) * block + column_of_word(word + j * kWidth);
            store_chain(low[x][j], sum, begin == offsets[pattern]);
            store_chain(high[x][j], sum + 16, begin == offsets[pattern]);
          }
        begin = end;
        if (end == last) ++pattern;
      }
  }

  // One picture, several groups in one sweep through a block, so that it is read from memory straight through and
  // once. The first group's sums pass through registers where `kSorted`, those of kTables further groups are tables in
  // the first-level cache; none of those may be longer than a chain. Every sum meets its rows in the order that
  // sum_group takes, hence the same bits.
  template <bool kBfloat16, int kBlock, bool kSorted, int kTables>
  static void sweep(const Model& model, const Group* const* groups, const char* weights, const float* features,
                    float* const* sums) {
    constexpr int kPairs = pairs_at_once(1, kBlock);
    constexpr int64_t block = kBlock, row_bytes = block * (kBfloat16 ? 2 : 4);
    const Group* const* tables = groups + kSorted;
    float* const* table_sums = sums + kSorted;
    for (int g = 0; g < kTables; ++g)
      for (int64_t c = 0; c < block << tables[g]->passes; c += kWidth) V(0.f).store(table_sums[g] + c);
    const int64_t patterns = kSorted ? 1 << groups[0]->passes : 1;
    const int32_t whole[2] = {0, static_cast<int32_t>(model.units)};
    const int32_t* offsets = kSorted ? groups[0]->offsets.data() : whole;
    for (int64_t word = 0; word < block / 2; word += kPairs * kWidth)
      for (int64_t pattern = 0, begin = 0; pattern < patterns;) {
        V low[kPairs], high[kPairs];
        for (int j = 0; j < kPairs; ++j) low[j] = high[j] = V(0.f);
        const int64_t last = offsets[pattern + 1];
        const int64_t end = kSorted && last - begin > kLongestChain ? begin + kLongestChain : last;
        for (int64_t i = begin; i < end; ++i) {
          const char* row = weights + i * row_bytes;
          if (word == 0) prefetch_row(row, row_bytes);
          const V h(features[i]);
          float* table[kTables + 1];
          for (int g = 0; g < kTables; ++g) table[g] = table_sums[g] + tables[g]->sums[i];
          for (int j = 0; j < kPairs; ++j) {
            const Pair<V> w = load_pair<V, kBfloat16>(row, word + j * kWidth);
            const int64_t c = column_of_word(word + j * kWidth);
            if (kSorted) {
              low[j] = V::fma(h, w.low, low[j]);
              high[j] = V::fma(h, w.high, high[j]);
            }
            for (int g = 0; g < kTables; ++g) {
              V::fma(h, w.low, V::load(table[g] + c)).store(table[g] + c);
              V::fma(h, w.high, V::load(table[g] + c + 16)).store(table[g] + c + 16);
            }
          }
        }
        if (kSorted)
          for (int j = 0; j < kPairs; ++j) {
            float* sum = sums[0] + pattern * block + column_of_word(word + j * kWidth);
            store_chain(low[j], sum, begin == offsets[pattern]);
            store_chain(high[j], sum + 16, begin == offsets[pattern]);
          }
        begin = end;
        if (end == last) ++pattern;
      }
  }

  // Fold the sums of one picture into the logits of the group's passes: pass t is the sum over all patterns with bit
  // t set. Where masks are antithetic, the first group's fold leaves W h in `total`, which gives the other half.
  static void fold(const Model& model, const Group& group, bool first, float* sums, float* total, const float* bias,
                   float scale, float* logits, int64_t stride) {
    const int64_t block = model.block;
    const V factor(scale);
    for (int64_t c = 0; c < block; c += kWidth) {
      float* column = sums + c;
      V partial[kMaxGroupPasses];
      for (int bit = group.passes - 1; bit >= 0; --bit) {
        const int half = 1 << bit;
        V sum[4] = {V(0.f), V(0.f), V(0.f), V(0.f)};
        for (int r = 0; r < half; ++r) {
          const V upper = V::load(column + (r + half) * block);
          sum[r % 4] = sum[r % 4] + upper;
          if (r > 0 || (first && model.antithetic))
            (V::load(column + r * block) + upper).store(column + r * block);
        }
        partial[bit] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      }
      const V offset = V::load(bias + c);
      for (int bit = 0; bit < group.passes; ++bit)
        V::fma(partial[bit], factor, offset).store(logits + (group.first_pass + bit) * stride + c);
      if (!model.antithetic) continue;
      if (first) V::load(column).store(total + c);
      const V whole = V::load(total + c);
      float* other = logits + (model.grouped_passes + group.first_pass) * stride + c;
      for (int bit = 0; bit < group.passes; ++bit)
        V::fma(whole - partial[bit], factor, offset).store(other + bit * stride);
    }
  }

  static void fold_picture(const Slab& slab, int64_t index, int picture, int64_t g, float* sums, float* total) {
    const Model& model = *slab.model;
    const int64_t head = index / model.blocks, first_class = index % model.blocks * model.block;
    const int64_t row = picture * slab.head_count + head - slab.first_head;
    fold(model, *model.groups[g], g == 0, sums, total, model.bias.data() + head * model.padded + first_class,
         model.scale[head], slab.logits + row * model.passes * slab.row_stride() + first_class, slab.row_stride());
  }

  static const float* packed_features(const Slab& slab, int64_t index, int picture) {
    const int64_t feature_head = slab.feature_heads > 1 ? index / slab.model->blocks : 0;
    return slab.packed + (feature_head * slab.pictures + picture) * slab.model->units;
  }

  template <bool kBfloat16, int kPictures>
  static void block_logits(const Slab& slab, int64_t index, int picture) {
    const Model& model = *slab.model;
    const char* weights = model.weights.data() + index * model.units * model.block * (kBfloat16 ? 2 : 4);
    const float* features = packed_features(slab, index, picture);
    alignas(kAlignment) float sums[kPictures << kMaxGroupPasses][kMaxBlock];
    alignas(kAlignment) float total[kPictures][kMaxBlock];
    for (int64_t g = 0; g < model.group_count; ++g) {
      const Group& group = *model.groups[g];
      const int first_pattern = g == 0 && model.antithetic ? 0 : 1;
      if (model.block == kMaxBlock)
        sum_group<kBfloat16, kMaxBlock, kPictures>(model, group, weights, features, first_pattern, sums[0]);
      else
        sum_group<kBfloat16, kMinBlock, kPictures>(model, group, weights, features, first_pattern, sums[0]);
      for (int x = 0; x < kPictures; ++x)
        fold_picture(slab, index, picture + x, g, sums[0] + (x << group.passes) * model.block, total[x]);
    }
  }

  template <bool kBfloat16, bool kSorted, int kTables>
  static void sweep_block(const Model& model, const Group* const* groups, const char* weights, const float* features,
                          float* const* sums) {
    if (model.block == kMaxBlock)
      sweep<kBfloat16, kMaxBlock, kSorted, kTables>(model, groups, weights, features, sums);
    else
      sweep<kBfloat16, kMinBlock, kSorted, kTables>(model, groups, weights, features, sums);
  }

  template <bool kBfloat16>
  static void block_logits_of_one(const Slab& slab, int64_t index, int picture) {
    const Model& model = *slab.model;
    const char* weights = model.weights.data() + index * model.units * model.block * (kBfloat16 ? 2 : 4);
    const float* features = packed_features(slab, index, picture);
    alignas(kAlignment) float storage[kSweepGroups][kMaxBlock << kMaxGroupPasses];
    alignas(kAlignment) float total[kMaxBlock];
    float* sums[kSweepGroups];
    for (int g = 0; g < kSweepGroups; ++g) sums[g] = storage[g];
    for (int64_t g = 0; g < model.group_count; g += kSweepGroups) {
      const Group* const* groups = model.groups.data() + g;
      const int64_t left = model.group_count - g, count = left < kSweepGroups ? left : kSweepGroups;
      if (g == 0 && count == 1) sweep_block<kBfloat16, true, 0>(model, groups, weights, features, sums);
      if (g == 0 && count == 2) sweep_block<kBfloat16, true, 1>(model, groups, weights, features, sums);
      if (g == 0 && count == 3) sweep_block<kBfloat16, true, 2>(model, groups, weights, features, sums);
      if (g > 0 && count == 1) sweep_block<kBfloat16, false, 1>(model, groups, weights, features, sums);
      if (g > 0 && count == 2) sweep_block<kBfloat16, false, 2>(model, groups, weights, features, sums);
      if (g > 0 && count == 3) sweep_block<kBfloat16, false, 3>(model, groups, weights, features, sums);
      for (int64_t i = 0; i < count; ++i) fold_picture(slab, index, picture, g + i, sums[i], total);
    }
  }

  template <bool kBfloat16>
  static void logits_of(const Slab& slab, int64_t index) {
    int picture = 0;
    for (; slab.pictures - picture >= 4; picture += 4) block_logits<kBfloat16, 4>(slab, index, picture);
    for (; slab.pictures - picture >= 2; picture += 2) block_logits<kBfloat16, 2>(slab, index, picture);
    if (picture == slab.pictures) return;
    if (slab.model->short_chains)
      block_logits_of_one<kBfloat16>(slab, index, picture);
    else
      block_logits<kBfloat16, 1>(slab, index, picture);
  }

  static void logits(const Slab& slab, int64_t index) {
    if (slab.model->bfloat16)
      logits_of<true>(slab, index);
    else
      logits_of<false>(slab, index);
  }

  // Turn a row of logits into e^(z - top).
  static SoftmaxRow exponentiate(float* z, int64_t length) {
    V highest = V::load(z);
    for (int64_t c = kWidth; c < length; c += kWidth) highest = V::max(V::load(z + c), highest);
    SoftmaxRow row;
    row.top = highest.maximum();
    const V top(row.top);
    ClassSum<V> sum, weighted;
    for (int64_t c = 0; c < length; c += 32)
      for (int j = 0; j < kVectors; ++j) {
        const V shifted = V::load(z + c + j * kWidth) - top;
        const V e = exponential(shifted);
        sum.chains[j] = sum.chains[j] + e;
        weighted.chains[j] = V::fma(shifted, e, weighted.chains[j]);
        e.store(z + c + j * kWidth);
      }
    row.sum = static_cast<float>(sum.total());
    row.weighted = static_cast<float>(weighted.total());
    return row;
  }

  static void statistics(const Slab& slab, int picture, int64_t head) {
    const Model& model = *slab.model;
    const int64_t stride = slab.row_stride(), padded = model.padded, passes = model.passes;
    float* logits =
        slab.logits + (picture * slab.head_count + head - slab.first_head) * passes * stride;
    double expected_entropy = 0, log_sum_exp = 0;
    for (int64_t t = 0; t < passes; ++t) {
      float* z = logits + t * stride;
      const SoftmaxRow row = exponentiate(z, padded);
      expected_entropy += row.entropy();
      log_sum_exp += row.log_sum_exp();
      z[padded] = 1.f / (row.sum * static_cast<float>(passes));
    }
    const int64_t place = picture * model.heads + head;
    float* mean = slab.mean + place * padded;
    for (int64_t c = 0; c < padded; c += 32) {
      V sum[kVectors];
      for (int j = 0; j < kVectors; ++j) sum[j] = V(0.f);
      for (int64_t t = 0; t < passes; ++t) {
        const float* e = logits + t * stride;
        const V share(e[padded]);
        for (int j = 0; j < kVectors; ++j) sum[j] = V::fma(share, V::load(e + c + j * kWidth), sum[j]);
      }
      for (int j = 0; j < kVectors; ++j) sum[j].store(mean + c + j * kWidth);
    }
    finish(slab, picture, head, expected_entropy / passes, log_sum_exp / passes);
  }

  // From mean probabilities: their logarithms, the entropy, and what follows from it.
  static void finish(const Slab& slab, int picture, int64_t head, double expected_entropy, double log_sum_exp) {
    const Model& model = *slab.model;
    const int64_t place = picture * model.heads + head;
    const float* mean = slab.mean + place * model.padded;
    float* log_mean = slab.log_mean + place * model.padded;
    ClassSum<V> sum;
    for (int64_t c = 0; c < model.padded; c += 32)
      for (int j = 0; j < kVectors; ++j) {
        const V p = V::load(mean + c + j * kWidth);
        const V log_p = logarithm(V::max(p, V(kProbabilityFloor)));
        log_p.store(log_mean + c + j * kWidth);
        sum.chains[j] = sum.chains[j] + entropy_term(p, log_p);
      }
    const double entropy = sum.total();
    slab.predictive_entropy[place] = static_cast<float>(entropy);
    slab.mutual_information[place] = not_negative(static_cast<float>(entropy - expected_entropy));
    slab.energy[place] = static_cast<float>(-log_sum_exp);
    std::memcpy(slab.probabilities + place * model.classes, mean, sizeof(float) * model.classes);
    // A logit that is NaN or infinite makes the row's weighted sum NaN.
    if (!__builtin_isfinite(expected_entropy) || !__builtin_isfinite(log_sum_exp)) slab.poisoned[place] = true;
  }

  static void divergences(const Slab& slab, int picture) {
    const Model& model = *slab.model;
    const int64_t heads = model.heads, padded = model.padded, first = picture * heads;
    bool poisoned = false;
    for (int64_t k = 0; k < heads; ++k) poisoned |= slab.poisoned[first + k];
    if (poisoned) {
      const float nan = __builtin_nanf("");
      for (int64_t i = 0; i < heads * model.classes; ++i) slab.probabilities[first * model.classes + i] = nan;
      for (int64_t i = 0; i < heads * heads; ++i) slab.divergence[first * heads + i] = nan;
      for (int64_t k = first; k < first + heads; ++k)
        slab.predictive_entropy[k] = slab.mutual_information[k] = slab.energy[k] = nan;
      return;
    }
    for (int64_t i = first; i < first + heads; ++i)
      for (int64_t j = first; j < first + heads; ++j) {
        const float* p = slab.mean + i * padded;
        const float* log_p = slab.log_mean + i * padded;
        const float* log_q = slab.log_mean + j * padded;
        ClassSum<V> sum;
        if (i != j)
          for (int64_t c = 0; c < padded; c += 32)
            for (int v = 0; v < kVectors; ++v) {
              const int64_t at = c + v * kWidth;
              sum.chains[v] = sum.chains[v] + divergence_term(V::load(p + at), V::load(log_p + at), V::load(log_q + at));
            }
        slab.divergence[i * heads + j - first] = not_negative(static_cast<float>(sum.total()));
      }
  }
};

}  // namespace
}  // namespace trivium
