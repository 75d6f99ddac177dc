"""The plan: what it accepts fits, what it names as fitting does, its sums are what is allocated (see test_start)."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwd.engine import plan as planning
from fwd.engine.device import GPUS, cpu, host
from fwd.engine.plan import PAGE_SIZE, Plan, ceilings, kv_format, plan
from fwd.engine.scheduler import MAX_ROWS
from fwd.errors import ConfigError
from fwd.kernels import drawing, sizes
from fwd.models.config import parse_spec
from fwd.models.layout import Latent, Paged, State
from fwd.models.spec import ModelSpec

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
}
EIGHT_B = {
    **SMALL,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SLIDING = {
    **SMALL,
    "architectures": ["Qwen3ForCausalLM"],
    "use_sliding_window": True,
    "sliding_window": 128,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
}
MIXED = {
    **SMALL,
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4"},
}
MLA = {
    **SMALL,
    "architectures": ["DeepseekV3ForCausalLM"],
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
RESERVE = cpu(0).reserve


class Other(ModelSpec):
    """A spec whose cache is what a test says."""

    __slots__ = ()
    layouts = ()

    @property
    def cache(self):
        return self.layouts


def keeping(*layouts, **config):
    """A model that keeps these layouts."""
    spec = parse_spec({**SMALL, **config})
    kind = type("Kind", (Other,), {"__slots__": (), "layouts": layouts})
    return kind(**{name: getattr(spec, name) for name in ModelSpec.__dataclass_fields__})


SPECS = {
    "full": parse_spec(SMALL),
    "sliding": parse_spec(SLIDING),
    "windows only": replace(parse_spec(SLIDING), windows=(128, 64, 128, 64)),
    "state": keeping(State((0, 1), 640), Paged((2,), 2, 64), Paged((3,), 2, 64, 96)),
    "states only": keeping(State((0, 1, 2, 3), 640)),
    "experts": parse_spec(MIXED),
    "mla": parse_spec(MLA),
    "latent": keeping(Latent((0, 1), 64, 32), Paged((2, 3), 2, 64)),
}
specs = st.sampled_from(sorted(SPECS)).map(SPECS.get)
memories = st.integers(RESERVE, RESERVE + (64 << 20))
wishes = st.fixed_dictionaries(
    {
        "context": st.integers(0, 4096),
        "max_seqs": st.integers(1, 16),
        "kv_bytes": st.one_of(st.just(0), st.integers(1, 32 << 20)),
    }
)


def planned(spec, memory, wish):
    """The plan, or the line that refuses it."""
    try:
        return plan(spec, cpu(memory), **wish)
    except ConfigError as error:
        return error.message


@settings(max_examples=400)
@given(specs, memories, wishes)
def test_what_is_accepted_fits(spec, memory, wish):
    found = planned(spec, memory, wish)
    if isinstance(found, Plan):
        assert found.total <= found.needed - RESERVE <= memory - RESERVE
        assert found.kv_bytes <= (wish["kv_bytes"] or memory)
        assert 0 < found.context <= spec.max_context
        assert wish["context"] in {0, found.context}


@settings(max_examples=400)
@given(specs, memories, wishes)
def test_the_pool_is_as_large_as_it_may_be(spec, memory, wish):
    found = planned(spec, memory, wish)
    if isinstance(found, Plan) and found.groups[0].kind == "full":
        whole = -(-found.context // PAGE_SIZE)
        assert whole <= found.pages <= found.max_seqs * whole
        more = replace(found, units=(found.pages + 1, *found.units[1:]))
        limit = wish["kv_bytes"] or max(cpu(0).pool, found.kv_bytes)
        assert found.pages == found.max_seqs * whole or more.kv_bytes > limit or more.needed > memory


@settings(max_examples=400)
@given(specs, memories, wishes, st.sampled_from(["context", "max_seqs", "kv_bytes", "memory"]), st.integers(1, 4096))
def test_whoever_wants_less_or_has_more_is_served_too(spec, memory, wish, what, change):
    assert_served(planned(spec, memory, wish), spec, memory, wish, what, change)


def assert_served(found, spec, memory, wish, what, change):
    if isinstance(found, str):
        return
    less = {**wish, "context": found.context}
    match what:
        case "context" | "max_seqs":
            less[what] = max(1, less[what] - change % less[what])
        case "kv_bytes" if wish["kv_bytes"]:
            less[what] += change << 8
        case "memory":
            memory += change << 8
    assert isinstance(planned(spec, memory, less), Plan)


def test_an_engine_fits_again_where_others_took_some_memory():
    device = GPUS["h100"]
    first = plan(parse_spec(EIGHT_B), device)
    less = replace(device, memory=device.memory - (250 << 20))
    again = plan(parse_spec(EIGHT_B), less, context=first.context, kv_bytes=first.kv_bytes)

    assert again.units == first.units
    assert first.pages < first.max_seqs * first.context // PAGE_SIZE
    assert device.memory - first.needed - device.spare < first.token_bytes * PAGE_SIZE


@given(specs, st.integers(1, 4095), st.integers(1, 15), st.integers(0, 4096), st.integers(0, 15))
def test_bytes_grow_with_context_and_sequences(spec, context, max_seqs, tokens, more):
    def sized(context, max_seqs):
        return planning._sized(Plan(spec, cpu(0), "float32", max_seqs, 0, ()), context)

    one = sized(context, max_seqs)
    other = sized(min(context + tokens, 4096), min(max_seqs + more, 16))
    assert all(one.items[kind] <= other.items[kind] for kind in one.items)
    assert one.needed <= other.needed


@settings(max_examples=300)
@given(specs, memories, wishes)
def test_the_number_that_is_named_fits_and_more_does_not(spec, memory, wish):
    found = planned(spec, memory, wish)
    if not isinstance(found, str):
        return
    assert "\n" not in found
    if named := re.fullmatch(r"kv_bytes: (\d+) hold (\d+) tokens; raise it to (\d+) for a context of (\d+)", found):
        given_bytes, held, needed, tokens = map(int, named.groups())
        assert given_bytes == wish["kv_bytes"]
        right = {**wish, "context": tokens}
        assert isinstance(planned(spec, memory, {**right, "kv_bytes": needed}), Plan)
        assert isinstance(planned(spec, memory, {**right, "kv_bytes": needed - 1}), str)
        assert held < tokens
        assert not held or isinstance(planned(spec, memory, {**wish, "context": held}), Plan)
        assert isinstance(planned(spec, memory, {**wish, "context": held + PAGE_SIZE}), str)
    elif named := re.fullmatch(r"context: (\d+) tokens need ([\d,]+) bytes and cpu has [\d,]+: (\d+) .*", found):
        tokens, _, fits = (int(number.replace(",", "")) for number in named.groups())
        assert tokens == wish["context"] > fits
        assert isinstance(planned(spec, memory, {**wish, "context": fits}), Plan)
        assert isinstance(planned(spec, memory, {**wish, "context": fits + PAGE_SIZE}), str)
    else:
        named = re.fullmatch(r"the model does not fit: it needs ([\d,]+) bytes at least and cpu has ([\d,]+)", found)
        needed, has = (int(number.replace(",", "")) for number in named.groups())
        assert has == memory < needed
        small = {**wish, "context": 1, "kv_bytes": 0}
        assert isinstance(planned(spec, needed, small), Plan)
        assert isinstance(planned(spec, needed - 1, small), str)


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
    assert found["lines"] == 16 * 128256 * (4 + 4)
    assert "prefix_index" not in found


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
    assert {"rope", "kv_full", "kv_sliding_128", "steps", "workspace", "graphs", "drafter"} <= set(found.items)
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
    """The properties above would not see it, the sums do: each of these is in the total."""
    before = plan(SPECS["full"], cpu(8 << 30)).total
    monkeypatch.setattr(planning, item, lambda *_: nothing)
    assert plan(SPECS["full"], cpu(8 << 30)).total < before


@pytest.mark.parametrize("config", [SMALL, EIGHT_B, SLIDING, {**SMALL, "vocab_size": 50_257}, MIXED, MLA])
def test_what_a_step_draws_takes_what_is_planned_for_it(config):
    spec = parse_spec(config)
    found = plan(spec, host(64 << 30), context=1024, max_seqs=7).items
    fetched = 2 * sizes.outcome_bytes(MAX_ROWS, 7) + spec.vocab * 8
    assert found["lines"] == drawing.drawing_bytes(0, 7, spec.vocab) + fetched
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


def test_the_plan_needs_no_torch():
    code = "import sys, fwd.engine.plan; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
