"""`fwd bench speculation`: what it measures, saves and says; no number decides."""

import json

import pytest
from apiserver import script
from checkpoints import make
from launch import daemon
from test_cli_verbs import error_line

from fwd.cli.bench import texts
from fwd.demo import MODEL
from fwd.protocol.values import Timing

KINDS = {"code", "chat", "edit", "edit, predicted", "records", "random"}
TOLD = Timing(drafted={"suffix": 10}, accepted={"suffix": 4})
SMALL = ("--rounds", 1, "--max-tokens", 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    return path


def test_a_real_engine(fwd, llama, tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("to be or not to be, " * 200)
    options = ("--drafter", "auto", "--temperature", 0, "--text", text, "--save", tmp_path, "--json")
    result = fwd("bench", "speculation", llama, *SMALL, *options)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (saved,) = tmp_path.glob("*.json")
    assert json.loads(saved.read_text()) == found
    assert saved.name.endswith("-drafts.json")
    assert set(found["kinds"]) - {"chat"} == (KINDS | {"mine.txt"}) - {"chat"}
    for kind, temperatures in found["kinds"].items():
        assert set(temperatures) == ({"1.5"} if kind == "random" else {"0"})
        for drafters in temperatures.values():
            assert set(drafters) == {"off", "auto"}
            assert drafters["off"]["ratio"] == drafters["off"]["accept_length"] == 1
            assert drafters["off"]["drafted"] == 0
            assert all(each["same"] and each["tokens_per_ms"] > 0 for each in drafters.values())
    assert {"commit", "cpu", "versions", "model", "device", "dtype"} <= set(found)


def test_what_it_says(fwd, folder):
    with daemon(script(cached=TOLD, drafters=("suffix",)), folder) as running:
        result = fwd("bench", "speculation", *SMALL, "--uds", running.uds)
        assert result.exit_code == 0, result.output
        heading, first, *rest = result.stdout.splitlines()
        assert "medians of 1 answers of 16 tokens" in heading
        assert first.startswith("code, temperature 0: ")
        assert rest[0].startswith("  auto ")
        assert rest[1].startswith("  suffix ")
        assert " 1.25 tokens a step,  40% of 10 drafted held" in rest[0]
        assert len(rest) == 11 * 3 - 1


def test_drafts_that_change_a_token_are_told(fwd, folder):
    with daemon(script(careless="drafts"), folder) as running:
        result = fwd("bench", "speculation", *SMALL, "--temperature", 0, "--uds", running.uds)
        assert result.exit_code == 6
        assert "NOT THE SAME TOKENS: code at 0, auto" in result.stdout


def test_what_is_refused(fwd, folder, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"\xff")
    with daemon(script(drafters=("suffix",)), folder) as running:
        uds = ("--uds", running.uds)
        assert "suffix" in error_line(fwd("bench", "speculation", *SMALL, "--drafter", "eagle", *uds), 5)
        assert "does not hold" in error_line(fwd("bench", "speculation", "--max-tokens", 4096, *uds), 2)
        assert "--text" in error_line(fwd("bench", "speculation", *SMALL, "--text", text, *uds), 2)
        error_line(fwd("bench", "speculation", *SMALL, "--text", tmp_path / "none", *uds), 2)


def test_bench_alone_is_bench_model(fwd):
    for arguments in (("--rounds", "0"), ("demo", "--rounds", "0"), ("model", "demo", "--rounds", "0")):
        assert "--rounds" in error_line(fwd("bench", *arguments), 2)
    helped = fwd("bench", "--help").stdout
    assert "model" in helped
    assert "speculation" in helped


def test_the_texts():
    found = texts.tasks(MODEL, [], 3, 4096)
    assert set(found) == KINDS
    assert {len(some) for some in found.values()} == {3}
    assert found == texts.tasks(MODEL, [], 3, 4096)
    for kind, some in found.items():
        assert len({tuple(task.prompt) for task in some}) == 3
        assert all(bool(task.prediction) == (kind == "edit, predicted") for task in some)
    assert all(0 <= token < 4096 for task in found["random"] for token in task.prompt)
