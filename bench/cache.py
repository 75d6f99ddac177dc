"""What the prefix cache costs and what it saves: `python bench/cache.py`.

The ceiling of a match is hashing each page and looking the hash up, with no tree. Tree operations run on the engine's
own books (no tensors) with a million tokens cached; hits and misses on the embedded model, through the daemon's socket.
Saves into bench/results.
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from fwd.cli.bench import machine
from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.engine.plan import PAGE_SIZE
from fwd.engine.prefix import HASH_BYTES, ID_BYTES
from fwd.engine.request import Request
from fwd.engine.space import Space
from fwd.errors import EngineError
from fwd.models.layout import Group
from fwd.protocol.client import Client
from fwd.protocol.ids import pack_ids
from fwd.protocol.messages import Failed, Finished, Submit, Tokens
from fwd.protocol.values import Limits

TARGET = 5e6  # tokens matched a second
CACHED = 1 << 20  # tokens
CHUNK = 64
KEY = bytes(range(32))
WINDOW = 64
SEED = 20261124
LAYOUTS = {
    "full": (Group("full", 0, ()),),
    "full+sliding": (Group("full", 0, ()), Group("sliding", WINDOW, ())),
}
PROMPTS = (64, 256, 1024, 1920)  # tokens; of them the embedded model takes 2048


def seconds(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def floor(ids: memoryview) -> float:
    """Seconds to hash every page after the one before it and find each hash in a table."""
    table: dict[bytes, bytes] = {}
    _chain(ids, table)
    return seconds(lambda: _chain(ids, table))


def _chain(ids: memoryview, table: dict[bytes, bytes]) -> None:
    size, find, fresh = PAGE_SIZE * ID_BYTES, table.get, blake2b(digest_size=HASH_BYTES, key=KEY).copy
    digest = bytes(HASH_BYTES)
    for begin in range(0, len(ids), size):
        state = fresh()
        state.update(digest + ids[begin : begin + size])
        digest = state.digest()
        if find(digest) is None:
            table[digest] = digest


def request(number: int, ids: memoryview) -> Request:
    """A request that draws nothing."""
    return Request(Submit(id=number, prompt=ids, limits=Limits(max_tokens=0)))


def tree_round(groups: Sequence[Group], ids: memoryview) -> dict[str, float]:
    """Seconds of each operation on the tokens `ids`, all of which end up in the tree, and go again."""
    tokens = len(ids) // ID_BYTES
    space = Space(groups, [tokens // PAGE_SIZE] * len(groups), PAGE_SIZE, chunk=CHUNK, key=KEY)
    first, again = request(1, ids), request(2, ids)
    assert space.admit(first, tokens)
    found = {"publish": sum(_publish(space, first, end) for end in range(CHUNK, tokens + 1, CHUNK))}
    space.release(first)
    found["floor"] = floor(ids)
    found["match"] = seconds(lambda: space.tree.match(again))
    found["share"] = seconds(lambda: space.admit(again, tokens)) - found["match"]
    assert again.computed == tokens - PAGE_SIZE
    found["release"] = seconds(lambda: space.release(again))
    found["evict"] = seconds(lambda: _evict(space))
    assert len(space.tree) == 0
    return found


def _publish(space: Space, request: Request, end: int) -> float:
    assert space.prepare(request, end)
    space.commit(request, end)
    return seconds(lambda: space.publish(request))


def _evict(space: Space) -> None:
    for group in reversed(range(len(space.groups))):
        while space.tree.evict(group):
            pass


def measure_tree(rounds: int) -> dict[str, Any]:
    """Medians of tokens per second at `CACHED` tokens, by cache layout, beside the floor."""
    ids = pack_ids(random.Random(SEED).choices(range(1 << 17), k=CACHED))
    gc.freeze()  # as the engine does
    result: dict[str, Any] = {"tokens": CACHED, "page": PAGE_SIZE}
    print(f"to reach: {TARGET / 1e6:.0f} M tokens/s matched; floor: pages hashed and looked up without a tree")
    for name, groups in LAYOUTS.items():
        samples = [tree_round(groups, ids) for _ in range(rounds)]
        found = {key: CACHED / statistics.median(run[key] for run in samples) for key in samples[0]}
        result[name] = {**found, "samples": samples}
        rates = ", ".join(f"{key} {rate / 1e6:.1f} M" for key, rate in found.items())
        print(f"{name}: {rates} tokens/s; match {found['match'] / found['floor']:.0%} of the floor")
    return result


def first_token(client: Client, ids: Sequence[int], *, cache: bool) -> tuple[float, Finished]:
    """Milliseconds from the request to its first token, and how it ended."""
    began, first = time.perf_counter(), 0.0
    for event in client.submit(ids, max_tokens=2, temperature=0.0, cache=cache):
        match event:
            case Tokens():
                first = first or (time.perf_counter() - began) * 1e3
            case Finished():
                return first, event
            case Failed():
                raise EngineError(event.message)
    raise EngineError("the stream had no end")


def engine_round(client: Client, ids: Sequence[int]) -> dict[str, float]:
    """Milliseconds to the first token: without a cache, as a miss that is kept, and as a hit."""
    cold, _ = first_token(client, ids, cache=False)
    miss, missed = first_token(client, ids, cache=True)
    hit, found = first_token(client, ids, cache=True)
    assert missed.timing.cached_tokens == 0
    assert found.timing.cached_tokens == (len(ids) - 1) // PAGE_SIZE * PAGE_SIZE
    return {"cold": cold, "miss": miss, "hit": hit}


def measure_engine(rounds: int) -> dict[str, Any]:
    """Medians at a few prompt lengths on the embedded model."""
    result: dict[str, Any] = {}
    rng = random.Random(SEED)
    flags = ("demo", "--http", "none", "--log-level", "error")
    with private_daemon(*flags) as daemon, daemon.connect() as client:
        vocab = (wait_ready(client).engine or _no_engine()).vocab_size
        for length in PROMPTS:
            samples = [engine_round(client, rng.choices(range(vocab), k=length)) for _ in range(rounds + 1)][1:]
            found = {key: statistics.median(run[key] for run in samples) for key in samples[0]}
            result[str(length)] = {**found, "samples": samples}
            print(
                f"{length} tokens: first token after {found['cold']:.1f} ms without a cache, {found['miss']:.1f} ms as "
                f"a miss, {found['hit']:.1f} ms as a hit ({found['hit'] / found['cold']:.0%})"
            )
    return result


def _no_engine() -> Any:
    raise EngineError("the daemon is ready and has no engine")


def main() -> None:
    """Measure, print, save."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--save", default=str(Path(__file__).parent / "results"))
    chosen = options.parse_args()
    result = {"what": "cache", **machine.facts(), "target": TARGET}
    result["tree"] = measure_tree(chosen.rounds)
    result["engine"] = measure_engine(chosen.rounds)
    print(machine.save(result, Path(chosen.save)))


if __name__ == "__main__":
    main()
