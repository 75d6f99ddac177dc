"""The making of the demo models, on a small library and a small shape."""

import re
import textwrap

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from fwd.demo import MODEL, batches, chat, corpus, llama, tokenizer, train

TURN = r"<\|im_start\|>{}\n(?:(?!<\|).)*<\|im_end\|>\n"
DIALOGUE = re.compile(f"(?:{TURN.format('system')})?(?:{TURN.format('user')}{TURN.format('assistant')})+", re.DOTALL)
SMALL = {"hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "intermediate": 96}
SOURCE = '''
class Box:
    def get(self, key):
        """Return the value of key, or None.

        Keys are strings.
        """
        found = self.items.get(key)
        return found

def plain(a):
    b = a
    return b
'''


@pytest.fixture
def library(tmp_path):
    for i in range(200):
        folder = tmp_path / ("test" if i % 4 == 0 else "pkg")
        folder.mkdir(exist_ok=True)
        (folder / f"m{i}.py").write_text(SOURCE + f"\nNAME = 'module {i}'\n")
    (tmp_path / "pkg" / "broken.py").write_text("def (:\n")
    (tmp_path / "pkg" / "table.py").write_text(f"T = {list(range(2000))}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(SOURCE)
    return tmp_path


def test_split_is_disjoint_and_complete(library):
    names = {wanted: {s.name for s in corpus.sources(library) if s.held_out is wanted} for wanted in (True, False)}
    assert len(names[True]) + len(names[False]) == 200
    assert not names[True] & names[False]
    assert 0 < len(names[True]) < 40


def test_documents_are_deterministic(library):
    assert corpus.documents(wanted=False, root=library) == corpus.documents(wanted=False, root=library)


def test_documents_by_kind(library):
    train_docs, held = corpus.documents(wanted=False, root=library), corpus.documents(wanted=True, root=library)
    assert len(train_docs.tests) + len(held.tests) == 50
    assert len(train_docs.code) + len(held.code) == 150
    assert not set(train_docs.code) & set(held.code)
    assert all(text.startswith(("def ", "class ")) for text in train_docs.pieces)


def test_chats_are_well_formed(library):
    docs = corpus.documents(wanted=False, root=library).chat
    assert len(docs) > 100
    assert all(DIALOGUE.fullmatch(text) for text in docs)


def test_functions_lose_their_docstring():
    found = {function.name: function for function in corpus.functions(SOURCE)}
    get = found["get"]
    assert get.kind == "method"
    assert get.doc.startswith("Return the value")
    assert get.bare == textwrap.dedent("""\
        def get(self, key):
            found = self.items.get(key)
            return found
    """)
    assert found["plain"].bare == found["plain"].text
    assert found["Box"].kind == "class"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Return the key", "returns the key"),
        ("Push it", "pushes it"),
        ("Returns the key", "returns the key"),
        ("The key", "does this: The key"),
    ],
)
def test_does(text, wanted):
    assert chat.does(text) == wanted


def test_sentence_and_answer():
    doc = "Return x (see `y`). More words.\n\n" + "a" * 300 + "\n\n" + "b" * 300
    assert chat.sentence(doc) == "Return x (see `y`)"
    assert chat.answer(doc).endswith("a")


@given(st.text(), st.integers(0, 4), st.integers(0, 9))
def test_cut_loses_nothing(text, cuts, seed):
    assert "".join(batches.cut(text, np.random.default_rng(seed), cuts)) == text


def test_rows_of_aligned_pools_start_documents():
    tok = tokenizer.load(MODEL)
    pool = batches.Pool.encode(tok, ["def a():\n", "def b():\n", "x = 1\n" * 50], cuts=1)
    assert set(pool.ids[pool.starts - 1]) == {tok.token_to_id(tokenizer.END)}
    rng = np.random.default_rng(0)
    assert all(len(pool.row(rng, 9, aligned)) == 9 for aligned in (True, False) for _ in range(20))


def plan(**changes):
    fields = {"tokens": 1000, "minutes": 0.0, "rate": 1e-3, "seed": 0, "device": "cpu", "compile": False}
    return train.Plan(**{"out": None, "teacher": None, **fields, **changes})


def test_schedule_warms_up_stays_and_decays():
    rates = [train.rate(train.Progress(step=step, share=share)) for step, share in ((0, 0), (500, 0.5), (900, 0.85))]
    assert rates == pytest.approx([1 / train.WARM_UP, 1.0, 0.5])
    assert train.rate(train.Progress(step=999, share=1.0)) == train.FLOOR


def test_the_nearest_budget_ends_a_run():
    progress = train.Progress()
    progress.advance(plan(minutes=1.0), tokens=100, seconds=30.0)
    assert progress.share == 0.5
    progress.advance(plan(), tokens=800, seconds=1.0)
    assert progress.share == 0.9
    assert train.shape(plan(), progress) == (4, 1024)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(llama, "MODEL", llama.Shape(layers=2, **SMALL))
    monkeypatch.setattr(llama, "DRAFT", llama.Shape(layers=1, **SMALL))
    pools = {}
    for kind in batches.SHARES:
        pools[kind] = batches.Pool(np.arange(5000, dtype=np.uint16) % 64, np.arange(0, 5000, 100))
    monkeypatch.setattr(batches, "load", lambda *_: pools)
    for name in ("model", "draft"):
        (tmp_path / name).mkdir()
        tokenizer.load(MODEL).save(str(tmp_path / name / "tokenizer.json"))
    return tmp_path


def run(*args):
    result = CliRunner().invoke(train.main, [*map(str, args), "--device", "cpu"], catch_exceptions=False)
    assert result.exit_code == 0, result.output


def test_training_resumes_and_exports(small):
    run("--out", small / "model", "--tokens", 8192)
    run("--out", small / "model", "--tokens", 12288, "--resume")
    run("--out", small / "model", "--resume", "--decay")
    state = train.read_checkpoint(small / "model", "cpu")
    assert state["progress"]["tokens"] == 20480
    assert state["progress"]["step"] == 5
    exported = AutoModelForCausalLM.from_pretrained(small / "model" / "export", dtype=torch.float32)
    ours, ids = llama.Llama(llama.MODEL), torch.arange(40)[None]
    ours.load_state_dict({k: v.bfloat16().float() for k, v in state["model"].items()})
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids), exported(ids).logits, rtol=1e-3, atol=1e-3)


def test_drafter_starts_from_its_teacher(small):
    run("--out", small / "model", "--tokens", 4096)
    drafter = train.Run(plan(out=small / "draft", teacher=small / "model"))
    teacher = train.read_checkpoint(small / "model", "cpu")["model"]
    assert all(torch.equal(weight, teacher[name]) for name, weight in drafter.model.state_dict().items())
    run("--out", small / "draft", "--teacher", small / "model", "--tokens", 4096)
    assert (small / "draft" / "export" / "model.safetensors").exists()
