"""The Prometheus text format, version 0.0.4."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]
Kind = Literal["counter", "gauge", "histogram"]


class Metric(NamedTuple):
    """One metric, and its name in vLLM's dashboards if there is one."""

    name: str
    kind: Kind
    text: str
    samples: Iterable[Sample]
    alias: str = ""


def value(name: str, kind: Kind, text: str, number: float, alias: str = "") -> Metric:
    """A metric of one sample; `alias` is vLLM's name without its prefix."""
    return Metric(name, kind, text, [("", {}, float(number))], alias and f"vllm:{alias}")


class Histogram:
    """Counts of seconds by upper bound."""

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one value."""
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self._sum += seconds

    def samples(self) -> Iterator[Sample]:
        """Cumulative counts, sum and count, by the suffix of their names."""
        total = 0
        for bound, count in zip([*map(str, SECONDS), "+Inf"], self._counts, strict=True):
            total += count
            yield "_bucket", {"le": bound}, total
        yield "_sum", {}, self._sum
        yield "_count", {}, total


def family(name: str, kind: Kind, text: str, samples: Iterable[Sample], labels: Labels) -> Iterator[str]:
    """The lines of one metric; `labels` are on every sample."""
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for suffix, own, value in samples:
        pairs = ",".join(f'{key}="{item.translate(ESCAPES)}"' for key, item in {**labels, **own}.items())
        yield f"{name}{suffix}{{{pairs}}} {value!r}"
