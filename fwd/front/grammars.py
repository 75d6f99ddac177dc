"""Tries each grammar in a process of its own before an engine gets it, and remembers the verdicts."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from fwd.errors import EngineError, GrammarError, OverloadedError
from fwd.grammar.trial import CPU_SECONDS, FITS, LATE, MEMORY, MUCH, WALL_SECONDS
from fwd.protocol.messages import Vocabulary, encoder
from fwd.protocol.values import SPILL

COMMAND = (sys.executable, "-m", "fwd.grammar.trial")
KEPT = 256  # verdicts
AT_ONCE = 2  # trials
TOO_MUCH = f"the grammar is too complex: compiling it takes more than {CPU_SECONDS} s of a CPU or {MEMORY >> 20} MiB"
TOO_LATE = f"the grammar could not be tried within {WALL_SECONDS:g} s: the machine is busy, try again"


class GrammarTrials:
    """Asks for verdicts on grammars. `vocabulary` is made, and the process started, with the first; `tried` counts."""

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self.tried = 0
        self._vocabulary = vocabulary
        self._verdicts: OrderedDict[bytes, asyncio.Task[str]] = OrderedDict()
        self._room = asyncio.Semaphore(AT_ONCE)
        self._process: TrialProcess | None = None

    async def check(self, grammar: str, param: str = "grammar") -> None:
        """Raise `GrammarError` that names `param` unless the grammar can be compiled within its limits.

        Raises `OverloadedError` if that could not be found out, `EngineError` if nothing can be tried here.
        """
        if len(grammar) > SPILL:
            raise GrammarError(f"the grammar has {len(grammar)} characters, at most {SPILL}: shorten it", param=param)
        if wrong := await self._verdict(grammar):
            raise GrammarError(wrong, param=param)

    def close(self) -> None:
        """Stop the process."""
        if self._process:
            self._process.close()
            self._process = None

    async def _verdict(self, grammar: str) -> str:
        """Who asks for the same at the same time shares the trial, which goes on if they leave."""
        key = blake2b(grammar.encode(errors="surrogatepass"), digest_size=16).digest()
        task = self._verdicts.get(key)
        if task is None or (task.done() and task.exception()):  # a trial that failed has no verdict
            task = self._verdicts[key] = asyncio.get_running_loop().create_task(self._try(grammar))
            while len(self._verdicts) > KEPT:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        return await asyncio.shield(task)

    async def _try(self, grammar: str) -> str:
        try:
            text = grammar.encode()
        except UnicodeEncodeError as error:
            return f"the grammar is no text: {error}"
        async with self._room:
            self.tried += 1
            vocabulary = await asyncio.to_thread(self._vocabulary)
            for _ in range(2):  # a process that was killed is started once more
                process = self._process = self._process or TrialProcess(vocabulary)
                if said := await process.ask(text):
                    return _read(said)
                process.close()
                if self._process is process:
                    self._process = None
        raise EngineError("grammars cannot be tried here: the process that does it died")


def _read(said: bytes) -> str:
    """What is wrong, "" if nothing; raises `OverloadedError` if the trial could not find it out."""
    if said == LATE:
        raise OverloadedError(TOO_LATE, retry_after=1)
    return {FITS: "", MUCH: TOO_MUCH}.get(said, said.decode(errors="replace"))


class TrialProcess:
    """`fwd.grammar.trial` with a vocabulary."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._link, theirs = socket.socketpair()
        fd = os.memfd_create("vocabulary", os.MFD_CLOEXEC)
        with theirs, os.fdopen(fd, "w+b") as told:
            told.write(encoder.encode(vocabulary))
            told.seek(0)
            self._child = subprocess.Popen(  # noqa: S603  # our own module
                [*COMMAND, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=told, start_new_session=True
            )

    async def ask(self, grammar: bytes) -> bytes:
        """What it answers to a grammar: nothing if it is dead."""
        loop, (ours, theirs) = asyncio.get_running_loop(), socket.socketpair()
        with ours:
            ours.setblocking(False)
            with theirs, contextlib.suppress(OSError):
                socket.send_fds(self._link, [b"\0"], [theirs.fileno()])
            said = b""
            with contextlib.suppress(ConnectionError):
                await loop.sock_sendall(ours, grammar)
                ours.shutdown(socket.SHUT_WR)
                while piece := await loop.sock_recv(ours, 1 << 12):
                    said += piece
            return said

    def close(self) -> None:
        """Kill it and what it has begun to try will end by its limits."""
        self._link.close()
        self._child.kill()
        self._child.wait()
