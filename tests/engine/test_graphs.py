"""What is captured, on a stand-in for torch's streams: each kernel has run before, the widest step first."""

from contextlib import contextmanager

import pytest
import torch

from fwd.engine.graphs import Graphs


class Device:
    """Remembers what is asked of `torch.cuda`."""

    def __init__(self):
        self.events = []
        self.capturing = False

    def run(self, slot, size):
        self.events.append(("captured" if self.capturing else "ran", slot, size))

    @contextmanager
    def graph(self, graph, **settings):
        self.settings, self.capturing, graph.device = settings, True, self
        graph.place = len(self.events)
        yield
        self.capturing = False


class Graph:
    def replay(self):
        self.device.events.append(("replayed", *self.device.events[self.place][1:]))


@pytest.fixture
def device(monkeypatch):
    here = Device()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", here.graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: here.events.append(("waited",)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream")
    return here


def test_each_step_runs_before_any_is_captured(device):
    Graphs(device.run, [(0, 1), (0, 16), (1, 1), (1, 16)])
    wide_first = [(0, 16), (1, 16), (0, 1), (1, 1)]

    assert device.events == [
        *(("ran", *key) for key in wide_first),
        ("waited",),
        *(("captured", *key) for key in wide_first),
    ]
    assert device.settings == {"pool": "pool", "stream": "stream", "capture_error_mode": "thread_local"}


def test_a_launch_replays_its_own(device):
    graphs = Graphs(device.run, [(0, 1), (1, 1), (1, 16)])
    del device.events[4:]  # all but what the replays look up
    device.events += [("captured", 1, 16), ("captured", 0, 1), ("captured", 1, 1)]
    graphs.launch(1, 16)
    graphs.launch(0, 1)

    assert device.events[-2:] == [("replayed", 1, 16), ("replayed", 0, 1)]
