"""Tiny random draft models in each layout, written from what the layouts are, and how they are run here."""

import json
from dataclasses import dataclass, replace

import checkpoints
import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it
from parity import CHUNK, PAGE, rows
from safetensors.torch import load_file, save_file

from fwd.models.config import read_spec, run_spec
from fwd.models.draft.config import read_draft
from fwd.models.draft.load import load_draft
from fwd.models.load import load

PAGES = 24
CONTEXT = 256


@dataclass(frozen=True)
class Sizes:
    """Of a dense model."""

    layers: int = 8
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    intermediate: int = 96
    vocab: int = 260
    eps: float = 1e-5
    theta: float = 1e4
    bias: bool = False
    qk_norm: bool = False

    def config(self, **others):
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate,
            "vocab_size": self.vocab,
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "attention_bias": self.bias,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "torch_dtype": "float32",
            **others,
        }


TARGET = Sizes()
WIDE = Sizes(layers=4, heads=2, kv_heads=1, head_dim=64)  # what kernels take


class Random:
    """Random tensors by a seed."""

    def __init__(self, seed):
        self._generator = torch.Generator().manual_seed(seed)

    def matrix(self, *shape):
        return torch.randn(*shape, generator=self._generator) * 2 * shape[-1] ** -0.5

    def norm(self, width):
        return 1 + 0.2 * torch.randn(width, generator=self._generator)

    def block(self, prefix, sizes, inputs=None):
        """The tensors of a block whose attention takes rows of `inputs` numbers."""
        width, inputs, own = sizes.hidden, inputs or sizes.hidden, {}
        for name, heads in (("q", sizes.heads), ("k", sizes.kv_heads), ("v", sizes.kv_heads)):
            own[f"self_attn.{name}_proj.weight"] = self.matrix(heads * sizes.head_dim, inputs)
            if sizes.bias:
                own[f"self_attn.{name}_proj.bias"] = self.matrix(heads * sizes.head_dim)
        own["self_attn.o_proj.weight"] = self.matrix(width, sizes.heads * sizes.head_dim)
        if sizes.bias:
            own["self_attn.o_proj.bias"] = self.matrix(width)
        if sizes.qk_norm:
            own |= {f"self_attn.{name}_norm.weight": self.norm(sizes.head_dim) for name in "qk"}
        own |= {f"mlp.{name}_proj.weight": self.matrix(sizes.intermediate, width) for name in ("gate", "up")}
        own["mlp.down_proj.weight"] = self.matrix(width, sizes.intermediate)
        own |= {f"{name}.weight": self.norm(width) for name in ("input_layernorm", "post_attention_layernorm")}
        return {prefix + name: tensor for name, tensor in own.items()}


def save(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors


def write_target(folder, sizes=TARGET, seed=1):
    """A Llama of these sizes and its tokenizer."""
    random, prefix = Random(seed), "model.layers."
    tensors = {"model.embed_tokens.weight": random.matrix(sizes.vocab, sizes.hidden)}
    for index in range(sizes.layers):
        tensors |= random.block(f"{prefix}{index}.", sizes)
    tensors |= {
        "model.norm.weight": random.norm(sizes.hidden),
        "lm_head.weight": random.matrix(sizes.vocab, sizes.hidden),
    }
    save(folder, sizes.config(architectures=["LlamaForCausalLM"]), tensors)
    checkpoints.make_tokenizer(folder)
    return folder


def eagle_tensors(sizes, *, taps=3, vocab=40, target=TARGET, first="midlayer.", seed=2, norms="", embedding=False):
    """The tensors of an EAGLE-3 head; `vocab` 0: the target's head. `norms` is "", `input` or `each`."""
    random = Random(seed)
    tensors = {"fc.weight": random.matrix(sizes.hidden, taps * target.hidden), "norm.weight": random.norm(sizes.hidden)}
    tensors |= random.block(first, sizes, 2 * sizes.hidden)
    tensors[f"{first}hidden_norm.weight"] = random.norm(sizes.hidden)
    for index in range(1, sizes.layers):
        tensors |= random.block(f"layers.{index}.", sizes)
    if norms == "input":
        tensors["input_norm.weight"] = random.norm(taps * target.hidden)
    if norms == "each":
        tensors |= {f"fc_norm.{index}.weight": random.norm(target.hidden) for index in range(taps)}
    if embedding:
        tensors["embed_tokens.weight"] = random.matrix(target.vocab, sizes.hidden)
    if vocab:
        tensors["lm_head.weight"] = random.matrix(vocab, sizes.hidden)
        ids = torch.randperm(target.vocab, generator=torch.Generator().manual_seed(seed))[:vocab].sort().values
        tensors["d2t"] = ids - torch.arange(vocab)
        tensors["t2d"] = torch.zeros(target.vocab, dtype=torch.bool).index_fill_(0, ids, value=True)
    return tensors


def eagle_config(sizes, *, vocab=40, **others):
    """As EAGLE-3 was published."""
    return sizes.config(**{"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": vocab or None, **others})


def speculators_config(sizes, *, vocab=40, layer=None, **others):
    """As `speculators` writes it."""
    verifier = {"name_or_path": "someone/model", "architectures": ["LlamaForCausalLM"]}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": verifier},
        "draft_vocab_size": vocab or None,
        "transformer_layer_config": sizes.config(model_type="llama", **(layer or {})),
        **others,
    }


def dflash_tensors(sizes, *, taps=3, target=TARGET, sinks=False, seed=3):
    random = Random(seed)
    tensors = {"fc.weight": random.matrix(sizes.hidden, taps * target.hidden)}
    tensors |= {f"{name}.weight": random.norm(sizes.hidden) for name in ("hidden_norm", "norm")}
    for index in range(sizes.layers):
        tensors |= random.block(f"layers.{index}.", sizes)
        if sinks:
            tensors[f"layers.{index}.self_attn.attention_sink_bias"] = 3 * random.matrix(sizes.heads)
    return tensors


def dflash_config(sizes, *, ids=(1, 3, 5), block=8, own=None, **others):
    named = {"target_layer_ids": list(ids), "mask_token_id": 259, **(own or {})}
    return sizes.config(
        **{"architectures": ["DFlashDraftModel"], "block_size": block, "dflash_config": named, **others}
    )


def read(wanted, folder, dtype="float32"):
    """What `--draft-model` gives for the target in a folder."""
    return read_draft(str(wanted), folder, run_spec(read_spec(folder), dtype))


def loaded(wanted, folder, dtype="float32"):
    """A target, and its drafter."""
    target = load(folder, dtype=dtype)
    spec = read_draft(str(wanted), folder, target.spec)
    return target, load_draft(spec, target, CONTEXT)


@torch.inference_mode()
def passed(draft, ids, hidden, start, cache, *, chunk=-1, valid=CONTEXT, run="forward"):
    """What rows from `start` on become: those of a step, filled up to whole blocks, or of a chunk."""
    count = len(ids)
    own = rows(start, start + count, chunk=chunk, valid=valid).padded(draft.ops.row_block)
    extra = len(own.positions) - count
    ids = F.pad(ids, (0, extra))
    hidden = None if hidden is None else F.pad(hidden, (0, 0, 0, extra))
    found = getattr(draft, run)(ids, hidden, own, cache)
    return None if found is None else found[:count]


@torch.inference_mode()
def hidden_of(draft, ids, features, prompt, width, cache):
    """Hidden of all rows of known ids: some in chunks, the rest `width` a step."""
    parts = []
    fused = None if features is None else by_steps(draft.fuse, features)
    for begin in range(0, prompt, CHUNK):
        part, own = ids[begin : min(begin + CHUNK, prompt)], None
        if fused is not None:
            own = F.pad(fused[begin : begin + len(part)], (0, 0, 0, CHUNK - len(part)))
        padded = F.pad(part, (0, CHUNK - len(part)))
        parts.append(passed(draft, padded, own, begin, cache, chunk=begin // CHUNK, valid=prompt)[: len(part)])
    for begin in range(prompt, len(ids), width):
        own = None if fused is None else fused[begin : begin + width].clone()
        parts.append(passed(draft, ids[begin : begin + width], own, begin, cache))
    return torch.cat(parts)


@torch.inference_mode()
def logits_of(draft, hidden):
    """Logits of any number of rows."""
    return by_steps(draft.logits, hidden)


def block_of(draft, ids, known, cache):
    """Hidden of a block behind so many positions."""
    ends = torch.full((len(ids) + -len(ids) % 4,), known + len(ids) - 1)
    ends[len(ids) :] = 0
    own = rows(known, known + len(ids), valid=CONTEXT).padded(4)
    return draft.draft(F.pad(ids, (0, -len(ids) % 4)), ends, own, cache)[: len(ids)]


@torch.inference_mode()
def absorb(draft, features, prompt, width, cache):
    fused = by_steps(draft.fuse, features)
    none = torch.zeros(CHUNK, dtype=torch.int64)
    for begin in range(0, prompt, CHUNK):
        part = fused[begin : min(begin + CHUNK, prompt)]
        padded = F.pad(part, (0, 0, 0, CHUNK - len(part)))
        passed(draft, none, padded, begin, cache, chunk=begin // CHUNK, valid=prompt, run="absorb")
    for begin in range(prompt, len(features), width):
        part = fused[begin : begin + width].clone()
        passed(draft, none[: len(part)], part, begin, cache, run="absorb")


def by_steps(function, rows):
    """A function of rows [rows, …], some of them at a time in whole blocks."""
    return torch.cat([function(F.pad(part, (0, 0, 0, -len(part) % 4)))[: len(part)] for part in rows.split(16)])


def new_cache(draft, kv="float32"):
    return draft.new_cache(PAGES, PAGE, kv)


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit(folder, change):
    """Rewrite the tensors of a folder with `change` applied to their dictionary."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def smaller(sizes, **others):
    return replace(sizes, **others)
