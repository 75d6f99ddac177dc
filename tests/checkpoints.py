"""Tiny random checkpoints made by transformers' own classes, with a byte-level tokenizer and a chat template."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from kinds import KINDS, VOCAB
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_RELEASED = {  # what transformers 5.23 writes otherwise than Kimi K2.5 was released
    r"^language_model\.model\.blocks\.": "language_model.model.layers.",
    r"^model\.mm_projector\.": "mm_projector.",
}


def make(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of `kind` (a key of KINDS) and its tokenizer; norms and biases are random too."""
    model = build(kind, seed)
    model.save_pretrained(folder)
    if kind.startswith("kimi"):
        rename(folder, _RELEASED)
    make_tokenizer(folder)


def rename(folder: Path, patterns: Mapping[str, str]) -> None:
    """Give the tensors of a checkpoint other names, by regular expressions."""
    path = folder / "model.safetensors"
    renamed = {name: tensor.clone() for name, tensor in load_file(path).items()}
    for pattern, name in patterns.items():
        renamed = {re.sub(pattern, name, old): tensor for old, tensor in renamed.items()}
    save_file(renamed, path)


def build(kind: str, seed: int = 0):
    """Return the random model itself, in float32 and eval mode."""
    torch.manual_seed(seed)
    config = KINDS[kind]()
    factory = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = factory.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif name.endswith("sinks"):
                parameter.normal_(0, 3)
            elif "norm" in name:
                parameter.normal_(1, 0.2)
    return model.eval()


def make_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer (one token per byte, then SPECIAL) and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], chat_template=CHAT_TEMPLATE)
    assert len(fast) == VOCAB
    fast.save_pretrained(folder)
