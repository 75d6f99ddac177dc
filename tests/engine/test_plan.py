"""Any plan: what it accepts fits, what it names as fitting does, who wants less is served too."""

import re
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from plan_specs import EIGHT_B, SPECS

from fwd.engine import plan as planning
from fwd.engine.device import GPUS, cpu
from fwd.engine.plan import PAGE_SIZE, Plan, plan
from fwd.errors import ConfigError
from fwd.models.config import parse_spec

RESERVE = cpu(0).reserve
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
