"""The whole daemon on a GPU: the text of host execution, and the same bytes beside others."""

import pytest

from fwd.cli.common import wait_ready
from fwd.cli.private import private_daemon
from fwd.kernels.gpu import probe, usable
from fwd.protocol.messages import Tokens

ABSENT = usable(probe())
PROMPTS = ("def fibonacci(n):", "import os\n\n\nclass Reader:\n", "for line in", "    return {")
TOKENS = 24

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))]


def serve(device, ask):
    flags = ("demo", "--device", device, "--dtype", "bfloat16", "--http", "none", "--log-level", "error")
    with private_daemon(*flags) as daemon, daemon.connect() as client:
        status = wait_ready(client)
        assert status.engine.kernel_set == device
        return ask(client)


def greedy(client):
    return ["".join(client.generate(prompt, max_tokens=TOKENS, temperature=0.0)) for prompt in PROMPTS]


def test_a_gpu_writes_what_host_execution_writes():
    assert serve("cuda", greedy) == serve("host", greedy)


def ids(events):
    return [token for event in events if isinstance(event, Tokens) for token in event.ids]


def test_same_seed_same_bytes_beside_others_on_a_gpu():
    prompts = [[7 * row + place for place in range(40 + 30 * row)] for row in range(8)]

    def submit(client, row):
        return client.submit(prompts[row], max_tokens=200, temperature=1.0, seed=row, cache=False)

    def ask(client):
        alone = [ids(submit(client, row)) for row in range(len(prompts))]
        streams = {row: submit(client, row) for row in range(len(prompts))}
        together = {row: [] for row in streams}
        while streams:
            for row, stream in list(streams.items()):
                event = next(stream, None)
                if event is None:
                    del streams[row]
                elif isinstance(event, Tokens):
                    together[row] += event.ids
        return alone, list(together.values())

    alone, together = serve("cuda", ask)
    assert all(len(answer) == 200 for answer in alone)
    assert together == alone
