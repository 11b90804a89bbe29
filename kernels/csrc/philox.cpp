// Philox4x32-10 words for dropout masks, the same as kernels/masks.py draws.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) void trivium_uniform_words(uint32_t* words, int64_t passes,
                                                                             int64_t units, uint64_t seed) {
  for (int64_t block = 0; block * 4 < passes; ++block)
    for (int64_t unit = 0; unit < units; ++unit) {
      uint32_t c[4] = {uint32_t(unit), uint32_t(block), 0, 0};
      uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
      for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t(c[0]) * 0xD2511F53u, b = uint64_t(c[2]) * 0xCD9E8D57u;
        const uint32_t n0 = uint32_t(b >> 32) ^ c[1] ^ k0, n2 = uint32_t(a >> 32) ^ c[3] ^ k1;
        c[0] = n0, c[1] = uint32_t(b), c[2] = n2, c[3] = uint32_t(a);
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
      }
      for (int64_t word = 0; word < 4 && block * 4 + word < passes; ++word) words[(block * 4 + word) * units + unit] = c[word];
    }
}
