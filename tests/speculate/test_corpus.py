"""The corpus in memory and its log: every cut and every flipped byte, the bound, two writers, who may read it."""

import errno
import os
import random
import stat
from array import array
from pathlib import Path

import pytest
import structlog

from fwd.engine.reports import dropped
from fwd.engine.speculate import corpus as module
from fwd.engine.speculate.corpus import Corpus, corpus_of
from fwd.engine.speculate.draft_log import HEADER, RECORD, DraftLog, erase, packed
from fwd.engine.speculate.speculator import JointSpeculator
from fwd.protocol.messages import Dropped

LIMIT = 1 << 20
OUTPUTS = [array("i", ids) for ids in ([5, 6, 7], [2**31 - 1, 0], range(100, 140))]


def opened(folder, weights="weights", text="text", limit=LIMIT):
    return DraftLog(folder, weights, text, limit)


def written(folder, outputs=OUTPUTS):
    """A log with these outputs, closed."""
    log = opened(folder)
    assert log.read() == []
    for ids in outputs:
        log.append(ids)
    log.close()
    return log.path


@pytest.fixture
def said():
    with structlog.testing.capture_logs() as events:
        yield events


def test_what_was_said_is_there_again(tmp_path, said):
    path = written(tmp_path)
    assert path.stat().st_size == HEADER.size + sum(RECORD.size + 4 * len(ids) for ids in OUTPUTS)
    log = opened(tmp_path)
    assert log.read() == OUTPUTS
    log.append(OUTPUTS[0])
    log.close()
    assert opened(tmp_path).read() == [*OUTPUTS, OUTPUTS[0]]
    assert said == []


def test_a_crash_at_any_byte_costs_the_last_output_at_most(tmp_path, said):
    path = written(tmp_path)
    whole = path.read_bytes()
    ends = [HEADER.size]
    for ids in OUTPUTS:
        ends.append(ends[-1] + len(packed(ids)))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        log = opened(tmp_path)
        kept = sum(end <= size for end in ends[1:])
        assert log.read() == OUTPUTS[:kept], size
        log.append(OUTPUTS[1])
        log.close()
        again = opened(tmp_path)
        assert again.read() == [*OUTPUTS[:kept], OUTPUTS[1]], size
        again.close()
    assert said == []


def test_a_changed_byte_anywhere_drops_the_log_with_one_warning(tmp_path, said):
    path = written(tmp_path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        log = opened(tmp_path)
        assert log.read() == [], place
        log.append(OUTPUTS[0])
        log.close()
        again = opened(tmp_path)
        assert again.read() == OUTPUTS[:1]
        again.close()
        (event,) = said
        assert event["event"] == "corpus_dropped"
        assert event["path"] == str(path)
        assert event["way_out"]
        said.clear()


def test_each_model_and_text_side_has_a_log_of_its_own(tmp_path):
    logs = [opened(tmp_path, weights, text) for weights in ("a", "b") for text in ("c", "d")]
    for number, log in enumerate(logs):
        log.read()
        log.append(array("i", [number] * 3))
        log.close()
    assert len({log.path for log in logs}) == 4
    assert [list(log.read()[0]) for log in logs] == [[number] * 3 for number in range(4)]


def test_another_models_log_under_this_name_is_dropped(tmp_path, said):
    path = written(tmp_path)
    other = opened(tmp_path, weights="other")
    path.rename(other.path)
    assert other.read() == []
    assert [event["event"] for event in said] == ["corpus_dropped"]


def test_the_bound_holds_and_the_latest_half_stays(tmp_path):
    rng, limit, outputs = random.Random(1), 4096, []
    log = opened(tmp_path, limit=limit)
    log.read()
    for number in range(400):
        outputs.append(array("i", [number] * rng.randrange(1, 100)))
        log.append(outputs[-1])
        assert log.path.stat().st_size <= limit
        if number % 20 == 0:
            log.close()
            log = opened(tmp_path, limit=limit)
            kept = log.read()
            assert kept == outputs[-len(kept) :]
            assert number < 20 or sum(len(packed(ids)) for ids in kept) > (limit - HEADER.size) // 2 - 1000
    assert [path.name for path in tmp_path.iterdir()] == [log.path.name]


def test_of_an_output_longer_than_the_log_the_end_is_kept(tmp_path):
    log = opened(tmp_path, limit=1024)
    log.read()
    for _ in range(3):
        log.append(array("i", range(5000)))
    log.close()
    kept = opened(tmp_path, limit=1024).read()
    assert [list(ids) for ids in kept] == [list(range(5000 - len(kept[0]), 5000))] * len(kept)
    assert len(kept[0]) * 4 > 400


@pytest.mark.parametrize("limit", [1, HEADER.size, HEADER.size + 2 * RECORD.size])
def test_a_bound_that_holds_nothing_keeps_nothing(tmp_path, limit):
    log = opened(tmp_path, limit=limit)
    log.read()
    log.append(OUTPUTS[0])
    assert log.path.stat().st_size <= max(limit, HEADER.size)


def test_a_crash_while_halving_leaves_the_old_log(tmp_path, monkeypatch):
    log = opened(tmp_path, limit=2048)
    log.read()
    for number in range(30):
        log.append(array("i", [number] * 10))
    before = log.path.read_bytes()
    monkeypatch.setattr("fwd.engine.speculate.draft_log.os.fsync", failing(errno.EIO))
    log.append(array("i", range(200)))
    assert log.path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [log.path.name]


def failing(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_two_engines_in_turn(tmp_path, said):
    first = corpus_of(str(tmp_path), "weights", "text", LIMIT)
    first.record(array("i", range(50)))
    first._log.close()  # its process ends
    second = corpus_of(str(tmp_path), "weights", "text", LIMIT)
    assert second.tokens == 50
    second.record(array("i", range(7)))
    second._log.close()
    assert corpus_of(str(tmp_path), "weights", "text", LIMIT).tokens == 57
    assert said == []


def test_two_engines_at_once_one_writes_until_it_ends(tmp_path, said):
    first, second = opened(tmp_path), opened(tmp_path)
    first.read()
    first.append(OUTPUTS[0])
    assert second.read() == []
    second.append(OUTPUTS[1])
    assert [event["event"] for event in said] == ["corpus_not_kept"]  # once
    first.append(OUTPUTS[2])
    first.close()
    second.append(OUTPUTS[1])
    second.close()
    assert opened(tmp_path).read() == [OUTPUTS[0], OUTPUTS[2], OUTPUTS[1]]
    assert len(said) == 1


def test_who_waited_does_not_write_what_was_replaced(tmp_path):
    """Between the opening of the file and its lock another process may have put a new one in its place."""
    path = written(tmp_path)
    log = opened(tmp_path)
    stale = path.with_suffix(".old")
    path.rename(stale)
    written(tmp_path, OUTPUTS[:1])
    real = os.open
    log.path = stale

    def swapped(name, *rest):
        file = real(name, *rest)
        log.path = path
        return file

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fwd.engine.speculate.draft_log.os.open", swapped)
        assert log.read() == []
    log.append(OUTPUTS[1])
    log.close()
    assert opened(tmp_path).read() == OUTPUTS[:2]
    assert stale.read_bytes() == b"".join([path.read_bytes()[: HEADER.size], *map(packed, OUTPUTS)])


def test_it_is_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        path = written(tmp_path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        log = opened(tmp_path, limit=1024)
        assert log.read() == OUTPUTS
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for _ in range(40):
            log.append(OUTPUTS[0])
        assert stat.S_IMODE(path.stat().st_mode) == 0o600  # halved
    finally:
        os.umask(before)


@pytest.mark.parametrize("what", ["folder", "link", "pipe", "missing"])
def test_what_cannot_be_used_is_left_alone_with_one_warning(tmp_path, said, what):
    log = opened(tmp_path / "gone" if what == "missing" else tmp_path)
    target = tmp_path / "target"
    target.write_bytes(b"something")
    match what:
        case "folder":
            log.path.mkdir()
        case "link":
            log.path.symlink_to(target)
        case "pipe":
            os.mkfifo(log.path)
    assert log.read() == []
    log.append(OUTPUTS[0])
    log.append(OUTPUTS[1])
    assert [event["event"] for event in said] == ["corpus_not_kept"]
    assert target.read_bytes() == b"something"


def test_a_full_disk_ends_the_log_and_not_the_serving(tmp_path, said, monkeypatch):
    corpus = corpus_of(str(tmp_path), "weights", "text", LIMIT)
    corpus.record(OUTPUTS[0])
    real = os.write
    monkeypatch.setattr("fwd.engine.speculate.draft_log.os.write", lambda file, data: real(file, data[:7]))
    corpus.record(OUTPUTS[1])
    monkeypatch.undo()
    corpus.record(OUTPUTS[2])
    assert [event["event"] for event in said] == ["corpus_not_kept"]
    assert corpus.tokens == sum(map(len, OUTPUTS))
    assert corpus._log.path.stat().st_size == HEADER.size + len(packed(OUTPUTS[0]))  # and no half of the next
    assert opened(tmp_path).read() == OUTPUTS[:1]


def test_drop_forgets_memory_and_all_logs(tmp_path):
    other = opened(tmp_path, weights="other")
    other.read()
    other.append(OUTPUTS[0])
    other.close()
    (tmp_path / "prefix.key").write_bytes(b"key")
    corpus = corpus_of(str(tmp_path), "weights", "text", LIMIT)
    for ids in OUTPUTS:
        corpus.record(ids)
    assert corpus.drop() == sum(map(len, OUTPUTS))
    assert corpus.tokens == 0
    assert not corpus.texts
    assert [path.name for path in tmp_path.iterdir()] == ["prefix.key"]
    corpus.record(OUTPUTS[1])  # it begins anew
    corpus._log.close()
    assert opened(tmp_path).read() == [OUTPUTS[1]]


def test_a_log_that_cannot_be_erased_is_not_said_to_be(tmp_path, monkeypatch):
    corpus = corpus_of(str(tmp_path), "weights", "text", LIMIT)
    corpus.record(OUTPUTS[0])
    speculator = JointSpeculator([], ahead=False, corpus=corpus)
    monkeypatch.setattr(Path, "unlink", failing(errno.EROFS))
    said = dropped(speculator)

    assert said == Dropped(error=f"{tmp_path}: the log of drafts cannot be erased: Read-only file system")
    assert corpus.tokens == 0
    assert opened(tmp_path).read() == [OUTPUTS[0]]


def test_erase_without_an_engine(tmp_path):
    written(tmp_path)
    assert erase(tmp_path) == sum(map(len, OUTPUTS))
    assert list(tmp_path.iterdir()) == []
    assert erase(tmp_path) == 0
    path = written(tmp_path)
    path.write_bytes(b"rubbish")
    path.with_name(f"{path.name}.new").write_bytes(b"half of it")
    assert erase(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_without_a_state_directory_nothing_is_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fwd.engine.speculate.draft_log.os.open", failing(errno.EPERM))
    corpus = corpus_of("", "weights", "text", 0)
    corpus.record(OUTPUTS[0])
    assert corpus.tokens == 3
    assert corpus.drop() == 3
    assert list(tmp_path.iterdir()) == []


def test_memory_has_the_same_bound_and_drops_the_older_half():
    corpus, said = Corpus(limit=4000), []
    for number in range(500):
        said += [number] * 7
        before = corpus.tokens
        corpus.record(array("i", [number] * 7))
        kept = [token for grams in reversed(corpus.texts) for token in grams.text]
        assert corpus.tokens == len(kept) <= 1000
        assert kept == said[-len(kept) :]
        assert corpus.tokens > before or corpus.tokens <= 500
        assert len(said) < 1000 or len(kept) > 1000 // 2 - 1000 // 8
    corpus.record(array("i", range(10_000)))
    assert corpus.tokens <= 1000
    assert list(corpus.texts[0].text) == list(range(9500, 10_000))


def test_at_a_start_the_latest_is_known_at_once_and_the_rest_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "START", 100)
    limit = 4 * 8 * 64  # segments of 64 ids
    first = corpus_of(str(tmp_path), "weights", "text", limit)
    for number in range(30):
        first.record(array("i", range(10 * number, 10 * number + 10)))
    first._log.close()
    corpus = corpus_of(str(tmp_path), "weights", "text", limit)
    assert corpus.tokens == 300
    assert [grams.size for grams in corpus.texts] == [60, 40, 0, 0, 0]
    corpus.take(30)
    assert [grams.size for grams in corpus.texts] == [60, 60, 10, 0, 0]
    corpus.take(1000)
    assert [grams.size for grams in corpus.texts] == [60] * 5


def test_what_is_too_short_is_not_kept():
    corpus = Corpus()
    corpus.record(array("i"))
    corpus.record(array("i", [1]))
    assert corpus.tokens == 0
