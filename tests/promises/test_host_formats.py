"""`--device host` on the embedded model in other formats, against the reference."""

import shutil
from functools import cache

import pytest
from forced import Forced, assert_alike, held_out
from quantised import quantise

from fwd.config import Config

FEWER = 64  # positions that are teacher-forced
LAYOUTS = {
    "fp8": "fp8-channel",
    "mxfp4": "mxfp4-compressed",
    "nvfp4": "nvfp4-compressed",
    "int4": "awq",
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder of the embedded model in a format, written once."""

    @cache
    def made(kind):
        place = tmp_path_factory.mktemp(kind)
        quantise(Config().folder, LAYOUTS[kind], place / "quantised", place / "plain")
        shutil.rmtree(place / "plain")
        return place / "quantised"

    return made


@pytest.mark.parametrize("kind", LAYOUTS)
def test_the_embedded_model_in_other_formats(kind, demo):
    ids = held_out(demo(kind), FEWER)
    ours, theirs = (Forced(demo(kind), device) for device in ("host", "cpu"))

    assert_alike(ours.logits(ids), theirs.logits(ids))
    assert ours.greedy(FEWER, ids[0], 12) == theirs.greedy(FEWER, ids[0], 12)
