"""`fwd plan`: what a model takes of a device, by kind, and how fast its memory lets it go. No weight is read."""

from typing import TYPE_CHECKING, Any, get_args

import click

from fwd.cli.common import emit
from fwd.cli.options import draft_model_option, json_option, requant_option, uds_option
from fwd.config import Config, Device, DType, KVDType, load
from fwd.errors import ModelError

if TYPE_CHECKING:
    from fwd.engine import device as engine
    from fwd.engine.plan import Plan
    from fwd.models.spec import ModelSpec

GPU_NAMES = ("h100", "h200", "b200")


@click.command()
@click.argument("model", default="demo")
@click.option("--gpu", type=click.Choice(GPU_NAMES), help="A GPU that is not here (default: see --device).")
@click.option("--device", type=click.Choice(get_args(Device)), help="auto is a GPU of this machine, else its CPU.")
@click.option("--context", type=int, help="Tokens of prompt and answer (default: the model's, or what fits).")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="auto is the checkpoint's.")
@click.option("--kv-dtype", type=click.Choice(get_args(KVDType)))
@requant_option
@draft_model_option
@click.option("--max-seqs", type=int, help="Sequences that run at once, 1 to 16.")
@click.option("--kv-bytes", type=int, help="Bytes of the KV pool (default: 1 GiB on a CPU, all that is left on a GPU).")
@click.option("--measure/--no-measure", default=True, help="Measure the bandwidth of this machine for the ceilings.")
@uds_option
@json_option
def plan(gpu: str | None, measure: bool, as_json: bool, **flags: Any) -> None:
    """Plan MODEL, a folder of which configs and headers are read, or `demo` (default), as `fwd serve` would load it."""
    planned, refused = _planned(load(flags), gpu)
    found = _document(planned, planned.device.bandwidth) | {"refused": refused}
    if measure and not gpu:
        from fwd.cli.bench.ceiling import bandwidth  # noqa: PLC0415  # it imports torch: seconds

        found |= _ceilings(planned, bandwidth()["gb_per_s"] * 1e9)
    if as_json:
        emit(found)
    else:
        click.echo("\n".join(_lines(found)))


def _planned(config: Config, gpu: str | None) -> tuple["Plan", str]:
    """The plan, and why the kernels of this build do not take the model on a GPU that is not here."""
    from fwd.engine.drafting import plan_drafting  # noqa: PLC0415  # the engine half, only where it is needed
    from fwd.models.config import read_spec, run_spec  # noqa: PLC0415

    spec = run_spec(read_spec(config.folder), config.dtype, config.requant)
    device, refused = _absent(gpu, spec) if gpu else (_device(config, spec), "")
    planned = plan_drafting(
        config.drafter,
        config.folder,
        spec,
        device,
        context=config.context,
        max_seqs=config.max_seqs,
        kv_dtype=config.kv_dtype,
        kv_bytes=config.kv_bytes,
        corpus=config.draft_log_bytes,
    )
    return planned, refused


def _absent(gpu: str, spec: "ModelSpec") -> tuple["engine.Device", str]:
    """A GPU that is not here, and why `fwd serve` would refuse the model there; raises for a dtype that it would."""
    from fwd.engine.device import GPUS  # noqa: PLC0415
    from fwd.kernels.device import check  # noqa: PLC0415
    from fwd.models.load import shape  # noqa: PLC0415

    try:
        check("cuda", shape(spec))
    except ModelError as error:
        return GPUS[gpu], error.message
    return GPUS[gpu], ""


def _device(config: Config, spec: "ModelSpec") -> "engine.Device":
    """What `fwd serve` would take; torch is imported only where there may be a GPU, or kernels, to ask about."""
    from fwd.engine import device as engine  # noqa: PLC0415
    from fwd.engine.memory import available  # noqa: PLC0415
    from fwd.kernels.gpu import present  # noqa: PLC0415

    if config.device == "cpu" or (config.device == "auto" and not present()):
        return engine.cpu(available())
    from fwd.engine.start import device_of  # noqa: PLC0415
    from fwd.kernels.gpu import probe  # noqa: PLC0415

    return device_of(config.device, spec, probe())


def _document(planned: "Plan", bandwidth: float) -> dict[str, Any]:
    """Everything that is printed. All sizes are bytes; `total` is taken at load, `needed` includes the reserve."""
    spec = planned.spec
    return {
        "architecture": spec.architecture,
        "fallbacks": _fallbacks(planned),
        "drafter": planned.draft.kind if planned.draft else "",
        "draft_notes": planned.draft_notes,
        "dtype": spec.dtype,
        "kv_dtype": planned.kv,
        "device": planned.device.name,
        "available": planned.device.memory,
        "context": planned.context,
        "max_seqs": planned.max_seqs,
        "chunk": planned.chunk,
        "page_size": planned.page_size,
        "memory": planned.items,
        "total": planned.total,
        "reserve": planned.device.reserve,
        "needed": planned.needed,
        "index": planned.index_bytes,
        "groups": [
            {"kind": group.kind, "window": group.window, "units": units}
            for group, units in zip(planned.groups, planned.units, strict=True)
        ],
        "token": planned.token_bytes,
        "sequence": spec.kv_bytes(planned.context, planned.kv),
        **_ceilings(planned, bandwidth),
    }


def _fallbacks(planned: "Plan") -> tuple[str, ...]:
    """Lines on quantised matrices that kernels do not take as they are."""
    from fwd.models.streamed import fallbacks  # noqa: PLC0415

    return fallbacks(planned.spec) if planned.device.kernels else ()


def _ceilings(planned: "Plan", bandwidth: float) -> dict[str, Any]:
    """`bandwidth` in bytes a second; no ceilings where it is 0: not known."""
    from fwd.engine.ceilings import ceilings  # noqa: PLC0415

    found = ceilings(planned, bandwidth) if bandwidth else []
    return {"bandwidth": bandwidth, "ceilings": [each._asdict() for each in found]}


def _lines(found: dict[str, Any]) -> list[str]:
    return [
        f"{found['architecture']} in {found['dtype']}, KV in {found['kv_dtype']}, on {found['device']}; bytes:",
        *(_row(kind, size) for kind, size in found["memory"].items()),
        _row("total", found["total"]),
        _row("reserve", found["reserve"]),
        f"fits: {found['needed']:,} of {found['available']:,} bytes with the reserve",
        *_capacity(found),
        *_speed(found),
        *(f"fallback: {line}" for line in found["fallbacks"]),
        *(f"drafter: {line}" for line in found["draft_notes"]),
        *([f"not served there: {found['refused']}"] if found["refused"] else []),
    ]


def _row(kind: str, size: int) -> str:
    return f"  {kind:<20} {size:>18,}"


def _capacity(found: dict[str, Any]) -> list[str]:
    lines = [
        f"capacity: {found['max_seqs']} sequences, contexts of up to {found['context']} tokens",
        f"cache: {', '.join(_pool(each) for each in found['groups'])}; a page holds {found['page_size']} tokens",
        f"a token takes {found['token']:,} bytes of KV, a whole context {found['sequence']:,}",
    ]
    host = f"on the host: {found['index']:,} bytes for pages and prefix tree"
    return lines if "prefix_index" in found["memory"] else [*lines, host]


def _pool(group: dict[str, Any]) -> str:
    window = f" window of {group['window']}" if group["window"] else ""
    return f"{group['units']} {'records' if group['kind'] == 'state' else 'pages'} ({group['kind']}{window})"


def _speed(found: dict[str, Any]) -> list[str]:
    if not found["ceilings"]:
        return []
    return [
        f"ceiling: memory of {found['bandwidth'] / 1e9:,.1f} GB/s; each sequence at {found['context']} tokens",
        f"  {'rows':>4} {'bytes/step':>18} {'ms':>10} {'tokens/s':>10}",
        *(
            f"  {each['rows']:>4} {each['bytes']:>18,} {each['ms']:>10.3f} {each['tokens_per_s']:>10,.1f}"
            for each in found["ceilings"]
        ),
    ]
