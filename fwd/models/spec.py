"""Every number of a model that the forward pass and the planner need, and what the model costs. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from fwd.models.layout import CacheLayout, KVFormat, Latent, Paged, State
from fwd.models.quantization import PLAIN, Quantization, Stored

if TYPE_CHECKING:
    from fwd.models.streamed import Streamed

Dtype = Literal["float32", "float16", "bfloat16"]
Family = Literal["dense", "moe", "gpt_oss", "deepseek"]
ITEMSIZE: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}
EMBEDDING, LAYER, HEAD = "model.embed_tokens", "model.layers.{}.", "lm_head"
REQUANT = ("fp8-head", "fp8-attn")
_PLAIN = ("fp32", "fp16", "bf16")
_ROWS = Stored("fp8", (1, 0))


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding: `kind` names the scaling rule, which uses some of the fields (see `fwd.models.rope`)."""

    kind: Literal["default", "linear", "llama3", "yarn"]
    theta: float
    factor: float = 1.0
    original: int = 0  # original_max_position_embeddings
    low: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    high: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True  # yarn: round the ends of the ramp


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """`experts` of width `intermediate`, of which a token visits `top_k` (see `fwd.kernels.ops.Router`)."""

    experts: int
    top_k: int
    intermediate: int
    scoring: Literal["softmax", "topk_softmax", "sigmoid"]
    normalize: bool
    layers: tuple[int, ...]  # that have experts; the others have a plain MLP
    shared: int = 0  # width of the expert that every token visits
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    bias: bool = False  # of router and experts


@dataclass(frozen=True, slots=True)
class LatentSpec:
    """Latent attention (see `kernels.ops.Latents`): widths of the latents and of the parts of a head."""

    q_rank: int  # 0: queries come straight from the hidden state
    latent: int
    nope: int
    rope: int
    value: int
    scale: float  # of the softmax
    interleaved: bool = True  # the checkpoint pairs 2i with 2i + 1


@dataclass(frozen=True)  # without slots: it remembers what it holds
class ModelSpec:
    """A decoder's dimensions. `dtype` is the checkpoint's, or what the model was loaded as."""

    architecture: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    eps: float
    rope: RopeSpec
    tied: bool
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    max_context: int
    dtype: Dtype
    windows: tuple[int, ...]  # per layer: tokens a row sees, itself included; 0: all
    sinks: bool = False  # a learned logit without a value in each head's softmax
    moe: ExpertSpec | None = None
    mla: LatentSpec | None = None
    quantization: Quantization = PLAIN
    prefix: str = ""  # of the names of all tensors
    others: tuple[str, ...] = ()  # prefixes of tensors that are not the text model's (vision)
    mtp: int = 0  # layers that predict further tokens; they follow the others in the checkpoint
    requant: frozenset[str] = frozenset()  # of REQUANT: plain matrices that become FP8 when they are loaded

    @property
    def qkv_width(self) -> int:
        """Outputs of the fused q, k, v projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def rotated(self) -> int:
        """Numbers of a head that are rotated."""
        return self.mla.rope if self.mla else self.head_dim

    @property
    def shares(self) -> bool:
        """The head is the embedding itself."""
        return self.tied and "fp8-head" not in self.requant

    def requantised(self, module: str) -> bool:
        """Whether a matrix becomes FP8, with a scale a row, if it is plain."""
        attention = ".self_attn." in module and not module.endswith("kv_b_proj")
        return ("fp8-head" in self.requant and module == HEAD) or ("fp8-attn" in self.requant and attention)

    @property
    def cache(self) -> tuple[CacheLayout, ...]:
        """The cache layouts of this model: one per window."""
        if self.mla:
            return (Latent(tuple(range(self.layers)), self.mla.latent, self.mla.rope),)
        layers: dict[int, list[int]] = {}
        for layer, window in enumerate(self.windows):
            layers.setdefault(window, []).append(layer)
        return tuple(Paged(tuple(own), self.kv_heads, self.head_dim, window) for window, own in layers.items())

    @cached_property
    def held(self) -> "tuple[Held, ...]":
        """Everything that is loaded, as it is held. Raises ModelError for a layout of files that is not known."""
        return tuple(held_of(self, part) for part in parts(self) if part.numbers)

    @cached_property
    def streamed(self) -> "tuple[Streamed, ...]":
        """The same as kernels have it, of a model in bfloat16."""
        from fwd.models.streamed import streamed  # noqa: PLC0415  # it needs this module

        return tuple(streamed(held, shared=self.shares) for held in self.held)

    def parameters(self) -> int:
        """Parameters of the text model, without what predicts further tokens (`mtp`)."""
        return sum(part.numbers * part.copies for part in parts(self) if part.module != HEAD or not self.tied)

    def active_parameters(self) -> int:
        """Parameters that the step of one row multiplies with: its experts only, and of the embedding none."""
        used = (part for part in parts(self) if part.module != EMBEDDING or self.shares)
        return round(sum(part.numbers * part.read(1) for part in used))

    def weights(self, *, head: bool = True) -> dict[str, int]:
        """Bytes of all weights by the format they are held in, with or without a head that is not the embedding."""
        sizes: dict[str, int] = {}
        for part, name, size, _ in self.held:
            if head or part.module != HEAD:
                sizes[name] = sizes.get(name, 0) + size * part.copies
        return sizes

    def weight_bytes(self, *, head: bool = True) -> int:
        """Bytes of the same in all formats."""
        return sum(self.weights(head=head).values())

    def kv_bytes(self, context: int, kv: KVFormat) -> int:
        """Bytes of cache that a row at the end of `context` tokens reads."""
        return sum(_read_bytes(layout, context, kv) for layout in self.cache)

    def step_bytes(self, rows: int, context: int, kv: KVFormat) -> int:
        """Bytes a decode step of `rows` sequences at `context` tokens each must read: layers, head, embeddings, KV.

        Experts are those that rows visit which choose each for itself and all alike: E·(1 − (1 − k/E)^rows) of E.
        """
        weights = sum(size * part.read(rows) for part, _, size, _ in self.held if part.module != EMBEDDING)
        head = self.vocab * self.hidden * ITEMSIZE[self.dtype] if self.shares else 0
        embedded = rows * self.hidden * ITEMSIZE[self.dtype]
        return round(weights) + head + embedded + rows * self.kv_bytes(context, kv)


class Part(NamedTuple):
    """Matrices [height, inputs] one above the other in one, or vectors one after the other, or `copies` of the same.

    Of copies, which are experts, a row reads `visited`. Parts are held as the files have them, or in the model's dtype
    or in float32 always.
    """

    module: str  # the first; vectors have none, for they are never quantised
    heights: tuple[int, ...]
    inputs: int = 1
    copies: int = 1
    visited: int = 1
    kept: Literal["stored", "model", "float32"] = "stored"
    turned: tuple[int, int] = (0, 0)  # of so many equal parts so many last rows change their order

    @property
    def numbers(self) -> int:
        """Of one copy."""
        return sum(self.heights) * self.inputs

    def read(self, rows: int) -> float:
        """Copies that `rows` rows read: all, or those that are expected of independent choices of `visited`."""
        return self.copies * (1 - (1 - self.visited / self.copies) ** rows) if rows else float(self.copies == 1)

    def stays(self, block: int) -> bool:
        """Whether rows that change their order stay in their block of so many."""
        heads, last = self.turned
        ends = range(sum(self.heights) // heads, sum(self.heights) + 1, sum(self.heights) // heads) if heads else ()
        return all((end - last) // block == (end - 1) // block for end in ends)


class Held(NamedTuple):
    """A part, the format it is held in, the bytes of one copy, and of quantised ones what files hold, fused."""

    part: Part
    format: str
    nbytes: int
    stored: Stored | None = None


def held_of(spec: ModelSpec, part: Part) -> Held:
    """Return how a part of a model is held, of whose format its tensors tell."""
    stored = spec.quantization.format_of(spec.prefix + part.module) if part.kept == "stored" else None
    if part.kept == "stored" and spec.requantised(part.module) and (stored is None or stored.format in _PLAIN):
        stored = _ROWS
    if stored is None or stored.format in _PLAIN:
        dtype = "float32" if part.kept == "float32" else spec.dtype
        return Held(part, dtype, part.numbers * ITEMSIZE[dtype])
    fused = stored.fused(part.heights)
    if part.turned[0] and not part.stays(fused.block[0] or sum(part.heights)):
        fused = replace(fused, block=(1, fused.block[1]))
    return Held(part, stored.format, fused.nbytes(sum(part.heights), part.inputs), fused)


def parts(spec: ModelSpec) -> Iterator[Part]:
    """Return everything that is loaded of a model, each once."""
    yield Part(EMBEDDING, (spec.vocab,), spec.hidden, kept="model")
    for index in range(spec.layers):
        prefix = LAYER.format(index)
        yield from _latents(spec, spec.mla, prefix) if spec.mla else _attention(spec, prefix)
        yield from _experts(spec, spec.moe, prefix) if spec.moe and index in spec.moe.layers else _mlp(spec, prefix)
    yield Part("", (spec.hidden,), kept="model")
    if not spec.shares:
        yield Part(HEAD, (spec.vocab,), spec.hidden)


def _attention(spec: ModelSpec, prefix: str) -> Iterator[Part]:
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    yield Part(f"{prefix}self_attn.q_proj", (queries, keys, keys), spec.hidden)
    yield Part(f"{prefix}self_attn.o_proj", (spec.hidden,), queries)
    norms = spec.hidden + 2 * spec.qk_norm * spec.head_dim
    biases = spec.qkv_bias * spec.qkv_width + spec.output_bias * spec.hidden
    yield Part("", (norms, biases), kept="model")
    yield Part("", (spec.sinks * spec.heads,), kept="float32")


def _latents(spec: ModelSpec, mla: LatentSpec, prefix: str) -> Iterator[Part]:
    down, last = (mla.q_rank, mla.latent + mla.rope), mla.rope * mla.interleaved
    first = "q_a_proj" if mla.q_rank else "kv_a_proj_with_mqa"
    yield Part(f"{prefix}self_attn.{first}", down[not mla.q_rank :], spec.hidden, turned=(1, last))
    up = "q_b_proj" if mla.q_rank else "q_proj"
    queries, turned = (spec.heads * (mla.nope + mla.rope),), (spec.heads, last)
    yield Part(f"{prefix}self_attn.{up}", queries, mla.q_rank or spec.hidden, turned=turned)
    yield Part(f"{prefix}self_attn.kv_b_proj", (spec.heads * (mla.nope + mla.value),), mla.latent, kept="model")
    yield Part(f"{prefix}self_attn.o_proj", (spec.hidden,), spec.heads * mla.value)
    yield Part("", (spec.hidden, mla.q_rank, mla.latent), kept="model")  # norms


def _mlp(spec: ModelSpec, prefix: str) -> Iterator[Part]:
    yield from _gated(f"{prefix}mlp", spec.hidden, spec.intermediate)
    yield Part("", (spec.hidden,), kept="model")  # norm


def _experts(spec: ModelSpec, moe: ExpertSpec, prefix: str) -> Iterator[Part]:
    yield Part("", (spec.hidden,), kept="model")  # norm
    yield Part(f"{prefix}mlp.{'router' if moe.bias else 'gate'}", (moe.experts,), spec.hidden)
    yield Part("", (moe.experts * (moe.bias + (moe.scoring == "sigmoid")),), kept="float32")  # of the router
    one = _stacked(spec, moe, prefix) if moe.bias else _gated(f"{prefix}mlp.experts.0", spec.hidden, moe.intermediate)
    for part in one:
        yield part._replace(copies=moe.experts, visited=moe.top_k)
    if moe.shared:
        yield from _gated(f"{prefix}mlp.shared_experts", spec.hidden, moe.shared)


def _gated(prefix: str, hidden: int, width: int) -> Iterator[Part]:
    yield Part(f"{prefix}.gate_proj", (width, width), hidden)
    yield Part(f"{prefix}.down_proj", (hidden,), width)


def _stacked(spec: ModelSpec, moe: ExpertSpec, prefix: str) -> Iterator[Part]:
    """The experts of gpt-oss, which are stored in stacks and have biases."""
    yield Part(f"{prefix}mlp.experts.gate_up_proj", (2 * moe.intermediate,), spec.hidden)
    yield Part(f"{prefix}mlp.experts.down_proj", (spec.hidden,), moe.intermediate)
    yield Part("", (2 * moe.intermediate, spec.hidden), kept="float32")


def _read_bytes(layout: CacheLayout, context: int, kv: KVFormat) -> int:
    match layout:
        case State():
            return layout.record_bytes
        case Paged(window=window) if window:
            return min(context, window) * layout.token_bytes(kv)
    return context * layout.token_bytes(kv)
