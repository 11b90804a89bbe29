"""Dropout masks as data: Philox4x32-10 keyed by (seed, pass, unit), so that every backend and batch sees the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dropout_masks(passes: int, units: int, keep: float, seed: int) -> NDArray[np.uint8]:
    """Balanced Monte-Carlo-dropout masks, uint8 [passes, units]; 1 keeps the unit.

    Every unit is kept in keep * passes of the passes (where that is no whole number, in the number below or above it,
    drawn so that the mean is right), which estimates entropies better than independent draws of the same number.
    With keep = 1/2 and an even number of passes the masks are antithetic as well: the second half is the complement
    of the first, so that a kernel obtains half of the logits by one subtraction from W h.

    Raises: ValueError for passes < 1, units < 1 or keep outside (0, 1].
    """
    if passes < 1 or units < 1 or not 0.0 < keep <= 1.0:
        raise ValueError(f"passes and units must be >= 1 and keep in (0, 1], got {passes}, {units}, {keep}")
    if keep == 0.5 and passes % 2 == 0:
        half = (uniform_words(passes // 2, units, seed) >> np.uint32(31)).astype(np.uint8)
        return np.concatenate([half, 1 - half])
    words = uniform_words(passes + 1, units, seed)
    # The last row decides, unit by unit, whether the fraction of keep * passes rounds up.
    whole = int(np.floor(keep * passes + 1e-9))
    fraction = max(keep * passes - whole, 0.0)
    up = words[passes] < np.uint32(round(fraction * 2**32))
    rank = np.argsort(np.argsort(words[:passes], axis=0, kind="stable"), axis=0, kind="stable")
    return np.asarray(rank < whole + up.astype(np.int64), np.uint8)


def uniform_words(passes: int, units: int, seed: int) -> NDArray[np.uint32]:
    """Uniform 32-bit words [passes, units]: word t % 4 of Philox(counter = (unit, t // 4, 0, 0), key = seed)."""
    unit, block = np.arange(units, dtype=np.uint32), np.arange(-(-passes // 4), dtype=np.uint32)
    counter = np.zeros((4, block.size, units), np.uint32)
    counter[0], counter[1] = unit[None, :], block[:, None]
    words = philox4x32(counter, seed)
    return words.transpose(1, 0, 2).reshape(-1, units)[:passes]


def philox4x32(counter: NDArray[np.uint32], seed: int) -> NDArray[np.uint32]:
    """Philox4x32-10 (Salmon et al. 2011): counter [4, ...] under a 64-bit key gives four uniform words [4, ...]."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            b & low,
            (a >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            a & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3]).astype(np.uint32)
