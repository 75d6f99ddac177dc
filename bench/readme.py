"""Writes the table of numbers into README.md from the newest results: `python bench/readme.py [--check]`."""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- numbers: python bench/readme.py -->\n", "<!-- end of numbers -->\n"
Row = tuple[str, str, str]
KINDS = ("bench", "front", "cache", "load", "drafts", "model")
GPU_ROWS = {"read bandwidth, cold", "bf16 matrix rate", "dependent launch, one more kernel in a graph"}


def results(what: str) -> list[dict[str, Any]]:
    """The results of that kind, oldest first: the names begin with the date. Dry runs hold no figures."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob(f"*-{what}.json"))]
    return [result for result in found if not result.get("dry")]


def newest(what: str) -> dict[str, Any] | None:
    """The last result of that kind."""
    return next(reversed(results(what)), None)


def newest_gpu() -> dict[str, Any] | None:
    """The last run on a GPU, with the parts that it left out taken from earlier ones on the same GPU.

    All commits that were measured are named.
    """
    runs = results("gpu")
    same = [run for run in runs if run["gpu"]["name"] == runs[-1]["gpu"]["name"]]
    latest = {name: run for run in same for name in run["parts"]}
    commits = dict.fromkeys(run["commit"] for run in latest.values())
    parts = {name: run["parts"][name] for name, run in latest.items()}
    return {**runs[-1], "commit": ", ".join(commits), "parts": parts} if runs else None


def rows(sources: dict[str, dict[str, Any] | None]) -> list[Row]:
    """What was measured, the value, what it is to be seen against."""
    bench, front, cache, load, drafts, model, gpu = (sources[what] for what in (*KINDS, "gpu"))
    found: list[Row] = []
    if bench:
        start = bench["startup"]
        found.append(
            (
                "start to accepted connection",
                f"{start['accept_s'] * 1e3:.0f} ms",
                f"≤ {start['accept_target_s'] * 1e3:.0f} ms",
            )
        )
        found.append(("start to first token", f"{start['first_token_s']:.2f} s", "torch's import included"))
        for dtype, decode in bench["decode"].items():
            found += decode_rows(dtype, decode)
    if front:
        eight = {name.split("-")[0]: run["us_per_event"] for name, run in front["runs"].items() if name.endswith("-8")}
        costs = ", ".join(f"{way} {cost:.1f} µs" for way, cost in eight.items())
        found.append(("front CPU a token event, fake engine, 8 at once", costs, f"≤ {front['target_us']:.0f} µs"))
    parts = ((cache_rows, cache), (load_rows, load), (draft_rows, drafts), (gpu_rows, gpu), (model_rows, model))
    for part, source in parts:
        found += part(source) if source else []
    return found


def gpu_rows(gpu: dict[str, Any]) -> list[Row]:
    """The GPU's own numbers, decode and the peers; the other numbers stay in the file."""
    numbers = [number for part in gpu["parts"].values() for number in part.get("numbers", ())]
    return [gpu_row(number) for number in numbers if shown(number)]


def shown(number: dict[str, Any]) -> bool:
    """Of decode what one client reads, of reads and products the ceilings."""
    if number.get("way"):
        return bool(number["way"] == "socket" and number["rows"] in {1, 8})
    return number["name"] in GPU_ROWS or number["name"].rpartition(": ")[2].startswith(("fwd over", "step of"))


def gpu_row(number: dict[str, Any]) -> Row:
    """The ceiling and the share behind the value."""
    against = f"{number['share']:.0%} of {number['against']}, {number['ceiling']:,.4g}" if number["ceiling"] else ""
    return f"GPU: {number['name']}", f"{number['value']:,.4g} {number['unit']}", against


def model_rows(model: dict[str, Any]) -> list[Row]:
    """What each GPU is predicted to do with one row: a sum, and by which constants."""
    found = []
    for gpu, known in model["constants"].items():
        numbers = [number for number in model["numbers"] if (number["gpu"], number["rows"]) == (gpu, 1)]
        rates = ", ".join(f"{number['model']} {number['value']:,.0f}" for number in numbers)
        label = f"predicted, not measured: tokens/s of one row at {model['context']:,} tokens on {gpu.upper()}"
        bandwidth, launch = known["bandwidth"], known["launch"]
        against = f"{bandwidth['value'] / 1e12:.2f} TB/s {bandwidth['origin']}, "
        found.append((label, rates, f"{against}{launch['value'] * 1e6:.1f} µs a launch {launch['origin']}"))
    return found


def cache_rows(cache: dict[str, Any]) -> list[Row]:
    """The prefix cache: its books at many tokens, and what a hit on the longest prompt saves."""
    tree, floor = cache["tree"], cache["tree"]["full"]["floor"]
    at = f"with {tree['tokens']:,} tokens cached"
    found = [
        (
            f"prefix match {at}",
            f"{tree['full']['match'] / 1e6:.1f} M tokens/s",
            f"≥ {cache['target'] / 1e6:.0f} M; hashing and look-up alone {floor / 1e6:.1f} M",
        ),
    ]
    length, run = list(cache["engine"].items())[-1]
    label = f"first token of a cached prompt of {int(length):,} tokens, embedded model"
    against = f"{run['cold']:.0f} ms without a cache, {run['hit'] / run['cold']:.0%}"
    return [*found, (label, f"{run['hit']:.0f} ms", against)]


def load_rows(load: dict[str, Any]) -> list[Row]:
    """Each checkpoint from the disk: the rate beside a plain read, the memory beside the weights."""
    found = []
    for name, case in load.items():
        if isinstance(case, dict) and "disk" in case:
            runs = case["disk"]["load"]
            plain, took = (median(run["seconds"] for run in case["disk"][what]) for what in ("plain", "load"))
            extra = max(run["peak"] - run["stays"] for run in runs) / 2**20
            against = f"{plain / took:.0%} of a plain read (≥ {load['goal']:.0%}); {extra:,.0f} MiB more than weights"
            found.append((f"load of {name} from the disk", f"{case['bytes'] / took / 1e6:,.0f} MB/s", against))
    return found


def draft_rows(drafts: dict[str, Any]) -> list[Row]:
    """What the drafters that fwd picks are worth, by kind of text, each at its temperatures."""
    ratios = (
        f"{kind} {' and '.join(format(found['auto']['ratio'], '.2f') for found in temperatures.values())}"
        for kind, temperatures in drafts["kinds"].items()
    )
    name = f"decode with drafts, embedded model, {drafts['dtype']}, at temperature 0 and 1"
    return [(name, f"{', '.join(ratios)} × without", "held-out code and chat ≥ 1.5 ×, random ≥ 0.98 ×")]


def decode_rows(dtype: str, decode: dict[str, Any]) -> list[Row]:
    """Decode in one dtype."""
    against = f"{decode['http'] / decode['ceiling']:.0%} of the memory ceiling, {decode['ceiling']:.0f}"
    if "ratio" in decode:
        against += f"; {decode['ratio']:.2f} × `transformers` generate (≥ 1.2 ×)"
    return [(f"decode through HTTP, {dtype}", f"{decode['http']:.0f} tokens/s", against)]


def table() -> str:
    """The markdown between the markers."""
    sources = {**{what: newest(what) for what in KINDS}, "gpu": newest_gpu()}
    if not any(sources.values()):
        return "No results yet.\n"
    lines = [
        f"| {' | '.join(row)} |" for row in (("measured", "value", "against"), ("---", "---", "---"), *rows(sources))
    ]
    origins: dict[str, list[str]] = {}  # of one run of several benches: one line
    for what, source in sources.items():
        if source:
            origins.setdefault(origin(source), []).append(what)
    return "\n".join([*lines, "", *(f"- {', '.join(names)}: {text}" for text, names in origins.items()), ""])


def origin(source: dict[str, Any]) -> str:
    """What a result was measured on, or how it was predicted."""
    if source.get("predicted"):
        return f"no measurement: {source['formula']}; commit {source['commit']}; {source['when'][:10]}."
    versions = ", ".join(f"{name} {version}" for name, version in source["versions"].items())
    gpu = f"{source['gpu']['name']}, driver {source['gpu']['driver']}; " if source.get("gpu") else ""
    return (
        f"{gpu}{source['cpu']}, {source['cores']} cores; {versions}; commit {source['commit']}; {source['when'][:10]}."
    )


def main() -> int:
    """Write, or with `--check` compare."""
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    text = f"{head}{BEGIN}{table()}{END}{rest.split(END)[1]}"
    if "--check" not in sys.argv:
        readme.write_text(text)
    elif text != readme.read_text():
        print("README.md: run `python bench/readme.py`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
