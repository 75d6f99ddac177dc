"""Tensors of a checkpoint: read into place, each once, every byte hashed, and the disk's faults in one line."""

import errno
import hashlib
import json
import os
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from raw_files import FILES, header, raw, write, write_index, write_shards

from fwd.errors import ModelError
from fwd.models import checkpoint as module
from fwd.models import reader
from fwd.models.checkpoint import Checkpoint
from fwd.models.source import DTYPES

EXPERTS = 9


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture(autouse=True)
def small_leaves(monkeypatch):
    """Leaves so small that a tensor of some KiB has many, and one that ends in the middle of a step."""
    monkeypatch.setattr(reader, "LEAF", 1 << 10)
    monkeypatch.setattr(reader, "STEP", 1 << 8)
    monkeypatch.setattr(module, "STAGED", 1 << 12)


def opened(folder, progress=lambda _done, _total: None):
    return Checkpoint(folder, progress)


def stored(data, dtype, shape):
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def same(left, right):
    return left.shape == right.shape and torch.equal(
        *(tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    )


def aligned(tensor):
    return tensor.data_ptr() % 64 == 0


def refusal(work, *arguments):
    with pytest.raises(ModelError) as refused:
        work(*arguments)
    assert refused.value.message.isprintable()
    return refused.value.message


def accept(_name):
    return True


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", range(4))
def test_a_tensor_is_read_as_it_is_stored_wherever_it_stands(folder, random_bytes, dtype, pad):
    table, size = header({"odd": ("U8", (3,)), "w": (dtype, (37, 53))})
    data = random_bytes.randbytes(size)
    (folder / "model.safetensors").write_bytes(raw(str(table).replace("'", '"').encode() + b" " * pad, data))
    with opened(folder) as checkpoint:
        read = checkpoint.raw("w", (37, 53))
        assert same(read, stored(data[3:], DTYPES[dtype], (37, 53)))
        assert aligned(read)


def test_scalars_and_empty_tensors_are_read(folder, random_bytes):
    data = write(folder / "model.safetensors", {"s": ("F32", ()), "e": ("BF16", (0, 3))}, random_bytes)
    with opened(folder) as checkpoint:
        assert same(checkpoint.raw("s"), stored(data, torch.float32, ()))
        assert checkpoint.raw("e").shape == (0, 3)


@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_parts_are_converted_and_stand_one_after_the_other(folder, target):
    parts = {name: torch.randn(rows, 130) for name, rows in (("F32", 70), ("BF16", 1), ("F16", 33))}
    table, _ = header({name: (name, tuple(part.shape)) for name, part in parts.items()})
    data = b"".join(part.to(DTYPES[name]).view(torch.uint8).numpy().tobytes() for name, part in parts.items())
    (folder / "model.safetensors").write_bytes(raw(table, data))
    with opened(folder) as checkpoint:
        taken = checkpoint.take(list(parts), [tuple(part.shape) for part in parts.values()], target)
        assert same(taken, torch.cat([part.to(DTYPES[name]).to(target) for name, part in parts.items()]))
        assert aligned(taken)
        checkpoint.finish(accept)


def test_many_tensors_are_stacked_in_the_order_asked_for(folder, random_bytes):
    names = [f"experts.{index}.w" for index in range(EXPERTS)]
    data = write(folder / "model.safetensors", dict.fromkeys(names, ("U8", (40, 31))), random_bytes)
    whole = stored(data, torch.uint8, (EXPERTS, 40, 31))
    order = random_bytes.sample(range(EXPERTS), EXPERTS)
    with opened(folder) as checkpoint:
        stacked = checkpoint.stack([names[index] for index in order], (40, 31), torch.uint8)
        assert same(stacked, whole[order])
        assert aligned(stacked)
        checkpoint.finish(accept)


def test_each_tensor_is_taken_once(folder, random_bytes):
    write_shards(folder, random_bytes)
    for again in (
        lambda checkpoint: checkpoint.take(("a0",), ((2, 3),), torch.float32),
        lambda checkpoint: checkpoint.raw("a0"),
        lambda checkpoint: checkpoint.stack(("a0",), (2, 3), torch.float32),
    ):
        with opened(folder) as checkpoint:
            checkpoint.raw("a0")
            with pytest.raises(AssertionError, match="a0 taken twice"):
                again(checkpoint)


def test_what_is_missing_or_of_another_kind_is_named(folder, random_bytes):
    write_shards(folder, random_bytes)
    with opened(folder) as checkpoint:
        assert f"{folder}: tensor x is missing" in refusal(checkpoint.raw, "x")
        assert "a0 has shape [2, 3], expected [3, 2]" in refusal(checkpoint.raw, "a0", (3, 2))
        assert "a0 has dtype F32, expected one of U8" in refusal(checkpoint.stack, ("a0",), (2, 3), torch.uint8)


def test_what_is_kept_needs_no_place_and_is_counted(folder, random_bytes):
    write_shards(folder, random_bytes)
    with opened(folder) as checkpoint:
        checkpoint.raw("b1")
        assert "tensor a0 and 2 more has no place" in refusal(checkpoint.finish, lambda _name: False)
        checkpoint.keep("a")
        checkpoint.keep("none")
        assert checkpoint.kept == {"a": 48}
        assert f"{folder / FILES[0]}: tensor b0 has no place" in refusal(checkpoint.finish, lambda _name: False)
        checkpoint.finish(lambda name: name == "b0")


def digest_of(folder, *files):
    """The hash as its docstring defines it, from the files alone."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for file in files:
        whole = (folder / file).read_bytes()
        start = 8 + int.from_bytes(whole[:8], "little")
        cuts = [0, start, *(entry["data_offsets"][1] + start for entry in json.loads(whole[8:start]).values())]
        leaves = b"".join(
            hashlib.sha256(whole[at : min(at + reader.LEAF, end)]).digest()
            for begin, end in pairwise(cuts)
            for at in range(begin, end, reader.LEAF)
        )
        total.update(hashlib.sha256(leaves).digest())
    return total.hexdigest()


def taken_in(order, folder):
    """The hash when tensors are taken in some order, and the rest left."""
    with opened(folder) as checkpoint:
        for name in order:
            checkpoint.raw(name)
        checkpoint.finish(accept)
        return checkpoint.digest()


def test_the_hash_is_of_every_byte_in_whatever_order_they_are_read(folder, random_bytes):
    sizes = {"a": ("F32", (700,)), "b": ("U8", (1,)), "c": ("BF16", (1024,)), "none": ("U8", (0,))}
    write(folder / "model.safetensors", sizes, random_bytes)
    wanted = digest_of(folder, "model.safetensors")
    for order in ("abc", "cba", "b", ""):
        assert taken_in(order, folder) == wanted
    whole = bytearray((folder / "model.safetensors").read_bytes())
    for place in random_bytes.sample(range(len(whole) - 4825, len(whole)), 20):
        whole[place] ^= 1
        (folder / "model.safetensors").write_bytes(whole)
        assert taken_in("b", folder) != wanted
        whole[place] ^= 1


def test_the_hash_of_shards_is_of_their_order(folder, random_bytes):
    write_shards(folder, random_bytes)
    assert taken_in(("b1", "a0"), folder) == digest_of(folder, *FILES)


def test_progress_grows_to_the_bytes_of_all_files_in_one_thread(folder, random_bytes):
    seen = []
    places = write_shards(folder, random_bytes)
    sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES}
    write_index(folder, places, sha256=sums)
    with opened(folder, lambda done, total: seen.append((done, total, threading.current_thread()))) as checkpoint:
        for name in places:
            checkpoint.raw(name)
        checkpoint.finish(accept)
    size = 2 * sum((folder / file).stat().st_size for file in FILES)  # each is read to be hashed as a whole, too
    assert seen[-1][:2] == (size, size)
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert {thread for _, _, thread in seen} == {threading.current_thread()}


def test_a_sum_of_the_index_that_is_wrong_is_refused_with_the_file(folder, random_bytes):
    places = write_shards(folder, random_bytes)
    sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in FILES}
    write_index(folder, places, sha256={file: digest.upper() for file, digest in sums.items()})
    taken_in((), folder)
    write_index(folder, places, sha256={FILES[1]: sums[FILES[0]]})
    message = refusal(taken_in, (), folder)
    assert f"{folder / FILES[1]} is damaged: its SHA-256 is {sums[FILES[1]]}" in message


@pytest.mark.parametrize("how", ["shorter", "other bytes", "longer"])
def test_a_file_that_is_changed_while_it_is_loaded_is_refused(folder, random_bytes, how):
    places = write_shards(folder, random_bytes)
    path = folder / FILES[0]
    with opened(folder) as checkpoint:
        for name in places:
            checkpoint.raw(name)
        whole = path.read_bytes()
        path.write_bytes({"shorter": whole[:-1], "other bytes": whole[:-1] + b"x", "longer": whole + b"x"}[how])
        os.utime(path, ns=(1, 1))
        assert f"{path} " in (message := refusal(checkpoint.finish, accept))
        assert "changed while it was loaded" in message


def test_a_file_that_is_replaced_while_it_is_loaded_is_read_on_as_it_was(folder, random_bytes):
    write_shards(folder, random_bytes)
    wanted = digest_of(folder, *FILES)
    with opened(folder) as checkpoint:
        (folder / "new").write_bytes(b"")
        (folder / "new").rename(folder / FILES[0])
        checkpoint.raw("a0")
        checkpoint.finish(accept)
        assert checkpoint.digest() == wanted


def test_a_file_that_is_cut_while_it_is_loaded_is_refused(folder, random_bytes):
    write_shards(folder, random_bytes)
    path = folder / FILES[1]
    with opened(folder) as checkpoint:
        os.truncate(path, path.stat().st_size - 4)
        assert f"{path} ends at byte" in refusal(checkpoint.raw, "b1")


def test_what_the_disk_says_is_one_line(folder, random_bytes, monkeypatch):
    write(folder / "model.safetensors", {"w": ("U8", (100 << 10,))}, random_bytes)
    calls = []

    def preadv(fd, buffers, offset):
        calls.append(offset)
        if len(calls) == 7:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return len(buffers[0])

    with opened(folder) as checkpoint:
        monkeypatch.setattr(os, "preadv", preadv)
        message = refusal(checkpoint.raw, "w")
        assert f"{folder / 'model.safetensors'} cannot be read at byte" in message
        assert "Input/output error" in message


def test_short_reads_are_gone_on_with(folder, random_bytes, monkeypatch):
    data = write(folder / "model.safetensors", {"w": ("U8", (5000,))}, random_bytes)
    whole = os.preadv
    with opened(folder) as checkpoint:
        monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:7]], offset))
        assert same(checkpoint.raw("w"), stored(data, torch.uint8, (5000,)))


def test_a_refusal_leaves_no_file_open(folder, random_bytes):
    places = write_shards(folder, random_bytes)
    write_index(folder, places | {"z": FILES[1]})
    before = set(Path("/proc/self/fd").iterdir())
    refusal(opened, folder)
    assert set(Path("/proc/self/fd").iterdir()) <= before


def test_a_progress_that_fails_leaves_no_file_open_and_no_thread(folder, random_bytes):
    write_shards(folder, random_bytes)
    before, threads = set(Path("/proc/self/fd").iterdir()), threading.active_count()

    def gone(_done, _total):
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Checkpoint(folder, gone)
    assert set(Path("/proc/self/fd").iterdir()) <= before
    assert threading.active_count() <= threads


def test_no_tensor_is_allocated_before_its_shape_is_that_of_the_file(folder, random_bytes, monkeypatch):
    write_shards(folder, random_bytes)
    with opened(folder) as checkpoint:
        monkeypatch.setattr(torch, "empty", None)
        refusal(checkpoint.take, ("a0",), ((1 << 40, 3),), torch.float32)
        refusal(checkpoint.take, ("a0", "b0"), ((2, 3), (1 << 40, 3)), torch.float32)
        refusal(checkpoint.raw, "a0", (1 << 40, 3))
        refusal(checkpoint.stack, ("a0", "b0"), (1 << 40, 3), torch.float32)
