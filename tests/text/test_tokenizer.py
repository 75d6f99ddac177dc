import asyncio
import json
import os
import shutil

import msgspec
import pytest

from fwd.errors import ModelError
from fwd.text.guard import Piece
from fwd.text.tokenizer import INLINE_CHARS, Tokenizer

CONTROL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>"],
    "llama2": ["<s>", "</s>", "<unk>"],
    "metaspace": ["<s>", "</s>", "<unk>"],
    "unigram": ["<s>", "</s>"],
}


@pytest.fixture
def copy(tmp_path, chatml_folder):
    return shutil.copytree(chatml_folder.path, tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


@pytest.mark.parametrize("kind", CONTROL)
def test_added_tokens_in_text_are_text_unless_asked_for(folders, kind):
    folder = folders[kind]
    tokenizer = Tokenizer.load(folder.path)
    control = {folder.id_of(token) for token in CONTROL[kind]}
    text = "a " + "".join(CONTROL[kind]) + " b".join(CONTROL[kind])
    assert control.isdisjoint(tokenizer.encode(text, add_special_tokens=False))
    assert control <= set(tokenizer.encode(text, special=True, add_special_tokens=False))


@pytest.mark.parametrize("text", ["Hello world", "def add(a, b):\n        return 1\n", "naïve 東京 🙂", ""])
def test_text_without_added_tokens_is_encoded_as_by_the_library(folder, text):
    tokenizer = Tokenizer.load(folder.path)
    for add in (False, True):
        expected = folder.raw.encode(text, add_special_tokens=add).ids
        assert tokenizer.encode(text, add_special_tokens=add) == expected
        assert tokenizer.encode(text, special=True, add_special_tokens=add) == expected


@pytest.mark.parametrize("text", ["        ", "ö"])
def test_added_text_that_is_no_markup_is_no_control_token(chatml_folder, text):
    tokenizer = Tokenizer.load(chatml_folder.path)
    assert chatml_folder.id_of(text) in tokenizer.encode(f"x\n{text}y")


def test_a_look_alike_that_normalizes_to_an_added_token_stays_text(chatml_folder):
    tokenizer = Tokenizer.load(chatml_folder.path)
    look_alike = "＜think＞"
    assert chatml_folder.id_of("<think>") in chatml_folder.raw.encode(look_alike).ids
    for special in (False, True):
        assert chatml_folder.id_of("<think>") not in tokenizer.encode(look_alike, special=special)


@pytest.mark.parametrize("special", [False, True])
def test_bos_is_added_by_the_post_processor_only_when_asked_for(llama3_folder, special):
    tokenizer = Tokenizer.load(llama3_folder.path)
    bos = llama3_folder.id_of("<|begin_of_text|>")
    assert tokenizer.bos_id == bos
    assert tokenizer.encode("x", special=special)[0] == bos
    assert bos not in tokenizer.encode("x", special=special, add_special_tokens=False)


def test_long_texts_in_a_thread_give_the_same_ids(llama3_folder):
    tokenizer = Tokenizer.load(llama3_folder.path)
    text = "The quick brown fox <|eot_id|> " * (INLINE_CHARS // 16)
    expected = llama3_folder.id_of("<|begin_of_text|>"), *tokenizer.encode(text, add_special_tokens=False)
    assert tuple(asyncio.run(tokenizer.encode_async(text))) == expected
    assert asyncio.run(tokenizer.encode_async("x")) == tokenizer.encode("x")


def test_token_bytes_are_true_bytes(folders):
    byte_level = Tokenizer.load(folders["llama3"].path)
    ids = byte_level.encode("🙂 é\n", add_special_tokens=False)
    assert b"".join(map(byte_level.token_bytes, ids)) == "🙂 é\n".encode()
    assert byte_level.token_bytes(folders["llama3"].id_of("Ċ")) == b"\n"
    assert byte_level.token_bytes(folders["llama3"].id_of("<|eot_id|>")) == b"<|eot_id|>"
    pieces = Tokenizer.load(folders["llama2"].path)
    assert pieces.token_bytes(folders["llama2"].id_of("<0x0A>")) == b"\n"
    assert pieces.token_bytes(folders["llama2"].id_of("▁a")) == b" a"
    assert pieces.token_text(folders["llama2"].id_of("<0xFF>")) == "�"
    assert pieces.token_bytes(pieces.vocab_size) == b""


def test_every_id_below_the_vocabulary_size_has_bytes(folder):
    tokenizer = Tokenizer.load(folder.path)
    assert tokenizer.vocab_size == folder.raw.get_vocab_size()
    assert all(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))


@pytest.mark.parametrize(
    ("generation", "config", "eos"),
    [
        ({}, {}, [2]),
        ({"eos_token_id": 0}, {"eos_token_id": 1}, [0, 2]),
        ({"eos_token_id": [0, 2]}, {}, [0, 2]),
        ({"eos_token_id": None}, {"eos_token_id": [1, 0]}, [0, 1, 2]),
    ],
)
def test_eos_ids_come_from_where_the_folder_has_them(copy, generation, config, eos):
    edit(copy / "config.json", **config)
    edit(copy / "generation_config.json", **generation)
    assert Tokenizer.load(copy).eos_ids == tuple(eos)


def test_eos_token_may_be_an_object(folders):
    assert Tokenizer.load(folders["llama2"].path).eos_ids == (folders["llama2"].id_of("</s>"),)


def test_a_stored_truncation_is_not_applied(copy):
    truncation = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    edit(copy / "tokenizer.json", truncation=truncation)
    assert len(Tokenizer.load(copy).encode("a b c d e f g h")) > 4


def test_the_hash_names_the_content(copy, chatml_folder):
    before = Tokenizer.load(copy).hash
    assert before == Tokenizer.load(chatml_folder.path).hash
    (copy / "tokenizer.json").write_bytes((copy / "tokenizer.json").read_bytes() + b"\n")
    assert Tokenizer.load(copy).hash != before


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"])
def test_what_is_no_file_neither_hangs_nor_fills_the_memory(copy, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (copy / name).unlink(missing_ok=True)
        make(copy / name)
        with pytest.raises(ModelError, match=f"{name}: what stands there is no file"):
            Tokenizer.load(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [None, b"", b'{"model": {"typ', b"[]", b"\xff\xfe{}"])
def test_a_missing_or_broken_file_is_named(copy, name, content):
    (copy / name).unlink()
    if content is not None:
        (copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        Tokenizer.load(copy)


@pytest.mark.parametrize(
    "content", ["{}", '{"model": 3}', '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}']
)
def test_json_that_is_no_tokenizer_is_named(copy, content):
    (copy / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(copy)


def test_a_broken_optional_file_is_named(copy):
    (copy / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        Tokenizer.load(copy)


def test_an_unknown_decoder_is_refused(copy):
    edit(copy / "tokenizer.json", decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(ModelError, match="WordPiece"):
        Tokenizer.load(copy)


def test_large_integers_in_a_config_are_read(chatml_folder):
    assert msgspec.json.decode(b'{"model_max_length": 1%s}' % (b"0" * 30))["model_max_length"] == 10**30
    assert Tokenizer.load(chatml_folder.path).bos_id is None


def test_a_long_piece_is_never_encoded_under_the_lock(chatml_folder, monkeypatch):
    """`encode` of the library holds the GIL, also for a piece that cannot be told from the anchor before it."""
    tokenizer = Tokenizer.load(chatml_folder.path)
    plain, asked = tokenizer._plain, []

    class Merging:
        def encode(self, text, **options):
            asked.append(len(text))
            return plain.encode("x" + text, **options)

        def encode_batch(self, texts, **options):
            return plain.encode_batch(texts, **options)

    monkeypatch.setattr(tokenizer, "_plain", Merging())
    text = "def " * INLINE_CHARS
    ids = tokenizer.encode_pieces([Piece("a", True), Piece(text, False)])
    assert tokenizer.decode(ids) == "a" + text
    assert max(asked) <= INLINE_CHARS


@pytest.mark.parametrize("text", ["x" * 3000, " " * 3000, "naïve 東京 🙂 " * 300, "def add(a, b):\n" * 300, "", "x"])
def test_the_fewest_tokens_of_a_text_are_no_more_than_it_has(folder, text):
    tokenizer = Tokenizer.load(folder.path)
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text))
    assert tokenizer.fewest_tokens(text) <= len(tokenizer.encode(text, special=True))


def test_the_fewest_tokens_of_a_text_are_told_by_its_length(llama3_folder):
    tokenizer = Tokenizer.load(llama3_folder.path)
    assert tokenizer.fewest_tokens("x" * 10_000) >= 10_000 // len("<|start_header_id|>")
