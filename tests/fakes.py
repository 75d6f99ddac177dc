"""A scripted engine: the real protocol over a real socketpair, tokens from a pure function, faults on order.

`command(script)` is what `EngineProcess` runs; `answer` and `token` are the oracle. Imports only `fwd.protocol`.
"""

import os
import select
import signal
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from socket import SHUT_RDWR, socket
from typing import Literal, NoReturn

import msgspec
from msgspec import Struct

from fwd.protocol.frames import Channel
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import (
    VERSION,
    Cancel,
    DropDrafts,
    Dropped,
    Failed,
    Finished,
    Hello,
    Load,
    Loading,
    Message,
    Ping,
    Pong,
    PromptLogprobs,
    Ready,
    Submit,
    ToEngine,
    Tokens,
    Vocabulary,
    to_engine,
)
from fwd.protocol.values import (
    MAX_FRAME,
    DrafterCounts,
    EngineInfo,
    Limits,
    Prefilling,
    Reason,
    Timing,
    TopLogprobs,
)

MASK = 2**64 - 1
SCORES = 512
RAW = {
    "garbage": b"\x05\0\0\0\xff\xc1\xc1\xc1\xc1",
    "oversized": (MAX_FRAME + 1).to_bytes(4, "little"),
    "unknown": b"\x03\0\0\0\x92\x7f\0",
    "half": b"\x40\0\0\0\x92",
    "close": b"",
}
START = "import sys; sys.path[:0] = sys.argv.pop(1).split(':'); import fakes; fakes.main()"


class Fault(Struct, forbid_unknown_fields=True):
    """What goes wrong in one life: at its start, or once `after` tokens have been sent in it.

    At the start: `version` (foreign Hello), `vanish` (exit before Hello), `stall` (the load stands still),
    `bad_model` (`Failed`, then exit). Later: `kill` (SIGKILL), `exit`, `hang` (deaf), `stand` (pings are answered, the
    step counter stands still), `garbage`, `oversized`, `unknown` (tag), `gap`, `double`, `half` (a frame), `close`.
    """

    kind: Literal[
        "version", "vanish", "stall", "bad_model",
        "kill", "exit", "hang", "stand", "garbage", "oversized", "unknown", "gap", "double", "half", "close",
    ]  # fmt: skip
    after: int = 0


class Script(Struct, forbid_unknown_fields=True):
    """What the engine does. Life n suffers `faults[n]`, lives beyond the list `always`; `lives` is the counter's file.

    Tokens are `text` (repeated) or drawn by hash from `low` … `vocab` − 1; the one at index `eos_at` is `eos`.
    A frame carries `per_frame[step]` tokens. A step is made whenever there is work, or with `pace="ping"` one for each
    ping. A prompt is read `chunk` tokens a step, 0: whole in the first one. `cached` is what each answer says about the
    prefix cache, and `memory` the plan. The load waits until the file `hold` exists. A running prompt that holds an id
    in `poison` kills. `hashes[life]` is the weights' hash. `drafters` are loaded and have done `drafts` in each life;
    `corpus` tokens are remembered until they are dropped. If it is `careless`, token 5 is another one where there may
    be drafts, or where there are neighbours.
    """

    vocab: int = 4096
    low: int = 16
    context: int = 4096
    pages: int = 64
    text: tuple[int, ...] = ()
    eos: int = 0
    eos_at: int = -1
    per_frame: tuple[int, ...] = (1,)
    chunk: int = 0
    cached: Timing = Timing()
    memory: dict[str, int] = {}
    pace: Literal["free", "ping"] = "free"
    loading: int = 2
    hold: str = ""
    hashes: tuple[str, ...] = ("fake",)
    poison: tuple[int, ...] = ()
    faults: tuple[Fault | None, ...] = ()
    always: Fault | None = None
    lives: str = ""
    drafters: tuple[str, ...] = ()
    drafts: tuple[DrafterCounts, ...] = ()
    notes: tuple[str, ...] = ()
    corpus: int = 0
    careless: Literal["", "drafts", "neighbours"] = ""


def command(script: Script) -> list[str]:
    """The command of an `EngineProcess` that plays `script`."""
    assert script.lives or not (script.faults or script.hashes[1:]), "faults by life need a counter file"
    here = Path(__file__).resolve().parent
    return [sys.executable, "-c", START, f"{here.parent}:{here}", msgspec.json.encode(script).decode()]


def mix(value: int) -> int:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31


def key(prompt: Sequence[int], seed: int, choice: int) -> int:
    """What the tokens of a request depend on."""
    crc = zlib.crc32(b"".join(number.to_bytes(4, "little") for number in prompt))
    return mix(mix(crc) ^ mix(seed & MASK) ^ mix(choice + 1))


def token(script: Script, number: int, index: int, limits: Limits | None = None) -> int:
    """The token at `index` of the output of the request whose `key` is `number`."""
    if index == script.eos_at:
        drawn = script.eos
    elif script.text:
        drawn = script.text[index % len(script.text)]
    else:
        drawn = script.low + mix(number + index) % (script.vocab - script.low)
    while limits and index < limits.min_tokens and drawn in limits.stop_ids:
        drawn = (drawn + 1) % script.vocab
    return drawn


def score(number: int, index: int) -> float:
    """The log-probability at `index`; those of the prompt have negative indices."""
    return -(mix(number ^ (index & MASK)) % 4096) / 1024


def top(script: Script, number: int, index: int, drawn: int, count: int) -> TopLogprobs:
    """The `count` most likely tokens at `index`, the drawn one first."""
    best = score(number, index)
    return TopLogprobs(
        ids=tuple((drawn + rank) % script.vocab for rank in range(count)),
        logprobs=tuple(best - rank for rank in range(count)),
    )


def expected(prompt: Sequence[int], seed: int, choice: int, n: int, script: Script | None = None) -> list[int]:
    """The first `n` tokens of an answer that nothing stops."""
    number = key(prompt, seed, choice)
    return [token(script or Script(), number, index) for index in range(n)]


def answer(script: Script, submit: Submit) -> tuple[list[int], Reason]:
    """All tokens of a request, those in `emitted` included, and why it ends."""
    row = Row.of(script, submit)
    while (end := row.end()) is None:
        row.ids.append(row.next())
    return row.ids, end.reason


@dataclass
class Row:
    """One request in the engine."""

    script: Script
    submit: Submit
    prompt: Sequence[int]
    ids: list[int]
    number: int
    length: int
    steps: int = 0
    read: int = 0
    scored: int = 1
    wrong: bool = False

    @classmethod
    def of(cls, script: Script, submit: Submit) -> "Row":
        prompt = unpack_ids(submit.prompt)
        assert submit.seed is not None
        room = script.context - len(prompt)
        wanted = submit.limits.max_tokens
        return cls(
            script,
            submit,
            prompt,
            ids=list(unpack_ids(submit.emitted)),
            number=key(prompt, submit.seed, submit.choice),
            length=room if wanted < 0 else min(room, wanted),
        )

    def next(self) -> int:
        drawn = token(self.script, self.number, len(self.ids), self.submit.limits)
        return drawn ^ 1 if self.wrong and len(self.ids) == 5 else drawn

    def end(self) -> Finished | None:
        limits, timing = self.submit.limits, self.timing()
        if self.ids and self.ids[-1] in limits.stop_ids and len(self.ids) > limits.min_tokens:
            return Finished(id=self.submit.id, reason="stop", stop_id=self.ids[-1], timing=timing)
        if len(self.ids) >= self.length:
            return Finished(id=self.submit.id, reason="length", timing=timing)
        return None

    def timing(self) -> Timing:
        return msgspec.structs.replace(self.script.cached, steps=self.steps)

    def step(self, count: int) -> Iterator[Message]:
        """The frames of one step that reads a chunk or commits up to `count` tokens."""
        self.steps += 1
        self.read = min(len(self.prompt), self.read + (self.script.chunk or len(self.prompt)))
        if self.read < len(self.prompt):
            return
        yield from self.scores()
        start = len(self.ids)
        while len(self.ids) < start + count and self.end() is None:
            self.ids.append(self.next())
        if new := self.ids[start:]:
            yield self.tokens(start, new)
        if end := self.end():
            yield end

    def tokens(self, start: int, ids: list[int]) -> Tokens:
        wanted = self.submit.sampling.logprobs
        if wanted < 0:
            return Tokens(id=self.submit.id, start=start, ids=ids)
        places = range(start, start + len(ids))
        return Tokens(
            id=self.submit.id,
            start=start,
            ids=ids,
            logprobs=[score(self.number, place) for place in places],
            top=[top(self.script, self.number, place, self.ids[place], wanted) for place in places],
        )

    def scores(self) -> Iterator[PromptLogprobs]:
        wanted = self.submit.prompt_logprobs
        while wanted >= 0 and self.scored < len(self.prompt):
            places = range(self.scored, min(self.scored + SCORES, len(self.prompt)))
            yield PromptLogprobs(
                id=self.submit.id,
                start=self.scored,
                logprobs=[score(self.number, -place) for place in places],
                top=[top(self.script, self.number, -place, self.prompt[place], wanted) for place in places],
            )
            self.scored = places.stop


class FakeEngine:
    """Plays a script on a channel until the other side closes it."""

    def __init__(self, script: Script, channel: Channel[ToEngine]) -> None:
        self.script = script
        self.channel = channel
        self.life = _life(script.lives)
        self.fault = script.faults[self.life] if self.life < len(script.faults) else script.always
        self.load: Load | None = None
        self.rows: dict[int, Row] = {}
        self.steps = 0
        self.sent = 0
        self.computed = 0
        self.standing = False
        self.introduced = False
        self.corpus = script.corpus

    def run(self) -> None:
        self.start()
        while True:
            moving = bool(self.rows) and not self.standing and self.script.pace == "free"
            message = self.channel.receive(0 if moving else None)
            while message is not None:
                self.hear(message)
                message = self.channel.receive(0)
            if moving:
                self.step()

    def start(self) -> None:
        kind = self.fault.kind if self.fault else ""
        if kind == "vanish":
            os._exit(1)
        self.channel.send(Hello(version=VERSION + (kind == "version"), build="fake"))
        while self.load is None:
            if (message := self.channel.receive()) is not None:
                self.hear(message)
        for done in range(self.script.loading):
            self.channel.send(Loading(done=done, total=self.script.loading))
        if kind == "bad_model":
            self.channel.send(Failed(code="bad_model", message="model.safetensors: the tensor lm_head is missing"))
            sys.exit(2)
        if kind == "stall":
            self.hang()
        while self.script.hold and not Path(self.script.hold).exists():
            self.channel.receive(0.005)
        self.channel.send(Ready(info=self.info()))

    def info(self) -> EngineInfo:
        assert self.load
        return EngineInfo(
            architecture="FakeForCausalLM",
            weights_hash=self.script.hashes[min(self.life, len(self.script.hashes) - 1)],
            vocab_size=self.script.vocab,
            context=self.load.context or self.script.context,
            kv_bytes=self.load.kv_bytes or self.script.pages << 10,
            device="cpu",
            dtype="float32",
            kv_dtype="float32",
            kernel_set="fake",
            build="fake",
            chunk=64,
            page_size=16,
            pages=self.script.pages,
            memory=self.script.memory,
            max_seqs=self.load.max_seqs,
            pid=os.getpid(),
            drafters=self.script.drafters,
            draft_notes=self.script.notes,
        )

    def hear(self, message: ToEngine) -> None:
        match message:
            case Load():
                self.load = message
            case Vocabulary():
                assert not self.introduced, "once is enough"
                self.introduced = True
            case Submit():
                assert self.introduced or not message.grammar, "a grammar comes after the vocabulary"
                self.rows[message.id] = Row.of(self.script, message)
            case Cancel():
                if row := self.rows.pop(message.id, None):
                    self.channel.send(Finished(id=message.id, reason="cancelled", timing=row.timing()))
            case Ping():
                if self.script.pace == "ping" and not self.standing:
                    self.step()
                self.channel.send(self.pong(message.seq))
            case DropDrafts():
                self.channel.send(Dropped(tokens=self.corpus))
                self.corpus = 0
            case Hello():
                assert message.version == VERSION

    def running(self) -> list[Row]:
        assert self.load
        return list(self.rows.values())[: self.load.max_seqs]

    def pong(self, seq: int) -> Pong:
        running = len(self.running())
        return Pong(
            seq=seq,
            steps=self.steps,
            running=running,
            waiting=len(self.rows) - running,
            pages_free=self.script.pages - running,
            pages_total=self.script.pages,
            computed=self.computed,
            prefilling=[
                Prefilling(id=row.submit.id, done=row.read, total=len(row.prompt))
                for row in self.running()
                if row.read < len(row.prompt)
            ],
            drafters=list(self.script.drafts),
            corpus_tokens=self.corpus,
        )

    def step(self) -> None:
        """One step for every running row, sent in one go; the fault comes after exactly its number of tokens."""
        frames: list[Message] = []
        for row in (rows := self.running()):
            left = self.fault.after - self.sent if self.fault else sys.maxsize
            poisoned = any(token in row.prompt for token in self.script.poison)
            if poisoned or left <= 0:
                self.channel.send(*frames)
                self.suffer("kill" if poisoned or not self.fault else self.fault.kind, row)
                return
            before, read = len(row.ids), row.read
            row.wrong = self.wrong(row)
            frames += row.step(min(left, self.script.per_frame[self.steps % len(self.script.per_frame)]))
            self.sent += len(row.ids) - before
            self.computed += len(row.ids) - before + row.read - read
            if row.end():
                del self.rows[row.submit.id]
        self.steps += bool(rows)
        self.channel.send(*frames)

    def wrong(self, row: Row) -> bool:
        match self.script.careless:
            case "drafts":
                return row.submit.draft.drafter != "off"
            case "neighbours":
                return len(self.rows) > 1
        return False

    def suffer(self, kind: str, row: Row) -> None:
        match kind:
            case "stand":
                self.standing = True
                return
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(1)
            case "gap" | "double":
                self.channel.send(row.tokens(len(row.ids) + (1 if kind == "gap" else -1), [1]))
            case "hang":
                pass
            case _:
                self.channel.sock.sendall(RAW[kind])
        if kind in {"half", "close"}:
            self.channel.sock.shutdown(SHUT_RDWR)
            time.sleep(60)
        self.hang()

    def hang(self) -> NoReturn:
        """Hear nothing more, but do not outlive the other side."""
        gone = select.poll()
        gone.register(self.channel.sock, 0)
        gone.poll()
        sys.exit(1)


def _life(counter: str) -> int:
    if not counter:
        return 0
    with Path(counter).open("ab") as file:
        life = file.tell()
        file.write(b".")
    return life


def main() -> None:
    """Play the script in the second-last argument on the descriptor in the last."""
    script = msgspec.json.decode(sys.argv[-2], type=Script)
    channel: Channel[ToEngine] = Channel(socket(fileno=int(sys.argv[-1])), to_engine)
    try:
        FakeEngine(script, channel).run()
    except (EOFError, OSError):
        sys.exit(0)
