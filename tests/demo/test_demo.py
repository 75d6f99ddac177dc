"""The committed folders: size, tokenizer, template, and that both models still predict Python."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from fwd.demo import DRAFT, MODEL, chat, corpus, evaluate

# About a tenth above what was measured on this held-out module, in nats per token, where the models were made.
MODULE = "asyncio/staggered.py"
MODEL_NATS = 3.4
DRAFT_NATS = 4.3
AGREEMENT = 0.4

TOKENIZER = Tokenizer.from_file(str(MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def ids():
    text = (Path(sysconfig.get_paths()["stdlib"]) / MODULE).read_text(encoding="utf-8")
    return torch.tensor(TOKENIZER.encode(text).ids[:1024])


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_folders_are_small():
    assert sum(f.stat().st_size for folder in (MODEL, DRAFT) for f in folder.iterdir()) <= 18 << 20


def test_parameters():
    counts = [sum(p.numel() for p in load(folder).parameters()) for folder in (MODEL, DRAFT)]
    assert 5_500_000 < counts[0] < 6_500_000
    assert counts[1] < 2_000_000


def test_folders_share_the_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODEL / name).read_bytes() == (DRAFT / name).read_bytes()


def test_tokenizer_has_every_byte():
    assert TOKENIZER.get_vocab_size() == 4096
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(TOKENIZER.get_vocab())


@given(st.text())
def test_tokenizer_round_trips(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


@given(st.lists(st.sampled_from(["def f():", "\n", "    ", "\t", "return x", "<|im_end|>", "é", "\r\n", "🐍"])))
def test_tokenizer_round_trips_code(parts):
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_template_is_the_training_format():
    tok = AutoTokenizer.from_pretrained(MODEL)
    talk = [{"role": role, "content": role[::-1]} for role in ("system", "user", "assistant")]
    talk[0]["content"] = chat.SYSTEM
    assert tok.apply_chat_template(talk, tokenize=False) == chat.dialogue("resu", "tnatsissa", system=True)
    opened = tok.apply_chat_template(talk[:2], tokenize=False, add_generation_prompt=True)
    assert opened.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_generation_stops_at_the_end_of_a_turn_or_a_document():
    stops = json.loads((MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert [TOKENIZER.id_to_token(stop) for stop in stops] == ["<|im_end|>", "<|endoftext|>"]


def test_held_out_loss_and_agreement(ids):
    assert corpus.held_out(MODULE)
    row = evaluate.compare(evaluate.load(MODEL), evaluate.load(DRAFT), ids)
    assert row["model_nats"] < MODEL_NATS
    assert row["draft_nats"] < DRAFT_NATS
    assert row["agreement"] > AGREEMENT


@pytest.mark.parametrize("folder", [MODEL, DRAFT])
@torch.inference_mode()
def test_training_module_is_the_llama_of_transformers(folder, ids):
    ours, theirs = evaluate.load(folder)(ids[None]), load(folder)(ids[None]).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_chat_answers_with_python_and_stops():
    tok, model = AutoTokenizer.from_pretrained(MODEL), load(MODEL)
    talk = [{"role": "user", "content": "Write a function `get_name` that returns the name."}]
    prompt = tok.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**prompt, max_new_tokens=200, do_sample=False, temperature=None, top_p=None)
    answer = tok.decode(out[0, prompt["input_ids"].shape[1] :])
    assert answer.startswith("```python\ndef get_name(")
    assert answer.endswith("```<|im_end|>")
