"""Ordinary models as drafters: what they say is what they say alone; tokenizers that differ and tables that do not."""

import json
import shutil

import checkpoints
import pytest
import torch
from drafts import CONTEXT, hidden_of, loaded, logits_of, new_cache, read
from parity import tokens

from fwd.errors import ModelError
from fwd.models.config import read_spec, run_spec
from fwd.models.draft.config import read_draft
from fwd.models.draft.load import load_draft
from fwd.models.draft.model import ABSENT
from fwd.models.load import load

KINDS = ["llama", "llama-tied", "qwen3-sliding", "gpt-oss", "qwen3-moe", "deepseek"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target")
    checkpoints.make("llama", folder, seed=1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_drafts_what_it_says_alone(kind, target, pair):
    folder, reference = pair(kind)
    _, draft = loaded(folder, target)
    assert (draft.spec.kind, draft.spec.shift, draft.spec.block, draft.spec.taps) == ("model", 0, 1, ())
    ids = tokens(100, seed=1)
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    for prompt, width in ((70, 7), (0, 16)):
        found = logits_of(draft, hidden_of(draft, ids, None, prompt, width, new_cache(draft)))
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), atol=1e-4, rtol=0)


def test_the_hash_is_its_own(target, pair):
    folder, _ = pair("llama-tied")
    assert loaded(folder, target)[1].weights_hash == load(folder, dtype="float32").weights_hash


def test_it_takes_the_dtype_of_its_target(target, pair):
    _, draft = loaded(pair("llama-tied")[0], target, "bfloat16")
    assert draft.dtype == torch.bfloat16
    assert draft.spec.body.dtype == "bfloat16"


def resized(folder, vocab):
    """The model with a table of another height: cut, or padded."""
    model = checkpoints.build("llama", seed=4)
    model.resize_token_embeddings(vocab, mean_resizing=False)
    model.save_pretrained(folder)
    checkpoints.make_tokenizer(folder)
    return model


@pytest.mark.parametrize("vocab", [256, 280])
def test_tables_may_be_padded_differently(vocab, target, tmp_path):
    model = resized(tmp_path, vocab)
    _, draft = loaded(tmp_path, target)
    assert draft.spec.reference.logits == 4 * vocab
    ids = tokens(40, seed=1)
    found = logits_of(draft, hidden_of(draft, ids, None, 0, 8, new_cache(draft)))
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    common = min(vocab, 260)
    assert found.shape == (40, 260)
    torch.testing.assert_close(found[:, :common], expected[:, :common], atol=1e-4, rtol=1e-4)
    assert (found[:, common:] == ABSENT).all()
    beyond = torch.tensor([259] * 4)
    assert hidden_of(draft, beyond, None, 0, 4, new_cache(draft)).isfinite().all()


def refusal(folder, target):
    with pytest.raises(ModelError) as refused:
        read(folder, target)
    message = refused.value.message
    assert "\n" not in message
    assert message.startswith("draft_model: ")
    return message


def test_another_tokenizer(target, tmp_path):
    resized(tmp_path, 260)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = table["model"]["vocab"]
    first, second = (next(token for token, index in vocab.items() if index == place) for place in (17, 40))
    vocab[first], vocab[second] = 40, 17
    (tmp_path / "tokenizer.json").write_text(json.dumps(table))
    message = refusal(tmp_path, target)
    assert "another tokenizer" in message
    assert f"id 17 is {first!r}" in message


def test_a_tokenizer_written_otherwise_is_the_same(target, tmp_path):
    resized(tmp_path, 260)
    table = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(table, indent=7))
    assert read(tmp_path, target).kind == "model"


def test_another_added_token(target, tmp_path):
    resized(tmp_path, 260)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace("<|user|>", "<|human|>"))
    assert "<|human|>" in refusal(tmp_path, target)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', '{"model": {"vocab": 3}}'])
def test_a_tokenizer_that_cannot_be_read(content, target, tmp_path):
    resized(tmp_path, 260)
    (tmp_path / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refusal(tmp_path, target)


def test_another_vocabulary_and_no_tokenizer_to_ask(target, tmp_path):
    resized(tmp_path, 280)
    (tmp_path / "tokenizer.json").unlink()
    message = refusal(tmp_path, target)
    assert "280" in message
    assert "260" in message


def test_the_embedded_model_comes_with_its_drafter():
    from fwd.demo import DRAFT, MODEL  # noqa: PLC0415

    spec = run_spec(read_spec(MODEL), "auto")
    found = read_draft("", MODEL, spec)
    assert found.folder == DRAFT
    assert found.kind == "model"
    assert read_draft("none", MODEL, spec) is None


def test_a_copy_of_the_embedded_model_comes_with_none(tmp_path):
    from fwd.demo import MODEL  # noqa: PLC0415

    shutil.copytree(MODEL, tmp_path / "model")
    assert read_draft("", tmp_path / "model", run_spec(read_spec(MODEL), "auto")) is None


def test_a_drafter_of_a_shorter_context_says_so(target, tmp_path):
    resized(tmp_path, 260)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 128}))
    found = read(tmp_path, target)
    assert found.context == 128
    assert load_draft(found, load(target, dtype="float32"), 128).spec is found
    with pytest.raises(AssertionError):
        load_draft(found, load(target, dtype="float32"), CONTEXT)
