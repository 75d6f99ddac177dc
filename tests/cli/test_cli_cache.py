"""`fwd cache`: what it shows, what it forgets, and where no daemon runs what it erases."""

import json
from array import array

import pytest
from apiserver import script
from launch import daemon
from test_cli_verbs import error_line

from fwd.engine.speculate.draft_log import DraftLog
from fwd.protocol.values import DrafterCounts

DRAFTS = (DrafterCounts("suffix", 10, 40, 12, [9, 3], 2.0), DrafterCounts("model"))


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state directory that the environment names, with two logs of 5 and 7 ids."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("FWD_STATE_DIR", str(tmp_path))
    for weights, ids in (("a", range(5)), ("b", range(7))):
        log = DraftLog(tmp_path, weights, "text", 1 << 20)
        log.append(array("i", ids))
        log.close()
    (tmp_path / "secret").write_text("stays")
    return tmp_path


def test_the_engine_forgets(fwd, folder):
    with daemon(script(corpus=500, drafts=DRAFTS), folder) as running:
        found = json.loads(fwd("cache", "stats", "--json", "--uds", running.uds).stdout)
        assert found["pages"] == {"total": 64, "cached": 0, "free": 64}
        result = fwd("cache", "drop", "--drafts", "--uds", running.uds)
        assert (result.exit_code, result.stdout) == (0, "500 tokens of earlier answers are forgotten\n")
        result = fwd("cache", "drop", "--drafts", "--json", "--uds", running.uds)
        assert json.loads(result.stdout) == {"dropped_tokens": 0}


def test_stats(fwd, folder):
    engine = script(corpus=500, drafts=DRAFTS)
    with daemon(engine, folder) as running, running.connect() as client:
        while not client.status().drafters:
            pass
        found = json.loads(fwd("cache", "stats", "--json", "--uds", running.uds).stdout)
        assert found["corpus_tokens"] == 500
        assert [each["name"] for each in found["drafters"]] == ["suffix", "model"]
        lines = fwd("cache", "stats", "--uds", running.uds).stdout
        assert "0 of 64 pages, 64 are free" in lines
        assert "500 tokens of earlier answers" in lines
        assert "suffix: 30% of 40 tokens held, 200 µs a draft" in lines


def test_what_is_on_disk_is_erased_where_nobody_runs(fwd, state, tmp_path):
    nobody = ("--uds", tmp_path / "none.sock")
    result = fwd("cache", "drop", "--drafts", "--json", *nobody)
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"dropped_tokens": 12})
    assert [path.name for path in state.iterdir()] == ["secret"]
    assert json.loads(fwd("cache", "drop", "--drafts", "--json", *nobody).stdout) == {"dropped_tokens": 0}
    error_line(fwd("cache", "stats", *nobody), 3)


def test_a_state_directory_that_is_not_there_yet_holds_nothing(fwd, tmp_path, monkeypatch):
    monkeypatch.setenv("FWD_STATE_DIR", str(tmp_path / "later"))
    result = fwd("cache", "drop", "--drafts", "--uds", tmp_path / "none.sock")
    assert (result.exit_code, result.stdout) == (0, "0 tokens of earlier answers are forgotten\n")


def test_a_log_that_cannot_be_erased(fwd, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FWD_STATE_DIR", str(file))
    assert "cannot be erased" in error_line(fwd("cache", "drop", "--drafts", "--uds", tmp_path / "none.sock"), 2)


def test_nobody_runs_and_nothing_is_configured(fwd, tmp_path, monkeypatch):
    monkeypatch.delenv("FWD_STATE_DIR", raising=False)
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert "fwd serve" in error_line(fwd("cache", "drop", "--drafts", "--uds", tmp_path / "none.sock"), 3)


def test_something_must_be_named(fwd):
    assert "--drafts" in error_line(fwd("cache", "drop"), 2)


def test_an_engine_that_loads_cannot_forget(fwd, folder, tmp_path):
    with daemon(script(hold=str(tmp_path / "hold")), folder, ready=False) as running:
        assert "not ready" in error_line(fwd("cache", "drop", "--drafts", "--uds", running.uds), 4)
        assert "not ready" in error_line(fwd("cache", "stats", "--uds", running.uds), 4)
