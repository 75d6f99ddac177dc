"""What the launches of a step leave for each other: each is made for a shape when it is first met, and then stays."""

from collections.abc import Callable
from typing import TypeVar

from fwd.kernels import expert_items, gemv, latent_kernels, paged_attention, sample
from fwd.kernels.launch import Launcher
from fwd.kernels.ops import QKV, Experts, Latents, Routed, Router
from fwd.kernels.sizes import MAX_ROWS

Space = TypeVar("Space")


class Spaces:
    """The workspaces of one launcher. A step is captured after each kernel has run once, so that none is made then."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._projections: dict[tuple[int, ...], gemv.Workspace] = {}
        self._splits: dict[tuple[int, ...], paged_attention.Workspace] = {}
        self._samplers: dict[tuple[int, ...], sample.Workspace] = {}
        self._mixtures: dict[tuple[int, ...], expert_items.Workspace] = {}
        self._latents: dict[tuple[int, ...], latent_kernels.Workspace] = {}

    def projection(self, layer: QKV) -> gemv.Workspace:
        """Of `gemv.qkv`."""
        heads, dim = layer.weight.shape[0] // layer.head_dim, layer.head_dim
        return _made(self._projections, (heads, dim), lambda: gemv.Workspace.of(self._launcher.device, heads, dim))

    def split(self, heads: int, kv_heads: int, dim: int) -> paged_attention.Workspace:
        """Of `paged_attention`."""
        key = (heads, kv_heads, dim)
        return _made(self._splits, key, lambda: paged_attention.Workspace.new(self._launcher, *key))

    def sampler(self, vocab: int) -> sample.Workspace:
        """Of `sample`."""
        return _made(self._samplers, (vocab,), lambda: sample.Workspace.new(self._launcher, vocab))

    def router(self, rows: int, router: Router) -> expert_items.Workspace:
        """Of `expert_kernels`, for a step or a chunk of rows that are to be routed."""
        experts, hidden = router.weight.shape
        return self._mixture(rows, hidden, experts, router.top_k)

    def mixture(self, routed: Routed, experts: Experts) -> expert_items.Workspace:
        """The same, of rows that were."""
        (rows, hidden), top_k = routed.x.shape, routed.experts.shape[1]
        return self._mixture(rows, hidden, experts.gate_up.shape[0], top_k)

    def latents(self, layer: Latents) -> latent_kernels.Workspace:
        """Of `latent_kernels`."""
        rank = 0 if layer.q_norm is None else len(layer.q_norm.weight)
        key = (*layer.up_key.shape, layer.rope, rank)
        return _made(self._latents, key, lambda: latent_kernels.Workspace.new(self._launcher, layer))

    def _mixture(self, rows: int, hidden: int, experts: int, top_k: int) -> expert_items.Workspace:
        rows = max(rows, MAX_ROWS)
        key = (rows, hidden, experts, top_k)
        make = expert_items.Workspace.of
        return _made(self._mixtures, key, lambda: make(self._launcher, hidden, experts, top_k, rows=rows))


def _made(known: dict[tuple[int, ...], Space], key: tuple[int, ...], make: Callable[[], Space]) -> Space:
    if key not in known:
        known[key] = make()
    return known[key]
