"""Counter-based noise for sampling: a function of (seed, position, token) and of nothing else. No torch here.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). splitmix64: Steele et al. (2014).
"""

import numpy as np
from numpy.typing import NDArray

Words = tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64], NDArray[np.uint64]]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MASK64 = (1 << 64) - 1


def choice_seed(seed: int, choice: int) -> int:
    """Return the 64-bit seed of choice n of a request: `seed` for 0, else splitmix64 of seed + n·golden ratio."""
    if choice == 0:
        return seed & _MASK64
    mixed = (seed + choice * 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Return the four 32-bit words (held in uint64) of Philox4x32-10 for counters of one shape and a two-word key."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1 = (p1 >> _SHIFT) ^ x1 ^ np.uint64(k0), p1 & _LOW
        x2, x3 = (p0 >> _SHIFT) ^ x3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return x0, x1, x2, x3


def gumbel(seed: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return standard Gumbel noise [tokens] float64: g = −log(−log1p(−u)), u = (x + ½)·2⁻³².

    x is the first word of Philox with key (seed low, seed high) and counter (token, position low, 0, 0).
    """
    zero = np.zeros_like(tokens, dtype=np.uint64)
    counter = (tokens.astype(np.uint64), zero + np.uint64(position & 0xFFFFFFFF), zero, zero)
    words = philox4x32(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    uniform = (words[0].astype(np.float64) + 0.5) * 2.0**-32
    noise: NDArray[np.float64] = -np.log(-np.log1p(-uniform))
    return noise
