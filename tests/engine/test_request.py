"""What a request knows of itself."""

import random
from array import array
from collections import Counter

import pytest
from mock_engine import submit

from fwd.engine.request import History, Request
from fwd.errors import BadFrameError


@pytest.mark.parametrize("seed", range(5))
def test_the_history_is_counted_once_as_it_grows(seed):
    rng = random.Random(seed)
    ids = array("i", [rng.randrange(20) for _ in range(rng.randrange(1, 50))])
    prompt, history = len(ids), History()
    for _ in range(30):
        ids.extend(rng.randrange(20) for _ in range(rng.randrange(4)))
        seen, counts = history.read(ids, prompt)

        assert seen == set(ids)
        assert counts == Counter(ids[prompt:])


def test_ids_that_are_not_whole_are_a_bad_frame():
    with pytest.raises(BadFrameError, match="no whole number"):
        Request(submit(1, [1, 2], emitted=memoryview(b"abc")))


def test_requests_with_one_prompt_have_one_prefill_key():
    keys = {Request(submit(n, [1, 2, 3], seed=n, choice=n)).prefill_key for n in range(3)}
    others = [submit(9, [1, 2, 4]), submit(9, [1, 2, 3], adapter="a"), submit(9, [1, 2, 3], prompt_logprobs=0)]

    assert len(keys) == 1
    assert not keys & {Request(each).prefill_key for each in others}
