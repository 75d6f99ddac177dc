import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwd.text.detokenize import Detokenizer
from fwd.text.tokenizer import Tokenizer

SAMPLES = ["Hello world", " leading space", "naïve 東京 🙂\n\tx", "zerø ☃ \U0001f469‍\U0001f4bb", "a  b   c", ""]


@pytest.fixture(scope="module")
def tokenizers_by_kind(folders):
    return {kind: Tokenizer.load(folder.path) for kind, folder in folders.items()}


@given(data=st.data(), kind=st.sampled_from(["chatml", "llama3", "llama2", "metaspace"]), skip=st.booleans())
def test_any_split_of_any_ids_is_the_decoding_of_the_whole(tokenizers_by_kind, data, kind, skip):
    tokenizer = tokenizers_by_kind[kind]
    chunks = data.draw(st.lists(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=4), max_size=8))
    detokenizer = Detokenizer(tokenizer, skip_special=skip)
    got = "".join([*map(detokenizer.push, chunks), detokenizer.flush()])
    assert got == tokenizer.decode([i for chunk in chunks for i in chunk], skip_special=skip)


@given(text=st.text(max_size=40), cuts=st.lists(st.integers(0, 200)))
def test_only_complete_characters_come_out(tokenizers_by_kind, text, cuts):
    tokenizer = tokenizers_by_kind["llama3"]
    detokenizer = Detokenizer(tokenizer)
    got = [detokenizer.push([i]) for i in tokenizer.encode(text)]
    assert "".join(got) == text
    assert detokenizer.flush() == ""


@given(data=st.binary(max_size=30))
def test_invalid_bytes_become_what_decoding_the_whole_makes_of_them(tokenizers_by_kind, data):
    tokenizer = tokenizers_by_kind["llama2"]
    first = tokenizer.encode("x", add_special_tokens=False)
    by_byte = {tokenizer.token_bytes(3 + byte): 3 + byte for byte in range(256)}
    detokenizer = Detokenizer(tokenizer)
    got = [detokenizer.push(first), *(detokenizer.push([by_byte[bytes([byte])]]) for byte in data), detokenizer.flush()]
    assert "".join(got) == "x" + data.decode(errors="replace")


@pytest.mark.parametrize("kind", ["chatml", "llama3", "llama2"])
@pytest.mark.parametrize("text", SAMPLES)
def test_encoding_and_detokenizing_is_the_identity(tokenizers_by_kind, kind, text):
    tokenizer = tokenizers_by_kind[kind]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([i]) for i in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.flush() == text


@pytest.mark.parametrize("text", ["Hello world", "naïve 東京 🙂", "x\n  y"])
def test_decoding_is_the_library_s_own(folder, text):
    tokenizer = Tokenizer.load(folder.path)
    ids = folder.raw.encode(text).ids
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special=skip) == folder.raw.decode(ids, skip_special_tokens=skip)


def test_a_continued_text_keeps_its_space(folders):
    tokenizer = Tokenizer.load(folders["llama2"].path)
    ids = tokenizer.encode("dog", add_special_tokens=False)
    assert Detokenizer(tokenizer).push(ids) == "dog"
    assert Detokenizer(tokenizer, continues=True).push(ids) == " dog"


def test_special_tokens_are_skipped_unless_asked_for(chatml_folder):
    tokenizer = Tokenizer.load(chatml_folder.path)
    ids = [chatml_folder.id_of("<think>"), *tokenizer.encode("x"), chatml_folder.id_of("<|im_end|>")]
    assert Detokenizer(tokenizer).push(ids) == "<think>x"
    assert Detokenizer(tokenizer, skip_special=False).push(ids) == "<think>x<|im_end|>"
