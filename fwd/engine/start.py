"""From a `Load` to a running loop: plan, weights, cache."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog
import torch
from msgspec.structs import replace

from fwd import __version__
from fwd.engine.device import Device, cpu, gpu, host
from fwd.engine.device_runner import DeviceRunner
from fwd.engine.drafting import plan_drafting
from fwd.engine.grammar import Grammars
from fwd.engine.keyfile import prefix_key
from fwd.engine.loop import Loop
from fwd.engine.memory import available, blocks_apart
from fwd.engine.plan import Plan
from fwd.engine.runner import ModelRunner
from fwd.engine.space import Space
from fwd.engine.speculate.build import neural_of
from fwd.engine.speculate.corpus import corpus_of
from fwd.engine.speculate.forced import Forced
from fwd.engine.speculate.neural import Neural
from fwd.engine.speculate.speculator import JointSpeculator
from fwd.engine.speculate.suffix import Suffix
from fwd.engine.work import Runner
from fwd.errors import ConfigError, KernelError, ModelError
from fwd.kernels.cuda import CudaLauncher, Facts, probe
from fwd.kernels.device import DeviceOps
from fwd.kernels.gpu import held
from fwd.kernels.select import resolve
from fwd.models.config import read_spec, run_spec
from fwd.models.load import load as load_model
from fwd.models.load import shape
from fwd.models.model import Model
from fwd.models.spec import ModelSpec
from fwd.models.streamed import fallbacks
from fwd.protocol.frames import Channel
from fwd.protocol.messages import Load, ToEngine
from fwd.protocol.values import EngineInfo

SMALL_MODEL = 64 << 20

log = structlog.get_logger("fwd.engine")


def start(
    load: Load, channel: Channel[ToEngine], progress: Callable[[int, int], None], started: float
) -> tuple[Loop, EngineInfo]:
    """Load the model and build the loop, allocating what is planned; `started` is a monotonic time.

    Raises `ConfigError` before a weight is read if the model does not fit, `ModelError` for what is wrong with it,
    `KernelError` if a GPU cannot be used.
    """
    facts = probe() if load.device in {"auto", "cuda"} else Facts()
    planned, key = plan_load(load, facts), prefix_key(load.state_dir)
    space = Space(planned.groups, planned.units, planned.page_size, chunk=planned.chunk, key=key, nodes=planned.nodes)
    threads = load.threads or _threads(planned.spec)
    torch.set_num_threads(threads)
    with blocks_apart(), _failures_of(planned.device, facts):
        model = load_model(
            Path(load.model),
            device=planned.device.kind,
            dtype=load.dtype,
            context=planned.context,
            requant=load.requant,
            progress=progress,
        )
        runner = runner_of(model, planned)
        neural, notes = neural_of(load, planned, model, runner, space)
    for line in _fallbacks(planned.device, planned.spec):
        log.warning("weights_rounded", reason=line)
    speculator = speculator_of(load, model, runner, neural)
    sizes, grammars = {"max_seqs": planned.max_seqs, "chunk": planned.chunk}, Grammars(planned.spec.vocab)
    loop = Loop(channel, runner, space, **sizes, speculator=speculator, grammars=grammars)
    info = _info(planned, model, threads, (time.monotonic() - started) * 1e3)
    return loop, replace(
        info,
        drafters=speculator.names,
        draft_notes=(*planned.draft_notes, *notes),
        draft_hash=neural.weights_hash if neural else "",
    )


@contextlib.contextmanager
def _failures_of(device: Device, facts: Facts) -> Iterator[None]:
    """What torch says of a GPU, in one line: what seemed free may be taken meanwhile, or by whom NVML does not see."""
    try:
        yield
    except RuntimeError as error:
        if not device.gpu:
            raise
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        way_out = held(facts) if isinstance(error, torch.OutOfMemoryError) else "see what nvidia-smi says"
        raise KernelError("; ".join(filter(None, (f"{device.name} failed: {reason}", way_out)))) from error


def runner_of(model: Model, planned: Plan) -> DeviceRunner | ModelRunner:
    """What executes steps: launches of kernels where there are such."""
    if isinstance(model.ops, DeviceOps):
        return DeviceRunner(model, model.ops, planned)
    return ModelRunner(model, planned)


def speculator_of(load: Load, model: Model, runner: Runner, neural: Neural | None) -> JointSpeculator:
    """Who drafts: the texts of requests and of earlier answers, grammars, and a model if there is one."""
    corpus = corpus_of(load.state_dir, model.weights_hash, load.text_hash, load.corpus_bytes)
    return JointSpeculator([Suffix(corpus), Forced()], neural, ahead=runner.ahead, corpus=corpus)


def plan_load(load: Load, facts: Facts) -> Plan:
    """The plan for what this machine has available now; raises `ConfigError`, `ModelError` or `KernelError`."""
    spec = run_spec(read_spec(Path(load.model)), load.dtype, load.requant)
    device = device_of(load.device, spec, facts)
    if load.strict and (found := _fallbacks(device, spec)):
        raise ModelError(f"--strict: {'; '.join(found)}: leave it out, or use --device cpu")
    try:
        return plan_drafting(
            load.draft_model,
            Path(load.model),
            spec,
            device,
            context=load.context,
            max_seqs=load.max_seqs,
            kv_dtype=load.kv_dtype,
            kv_bytes=load.kv_bytes,
            corpus=load.corpus_bytes,
        )
    except ConfigError as error:
        if device.gpu and (others := held(facts)):  # perhaps it would fit without them
            raise KernelError(f"{error.message}; {others}") from None
        raise


def device_of(wanted: str, spec: ModelSpec, facts: Facts) -> Device:
    """What `--device` means for a model here; raises as `resolve` does."""
    match resolve(wanted, shape(spec), facts):
        case "cpu":
            return cpu(available())
        case "host":
            return host(available())
        case "cuda":
            return gpu(facts)


def _fallbacks(device: Device, spec: ModelSpec) -> tuple[str, ...]:
    """Which quantised matrices the kernels of the device do not take as they are."""
    return fallbacks(spec) if device.kernels else ()


def _info(planned: Plan, model: Model, threads: int, load_ms: float) -> EngineInfo:
    spec = planned.spec
    return EngineInfo(
        architecture=spec.architecture,
        parameters=spec.parameters(),
        weight_bytes=spec.weight_bytes(),
        weights_hash=model.weights_hash,
        vocab_size=spec.vocab,
        context=planned.context,
        device=planned.device.name,
        dtype=spec.dtype,
        kernel_set=model.ops.name,
        build=f"fwd {__version__}, torch {torch.__version__}",
        chunk=planned.chunk,
        page_size=planned.page_size,
        pages=planned.pages,
        kv_bytes=planned.kv_bytes,
        max_seqs=planned.max_seqs,
        threads=threads,
        load_ms=load_ms,
        pid=os.getpid(),
        kv_dtype=planned.kv,
        memory=planned.items,
        launches=_launches(model),
        kept=model.kept,
        fallbacks=_fallbacks(planned.device, spec),
        requant=tuple(sorted(spec.requant)),
    )


def _launches(model: Model) -> str:
    """How the kernels of a step are launched; "" where there are none."""
    match getattr(model.ops, "launcher", None):
        case CudaLauncher() as cuda:
            return f"graph + {cuda.how}" if cuda.dependent else f"graph, {cuda.how}"
        case None:
            return ""
    return model.ops.name


def _threads(spec: ModelSpec) -> int:
    """One thread where a step is over before a second has woken up, else one a core. Part of what fixes the bits."""
    return 1 if spec.weight_bytes() <= SMALL_MODEL else os.cpu_count() or 1
