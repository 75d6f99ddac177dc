"""Grammars on kernels that the CPU executes: what the reference says, drafted or not, beside others and displaced."""

import random

import checkpoints
import pytest
import test_device_runner
from guesser import Knowing
from msgspec.structs import replace
from test_device_runner import Late, model, wanted  # noqa: F401  # a fixture

from fwd.engine import ring
from fwd.engine.device_runner import DeviceRunner
from fwd.engine.grammar import Grammars
from fwd.engine.runner import ModelRunner
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Vocabulary
from fwd.protocol.values import EMPTY, Limits

EOS, BYTES = (0, 1), range(256)
GRAMMARS = (
    r"regex:[a-c]{4,}x?",
    r"regex:(ab|ba|\n)*(12|[0-9]{3})",
    'json_schema:{"enum": ["abcabc", true, 12345, "abd"]}',
    "",
)
TOKENS = 12


class Engine(test_device_runner.Engine):
    """That one with grammars over single bytes."""

    def __init__(self, model, runner=DeviceRunner, **settings):  # noqa: F811
        super().__init__(model, runner, **settings)
        self.loop._grammars = Grammars(checkpoints.VOCAB)
        texts = memoryview(bytes(BYTES))
        self.loop._handle(Vocabulary(text=texts, ends=pack_ids(range(1, 257)), special=pack_ids([2]), eos=EOS))


def requests(seed, count):
    limits = Limits(max_tokens=TOKENS, stop_ids=EOS)
    made = [replace(each, limits=limits, emitted=EMPTY) for each in wanted(seed, count)]
    return [replace(each, grammar=GRAMMARS[number % len(GRAMMARS)]) for number, each in enumerate(made)]


def answers(told):
    """Ids by request, with some that come after an end."""
    return {number: [token[0] for token in tokens[:-1]] + [*EOS, 97, 98] for number, tokens in enumerate(told, 1)}


@pytest.fixture(scope="module")
def told(model):  # noqa: F811
    return Engine(model, ModelRunner).run(*requests(1, 5))


def test_the_device_draws_what_grammars_let_through(model, told):  # noqa: F811
    assert Engine(model).run(*requests(1, 5), between=2) == told
    for number, request in enumerate(requests(1, 5)):
        if request.grammar.startswith("regex:[a-c]"):
            assert {token[0] for token in told[number][:4]} <= set(b"abc")
    assert sum(result[-1][0] == "stop" for result in told) >= 2


@pytest.mark.parametrize(
    ("runner", "nature"), [(ModelRunner, "fool"), (DeviceRunner, "oracle"), (DeviceRunner, "fool")]
)
def test_drafts_change_nothing(model, told, runner, nature):  # noqa: F811
    guesser = Knowing(random.Random(nature), nature, answers(told))
    engine = Engine(model, runner, speculator=guesser, seqs=3)
    assert engine.run(*requests(1, 5), between=1) == told
    assert guesser.settled


def test_beside_others_displaced_and_late(model, told):  # noqa: F811
    assert Engine(model, Late, seqs=3).run(*requests(1, 5), between=3) == told
    assert Engine(model, seqs=16, pages=17 if model.kv == "auto" else 0).run(*requests(1, 5)) == told


def test_a_mask_that_is_told_once_is_noticed(model, told, monkeypatch):  # noqa: F811
    """A planted mistake: what a row may draw is taken for what never changes."""
    slot, draw = ring.Slot, ring.Slot._draw

    def once(self, row, line, request, place):
        known = self._told[row] == (request, line)
        constrain = self._lines.constrain
        self._lines.constrain = (lambda *_: None) if known else constrain
        draw(self, row, line, request, place)
        self._lines.constrain = constrain

    monkeypatch.setattr(slot, "_draw", once)
    assert Engine(model).run(*requests(1, 5)) != told


def test_masks_that_are_one_row_off_are_noticed(model, told, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ring, "mask_of", lambda request, _: request.grammar.masks[0] if request.grammar else None)
    guesser = Knowing(random.Random(1), "oracle", answers(told))
    assert Engine(model, speculator=guesser).run(*requests(1, 5)) != told
