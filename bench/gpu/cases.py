"""What kernels.py times: each operation of a step at a model's shapes, over as many copies as keep the L2 cold.

A case has our launches and torch's own for the same work, on the same random numbers, and the floor: bytes that must be
read, or operations. Ours are called through the ops that the engine calls.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own name for it
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fwd.kernels import drawing, sample
from fwd.kernels.device import DeviceOps
from fwd.kernels.kv import KV
from fwd.kernels.launch import Launcher
from fwd.kernels.ops import QKV, Draw, Norm
from fwd.kernels.prefill import Prefill
from fwd.kernels.qtensor import QTensor
from fwd.kernels.rows import Cells, Rows
from fwd.models.rope import rope_table
from fwd.models.spec import HEAD, LAYER, ModelSpec
from gpu import sparse
from gpu.case import BF16, PAGE, Case
from gpu.matrices import matrix
from gpu.shapes import step_work
from gpu.timing import copies

SEED = 20261124


class Cases:
    """The cases of a model on a device with `l2` bytes of cache."""

    def __init__(self, launcher: Launcher, model: ModelSpec, l2: int) -> None:
        self.launcher, self.model, self.l2, self.device = launcher, model, l2, launcher.device
        self.ops, self.chunks = DeviceOps(launcher), Prefill(launcher)
        self._generator = torch.Generator(self.device).manual_seed(SEED)
        self.rope = rope_table(model.rope, model.rotated, model.max_context).to(self.device)

    def decode(self, rows: int, context: int) -> Iterator[Case]:
        """All of a step but its embedding and its sampler; `context` is where its rows write."""
        work = step_work(self.model, rows, context, "bfloat16")
        for case in self._layers(rows, context):
            launches, size = work[case.name]
            yield replace(case, read=size, per_step=launches)

    def _layers(self, rows: int, context: int) -> Iterator[Case]:
        model = self.model
        if model.mla:
            yield from sparse.latents(self, model.mla, rows, context)
        else:
            yield self._qkv(rows, context)
            for layout in model.cache:
                yield self.attention(rows, context, getattr(layout, "window", 0))
        yield self._output(rows)
        if self.dense is not None:
            yield from (self._gate_up(rows), self._down(rows))
        if model.moe:
            yield from sparse.mixture(self, model.moe, rows)
        yield self._head(rows)

    @property
    def dense(self) -> int | None:
        """A layer with a plain MLP."""
        mixed = self.model.moe.layers if self.model.moe else ()
        return next((layer for layer in range(self.model.layers) if layer not in mixed), None)

    def embed(self, rows: int) -> Case:
        """The rows of the embedding."""
        model = self.model
        table = self.random(model.vocab, model.hidden)
        count = min(64, max(2, model.vocab // rows))
        places = torch.randint(0, model.vocab, (count, rows), generator=self._generator, device=self.device)
        return Case(
            "embed",
            [lambda ids=ids: self.ops.embed(ids, QTensor.plain(table)) for ids in places],
            [lambda ids=ids: F.embedding(ids, table) for ids in places],
            read=rows * model.hidden * 2,
            per_step=1,
            call="F.embedding",
        )

    def attention(self, rows: int, context: int, window: int = 0) -> Case:
        """Decode attention over pages in any order; torch's has the keys that are seen in one piece."""
        model, name = self.model, f"attention, window {window}" if window else "attention"
        launches, size = step_work(model, rows, context, "bfloat16")[name]
        q, seen = self.random(rows, model.heads, model.head_dim), min(context, window or context)
        step, sinks = self.rows(rows, context), self.floats(model.heads) if model.sinks else None
        ours, theirs = [], []
        for _ in range(copies(size, self.l2)):
            kv = replace(self.cache(rows * self.pages(context)), window=window)
            dense = [self.random(rows, model.kv_heads, seen, model.head_dim) for _ in range(2)]
            ours.append(lambda kv=kv: self.ops.decode_attention(q, step, kv, sinks))
            theirs.append(lambda dense=dense: F.scaled_dot_product_attention(q[:, :, None], *dense, enable_gqa=True))
        call = "F.scaled_dot_product_attention"
        return Case(name, ours, theirs, read=size, per_step=launches, call=call)

    def most_attention(self, rows: int, context: int) -> Case:
        """The one that sees most."""
        model, name = self.model, "latent attention" if self.model.mla else "attention"
        launches, size = step_work(model, rows, context, "bfloat16")[name]
        if model.mla is None:
            return self.attention(rows, context)
        *_, case = sparse.latents(self, model.mla, rows, context)
        return replace(case, read=size, per_step=launches)

    def products(self, chunk: int) -> Iterator[Case]:
        """A chunk's products of a plain MLP: library kernels over packed weights."""
        model, norm = self.model, self.norm()
        if self.dense is None:
            return
        hidden, x = self.random(chunk, model.hidden), self.random(chunk, model.intermediate)
        for name, source, outputs, run in (
            ("gate_up", hidden, 2 * model.intermediate, lambda weight: self.chunks.gate_up(hidden, norm, weight)),
            ("down", x, model.hidden, lambda weight: self.chunks.linear(x, weight, hidden)),
        ):
            plain, packed = self._matrices(self._mlp(name), outputs, source.shape[1])
            yield Case(
                name,
                [lambda weight=weight, run=run: run(weight) for weight in packed],
                [lambda weight=weight, source=source: F.linear(source, weight) for weight in plain],
                operations=2 * source.numel() * outputs,
                call="F.linear",
            )

    def prefill_attention(self, chunk: int, index: int) -> Case:
        """A chunk's attention over all that is before it; torch's has its keys in one piece."""
        model, end = self.model, (index + 1) * chunk
        q, kv = self.random(chunk, model.heads, model.head_dim), self.cache(self.pages(end))
        at = torch.arange(index * chunk, end, device=self.device)
        table = torch.randperm(self.pages(end), generator=self._generator, device=self.device).view(1, -1).int()
        slots = table[0, at // PAGE].long() * PAGE + at % PAGE
        step = Rows(at, torch.zeros_like(at), torch.full_like(at, -1), (Cells(slots, table),), chunk=index)
        keys, values = (self.random(1, model.kv_heads, end, model.head_dim) for _ in range(2))

        def theirs() -> Tensor:
            query, mask = q.transpose(0, 1)[None], causal_lower_right(chunk, end)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

        operations = 4 * model.heads * model.head_dim * sum(range(index * chunk + 1, end + 1))
        ours = [lambda: self.chunks.attention(q, step, kv)] * 2
        call = "F.scaled_dot_product_attention"
        return Case(f"attention up to {end}", ours, [theirs] * 2, operations=operations, call=call)

    def sampler(self, rows: int, draw: Draw, name: str) -> Case:
        """Sample and commit, the two launches of a step; torch takes the highest logit."""
        vocab, device = self.model.vocab, self.device
        logits = [torch.randn(rows, vocab, generator=self._generator, device=device) for _ in range(8)]
        space = sample.Workspace.new(self.launcher, vocab)
        state = drawing.new_drawing(device, rows, rows, vocab)
        arrays = {field: getattr(state, field).cpu().numpy() for field in drawing.FIELDS}
        for row in range(rows):
            drawing.fill_row(arrays, row, draw, drawing.kinds_of(draw))
        for field, array in arrays.items():
            getattr(state, field).copy_(torch.from_numpy(array))
        outcome = drawing.new_outcome(rows, rows, device)
        ids, step = (torch.zeros(size, dtype=torch.int64, device=device) for size in (rows, 1))
        told = {"drawing": state, "outcome": outcome, "next_ids": ids.clone(), "step": step}
        place = self.rows(rows, 1)
        return Case(
            f"sample, {name}",
            [lambda each=each: sample.draw(self.launcher, space, each, ids, place, **told) for each in logits],
            [lambda each=each: each.argmax(-1) for each in logits],
            read=rows * vocab * 4,
            per_step=1,
            call="Tensor.argmax",
        )

    def rows(self, count: int, context: int) -> Rows:
        """Decode rows that stand at the end of `context` tokens each, their pages in random order."""
        pages = self.pages(context)
        tables = torch.randperm(count * pages, generator=self._generator, device=self.device).view(count, pages).int()
        last = context - 1
        slots = tables[:, last // PAGE].long() * PAGE + last % PAGE
        sequences = torch.arange(count, device=self.device)
        positions, parents = torch.full_like(sequences, last), torch.full_like(sequences, -1)
        return Rows(positions, sequences, parents, (Cells(slots, tables),))

    def cache(self, pages: int) -> KV:
        """A layer's pages."""
        shape = (pages * PAGE, self.model.kv_heads, self.model.head_dim)
        return KV(self.random(*shape), self.random(*shape), PAGE)

    def random(self, *shape: int) -> Tensor:
        """Standard normal numbers in bfloat16."""
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32).to(BF16)

    def floats(self, *shape: int) -> Tensor:
        """The same in float32."""
        return torch.randn(shape, generator=self._generator, device=self.device)

    def norm(self, width: int = 0) -> Norm:
        """A norm, of the hidden width where none is said."""
        return Norm(self.random(width or self.model.hidden), self.model.eps)

    def matrix(self, module: str, outputs: int, inputs: int, count: int = 0) -> QTensor:
        """A matrix in the format of a module, or a stack of them."""
        stored = self.model.quantization.format_of(module) if module else None
        return matrix(stored, (count, outputs, inputs) if count else (outputs, inputs), self._generator)

    def _qkv(self, rows: int, context: int) -> Case:
        model, norm = self.model, self.norm()
        hidden, step = self.random(rows, model.hidden), self.rows(rows, context)
        kv = self.cache(rows * self.pages(context))
        plain, packed = self._matrices(_first("self_attn.q_proj"), model.qkv_width, model.hidden)
        bias = self.random(model.qkv_width) if model.qkv_bias else None
        norms = [self.norm(model.head_dim) if model.qk_norm else None for _ in range(2)]
        layers = [QKV(norm, weight, bias, *norms, model.kv_heads, model.head_dim) for weight in packed]
        return Case(
            "qkv",
            [lambda layer=layer: self.ops.qkv(hidden, layer, self.rope, step, kv) for layer in layers],
            [lambda weight=weight: F.linear(self._normed(hidden, norm), weight) for weight in plain],
            call="F.rms_norm, F.linear",
        )

    def _output(self, rows: int) -> Case:
        model = self.model
        width = model.mla.value if model.mla else model.head_dim
        bias = self.random(model.hidden) if model.output_bias else None
        return self._linear("output", _first("self_attn.o_proj"), rows, model.heads * width, bias)

    def _down(self, rows: int) -> Case:
        return self._linear("down", self._mlp("down"), rows, self.model.intermediate)

    def _mlp(self, name: str) -> str:
        return f"{LAYER.format(self.dense)}mlp.{'down' if name == 'down' else 'gate'}_proj"

    def _linear(self, name: str, module: str, rows: int, inputs: int, bias: Tensor | None = None) -> Case:
        x, residual = self.random(rows, inputs), self.random(rows, self.model.hidden)
        plain, packed = self._matrices(module, self.model.hidden, inputs)
        return Case(
            name,
            [lambda weight=weight: self.ops.linear(x, weight, residual, bias) for weight in packed],
            [lambda weight=weight: residual + F.linear(x, weight) for weight in plain],
            call="F.linear, add",
        )

    def _gate_up(self, rows: int) -> Case:
        hidden, norm = self.random(rows, self.model.hidden), self.norm()
        plain, packed = self._matrices(self._mlp("gate_up"), 2 * self.model.intermediate, self.model.hidden)

        def theirs(weight: Tensor) -> Tensor:
            gate, up = F.linear(self._normed(hidden, norm), weight).chunk(2, -1)
            return F.silu(gate) * up

        return Case(
            "gate_up",
            [lambda weight=weight: self.ops.gate_up(hidden, norm, weight) for weight in packed],
            [lambda weight=weight: theirs(weight) for weight in plain],
            call="F.rms_norm, F.linear, F.silu, mul",
        )

    def _head(self, rows: int) -> Case:
        hidden, norm = self.random(rows, self.model.hidden), self.norm()
        plain, packed = self._matrices(HEAD, self.model.vocab, self.model.hidden, self.ops.pack_head)
        return Case(
            "head",
            [lambda weight=weight: self.ops.head(hidden, norm, weight) for weight in packed],
            [lambda weight=weight: F.linear(self._normed(hidden, norm), weight) for weight in plain],
            call="F.rms_norm, F.linear",
        )

    def _matrices(
        self, module: str, outputs: int, inputs: int, pack: Callable[[QTensor], QTensor] | None = None
    ) -> tuple[list[Tensor], list[QTensor]]:
        """Copies of a random matrix in a module's format, as torch has it in bfloat16 and as our kernels stream it."""
        weight = self.matrix(module, outputs, inputs)
        plain, packed = weight.dequantize().to(BF16), (pack or self.ops.pack)(weight)
        clones = [plain.clone() for _ in range(copies(plain.nbytes, self.l2))]
        return clones, [_copy(packed) for _ in range(copies(packed.nbytes, self.l2))]

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)

    def pages(self, context: int) -> int:
        """Pages of a context."""
        return -(-context // PAGE)


def _first(module: str) -> str:
    return LAYER.format(0) + module


def _copy(weight: QTensor) -> QTensor:
    return replace(weight, data=weight.data.clone())
