"""What a plan counts and what it refuses, by example; its sums are what is allocated (see test_start)."""

import re
import subprocess
import sys
from array import array
from dataclasses import replace

import pytest
from plan_specs import EIGHT_B, MIXED, MLA, SLIDING, SMALL, SPECS, keeping

from fwd.engine import plan as planning
from fwd.engine.ceilings import ceilings
from fwd.engine.device import GPUS, cpu, host
from fwd.engine.plan import kv_format, plan
from fwd.engine.speculate.grams import Grams
from fwd.errors import ConfigError
from fwd.kernels import drawing, sizes
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.config import parse_spec
from fwd.models.layout import Latent


def test_context_is_the_models_own_where_it_fits():
    assert plan(SPECS["full"], cpu(8 << 30)).context == 4096
    assert plan(SPECS["full"], cpu(8 << 30), kv_bytes=100 * 2048 * 4).context == 192  # pages of 16 tokens


def test_a_pool_of_no_given_size_is_a_gibibyte_or_one_context_that_was_asked_for():
    spec = parse_spec({**EIGHT_B, "num_hidden_layers": 2, "vocab_size": 1024, "max_position_embeddings": 1 << 20})
    auto, asked = plan(spec, cpu(64 << 30)), plan(spec, cpu(64 << 30), context=1 << 20)
    assert (auto.kv_bytes, auto.context) == (1 << 30, (1 << 30) // (2 * 8 * 2 * 128 * 2))
    assert asked.kv_bytes == (1 << 20) * 2 * 8 * 2 * 128 * 2


def test_the_bytes_of_an_8b_model():
    """Counted by hand: bf16, untied, grouped query attention."""
    found = plan(parse_spec(EIGHT_B), GPUS["h100"], context=8192, kv_dtype="fp8").items
    layer = 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 2 * 4096
    assert found["weights_bfloat16"] == 2 * (32 * layer + 4096 + 128256 * 4096)
    assert found["head_bfloat16"] == 2 * 128256 * 4096
    assert found["rope"] == 8192 * 128 * 4
    assert found["kv_full"] == 16 * 8192 * 32 * 8 * 2 * (128 + 4)
    assert found["steps"] == 2 * 16 * (8 * 5 + 8 + 2 * 8 + 9 * 4) + 512 * 8 * 5 + 4 * (16 + 1) * 512
    assert found["lines"] == 16 * 128256 * (4 + 4) + 16 * 128256 // 8
    assert not {"prefix_index", "corpus", "draft_tables"} & set(found)


def test_a_tied_model_in_bfloat16_has_embedding_and_a_head_in_float32_on_a_cpu():
    tied = parse_spec({**SMALL, "tie_word_embeddings": True, "torch_dtype": "bfloat16"})
    found = plan(tied, cpu(8 << 30)).items
    assert found["head_float32"] == 1024 * 256 * 4
    assert found["weights_bfloat16"] == tied.weight_bytes()
    loose = plan(replace(tied, tied=False), cpu(8 << 30)).items
    assert (loose["head_float32"], loose["weights_bfloat16"]) == (found["head_float32"], found["weights_bfloat16"])


def test_every_group_has_units_of_its_own():
    found = plan(SPECS["state"], cpu(8 << 30), context=1024, max_seqs=4)
    assert [group.kind for group in found.groups] == ["full", "sliding", "state"]
    window = min((96 + 64) // 16 + 2, 65) + min(96 // 16 + 2, 65)
    assert found.units == (4 * 64, 4 * window, 4 + 16 + 8 + 16)
    assert found.items["kv_sliding_96"] == 4 * window * 16 * 2 * 64 * 2 * 4
    assert found.items["kv_state"] == 44 * 2 * 640 * 4
    assert found.kv_bytes == sum(found.items[kind] for kind in ("kv_full", "kv_sliding_96", "kv_state"))


def test_a_window_wider_than_the_context_takes_no_more_than_the_context():
    wide = replace(SPECS["full"], windows=(4000,) * 4)
    assert plan(wide, cpu(8 << 30), context=64, max_seqs=2).units == (2 * (5 + 5),)


@pytest.mark.parametrize("device", [cpu(8 << 30), *GPUS.values()], ids=lambda device: device.name)
def test_every_device_takes_the_same_kinds(device):
    found = plan(SPECS["sliding"], device)
    assert {"rope", "kv_full", "kv_sliding_128", "steps", "workspace", "graphs"} <= set(found.items)
    assert found.total == sum(found.items.values())
    assert found.needed >= found.total + device.reserve


def test_more_context_than_the_model_has_is_refused():
    with pytest.raises(ConfigError, match="context: 4097 is more than the 4096 tokens of the model"):
        plan(SPECS["full"], cpu(8 << 30), context=4097)


@pytest.mark.parametrize(
    ("spec", "wanted", "kept"),
    [
        ("full", "auto", "float32"),
        ("full", "bfloat16", "bfloat16"),
        ("full", "fp8", "fp8"),
        ("latent", "fp8", "fp8"),
        ("state", "fp8", "fp8"),
        ("states only", "auto", "float32"),
    ],
)
def test_kv_dtypes(spec, wanted, kept):
    assert kv_format(SPECS[spec], wanted) == kept


@pytest.mark.parametrize(
    ("spec", "wanted", "named"),
    [
        (SPECS["full"], "int4", "unknown 'int4': use auto, bfloat16 or fp8"),
        (parse_spec({**SMALL, "head_dim": 24}), "fp8", "a multiple of 16, the model has 24: use bfloat16"),
        (keeping(Latent((0,), 100, 16)), "fp8", "the model has 100"),
        (SPECS["states only"], "bfloat16", "states only, which are float32"),
    ],
    ids=["unknown", "heads", "latent", "states"],
)
def test_a_kv_dtype_that_the_model_cannot_take_is_refused(spec, wanted, named):
    with pytest.raises(ConfigError, match=re.escape(named)) as refused:
        plan(spec, cpu(8 << 30), kv_dtype=wanted)
    assert refused.value.exit_code == 2
    assert refused.value.message.startswith("kv-dtype: ")


def test_ceilings_are_the_bytes_of_a_step_over_the_bandwidth():
    found = plan(parse_spec(EIGHT_B), GPUS["h200"], context=4096)
    rows = {each.rows: each for each in ceilings(found, 4.8e12)}
    assert set(rows) == {1, 2, 4, 8}
    assert rows[1].bytes == found.spec.step_bytes(1, 4096, "bfloat16")
    assert rows[8].ms == pytest.approx(rows[8].bytes / 4.8e9)
    assert rows[8].tokens_per_s == pytest.approx(8e3 / rows[8].ms)
    assert 295 < rows[1].tokens_per_s < 320


@pytest.mark.parametrize(
    ("item", "nothing"), [("_weights", {}), ("_head", planning._Head("float32", 0, 0)), ("_steps", 0), ("workspace", 0)]
)
def test_a_kind_that_is_forgotten_is_noticed(monkeypatch, item, nothing):
    """The properties of test_plan would not see it, the sums do: each of these is in the total."""
    before = plan(SPECS["full"], cpu(8 << 30)).total
    monkeypatch.setattr(planning, item, lambda *_: nothing)
    assert plan(SPECS["full"], cpu(8 << 30)).total < before


@pytest.mark.parametrize("config", [SMALL, EIGHT_B, SLIDING, {**SMALL, "vocab_size": 50_257}, MIXED, MLA])
def test_what_a_step_draws_takes_what_is_planned_for_it(config):
    spec = parse_spec(config)
    found = plan(spec, host(64 << 30), context=1024, max_seqs=7).items
    fetched = 2 * sizes.outcome_bytes(MAX_ROWS, 7) + spec.vocab * 8
    masks = drawing.drawing_bytes(MAX_ROWS, 0, spec.vocab) - drawing.drawing_bytes(MAX_ROWS, 0, 0)
    assert found["lines"] == drawing.drawing_bytes(0, 7, spec.vocab) + masks + fetched
    assert drawing.drawing_bytes(1, 0, 0) == planning.DRAWING_BYTES


@pytest.mark.parametrize("config", [MIXED, MLA])
def test_a_chunk_on_a_gpu_takes_a_slab_and_a_workspace_of_its_experts_more(config):
    spec, device = parse_spec({**config, "torch_dtype": "bfloat16"}), GPUS["h100"]
    step, chunk = (plan(spec, each, context=1024, max_seqs=7).items["kernels"] for each in (host(64 << 30), device))
    experts = sizes.mixture_bytes(spec.hidden, spec.moe.experts, spec.moe.top_k, device.chunk)
    assert chunk - step == sizes.UNPACKED_BYTES + experts


def test_a_tied_model_has_one_copy_of_its_head_where_there_are_kernels():
    tied = parse_spec({**EIGHT_B, "tie_word_embeddings": True})
    found = plan(tied, GPUS["h100"], context=1024).items
    assert found["head_bfloat16"] == 0
    assert found["weights_bfloat16"] == tied.weight_bytes()


@pytest.mark.parametrize("context", [2, 1000, 1024, 1025, 4096])
def test_the_tables_of_texts_take_what_is_planned_for_them(context):
    found = plan(SPECS["full"], cpu(8 << 30), context=context, max_seqs=7).items["draft_tables"]
    ids = array("i", range(context))
    own, given = Grams(array("i"), context), Grams(ids, context)
    tables = [table.nbytes for grams in (own, given) for pair in grams._tables for table in pair]
    assert found == 7 * (sum(tables) + len(ids) * ids.itemsize)


def test_the_plan_needs_no_torch():
    code = "import sys, fwd.engine.plan; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
