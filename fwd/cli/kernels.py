"""`fwd kernels`: builds of the GPU's kernels in the cache. Needs no GPU, so that a start on one compiles nothing."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from fwd.cli.common import emit
from fwd.cli.options import json_option, uds_option
from fwd.config import Config, DType, load

if TYPE_CHECKING:
    from fwd.kernels.jit import Build, Jit

cache_option = click.option(
    "--cache",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="The cache that a daemon with CACHE_DIRECTORY=DIR reads (default: this user's).",
)


@click.group()
def kernels() -> None:
    """Build the kernels of the GPU ahead of time, or list those that are built."""


@kernels.command()
@click.argument("model", default="")
@click.option("--arch", default="", metavar="ARCH,…", help="sm_90a: H100 and H200; sm_100a: B200 (default: both).")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="What MODEL will run in; auto is the checkpoint's.")
@cache_option
@uds_option
@json_option
def build(model: str, arch: str, cache: Path | None, as_json: bool, **flags: Any) -> None:
    """Build all kernels that the cache lacks, here and for any machine with the same kernels; no GPU is needed.

    With MODEL, a folder of which only `config.json` is read, refuse one that the kernels cannot take.
    """
    config = load({"model": model or None, **flags})
    if model:
        _require(config)
    arches, jit = _arches(arch), _jit(cache, config)
    built = []
    for each in jit.builds(arches, os.cpu_count() or 1):
        built.append(_file(each))
        if not as_json:
            click.echo(_told(each))
    if as_json:
        emit({"cache": str(jit.cache), "builds": built})
    else:
        click.echo(f"{len(built)} files in {jit.cache}")


@kernels.command("list")
@cache_option
@uds_option
@json_option
def list_(cache: Path | None, uds: str | None, as_json: bool) -> None:
    """List the kernels that are built, with what each takes of a multiprocessor."""
    jit = _jit(cache, load({"uds": uds}))
    kept = jit.kept()
    rows = [row for each in kept for row in _rows(each, jit)]
    missing = [{"source": source, "arch": arch} for source, arch in _missing(jit)]
    if as_json:
        emit({"cache": str(jit.cache), "kernels": rows, "missing": missing})
    else:
        click.echo("\n".join(_table(rows, missing, jit.cache)))


def _jit(cache: Path | None, config: Config) -> "Jit":
    from fwd.kernels.jit import Jit  # noqa: PLC0415  # the engine half, only where it is needed
    from fwd.log import configure  # noqa: PLC0415  # the same for logs

    configure("warning" if config.log_level == "info" else config.log_level)
    return Jit(cache)


def _arches(given: str) -> list[str]:
    """Those given, else all; raises UsageError for one that is not known."""
    from fwd.kernels.builds import ARCHES  # noqa: PLC0415  # the engine half, only where it is needed

    wanted = [arch.strip() for arch in given.split(",") if arch.strip()]
    if unknown := [arch for arch in wanted if arch not in ARCHES]:
        raise click.UsageError(f"--arch: {unknown[0]!r} is not one of {', '.join(ARCHES)}")
    return list(dict.fromkeys(wanted or ARCHES))


def _require(config: Config) -> None:
    """Raise if the kernels cannot take the model."""
    from fwd.kernels.device import check  # noqa: PLC0415  # the engine half, only where it is needed
    from fwd.models.config import read_spec, run_spec  # noqa: PLC0415
    from fwd.models.load import shape  # noqa: PLC0415

    check("cuda", shape(run_spec(read_spec(config.folder), config.dtype)))


def _missing(jit: "Jit") -> list[tuple[str, str]]:
    from fwd.kernels.builds import ARCHES  # noqa: PLC0415  # the engine half, only where it is needed

    return [(source, arch) for source in jit.table for arch in ARCHES if not jit.find(source, arch)]


def _file(build: "Build") -> dict[str, Any]:
    """One build, as a document; sizes in bytes."""
    record = build.record
    return {
        "source": record.source,
        "arch": record.arch,
        "compiler": record.compiler,
        "path": str(build.path),
        "bytes": record.length,
        "seconds": record.seconds,
        "fresh": build.fresh,
        "warnings": record.warnings,
        "kernels": len(record.kernels),
    }


def _told(build: "Build") -> str:
    record = build.record
    how = f"built in {record.seconds:.1f} s" if build.fresh else "in the cache"
    return f"{record.source:<24} {record.arch:<8} {len(record.kernels):>3} kernels {record.length:>12,} bytes  {how}"


def _rows(build: "Build", jit: "Jit") -> list[dict[str, Any]]:
    """Each kernel of a build: registers a thread, bytes of spills and of stack, of shared memory a block at most."""
    record = build.record
    bounds = jit.table.get(record.source, {})
    about = {"source": record.source, "arch": record.arch, "compiler": record.compiler}
    age, stale = time.time() - record.built, jit.stale(build)
    return [
        {
            "kernel": name,
            **about,
            "registers": usage.registers,
            "spills": usage.spills,
            "stack": usage.stack,
            "shared": usage.shared + (bounds[name].shared if name in bounds else 0),
            "age": age,
            "stale": stale,
        }
        for name, usage in sorted(record.kernels.items())
    ]


def _table(rows: list[dict[str, Any]], missing: list[dict[str, str]], cache: Path) -> list[str]:
    return [
        f"{'kernel':<40} {'arch':<8} {'registers':>9} {'spills':>6} {'shared':>6}  age",
        *(
            f"{row['kernel']:<40} {row['arch']:<8} {row['registers']:>9} {row['spills']:>6} {row['shared']:>6}"
            f"  {_age(row['age'])}{' stale' if row['stale'] else ''}"
            for row in rows
        ),
        *(f"{each['source']} is not built for {each['arch']}: run `fwd kernels build`" for each in missing),
        f"{len(rows)} kernels in {cache}",
    ]


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
