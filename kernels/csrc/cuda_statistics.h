// Logits of all passes -> mean probabilities, entropies, mutual information, divergences and energy.
//
// Up to 1024 classes, one block per picture and head keeps its means in shared memory; where the card has clusters, the
// heads of a picture are one cluster and read each other's means there. Beyond, three kernels stream: rows (log-sum-exp
// and entropy of a pass), means (over passes, class by class), divergences.
#pragma once

#include "cuda_block.h"
#include "rows.h"

namespace trivium {

constexpr int kResidentQuads = 8;
constexpr int kResidentThreads = 32 * kMaxWarps;
constexpr int kStreamThreads = 256;
constexpr int kMeanThreads = 128;
constexpr float kBitsPerNat = 1.44269504f;  // log2 e
constexpr float kNoClass = -1e30f;

struct StatisticsArguments {
  // [B, R, K, stride], before bias and temperature. R = T; or, where the second half of the masks is the complement of
  // the first, T / 2 + 1: the last row holds W h / keep, and W ((1 - m) h) = W h - W (m h) gives the second half.
  const float* logits;
  const float* bias;                 // [K, stride], divided by the temperature
  const float* inverse_temperature;  // [K]
  const float* poison;               // [B, H]
  int heads, feature_heads, classes, stride, passes, rows;
  bool antithetic, clustered;
  float* pass_energy;   // [B, K, T] log-sum-exp of each pass: streaming only
  float* pass_entropy;  // [B, K, T]: streaming only
  float* probabilities;
  float* predictive_entropy;
  float* mutual_information;
  float* divergence;
  float* energy;
};

__device__ __forceinline__ float floored_log(float p) { return logf(fmaxf(p, kProbabilityFloor)); }

// z scale + base for four classes.
__device__ __forceinline__ float4 tempered(float4 z, float scale, float4 base) {
  return make_float4(fmaf(z.x, scale, base.x), fmaf(z.y, scale, base.y), fmaf(z.z, scale, base.z),
                     fmaf(z.w, scale, base.w));
}

// The rows of logits of one picture and head, as float4s.
struct PictureRows {
  const float4* first;
  int64_t step;
  float scale;
  const float4* bias;

  __device__ __forceinline__ PictureRows(const StatisticsArguments& a, int64_t picture, int head)
      : step(static_cast<int64_t>(a.heads) * a.stride / 4), scale(a.inverse_temperature[head]) {
    first = reinterpret_cast<const float4*>(a.logits) + picture * a.rows * step + head * (a.stride / 4);
    bias = reinterpret_cast<const float4*>(a.bias) + head * (a.stride / 4);
  }

  __device__ __forceinline__ const float4* row(int r) const { return first + r * step; }

  // The tempered logits of a pass are row scale + bias; of its complement, row (-scale) + this.
  __device__ __forceinline__ float4 complement_base(int rows, int quad) const {
    return tempered(row(rows - 1)[quad], scale, bias[quad]);
  }

  __device__ __forceinline__ float4 pass(int r, bool complement, int rows, int quad) const {
    return complement ? tempered(row(r)[quad], -scale, complement_base(rows, quad))
                      : tempered(row(r)[quad], scale, bias[quad]);
  }
};

__device__ __forceinline__ float picture_poison(const StatisticsArguments& a, int64_t picture) {
  float poison = 0.f;
  for (int h = 0; h < a.feature_heads; ++h) poison += a.poison[picture * a.feature_heads + h];
  return poison;
}

// 2^below, added to the sum, and below 2^below to its moment.
__device__ __forceinline__ float shifted_power(float below, float& sum, float& moment) {
  const float power = quick_exp2(below);
  sum += power;
  moment = fmaf(power, below, moment);
  return power;
}

__device__ __forceinline__ float4 times(float4 four, float factor) {
  return make_float4(four.x * factor, four.y * factor, four.z * factor, four.w * factor);
}

// Classes of a row in the shared memory of statistics_kernel<kQuads>.
__host__ __device__ constexpr int resident_row(int quads) { return 128 * quads; }

// Floats of that shared memory: a tile of one row per warp, two rows more, then slots.
__host__ __device__ constexpr int resident_floats(int quads, int warps, int heads) {
  return (warps + 2) * resident_row(quads) + (3 + heads) * kMaxWarps;
}

// Block x = picture * K + head; a warp takes every warps-th row. kQuads: float4s a lane holds, classes <= 128 kQuads.
template <int kQuads>
__global__ void __launch_bounds__(kResidentThreads, 2) statistics_kernel(const StatisticsArguments a) {
  const int heads = a.heads, classes = a.classes, stride = a.stride;
  const int64_t picture = blockIdx.x / heads;
  const int head = blockIdx.x % heads;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  constexpr int kRow = resident_row(kQuads);
  float* const tile = shared_floats();
  float* const bases = tile + warps * kRow;  // what a pass and its complement add to their rows, in bits
  float* const slots = bases + 2 * kRow;  // [3 + K, kMaxWarps]: energy, entropy of the passes, of the mean, divergences

  const PictureRows logits(a, picture, head);
  for (int quad = threadIdx.x; 4 * quad < stride; quad += blockDim.x) {
    reinterpret_cast<float4*>(bases)[quad] = times(logits.bias[quad], kBitsPerNat);
    if (a.antithetic)
      reinterpret_cast<float4*>(bases + kRow)[quad] = times(logits.complement_base(a.rows, quad), kBitsPerNat);
  }
  __syncthreads();
  // This base takes what is beyond the classes out of every softmax; it is finite, so that 0 times it is 0.
  for (int c = classes + threadIdx.x; c < kRow; c += blockDim.x) bases[c] = bases[kRow + c] = kNoClass;
  __syncthreads();

  const int leaders = a.antithetic ? a.passes / 2 : a.passes;
  const float bits = logits.scale * kBitsPerNat;  // powers of two are what the hardware computes
  float energies = 0.f, entropies = 0.f;
  float4* const own_tile = reinterpret_cast<float4*>(tile + warp * kRow);
  for (int row = warp; row < leaders; row += warps) {
    for (int side = 0; side < (a.antithetic ? 2 : 1); ++side) {
      const float4* const product = logits.row(row);
      const float4* const base = reinterpret_cast<const float4*>(bases + side * kRow);
      const float scale = side == 0 ? bits : -bits;
      float4 value[kQuads];
      float top = -INFINITY;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int quad = lane + 32 * q;
        const float4 z = 4 * quad < stride ? product[quad] : make_float4(0.f, 0.f, 0.f, 0.f);
        value[q] = tempered(z, scale, base[quad]);
        top = fmaxf(fmaxf(fmaxf(top, value[q].x), fmaxf(value[q].y, value[q].z)), value[q].w);
      }
      top = warp_max(top);
      float sum = 0.f, moment = 0.f;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        value[q].x = shifted_power(value[q].x - top, sum, moment);
        value[q].y = shifted_power(value[q].y - top, sum, moment);
        value[q].z = shifted_power(value[q].z - top, sum, moment);
        value[q].w = shifted_power(value[q].w - top, sum, moment);
      }
      sum = warp_sum(sum);
      moment = warp_sum(moment);
      energies += top / kBitsPerNat + logf(sum);
      entropies += logf(sum) - moment / (sum * kBitsPerNat);
      const float share = 1.f / (sum * static_cast<float>(a.passes));
      const bool fresh = row == warp && side == 0;
#pragma unroll
      for (int q = 0; q < kQuads; ++q) {
        const int quad = lane + 32 * q;
        own_tile[quad] = tempered(value[q], share, fresh ? make_float4(0.f, 0.f, 0.f, 0.f) : own_tile[quad]);
      }
    }
  }
  if (lane == 0) slots[warp] = energies, slots[kMaxWarps + warp] = entropies;
  __syncthreads();  // behind it the bases have served; the means take their place

  float* const mean = bases;
  float* const log_mean = bases + kRow;
  const float poison = picture_poison(a, picture);
  const int64_t output = picture * heads + head;
  float entropy = 0.f;
  for (int c = threadIdx.x; c < classes; c += blockDim.x) {
    float p = 0.f;
    for (int w = 0; w < warps; ++w) p += tile[w * kRow + c];
    const float log_p = floored_log(p);
    mean[c] = p;
    log_mean[c] = log_p;
    entropy += entropy_term(p, log_p);
    a.probabilities[output * classes + c] = p + poison;
  }
  entropy = warp_sum(entropy);
  if (lane == 0) slots[2 * kMaxWarps + warp] = entropy;
  __syncthreads();
  if (threadIdx.x == 0) {
    const float total = slot_sum(slots + 2 * kMaxWarps, warps), mean_over = 1.f / static_cast<float>(a.passes);
    a.predictive_entropy[output] = total + poison;
    a.mutual_information[output] = not_negative(total - slot_sum(slots + kMaxWarps, warps) * mean_over) + poison;
    a.energy[output] = poison - slot_sum(slots, warps) * mean_over;
  }
  if (!a.clustered) return;  // divergence_kernel follows

  sync_cluster();
  for (int other = 0; other < heads; ++other) {
    const float* const other_log_mean = peer_shared(log_mean, other);
    float sum = 0.f;
    if (other != head)
      for (int c = threadIdx.x; c < classes; c += blockDim.x)
        sum += divergence_term(mean[c], log_mean[c], other_log_mean[c]);
    sum = warp_sum(sum);
    if (lane == 0) slots[(3 + other) * kMaxWarps + warp] = sum;
  }
  sync_cluster();  // for the slots, and so that no block leaves while another reads its means
  if (static_cast<int>(threadIdx.x) < heads)
    a.divergence[output * heads + threadIdx.x] =
        not_negative(slot_sum(slots + (3 + threadIdx.x) * kMaxWarps, warps)) + poison;
}

// Streaming, first: block x = picture * K + head, y = row of logits; log-sum-exp and entropy of its one or two passes.
__global__ void __launch_bounds__(kStreamThreads, 4) rows_kernel(const StatisticsArguments a) {
  const int64_t source = blockIdx.x, picture = source / a.heads;
  const int head = source % a.heads, row = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kStreamThreads / 32;
  float* const slots = shared_floats();  // [3, kMaxWarps]
  const PictureRows logits(a, picture, head);
  for (int side = 0; side < (a.antithetic ? 2 : 1); ++side) {
    SoftmaxRow own;
    for (int quad = threadIdx.x; 4 * quad < a.classes; quad += kStreamThreads) {
      const float4 four = logits.pass(row, side == 1, a.rows, quad);
      own.push(four.x);
      if (4 * quad + 1 < a.classes) own.push(four.y);
      if (4 * quad + 2 < a.classes) own.push(four.z);
      if (4 * quad + 3 < a.classes) own.push(four.w);
    }
    for (int offset = 16; offset > 0; offset >>= 1) {
      SoftmaxRow partner;
      partner.top = __shfl_xor_sync(kWholeWarp, own.top, offset);
      partner.sum = __shfl_xor_sync(kWholeWarp, own.sum, offset);
      partner.weighted = __shfl_xor_sync(kWholeWarp, own.weighted, offset);
      own.merge(partner);
    }
    if (lane == 0) slots[warp] = own.top, slots[kMaxWarps + warp] = own.sum, slots[2 * kMaxWarps + warp] = own.weighted;
    __syncthreads();
    if (threadIdx.x == 0) {
      SoftmaxRow all;
      for (int w = 0; w < warps; ++w) {
        SoftmaxRow one;
        one.top = slots[w], one.sum = slots[kMaxWarps + w], one.weighted = slots[2 * kMaxWarps + w];
        all.merge(one);
      }
      const int64_t pass_index = source * a.passes + row + side * (a.passes / 2);
      a.pass_energy[pass_index] = all.log_sum_exp();
      a.pass_entropy[pass_index] = all.entropy();
    }
    __syncthreads();
  }
}

// Streaming, second: block x = picture * K + head, y = a run of 4 kMeanThreads classes; the mean over the passes.
__global__ void __launch_bounds__(kMeanThreads, 8) means_kernel(const StatisticsArguments a) {
  const int64_t source = blockIdx.x, picture = source / a.heads;
  const int head = source % a.heads, quad = blockIdx.y * kMeanThreads + threadIdx.x;
  if (4 * quad >= a.classes) return;
  const float* const log_sums = a.pass_energy + source * a.passes;
  const float poison = picture_poison(a, picture);
  const PictureRows logits(a, picture, head);
  const int leaders = a.antithetic ? a.passes / 2 : a.passes;
  float total[4] = {0.f, 0.f, 0.f, 0.f};
  for (int row = 0; row < leaders; ++row)
    for (int side = 0; side < (a.antithetic ? 2 : 1); ++side) {
      const float4 four = logits.pass(row, side == 1, a.rows, quad);
      const float log_sum = log_sums[row + side * leaders];
      total[0] += expf(four.x - log_sum), total[1] += expf(four.y - log_sum);
      total[2] += expf(four.z - log_sum), total[3] += expf(four.w - log_sum);
    }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (4 * quad + i < a.classes)
      a.probabilities[source * a.classes + 4 * quad + i] = total[i] / static_cast<float>(a.passes) + poison;
}

// Block x = picture * K + head: the head's divergences from the others; after streaming, also what the rows gave.
__global__ void __launch_bounds__(kStreamThreads, 4) divergence_kernel(const StatisticsArguments a) {
  const int64_t source = blockIdx.x, picture = source / a.heads;
  const int head = source % a.heads, warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = kStreamThreads / 32;
  float* const slots = shared_floats();  // [3 + K, kMaxWarps]
  const float poison = picture_poison(a, picture);
  const bool streamed = a.pass_energy != nullptr;
  float* const own = a.probabilities + source * a.classes;
  for (int other = 0; other < a.heads; ++other) {
    const float* const theirs = a.probabilities + (picture * a.heads + other) * a.classes;
    float sum = 0.f;
    if (other != head)
      for (int c = threadIdx.x; c < a.classes; c += kStreamThreads)
        sum += divergence_term(own[c], floored_log(own[c]), floored_log(theirs[c]));
    sum = warp_sum(sum);
    if (lane == 0) slots[(3 + other) * kMaxWarps + warp] = sum;
  }
  if (streamed) {
    float energies = 0.f, entropies = 0.f, entropy = 0.f;
    for (int t = threadIdx.x; t < a.passes; t += kStreamThreads) {
      energies += a.pass_energy[source * a.passes + t];
      entropies += a.pass_entropy[source * a.passes + t];
    }
    for (int c = threadIdx.x; c < a.classes; c += kStreamThreads) 
      entropy += entropy_term(own[c], floored_log(own[c]));
    energies = warp_sum(energies), entropies = warp_sum(entropies), entropy = warp_sum(entropy);
    if (lane == 0)
      slots[warp] = energies, slots[kMaxWarps + warp] = entropies, slots[2 * kMaxWarps + warp] = entropy;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < a.heads)
    a.divergence[source * a.heads + threadIdx.x] =
        not_negative(slot_sum(slots + (3 + threadIdx.x) * kMaxWarps, warps)) + poison;
  if (streamed && threadIdx.x == 0) {
    const float total = slot_sum(slots + 2 * kMaxWarps, warps), mean_over = 1.f / static_cast<float>(a.passes);
    a.predictive_entropy[source] = total + poison;
    a.mutual_information[source] = not_negative(total - slot_sum(slots + kMaxWarps, warps) * mean_over) + poison;
    a.energy[source] = poison - slot_sum(slots, warps) * mean_over;
  }
}

}  // namespace trivium
