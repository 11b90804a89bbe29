// The hybrid mode: exact logits for each head's likeliest classes, moments over the passes for all others.
//
// Over the passes a logit is taken as normal with its true mean and the variance of independent masks, so that a class
// of mean m and variance v has E e^z = e^(m + v/2) and E z e^z = (m + v) e^(m + v/2). T draws show such a mean only while
// v is small, so each class weighs 1 + v times its share in the test of the tail.
#pragma once

#include "cpu_kernels.h"

namespace trivium {
namespace {

template <class V>
struct Hybrid {
  static constexpr int kWidth = V::kWidth;

  template <bool kBfloat16>
  static void block_moments(const Slab& slab, int64_t index, int picture) {
    const Model& model = *slab.model;
    const int64_t head = index / model.blocks, first_class = index % model.blocks * model.block;
    const int64_t row_bytes = model.block * (kBfloat16 ? 2 : 4), block_bytes = model.units * row_bytes;
    const char* weights = model.weights.data() + index * block_bytes;
    const int64_t feature_head = slab.feature_heads > 1 ? head : 0;
    const float* features = slab.packed + (feature_head * slab.pictures + picture) * model.units;
    float* mean = slab.moments + (picture * model.heads + head) * 2 * model.padded + first_class;
    float* variance = mean + model.padded;
    const V scale(model.scale[head]), scale2(model.scale[head] * model.scale[head]);
    constexpr int kPairs = kWidth >= 16 ? 1 : 16 / kWidth;
    for (int64_t word = 0; word < model.block / 2; word += kPairs * kWidth) {
      V m[2 * kPairs], v[2 * kPairs];
      for (int j = 0; j < 2 * kPairs; ++j) m[j] = v[j] = V(0.f);
      for (int64_t i = 0; i < model.units; ++i) {
        const char* row = weights + i * row_bytes;
        if (word == 0 && picture == 0) prefetch_row(row, row_bytes);
        const V h(features[i]), kept(model.kept[i]);
        const V first = h * kept, second = first * h * (V(1.f) - kept);
        for (int j = 0; j < kPairs; ++j) {
          const Pair<V> w = load_pair<V, kBfloat16>(row, word + j * kWidth);
          m[2 * j] = V::fma(w.low, first, m[2 * j]);
          v[2 * j] = V::fma(w.low * w.low, second, v[2 * j]);
          m[2 * j + 1] = V::fma(w.high, first, m[2 * j + 1]);
          v[2 * j + 1] = V::fma(w.high * w.high, second, v[2 * j + 1]);
        }
      }
      for (int j = 0; j < 2 * kPairs; ++j) {
        const int64_t c = column_of_word(word + j / 2 * kWidth) + j % 2 * 16;
        V::fma(m[j], scale, V::load(model.bias.data() + head * model.padded + first_class + c)).store(mean + c);
        (v[j] * scale2).store(variance + c);
      }
    }
  }

  static void moments(const Slab& slab, int64_t index) {
    for (int x = 0; x < slab.pictures; ++x) {
      if (slab.model->bfloat16)
        block_moments<true>(slab, index, x);
      else
        block_moments<false>(slab, index, x);
    }
  }

  // The classes of the highest mean plus two deviations, at most MCHEADS_TOP, in no order.
  static int likeliest(const float* mean, const float* variance, int64_t classes, int32_t* chosen) {
    float score[MCHEADS_TOP];
    int count = 0, weakest = 0;
    for (int64_t c = 0; c < classes; ++c) {
      const float s = mean[c] + 2.f * __builtin_sqrtf(variance[c]);
      if (count == MCHEADS_TOP && !(s > score[weakest])) continue;
      const int place = count < MCHEADS_TOP ? count++ : weakest;
      score[place] = s;
      chosen[place] = static_cast<int32_t>(c);
      weakest = 0;
      for (int i = 1; i < count; ++i)
        if (score[i] < score[weakest]) weakest = i;
    }
    return count;
  }

  // Products [kClasses][kRows] of class rows and masked features.
  template <bool kBfloat16, int kClasses, int kRows>
  static void products(const char* const* rows, const float* masked, int64_t units, float* out, int64_t out_stride) {
    V sum[kClasses][kRows];
    for (int c = 0; c < kClasses; ++c)
      for (int t = 0; t < kRows; ++t) sum[c][t] = V(0.f);
    for (int64_t line = 0; line < units / 32; ++line)
      for (int64_t word = line * 16; word < line * 16 + 16; word += kWidth) {
        const int64_t unit = column_of_word(word);
        V low[kRows], high[kRows];
        for (int t = 0; t < kRows; ++t) {
          low[t] = V::load(masked + t * units + unit);
          high[t] = V::load(masked + t * units + unit + 16);
        }
        for (int c = 0; c < kClasses; ++c) {
          const Pair<V> w = load_pair<V, kBfloat16>(rows[c], word);
          for (int t = 0; t < kRows; ++t) sum[c][t] = V::fma(w.high, high[t], V::fma(w.low, low[t], sum[c][t]));
        }
      }
    for (int c = 0; c < kClasses; ++c)
      for (int t = 0; t < kRows; ++t) out[t * out_stride + c] = static_cast<float>(sum[c][t].total());
  }

  template <bool kBfloat16>
  static void exact_logits(const Model& model, int64_t head, const int32_t* chosen, int count, const float* masked,
                           float* z) {
    const int64_t row_bytes = model.padded_units * (kBfloat16 ? 2 : 4);
    const int64_t rows = model.grouped_passes + 1, units = model.padded_units;
    for (int c = 0; c < count; c += 4) {
      const char* row[4];
      for (int j = 0; j < 4; ++j) {
        const int64_t index = head * model.classes + chosen[c + j < count ? c + j : count - 1];
        row[j] = model.class_rows.data() + index * row_bytes;
      }
      int64_t t = 0;
      for (; t + 4 <= rows; t += 4)
        products<kBfloat16, 4, 4>(row, masked + t * units, units, z + t * MCHEADS_TOP + c, MCHEADS_TOP);
      for (; t < rows; ++t)
        products<kBfloat16, 4, 1>(row, masked + t * units, units, z + t * MCHEADS_TOP + c, MCHEADS_TOP);
    }
    // Rows of sums to logits of all passes; the last row is W h.
    const float scale = model.scale[head];
    const float* bias = model.bias.data() + head * model.padded;
    for (int c = 0; c < MCHEADS_TOP; ++c) {
      const float whole = z[model.grouped_passes * MCHEADS_TOP + c], offset = c < count ? bias[chosen[c]] : kNoClass;
      for (int64_t t = 0; t < model.grouped_passes; ++t) {
        const float sum = c < count ? z[t * MCHEADS_TOP + c] : 0.f;
        z[t * MCHEADS_TOP + c] = sum * scale + offset;
        if (model.antithetic)
          z[(t + model.grouped_passes) * MCHEADS_TOP + c] = c < count ? (whole - sum) * scale + offset : kNoClass;
      }
    }
  }

  static void hybrid(const Slab& slab, int picture, int64_t head) {
    const Model& model = *slab.model;
    const int64_t place = picture * model.heads + head, padded = model.padded;
    float* mean = slab.moments + place * 2 * padded;
    float* variance = mean + padded;
    int32_t chosen[MCHEADS_TOP];
    const int count = likeliest(mean, variance, model.classes, chosen);
    float* z = slab.logits + (picture * slab.head_count + head - slab.first_head) * model.passes * slab.row_stride();
    const int64_t feature_head = slab.feature_heads > 1 ? head : 0;
    const float* masked = slab.masked + (picture * slab.feature_heads + feature_head) * (model.grouped_passes + 1) *
                                            model.padded_units;
    if (model.bfloat16)
      exact_logits<true>(model, head, chosen, count, masked, z);
    else
      exact_logits<false>(model, head, chosen, count, masked, z);

    // The likeliest classes leave the tail.
    for (int i = 0; i < count; ++i) {
      mean[chosen[i]] = kNoClass;
      variance[chosen[i]] = 0.f;
    }
    V highest(kNoClass);
    for (int64_t c = 0; c < padded; c += kWidth)
      highest = V::max(V::fma(V::load(variance + c), V(0.5f), V::load(mean + c)), highest);
    SoftmaxRow tail;
    tail.top = highest.maximum();
    ClassSum<V> sum, weighted, spread;
    float* share = slab.mean + place * padded;
    for (int64_t c = 0; c < padded; c += kWidth) {
      const V m = V::load(mean + c) - V(tail.top), v = V::load(variance + c);
      const V e = exponential(V::fma(v, V(0.5f), m));
      e.store(share + c);
      const int j = c / kWidth % ClassSum<V>::kVectors;
      sum.chains[j] = sum.chains[j] + e;
      weighted.chains[j] = V::fma(m + v, e, weighted.chains[j]);
      spread.chains[j] = V::fma(v, e, spread.chains[j]);
    }
    tail.sum = static_cast<float>(sum.total());
    tail.weighted = static_cast<float>(weighted.total());

    constexpr int kVectors = MCHEADS_TOP / kWidth;
    double expected_entropy = 0, log_sum_exp = 0, tail_share = 0;
    V likely[kVectors];
    for (int j = 0; j < kVectors; ++j) likely[j] = V(0.f);
    for (int64_t t = 0; t < model.passes; ++t, z += MCHEADS_TOP) {
      V best = V::load(z);
      for (int j = 1; j < kVectors; ++j) best = V::max(V::load(z + j * kWidth), best);
      SoftmaxRow row = tail;
      const float likeliest_logit = best.maximum();
      row.rescale(likeliest_logit > tail.top ? likeliest_logit : tail.top);
      const float tail_sum = row.sum;
      V e[kVectors], likely_sum(0.f), likely_weighted(0.f);
      for (int j = 0; j < kVectors; ++j) {
        const V shifted = V::load(z + j * kWidth) - V(row.top);
        e[j] = exponential(shifted);
        likely_sum = likely_sum + e[j];
        likely_weighted = V::fma(shifted, e[j], likely_weighted);
      }
      row.sum += static_cast<float>(likely_sum.total());
      row.weighted += static_cast<float>(likely_weighted.total());
      const V inverse(1.f / row.sum);
      for (int j = 0; j < kVectors; ++j) likely[j] = V::fma(e[j], inverse, likely[j]);
      const double entropy = row.entropy();
      expected_entropy += entropy > 0 ? entropy : 0;
      log_sum_exp += row.log_sum_exp();
      tail_share += tail_sum / row.sum;
    }
    if (!(tail_share * (1 + spread.total() / tail.sum) <= MCHEADS_TAIL * model.passes)) {
      slab.heavy_tail[place] = true;
      return;
    }
    alignas(kAlignment) float likely_share[MCHEADS_TOP];
    const V passes(static_cast<float>(model.passes));
    for (int j = 0; j < kVectors; ++j) (likely[j] / passes).store(likely_share + j * kWidth);
    const V tail_factor(static_cast<float>(tail_share / tail.sum / model.passes));
    for (int64_t c = 0; c < padded; c += kWidth) (V::load(share + c) * tail_factor).store(share + c);
    for (int i = 0; i < count; ++i) share[chosen[i]] = likely_share[i];
    Kernels<V>::finish(slab, picture, head, expected_entropy / model.passes, log_sum_exp / model.passes);
  }
};

}  // namespace
}  // namespace trivium
