"""The verbs on a running daemon: what they print, as text and as JSON, and how they end."""

import json
import re
import subprocess
import sys

import click
import msgspec
import pytest
from apiserver import ids, script, text
from fakes import expected
from launch import daemon, launch

from fwd.cli import VERBS, main
from fwd.cli.admin import _draft_rows, _engine_rows, _state
from fwd.cli.common import require_hope
from fwd.errors import FwdError
from fwd.protocol.client import GONE, Client
from fwd.protocol.messages import Finished
from fwd.protocol.values import DrafterCounts, EngineInfo, RequestInfo


def oracle(prompt, seed, tokens):
    return text(expected(ids(prompt), seed, 0, tokens, script()))


def error_line(result, code):
    """The one line on stderr."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("fwd: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_generate_streams_the_answer(fwd, shared):
    result = fwd("generate", "def f", "--max-tokens", 30, "--seed", 5, "--uds", shared.uds)
    assert result.exit_code == 0
    assert result.stdout == oracle("def f", 5, 30)
    assert result.stderr == ""


@pytest.mark.parametrize("argument", [(), ("-",)])
def test_generate_reads_a_pipe(fwd, shared, argument):
    result = fwd("generate", *argument, "--max-tokens", 30, "--seed", 5, "--uds", shared.uds, input="def f:\n")
    assert result.stdout == oracle("def f:\n", 5, 30)


def test_generate_speaks_utf8(fwd, folder):
    with daemon(script("né✓\n"), folder) as running:
        result = fwd("generate", "--max-tokens", 14, "--uds", running.uds, input="naïve ✓")
    assert result.stdout == "né✓\nné✓\n"


def test_generate_json(fwd, shared):
    result = fwd("generate", "x", "--max-tokens", 7, "--seed", -3, "--json", "--uds", shared.uds)
    found = json.loads(result.stdout)
    assert found["text"] == oracle("x", -3, 7)
    assert (found["finish_reason"], found["seed"]) == ("length", -3)
    assert (found["prompt_tokens"], found["output_tokens"]) == (1, 7)
    assert set(found["timing"]) >= {"prefill_ms", "decode_ms", "drafted", "accepted", "cached_tokens"}


def test_generate_ends_before_a_stop(fwd, shared):
    whole = oracle("x", 1, 40)
    stop = whole[20:23]
    result = fwd("generate", "x", "--seed", 1, "--max-tokens", 40, "--stop", stop, "--uds", shared.uds)
    assert result.stdout == whole[: whole.index(stop)]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--temperature", "2.1"),
        ("--temperature", "-0.1"),
        ("--temperature", "warm"),
        ("--top-p", "0"),
        ("--top-p", "nan"),
        ("--min-p", "1.5"),
        ("--top-k", "-1"),
        ("--top-k", "1e3"),
        ("--seed", str(2**63)),
        ("--max-tokens", "0"),
        ("--max-tokens", "-5"),
        ("--max-tokens", str(2**70)),
        ("--nonsense", "1"),
    ],
)
def test_a_wrong_option_is_a_usage_error(fwd, shared, arguments):
    line = error_line(fwd("generate", "x", *arguments, "--uds", shared.uds), 2)
    assert arguments[0] in line


def test_usage_errors_of_verbs(fwd, shared):
    assert "nonsense" in error_line(fwd("nonsense"), 2)
    assert "ID" in error_line(fwd("cancel", "one", "--uds", shared.uds), 2)
    assert "UTF-8" in error_line(fwd("generate", "--uds", shared.uds, input=b"\xff\xfe"), 2)


def test_the_daemon_refuses(fwd, shared):
    arguments = ("generate", "x" * 100, "--max-tokens", 4090, "--uds", shared.uds)
    line = error_line(fwd(*arguments), 5)
    assert "4096" in line
    assert "4190" in line
    error = json.loads(fwd(*arguments, "--json").stdout)["error"]
    assert error["code"] == "context_length_exceeded"
    assert line == f"fwd: {error['message']}\n"
    assert "empty" in error_line(fwd("generate", "", "--uds", shared.uds), 5)


def test_status(fwd, shared):
    result = fwd("status", "--json", "--uds", shared.uds)
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["state"], found["name"], found["pid"]) == ("ready", "letters", shared.child.pid)
    assert found["listening"] == [str(shared.uds)]
    assert found["engine"]["architecture"] == "FakeForCausalLM"
    lines = fwd("status", "--uds", shared.uds).stdout
    assert "ready" in lines
    assert f"pid {shared.child.pid}" in lines
    assert f"0 of at most {1 << 20} tokens wait" in lines
    assert "64 of 64 free, 0 hold the prefix cache" in lines


def test_ps_shows_how_far_a_prompt_is(fwd, folder):
    with daemon(script(pace="ping", chunk=1), folder) as running, Client(running.uds) as client:
        events = client.events("hello" * 50)
        next(events)
        while (row := client.requests()[0]).state != "prefill":
            pass
        assert 0 <= row.prefilled < row.prompt_tokens == 250
        shown = fwd("ps", "--uds", running.uds).stdout.splitlines()[1]
        assert re.search(r" prefill +\d+% +250 +0 +0.00 ", shown)
        events.close()


@pytest.mark.parametrize(
    ("state", "prefilled", "shown"),
    [("prefill", 40, "prefill 40%"), ("waiting", 0, "waiting"), ("running", 0, "running")],
)
def test_the_state_of_a_request(state, prefilled, shown):
    row = RequestInfo(
        id=1,
        state=state,
        prompt_tokens=100,
        output_tokens=0,
        age_s=1.0,
        priority="interactive",
        resumes=0,
        prefilled=prefilled,
    )
    assert _state(row) == shown


def test_ps_and_cancel(fwd, folder):
    with daemon(script(pace="ping"), folder) as running, Client(running.uds) as client:
        events = client.events("hello", priority="background")
        accepted = next(events)
        (row,) = json.loads(fwd("ps", "--json", "--uds", running.uds).stdout)["requests"]
        assert (row["id"], row["prompt_tokens"], row["priority"]) == (accepted.id, 5, "background")
        assert str(accepted.id) in fwd("ps", "--uds", running.uds).stdout.splitlines()[1]
        result = fwd("cancel", accepted.id, "--json", "--uds", running.uds)
        assert json.loads(result.stdout) == {"cancelled": accepted.id}
        *_, last = events
        assert isinstance(last, Finished)
        assert last.reason == "cancelled"
        assert str(accepted.id) in error_line(fwd("cancel", accepted.id, "--uds", running.uds), 5)


def test_stop(fwd, folder):
    with daemon(script(), folder) as running:
        result = fwd("stop", "--json", "--uds", running.uds)
        assert json.loads(result.stdout) == {"stopped": running.child.pid}
        assert running.child.wait(30) == 0
        assert not running.uds.exists()
        error_line(fwd("stop", "--uds", running.uds), 3)


@pytest.mark.parametrize("verb", [("status",), ("ps",), ("cancel", "1"), ("stop",), ("generate", "x"), ("chat",)])
def test_not_running(fwd, tmp_path, verb):
    line = error_line(fwd(*verb, "--uds", tmp_path / "none.sock"), 3)
    assert "none.sock" in line
    assert "fwd serve" in line
    error = json.loads(fwd(*verb, "--json", "--uds", tmp_path / "none.sock").stdout)["error"]
    assert error["code"] == "not_running"


def test_not_ready_and_then_ready(fwd, folder, tmp_path):
    hold = tmp_path / "hold"
    with daemon(script(hold=str(hold)), folder, ready=False) as running:
        result = fwd("status", "--json", "--uds", running.uds)
        found = json.loads(result.stdout)
        assert result.exit_code == 4
        assert found["state"] in {"starting", "loading"}
        assert found["reason"]
        assert "not ready" in error_line(fwd("generate", "x", "--no-wait", "--uds", running.uds), 4)
        hold.touch()
        result = fwd("generate", "x", "--seed", 1, "--max-tokens", 9, "--uds", running.uds)
        assert (result.exit_code, result.stdout) == (0, oracle("x", 1, 9))


def test_the_daemon_dies_in_the_middle(folder):
    with daemon(script(context=1 << 20), folder) as running:
        command = launch(script(), "generate", "x", "--uds", str(running.uds))
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout.read(10)
            running.child.kill()
            _, complaint = child.communicate()
    assert child.returncode == 6
    assert complaint == f"fwd: {GONE}\n"


@pytest.mark.parametrize(("state", "code"), [("failed", 6), ("stopping", 4)])
def test_a_state_without_hope(shared, state, code):
    with Client(shared.uds) as client:
        status = msgspec.structs.replace(client.status(), state=state, reason="because")
    with pytest.raises(FwdError) as caught:
        require_hope(status)
    assert caught.value.exit_code == code


def test_a_reader_that_had_enough(shared):
    command = launch(script(), "generate", "x", "--uds", str(shared.uds))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.read(10)
        child.stdout.close()
        assert child.wait(30) == 0
        assert child.stderr.read() == b""


def test_help_and_version(fwd):
    result = fwd("--help")
    assert result.exit_code == 0
    assert all(f"  {verb} " in result.stdout for verb in VERBS)
    assert fwd("--version").stdout.startswith("fwd, version ")
    assert fwd().exit_code == 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_json_and_uds(verb):
    command = main.get_command(None, verb)
    for leaf in command.commands.values() if isinstance(command, click.Group) else [command]:
        assert {"--json", "--uds"} <= {option for parameter in leaf.params for option in parameter.opts}


def test_serve_imports_little_before_it_listens():
    code = "import sys, fwd.cli.serve, fwd.daemon.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"asyncio", "aiohttp", "structlog", "tokenizers", "jinja2", "numpy", "torch", "cupy"} & set(loaded)


def test_status_says_what_was_left_for_drafters():
    rows = dict(_engine_rows(EngineInfo(kept={"model.layers.47.": 1_283_000_000}), 0.0))
    assert rows["left"] == "model.layers.47.* 1283.0 MB in the files"
    assert "left" not in dict(_engine_rows(EngineInfo(), 0.0))


def test_status_says_what_drafters_do(shared):
    with Client(shared.uds) as client:
        status = client.status()
    assert _draft_rows(status) == [("drafters", "none")]
    engine = EngineInfo(drafters=("suffix", "model"), draft_hash="abc", draft_notes=("one", "two"))
    drafters = [DrafterCounts("suffix", 10, 40, 10, [10], 1.0), DrafterCounts("model")]
    assert _draft_rows(msgspec.structs.replace(status, engine=engine, drafters=drafters, corpus_tokens=9)) == [
        ("drafters", "suffix, model, weights abc"),
        ("drafted", "suffix: 25% of 40 tokens held, 100 µs a draft"),
        ("corpus", "9 tokens of earlier answers"),
        ("note", "one"),
        ("note", "two"),
    ]


def test_status_names_what_no_kernel_takes():
    lines = ("lm_head in bfloat16: a head in mxfp4", "and another")
    assert [row for row in _engine_rows(EngineInfo(fallbacks=lines), 0.0) if row[0] == "fallback"] == [
        ("fallback", line) for line in lines
    ]
