"""What a model takes of a device, in bytes, before any weight is read. No torch here.

The engine allocates exactly what stands here when it loads, and nothing in the decode path.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from fwd.engine.device import Device
from fwd.engine.prefix import NODE_BYTES
from fwd.engine.speculate.items import drafter_items, drafter_workspace, sizes_of, text_items
from fwd.engine.workspaces import RING, kernel_items, workspace
from fwd.errors import ConfigError
from fwd.kernels.sizes import MAX_ROWS
from fwd.models.draft.spec import DraftSpec
from fwd.models.layout import CacheLayout, Group, KVFormat, Latent, Paged, State, groups
from fwd.models.spec import HEAD, ITEMSIZE, ModelSpec

PAGE_SIZE = 16  # tokens
UNIT_BYTES = 144  # what a pool remembers of a page or record: list entries, an int, its place among the cached (88)
FP8_BLOCK = 16  # kernels read fp8 vectors in blocks of 16 bytes
DRAWING_BYTES = 52  # of a row: how it draws (`kernels.drawing`)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a loaded model takes of a device, for `max_seqs` sequences of up to `context` tokens.

    `units` are the pages (or records of states) of each group, in the order of `groups`. A drafter takes as many pages
    as the first of them, beside the KV pool; `draft_notes` say what there is to know of it, or why there is none.
    """

    spec: ModelSpec  # in the dtype it runs in
    device: Device
    kv: KVFormat
    max_seqs: int
    context: int
    units: tuple[int, ...]
    page_size: int = PAGE_SIZE
    draft: DraftSpec | None = None
    draft_notes: tuple[str, ...] = ()
    corpus: int = 0  # bytes of its ids at most, 0 the usual

    @property
    def chunk(self) -> int:
        """Rows of a prefill chunk."""
        return self.device.chunk

    @property
    def groups(self) -> tuple[Group, ...]:
        """What shares pages."""
        return groups(self.spec.cache)

    @property
    def paged(self) -> int:
        """Groups that have pages."""
        return sum(group.kind != "state" for group in self.groups)

    @property
    def pages(self) -> int:
        """Pages of the first paged group, which is the full one where there is one."""
        return next((units for group, units in zip(self.groups, self.units, strict=True) if group.kind != "state"), 0)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole KV pool."""
        return sum(_pool_items(self).values())

    @property
    def token_bytes(self) -> int:
        """Bytes of KV a token takes, in all layers, as long as it is in their windows."""
        return sum(group.unit_bytes(1, self.kv) for group in self.groups if group.kind != "state")

    @property
    def items(self) -> dict[str, int]:
        """Bytes by kind, all of them on the device."""
        return {
            **{f"weights_{name}": size for name, size in _weights(self).items()},
            f"head_{_head(self).format}": _head(self).nbytes,
            "rope": self.context * self.spec.rotated * 4,  # cos and sin, float32 [context, 2, rotated/2]
            **_pool_items(self),
            "steps": _steps(self),
            **(kernel_items(self) if self.device.kernels else {}),
            "workspace": max(workspace(self), drafter_workspace(self)),
            **({} if self.device.gpu else {"prefix_index": self.index_bytes, **text_items(self)}),
            "graphs": self.device.graphs,
            **drafter_items(self, DRAWING_BYTES),
        }

    @property
    def nodes(self) -> int:
        """Pages that the prefix tree may know; without a full group most of them hold nothing any more."""
        full = self.groups[0].kind == "full"
        return self.units[0] if full else self.max_seqs * _pages(self.context)

    @property
    def index_bytes(self) -> int:
        """Bytes of host memory for the books on pages and for the prefix tree when it is full."""
        return self.nodes * NODE_BYTES + sum(self.units) * UNIT_BYTES

    @property
    def total(self) -> int:
        """Bytes that the engine takes."""
        return sum(self.items.values())

    @property
    def needed(self) -> int:
        """Bytes that must be available: the reserve and the total, or what weights take while they are packed."""
        target, draft = sum(_weights(self).values()) + _head(self).nbytes, sizes_of(self)
        packing = target + max(_packing(self), draft.weights + draft.packing)
        return max(self.total, packing) + self.device.reserve


def plan(
    spec: ModelSpec,
    device: Device,
    *,
    context: int = 0,
    max_seqs: int = 16,
    kv_dtype: str = "auto",
    kv_bytes: int = 0,
    draft: DraftSpec | None = None,
    corpus: int = 0,
) -> Plan:
    """Plan a model, `spec` being in the dtype it will run in, so that it fits.

    `context` 0 is the model's own or the largest that fits; `kv_bytes` 0 is what the device's `pool` says, or what one
    context that was asked for takes. Raises `ConfigError` for what the model cannot take, and for what does not fit,
    naming what would.
    """
    if context > spec.max_context:
        raise ConfigError(f"context: {context} is more than the {spec.max_context} tokens of the model")
    empty = Plan(spec, device, kv_format(spec, kv_dtype), max_seqs, 0, (), draft=draft, corpus=corpus)
    pool = kv_bytes or max(device.pool, _sized(empty, context).kv_bytes)

    def fits(sized: Plan, spare: int = 0) -> bool:
        return sized.kv_bytes <= pool and sized.needed + spare <= device.memory

    largest = _most(1, spec.max_context, lambda tokens: fits(_sized(empty, tokens)))
    if not 0 < (context or largest) <= largest:
        raise _refusal(empty, context, pool, largest)
    whole, spare = _pages(context or largest), 0 if kv_bytes else device.spare
    most = _most(whole, max_seqs * whole, lambda pages: fits(_sized(empty, context or largest, pages), spare))
    return _sized(empty, context or largest, max(most, whole))


def kv_format(spec: ModelSpec, kv_dtype: str) -> KVFormat:
    """What the pages of a model are kept in; raises `ConfigError` for a `kv_dtype` that it cannot take."""
    match spec.dtype if kv_dtype == "auto" else kv_dtype:
        case "float32" | "bfloat16" | "fp8" as kv:
            pass
        case other:
            raise ConfigError(f"kv-dtype: unknown {other!r}: use auto, bfloat16 or fp8")
    paged = [layout for layout in spec.cache if not isinstance(layout, State)]
    if kv_dtype not in {"auto", "float32"} and not paged:
        raise ConfigError(
            f"kv-dtype: the model keeps states only, which are float32: {kv_dtype} is for pages, leave it out"
        )
    width = next((vector_of(layout) for layout in paged if vector_of(layout) % FP8_BLOCK), 0)
    if kv == "fp8" and width:
        raise ConfigError(
            f"kv-dtype: fp8 needs vectors of a multiple of {FP8_BLOCK}, the model has {width}: use bfloat16"
        )
    return kv


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number in low … high that fits, low − 1 if none does. None above one that does not fit fits."""
    return low - 1 + bisect_left(range(low, high + 1), x=True, key=lambda number: not fits(number))


def _refusal(empty: Plan, asked: int, pool: int, largest: int) -> ConfigError:
    """Why not even one sequence of the context asked for fits, and what would."""
    device, least, sized = empty.device, _sized(empty, 1), _sized(empty, asked or 1)
    there = f"and {device.name} has {device.memory:,}"
    if least.needed > device.memory:
        return ConfigError(f"the model does not fit: it needs {least.needed:,} bytes at least {there}")
    if sized.needed > device.memory and largest:
        return ConfigError(f"context: {asked} tokens need {sized.needed:,} bytes {there}: {largest} tokens would fit")
    wanted = sized if sized.needed <= device.memory else least
    held = _most(1, wanted.context, lambda tokens: _sized(empty, tokens).kv_bytes <= pool)
    return ConfigError(
        f"kv_bytes: {pool} hold {held} tokens; raise it to {wanted.kv_bytes} for a context of {wanted.context}"
    )


def _sized(empty: Plan, context: int, pages: int = 0) -> Plan:
    """The plan for `context` tokens, with `pages` in the full group, or with what one context takes."""
    sized = replace(empty, context=context, units=())
    return replace(sized, units=tuple(_units(sized, group, pages or _pages(context)) for group in sized.groups))


def _units(plan: Plan, group: Group, pages: int) -> int:
    match group.kind:
        case "full":
            return pages
        case "sliding":
            return plan.max_seqs * (_window_pages(plan, group.window) + _kept_pages(plan, group.window))
        case "state":
            return _records(plan.max_seqs)


def _window_pages(plan: Plan, window: int) -> int:
    """Pages of one sequence: a window and a chunk that begin and end inside pages, and never more than a context."""
    return min((window + plan.chunk) // plan.page_size + 2, _pages(plan.context) + 1)


def _kept_pages(plan: Plan, window: int) -> int:
    """Pages by which the prefix cache lets one more sequence go on: the window before its end."""
    return min(window // plan.page_size + 2, _pages(plan.context) + 1)


def _records(max_seqs: int) -> int:
    """Records: the current ones, one a row of a step, two for a chunk in flight, and snapshots to go on from."""
    return max_seqs + MAX_ROWS + 2 * max_seqs + 4 * max_seqs


def _pages(tokens: int) -> int:
    return _ceil(tokens, PAGE_SIZE)


def _ceil(amount: int, size: int) -> int:
    return -(-amount // size)


def vector_of(layout: CacheLayout) -> int:
    """Values of one vector of a paged layout."""
    match layout:
        case Paged():
            return layout.head_dim
        case Latent():
            return layout.latent
        case State():
            return 0


def _pool_items(plan: Plan) -> dict[str, int]:
    return {
        f"kv_{group.kind}{f'_{group.window}' if group.window else ''}": units
        * group.unit_bytes(plan.page_size, plan.kv)
        for group, units in zip(plan.groups, plan.units, strict=True)
    }


def _weights(plan: Plan) -> dict[str, int]:
    """Bytes of the weights but the head, by format, as they are held."""
    if not plan.device.kernels:
        return plan.spec.weights(head=False)
    sizes: dict[str, int] = {}
    for each in plan.spec.streamed:
        if each.held.part.module != HEAD:
            sizes[each.format] = sizes.get(each.format, 0) + each.nbytes * each.held.part.copies
    return sizes


class _Head(NamedTuple):
    """The head as it is streamed, beside the embedding of a tied model unless a kernel reads it as such."""

    format: str
    nbytes: int
    read: int  # bytes that were read of it, beside the embedding


def _head(plan: Plan) -> _Head:
    """The reference keeps a plain head in float32, since products of narrower matrices are rounded to their dtype."""
    spec = plan.spec
    if plan.device.kernels:
        each = next((each for each in spec.streamed if each.held.part.module == HEAD), None)
        return _Head(each.format, each.nbytes, each.held.nbytes) if each else _Head(spec.dtype, 0, 0)
    held = next((held for held in spec.held if held.part.module == HEAD), None)
    if held is not None and held.stored is not None:
        return _Head(held.format, held.nbytes, held.nbytes)
    return _Head("float32", spec.vocab * spec.hidden * ITEMSIZE["float32"], held.nbytes if held else 0)


def _packing(plan: Plan) -> int:
    """Bytes beside the weights while one of them is packed; on a CPU that is only the head, of what was read of it."""
    if plan.device.kernels:
        return max(each.beside for each in plan.spec.streamed)
    spec, head = plan.spec, _head(plan)
    return head.read + (head.nbytes if head.format == "float32" != spec.dtype else 0)


def _steps(plan: Plan) -> int:
    """The buffers of a decode step, of each in the ring where there are kernels, and of a prefill chunk."""
    rows = _row_bytes(plan)
    decode = RING * MAX_ROWS * (rows + 8 + DRAWING_BYTES) if plan.device.kernels else MAX_ROWS * rows
    return decode + plan.chunk * rows + (plan.max_seqs + 1) * plan.paged * 4 * _pages(plan.context)


def _row_bytes(plan: Plan) -> int:
    """int64: id, position, sequence, parent, records to read and to write, a slot per paged group."""
    paged = plan.paged
    return 8 * (4 + paged + 2 * (len(plan.groups) - paged))
