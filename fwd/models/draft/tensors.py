"""What a draft model's files must hold, checked by their headers before anything is loaded. No torch here."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fwd.errors import ModelError
from fwd.models.safetensors import Entry
from fwd.models.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]
_FLOATS = ("F32", "F16", "BF16")
_UNUSED = ("rotary_emb.inv_freq", "t2d", "verifier_norm.weight", "verifier_lm_head.weight")


def check_tensors(folder: Path, files: Mapping[str, Entry], expected: Shapes, kind: str) -> None:
    """Raise ModelError for a tensor that is missing, has another shape, is quantised, or has no place."""
    for name, shape in expected.items():
        entry = files.get(name)
        if entry is None:
            raise ModelError(f"{folder}: tensor {name} is missing, expected shape {list(shape)}")
        if entry.shape != shape:
            raise ModelError(f"{entry.path}: {name} has shape {list(entry.shape)}, expected {list(shape)}")
        if entry.dtype not in _FLOATS and name != "d2t":
            raise ModelError(f"{entry.path}: {name} is {entry.dtype}: quantised {kind} drafters are not supported")
    left = next((name for name in sorted(files) if name not in expected and not is_unused(name)), None)
    if left is not None:
        raise ModelError(f"{files[left].path}: tensor {left} has no place in {kind}")


def is_unused(name: str) -> bool:
    """Whether a tensor is known and nothing of it is needed."""
    return name.endswith(_UNUSED)


def layer_shapes(body: ModelSpec, prefix: str, inputs: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a block of the dense family whose attention takes rows of so many inputs."""
    queries, keys = body.heads * body.head_dim, body.kv_heads * body.head_dim
    for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
        yield f"{prefix}self_attn.{name}_proj.weight", (outputs, inputs)
        if body.qkv_bias:
            yield f"{prefix}self_attn.{name}_proj.bias", (outputs,)
    yield f"{prefix}self_attn.o_proj.weight", (body.hidden, queries)
    if body.output_bias:
        yield f"{prefix}self_attn.o_proj.bias", (body.hidden,)
    if body.qk_norm:
        yield from ((f"{prefix}self_attn.{name}_norm.weight", (body.head_dim,)) for name in "qk")
    for name in ("gate", "up"):
        yield f"{prefix}mlp.{name}_proj.weight", (body.intermediate, body.hidden)
    yield f"{prefix}mlp.down_proj.weight", (body.hidden, body.intermediate)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{prefix}{name}.weight", (body.hidden,)
