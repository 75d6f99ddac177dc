"""The process that tries grammars: `python -m fwd.grammar.trial FD`, the vocabulary (a `Vocabulary`) on its input.

No limit of the library bounds how long it compiles, so each grammar is compiled in a fork of this process, which has
the vocabulary already and which the kernel ends when it has taken too long or too much memory. The front sends one end
of a socketpair for each grammar; on it come the text, and back FITS, MUCH (it takes too much), what is wrong, or LATE:
that could not be found out.
"""

import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from fwd.errors import GrammarError
from fwd.grammar.compiled import STEP_SECONDS, Tokens, reason
from fwd.protocol.ids import unpack_ids
from fwd.protocol.messages import Vocabulary

PR_SET_PDEATHSIG = 1
FITS, MUCH, LATE = b"+", b"*", b"~"
CPU_SECONDS, WALL_SECONDS = 0.6, 4.0  # what is slow because others have the CPUs is waited for
BY_OTHERS = {signal.SIGALRM, signal.SIGKILL}  # the wall clock, a machine without memory: not the grammar's fault
MEMORY = 256 << 20  # bytes of address space beyond what the process has


def main() -> int:
    """Fork for every descriptor that comes, until the link closes."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    link = socket.socket(fileno=int(sys.argv[1]))
    vocabulary = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Vocabulary)
    tokens = Tokens(vocabulary, len(unpack_ids(vocabulary.ends)))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze()
    while True:
        data, fds, _, _ = socket.recv_fds(link, 1, 1)
        if not data:
            return 0
        for fd in fds:
            if os.fork() == 0:
                _try(tokens, socket.socket(fileno=fd))
            os.close(fd)


def _try(tokens: Tokens, peer: socket.socket) -> None:
    """In a fork: say whether the grammar that comes from the peer can be followed; does not return.

    It is compiled in a fork of the fork, so that somebody is left who knows by what that was ended.
    """
    try:
        grammar = b"".join(iter(lambda: peer.recv(1 << 16), b"")).decode()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if pid := os.fork():
            if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                peer.sendall(LATE if -code in BY_OTHERS else MUCH)
        else:
            _bound()
            said = verdict(tokens, grammar).encode() or FITS
            _time(0, 0)  # who has a verdict may say it
            peer.sendall(said)
            os._exit(0)
    finally:
        os._exit(1)


def _bound() -> None:
    """From now on the kernel ends this process at its limits: the default action of both timers' signals."""
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    _time(CPU_SECONDS, WALL_SECONDS)
    size = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the library says when memory ends


def _time(cpu: float, wall: float) -> None:
    """Seconds until the kernel ends this process; 0: it does not."""
    signal.setitimer(signal.ITIMER_PROF, cpu)
    signal.setitimer(signal.ITIMER_REAL, wall)


def verdict(tokens: Tokens, grammar: str) -> str:
    """What is wrong with a grammar, in one line; "" if nothing is."""
    try:
        state = tokens.compiled(grammar)
    except GrammarError as error:
        return error.message
    begun = time.thread_time()
    state.compute_bitmask()
    if state.is_error():
        return f"the grammar cannot be followed: {reason(state)}"
    if time.thread_time() - begun > STEP_SECONDS / 2:
        return f"the grammar is too ambiguous: a step of it takes more than {STEP_SECONDS / 2 * 1e3:.0f} ms"
    return ""


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
