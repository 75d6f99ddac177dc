"""What layouts cost, and which of them share pages."""

import pytest

from fwd.models.layout import Latent, Paged, State, groups

FULL, NARROW, WIDE = Paged((0, 3), 2, 16), Paged((1,), 2, 16, 128), Paged((2, 4), 2, 16, 1024)
LATENT, STATE = Latent((5, 6, 7), 512, 64), State((8,), 100)


@pytest.mark.parametrize(("kv", "size"), [("float32", 4 * 16), ("bfloat16", 2 * 16), ("fp8", 16 + 4)])
def test_a_token_takes_a_key_and_a_value_per_head_and_layer_and_in_fp8_their_scales(kv, size):
    assert FULL.token_bytes(kv) == 2 * 2 * 2 * size


@pytest.mark.parametrize(("kv", "size"), [("float32", 4 * 576), ("bfloat16", 2 * 576), ("fp8", 512 + 4 * 4 + 2 * 64)])
def test_a_latent_token_takes_a_latent_and_a_key_a_layer(kv, size):
    assert LATENT.token_bytes(kv) == 3 * size


def test_what_is_kept_as_long_shares_pages():
    found = groups((WIDE, STATE, FULL, NARROW, LATENT))

    assert [(group.kind, group.window) for group in found] == [
        ("full", 0),
        ("sliding", 128),
        ("sliding", 1024),
        ("state", 0),
    ]
    assert found[0].layouts == (FULL, LATENT)
    assert found[0].unit_bytes(16, "bfloat16") == 16 * (FULL.token_bytes("bfloat16") + LATENT.token_bytes("bfloat16"))
    assert found[3].unit_bytes(16, "fp8") == 400
