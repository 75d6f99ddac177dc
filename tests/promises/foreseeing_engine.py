"""The real engine with drafts of answers that are known to come (run as a script: ANSWERS NATURE, as of `guesser`)."""

import os
import random
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

TESTS = Path(__file__).resolve().parents[1]


class Answer(NamedTuple):
    """What is known to come: by prompt in hexadecimal, seed and choice, the ids."""

    prompt: str
    seed: int
    choice: int
    ids: list[int]


def command(path, nature, streams):
    """The command of an engine that foresees what streams were given; the longest answer of each counts."""
    found = {}
    for stream in streams:
        key = bytes(stream.submit.prompt).hex(), stream.seed, stream.submit.choice
        found[key] = max(found.get(key, []), stream.emitted.tolist(), key=len)
    path.write_bytes(msgspec.json.encode([Answer(*key, ids) for key, ids in found.items()]))
    return sys.executable, __file__, str(path), nature


def foreseeing(init, answers, nature):
    """The loop's constructor with such drafts."""
    from guesser import Knowing  # noqa: PLC0415  # the path is only known to pytest and to the script

    known = {answer[:3]: answer.ids for answer in answers}
    vocab = 1 + max(token for ids in known.values() for token in ids)

    class Foreseeing(Knowing):
        def drafts(self, request):
            return request.submit.draft.drafter != "off" and super().drafts(request)

        def _guess(self, request, count):
            submit = request.submit
            prompt = bytes(submit.prompt).hex()
            self.answers = {request.id: known.get((prompt, submit.seed, submit.choice), [])}
            return super()._guess(request, count)

    def run(self, *args, **settings):
        speculator = Foreseeing(random.Random(os.getpid()), nature, {}, vocab=vocab)
        init(self, *args, **{**settings, "speculator": speculator})
        speculator.names = ()

    return run


if __name__ == "__main__":
    sys.path += [str(TESTS / "engine"), str(TESTS)]
    from fwd.engine import main
    from fwd.engine.loop import Loop

    path, nature = sys.argv[1:3]
    del sys.argv[1:3]
    answers = msgspec.json.decode(Path(path).read_bytes(), type=list[Answer])
    Loop.__init__ = foreseeing(Loop.__init__, answers, nature)
    os._exit(main.main())
