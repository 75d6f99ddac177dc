"""`/metrics`: valid text, and numbers that are true."""

import asyncio
import re

import fakes
import pytest
from apiserver import NAME, script, serving, until

from fwd.api.exposition import Histogram, family
from fwd.protocol.messages import Pong
from fwd.protocol.values import DrafterCounts, Timing

COMPLETE = "/v1/completions"
LINE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-z_]+="[^"]*",?)*)\} (\S+)')


def request(**options):
    return {"prompt": "hi", "max_tokens": 10, "seed": 7, **options}


async def scrape(server):
    """Values by name and labels (without the model's), after a check of the format."""
    async with server.session.get(server.url + "/metrics") as response:
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = (await response.text()).splitlines()
    kinds, values = {}, {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in kinds
            kinds[name] = kind
        elif not line.startswith("#"):
            name, labels, value = LINE.fullmatch(line).groups()
            assert f'model_name="{NAME}"' in labels
            assert any(name in {base, f"{base}_bucket", f"{base}_sum", f"{base}_count"} for base in kinds)
            rest = labels.replace(f'model_name="{NAME}"', "").strip(",")
            assert (name, rest) not in values
            values[name, rest] = float(value)
    return values


def test_what_was_served_is_counted(folder, run):
    async def scenario():
        async with serving(folder, script("ab stop ", pace="ping"), ping_interval=0.002) as server:
            await server.post(COMPLETE, request(n=2))
            await server.post(COMPLETE, request(stop="stop", max_tokens=3000))
            found = await scrape(server)
            for prefix, requests in (("fwd_", "fwd_requests_total"), ("vllm:", "vllm:request_success_total")):
                assert found[requests, 'finished_reason="length"'] == 2
                assert found[requests, 'finished_reason="stop"'] == 1
                assert found[requests, 'finished_reason="abort"'] == 0
                assert found[f"{prefix}prompt_tokens_total", ""] == 6
                assert found[f"{prefix}generation_tokens_total", ""] >= 27
                for name in ("time_to_first_token", "e2e_request_latency"):
                    assert found[f"{prefix}{name}_seconds_count", ""] == 3
                    assert found[f"{prefix}{name}_seconds_bucket", 'le="+Inf"'] == 3
                    assert found[f"{prefix}{name}_seconds_sum", ""] > 0
            assert found["fwd_ready", ""] == 1
            assert found["fwd_event_loop_lag_seconds", ""] >= 0
            assert [labels for name, labels in found if name == "fwd_build_info"] != []

    run(scenario())


def test_what_runs_is_shown(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping", pages=8), ping_interval=0.005) as server:
            asked = asyncio.create_task(server.post(COMPLETE, request(max_tokens=3000)))
            await until(lambda: server.keeper.pong.running == 1)
            found = await scrape(server)
            assert found["fwd_requests_running", ""] == found["vllm:num_requests_running", ""] == 1
            assert found["vllm:num_requests_waiting", ""] == 0
            assert found["vllm:kv_cache_usage_perc", ""] == 1 / 8
            asked.cancel()
            await server.idle()
            assert (await scrape(server))["fwd_requests_total", 'finished_reason="abort"'] == 1

    run(scenario())


def test_what_the_cache_did_is_counted(folder, run):
    async def scenario():
        told = Timing(cached_tokens=3, cache_miss="evicted", differs_at=-1)
        engine = script(cached=told, memory={"weights": 1000, "kv": 500}, pages=10)
        async with serving(folder, engine) as server:
            await server.post(COMPLETE, request(prompt=[20] * 10))
            found = await scrape(server)
            assert found["fwd_cached_tokens_total", ""] == 3
            assert found["fwd_prefix_miss_tokens_total", 'cause="evicted"'] == 7
            assert found["fwd_prefix_miss_tokens_total", 'cause="differs"'] == 0
            assert found["fwd_memory_bytes", 'kind="weights"'] == 1000
            assert found["fwd_memory_bytes", 'kind="kv"'] == 500
            server.keeper.pong = Pong(seq=1, pages_total=10, pages_free=2, pages_cached=5)
            found = await scrape(server)
            assert [found["fwd_pages", f'state="{state}"'] for state in ("free", "cached", "held")] == [2, 5, 3]
            assert found["fwd_kv_usage_ratio", ""] == found["vllm:kv_cache_usage_perc", ""] == 3 / 10

    run(scenario())


def test_the_queue_and_what_it_shed_are_shown(folder, run):
    async def scenario():
        async with serving(folder, script(pace="ping"), ping_interval=3600.0, max_queue=4) as server:
            found = await scrape(server)
            assert [found["fwd_shed_total", f'reason="{code}"'] for code in ("queue_full", "not_ready")] == [0, 0]
            asked = asyncio.create_task(server.post(COMPLETE, request(prompt=[20] * 9)))
            await until(lambda: server.keeper.queue.tokens == 9)
            assert (await server.post(COMPLETE, request()))[0] == 429
            server.service.draining = True
            assert (await server.post(COMPLETE, request()))[0] == 503
            found = await scrape(server)
            assert (found["fwd_queue_tokens", ""], found["fwd_queue_limit_tokens", ""]) == (9, 4)
            assert [found["fwd_shed_total", f'reason="{code}"'] for code in ("queue_full", "not_ready")] == [1, 1]
            asked.cancel()
            await server.idle()

    run(scenario())


def test_deaths_and_errors_are_counted(folder, run, tmp_path):
    async def scenario():
        faults = (fakes.Fault("kill", after=3), fakes.Fault("garbage", after=3))
        async with serving(folder, script(faults=faults, lives=str(tmp_path / "lives"), poison=(20,))) as server:
            await server.post(COMPLETE, request())
            found = await scrape(server)
            assert found["fwd_engine_restarts_total", 'cause="signal SIGKILL"'] == 1
            assert found["fwd_engine_restarts_total", 'cause="protocol"'] == 1
            assert found["fwd_stream_resumes_total", ""] == 2
            await server.post(COMPLETE, request(prompt=[20]))
            assert (await scrape(server))["fwd_request_errors_total", 'code="poisoned"'] == 1

    run(scenario())


def test_what_drafters_did_is_counted_through_the_death_of_an_engine(folder, run, tmp_path):
    suffix = DrafterCounts("suffix", drafts=10, drafted=40, accepted=12, places=[9, 3], ms=250.0)
    model = DrafterCounts("model", drafts=2, drafted=6, accepted=5, places=[2, 2, 1], ms=1000.0)
    fault = fakes.Fault("kill", after=400)

    async def scenario():
        engine = script(
            drafters=("suffix", "model"), drafts=(suffix, model), corpus=77, pace="ping", faults=(fault,),
            lives=str(tmp_path / "lives"),
        )  # fmt: skip
        async with serving(folder, engine, ping_interval=0.002) as server:
            for life in (1, 2):
                await server.post(COMPLETE, request(max_tokens=300))
                await until(lambda: server.keeper.pong.drafters)
                found = await scrape(server)
                assert server.keeper.restarts == ({} if life == 1 else {"signal SIGKILL": 1})
                assert found["fwd_draft_proposals_total", 'drafter="suffix"'] == 10 * life
                assert found["fwd_draft_tokens_total", 'drafter="model"'] == 6 * life
                assert found["fwd_draft_accepted_tokens_total", 'drafter="suffix"'] == 12 * life
                assert found["fwd_draft_seconds_total", 'drafter="model"'] == life
                assert found["fwd_draft_accepted_tokens_per_position_total", 'drafter="model",position="2"'] == life
                assert found["fwd_draft_corpus_tokens", ""] == 77
                assert found["vllm:spec_decode_num_drafts_total", ""] == 12 * life
                assert found["vllm:spec_decode_num_draft_tokens_total", ""] == 46 * life
                assert found["vllm:spec_decode_num_accepted_tokens_total", ""] == 17 * life
                places = [
                    found["vllm:spec_decode_num_accepted_tokens_per_pos_total", f'position="{place}"']
                    for place in range(15)
                ]
                assert places == [11 * life, 5 * life, life, *[0] * 12]

    run(scenario())


@pytest.mark.parametrize("name", ['q"uote', "back\\slash", "new\nline"])
def test_labels_are_escaped(name):
    *_, line = family("x", "gauge", "text", [("", {"label": name}, 1.0)], {})
    assert "\n" not in line
    assert line.count('"') - line.count('\\"') == 2


def test_a_histogram_is_cumulative():
    histogram = Histogram()
    for seconds in (0.0005, 0.001, 0.3, 10_000):
        histogram.observe(seconds)
    samples = {(suffix, labels.get("le")): value for suffix, labels, value in histogram.samples()}
    assert samples["_bucket", "0.001"] == 2
    assert samples["_bucket", "0.5"] == 3
    assert samples["_bucket", "600"] == 3
    assert samples["_bucket", "+Inf"] == samples["_count", None] == 4
