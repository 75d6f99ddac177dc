"""The real engine with a planted bug: a prompt with token `POISON` kills it (run as a script by the fault tests)."""

import os
import signal

from fwd.engine import main
from fwd.engine.runner import ModelRunner

POISON = 250


def poisoned(prefill):
    def run(self, chunk):
        if POISON in chunk.request.ids[: chunk.request.prompt]:
            os.kill(os.getpid(), signal.SIGSEGV)
        return prefill(self, chunk)

    return run


if __name__ == "__main__":
    ModelRunner.prefill = poisoned(ModelRunner.prefill)
    os._exit(main.main())
