"""The sampler: its distribution, its thresholds against brute force, its penalties against a naive version."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fwd.kernels.ops import Draw
from fwd.kernels.reference import Reference
from fwd.kernels.sampling import REACH, UNIT, adjust, keep, log_total, most_likely, sample_row, temper, weigh

OPS = Reference()
coarse = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=2, max_size=60)  # many ties


def row(values):
    return np.array(values, dtype=np.float32)


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (1.7, 0), (1.0, 5)])
def test_draws_follow_softmax(temperature, top_k):
    logits = row([1.5, 0.3, -0.7, 1.1, 0.0, 0.9, -1.5, 0.4])
    kept = most_likely(logits, top_k) if top_k else np.arange(8)
    weights = np.exp(logits[kept].astype(np.float64) / temperature)
    draws = 8000
    drawn = [sample_row(logits, Draw(seed=11, position=p, temperature=temperature, top_k=top_k)) for p in range(draws)]
    counts = np.bincount(drawn, minlength=8)
    assert counts.sum() == counts[kept].sum() == draws
    # 99.9th percentile of chi-square: 24.3 at 7 degrees of freedom, 18.5 at 4
    assert chi_square(counts[kept], weights / weights.sum()) < {8: 24.3, 5: 18.5}[len(kept)]


def test_seeds_of_choices_are_independent_draws():
    logits = row([0.0] * 8)
    drawn = [sample_row(logits, Draw(seed=seed, position=3)) for seed in range(4000)]
    assert chi_square(np.bincount(drawn, minlength=8), np.full(8, 1 / 8)) < 24.3
    pairs = np.bincount([8 * a + b for a, b in pairwise(drawn)], minlength=64)
    assert chi_square(pairs, np.full(64, 1 / 64)) < 103.4  # 99.9th percentile at 63


@given(coarse)
def test_greedy_is_argmax_and_ties_go_to_the_lowest_id(values):
    assert sample_row(row(values), Draw(temperature=0.0)) == values.index(max(values))


@given(coarse, st.integers(1, 60))
def test_top_k_keeps_exactly_k_of_the_best_and_the_lowest_ids_of_equals(values, k):
    kept = keep(row(values), Draw(top_k=k)).tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert kept == sorted(order[: min(k, len(values))])


def brute_force(values, top_k, top_p, min_p):
    """The definition, in exact integers and one token at a time."""
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: top_k or None]
    best = row(values)[order[0]]
    weights = weigh(row(values)[order], best).tolist()
    kept, before = [], 0
    for token, weight in zip(order, weights, strict=True):
        if top_p >= 1 or before < float(np.float32(top_p)) * sum(weights) or not kept:
            kept.append((token, weight))
        before += weight
    return sorted(token for token, weight in kept if weight >= float(np.float32(min_p)) * UNIT)


def test_weights_are_those_of_the_exponential():
    values = np.concatenate((np.linspace(-REACH, 0, 20001), [-20.79, -20.8])).astype(np.float32)
    exact = [math.exp(value) * UNIT for value in values.astype(np.float64).tolist()]
    weights = weigh(values, np.float32(0.0)).tolist()
    assert all(abs(weight - math.floor(number)) <= 1 for weight, number in zip(weights, exact, strict=True))
    assert weights[20000:] == [UNIT, 1, 0]
    assert weights[0] == 0, "what is further away has no weight either"


def test_ids_without_weight_are_left_out_only_where_something_limits():
    values = row([0.0, -20.0, -21.0, -30.0])
    assert keep(values, Draw()).tolist() == [0, 1, 2, 3]
    assert keep(values, Draw(top_k=3)).tolist() == keep(values, Draw(min_p=1e-30)).tolist() == [0, 1]


def test_what_is_subnormal_is_zero_and_what_is_beyond_float32_its_largest():
    tiny = row([-0.0, 1e-39, -1e-39, 0.0])
    assert sample_row(tiny, Draw(temperature=0.0)) == sample_row(tiny, Draw(seed=1, top_k=1)) == 0
    assert temper(row([3e38, -3e38, -np.inf]), 0.5).tolist() == [np.finfo(np.float32).max, -np.inf, -np.inf]
    assert log_total(row([3e38, -3e38])) == row([3e38])[0]


@pytest.mark.parametrize("limit", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_where_every_id_is_banned_the_first_is_drawn(limit):
    assert sample_row(row([1.0, 2.0, 3.0]), Draw(banned=(0, 1, 2), **limit)) == 0


@settings(max_examples=200)
@given(coarse, st.integers(0, 20), st.floats(0.01, 1.0), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_thresholds_match_their_definition(values, top_k, top_p, min_p):
    kept = keep(row(values), Draw(top_k=top_k, top_p=top_p, min_p=min_p)).tolist()
    assert kept == brute_force(values, top_k, top_p, min_p)


@given(coarse, st.floats(0.01, 0.99))
def test_top_p_does_not_depend_on_where_a_token_stands(values, top_p):
    distinct = row(values) + np.arange(len(values), dtype=np.float32) * np.float32(1 / 64)
    if len(np.unique(distinct)) < len(distinct):
        return
    turned = np.roll(distinct, 5)
    back = {(token - 5) % len(values) for token in keep(turned, Draw(top_p=top_p)).tolist()}
    assert back == set(keep(distinct, Draw(top_p=top_p)).tolist())


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 15), max_size=30),
    st.lists(st.integers(0, 15), max_size=30),
    st.sampled_from([1.0, 0.5, 1.3]),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([0.0, -0.4]),
)
def test_penalties_match_a_naive_version(prompt, output, repetition, presence, frequency):
    values = [(7 * i % 16 - 8) / 2 for i in range(16)]
    expected = list(values)
    for token in range(16):
        if token in prompt or token in output:
            expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
        expected[token] -= frequency * output.count(token) + presence * (token in output)
    expected[3] += 2.5
    expected[9] = -math.inf
    draw = Draw(
        seen={*prompt, *output},
        counts=Counter(output),
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        bias={3: 2.5},
        banned=(9,),
    )
    logits = row(values)
    np.testing.assert_allclose(adjust(logits, draw), row(expected), rtol=1e-6, atol=1e-6)
    assert logits.tolist() == values, "the logits themselves are not touched"


def test_banned_ids_are_never_drawn_even_at_the_highest_temperature():
    logits = row([9.0, 0.0, 0.0])
    drawn = {sample_row(logits, Draw(seed=1, position=p, temperature=2.0, banned=(0,))) for p in range(200)}
    assert drawn == {1, 2}


@settings(max_examples=60)
@given(coarse, st.randoms(use_true_random=False), st.integers(0, 5), st.sampled_from([0.0, 0.8]))
def test_masked_ids_are_as_if_they_were_not_there(values, random, top_k, temperature):
    """The draw is that of the ids that are left, whose noise is their own."""
    kept = sorted(random.sample(range(len(values)), random.randrange(1, len(values) + 1)))
    bits = np.zeros(-(-len(values) // 32) * 32, np.bool_)
    bits[[*kept, *range(len(values), len(bits))]] = True
    mask = np.packbits(bits, bitorder="little").view(np.uint32)
    banned = [token for token in range(len(values)) if token not in kept]
    draw = Draw(seed=3, position=len(kept), temperature=temperature, top_k=top_k, mask=mask)
    masked = sample_row(row(values), draw)
    assert masked in kept
    assert masked == sample_row(row(values), replace(draw, mask=None, banned=banned))
    assert adjust(row(values), draw)[kept].tolist() == row(values)[kept].tolist()


def test_where_every_id_is_masked_the_first_is_drawn():
    for limit in ({}, {"temperature": 0.0}, {"top_k": 2}):
        assert sample_row(row([1.0, 2.0, 3.0]), Draw(mask=np.zeros(1, np.uint32), **limit)) == 0


def test_a_row_draws_the_same_beside_any_others():
    logits = torch.randn(16, 777, generator=torch.Generator().manual_seed(5)) * 3
    draws = [Draw(seed=i, position=9 + i, temperature=0.9, top_p=0.9, top_k=i, top_logprobs=i) for i in range(16)]
    whole = OPS.sample(logits, draws)
    for index in range(16):
        alone = OPS.sample(logits[index : index + 1], draws[index : index + 1])
        assert alone.ids[0] == whole.ids[index]
        assert alone.logprobs[0].item().hex() == whole.logprobs[index].item().hex()
        assert (alone.tops[0].ids, alone.tops[0].logprobs) == (whole.tops[index].ids, whole.tops[index].logprobs)


def test_logprobs_are_those_of_the_raw_logits():
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(6))
    sampled = OPS.sample(logits, [Draw(seed=2, position=p, temperature=0.3, bias={5: 50.0}) for p in range(4)])
    assert sampled.ids.tolist() == [5] * 4
    torch.testing.assert_close(sampled.logprobs, logits.log_softmax(-1)[:, 5])


def test_top_logprobs_stand_by_logit_then_id():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 1.0]])
    scored = OPS.score(logits, [4], [4])
    assert scored.tops[0].ids == [1, 3, 2, 4]
    assert scored.tops[0].logprobs[3] == pytest.approx(scored.logprobs[0].item())
    assert OPS.score(logits, [4], [0]).tops[0].ids == []
    assert OPS.score(logits, [4], [-1]).tops == [None]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_told_and_disturbs_no_other(poison):
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(7))
    draws = [Draw(seed=1, position=p) for p in range(5)]
    healthy = OPS.sample(logits, draws)
    logits[2, 40] = poison
    sampled = OPS.sample(logits, draws)
    assert sampled.finite.tolist() == [True, True, False, True, True]
    others = [0, 1, 3, 4]
    assert sampled.ids[others].tolist() == healthy.ids[others].tolist()
    assert sampled.logprobs[others].tolist() == healthy.logprobs[others].tolist()
