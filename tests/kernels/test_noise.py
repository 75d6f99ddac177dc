"""Noise: Philox against Random123's known answers, and independence of everything but (seed, position, token)."""

import numpy as np
import pytest

from fwd.kernels.noise import choice_seed, gumbel, philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    found = philox4x32(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in found) == words


def test_noise_of_a_token_depends_on_no_other_token():
    tokens = np.arange(300)
    whole = gumbel(2**63 + 5, 17, tokens)
    for picked in (tokens[:1], tokens[7:20], tokens[::-3], tokens[[299, 0, 5]]):
        assert np.array_equal(gumbel(2**63 + 5, 17, picked), whole[picked])


def test_noise_differs_by_seed_half_and_position():
    tokens = np.arange(64)
    draws = [gumbel(seed, position, tokens) for seed, position in ((1, 1), (2, 1), (1 + (1 << 32), 1), (1, 2))]
    assert all(not np.array_equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_noise_is_finite_and_has_the_mean_and_variance_of_gumbel():
    noise = np.concatenate([gumbel(3, position, np.arange(4096)) for position in range(50)])
    assert np.isfinite(noise).all()
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.01)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.03)


def test_choice_seeds_are_distinct_64_bit_and_the_first_is_the_seed():
    seeds = {choice_seed(seed, choice) for seed in (0, 1, 2**64 - 1) for choice in range(100)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert choice_seed(12345, 0) == 12345
    assert choice_seed(0, 1) == 0xE220A8397B1DCDAF  # the first output of splitmix64 from state 0
