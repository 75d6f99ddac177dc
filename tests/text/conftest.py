"""Small model folders, trained here: byte-level (ChatML, Llama 3), SentencePiece-like (Llama 2, Metaspace, Unigram)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "def add(a, b):\n    return a + b\n\n\nclass Point:\n    x: int = 0\n",
    "The quick brown fox jumps over the lazy dog. user system assistant think tool",
    "naïve café über 東京 is a city 🙂 and <b>html</b> | pipes |> im_start im_end",
] * 4
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- generation %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

LLAMA3 = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Only system, user and assistant roles are supported!') }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}{{- part['text'] }}{%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
"""

LLAMA2 = """{{ bos_token }}{% for m in messages %}
{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}
{% endfor %}"""


@dataclass(frozen=True)
class Folder:
    path: Path
    raw: Tokenizer

    def id_of(self, token: str) -> int:
        found = self.raw.token_to_id(token)
        assert found is not None, token
        return found


def special(text, **options):
    return AddedToken(text, special=True, normalized=False, **options)


def ordinary(text, **options):
    return AddedToken(text, special=False, **{"normalized": False, **options})


def byte_level(vocab_size, trained_special):
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=trained_special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def chatml():
    tokenizer = byte_level(420, [special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_tokens([ordinary(t, normalized=True) for t in ("<think>", "</think>", "<tool_response>")])
    tokenizer.add_tokens([ordinary(t) for t in ("<tool_call>", "</tool_call>", "        ", "ö")])
    return tokenizer


def llama3():
    tokenizer = byte_level(400, [])
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens([special(name) for name in names])
    bos = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), bos])
    return tokenizer


def sentencepiece_bpe():
    """A BPE with byte fallback; `<s>` and `</s>` are in the vocabulary, and a merge makes `</s>`."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {name: i for i, name in enumerate(dict.fromkeys([*names, "</", "s>"]))}
    merges = [*map(tuple, model["merges"]), ("<", "/"), ("s", ">"), ("</", "s>")]
    return Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))


def with_ends(tokenizer):
    tokenizer.add_special_tokens([special(t) for t in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def llama2():
    tokenizer = sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_ends(tokenizer)


def metaspace():
    tokenizer = sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return with_ends(tokenizer)


def unigram():
    """Every character alone, and `</s>` as a piece that a plain search would choose."""
    letters = sorted({c for text in CORPUS for c in text.replace(" ", "▁")})
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((c, -5.0) for c in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return with_ends(tokenizer)


KINDS = {
    "chatml": (
        chatml,
        {
            "eos_token": "<|im_end|>",
            "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>"},
            "chat_template": CHATML,
        },
    ),
    "llama3": (llama3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "chat_template": LLAMA3}),
    "llama2": (
        llama2,
        {
            "bos_token": {"__type": "AddedToken", "content": "<s>"},
            "eos_token": {"__type": "AddedToken", "content": "</s>"},
            "chat_template": LLAMA2,
        },
    ),
    "metaspace": (metaspace, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}),
    "unigram": (unigram, {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LLAMA2}),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A model folder by kind."""
    made = {}
    for kind, (build, config) in KINDS.items():
        path = tmp_path_factory.mktemp(kind)
        raw = build()
        raw.save(str(path / "tokenizer.json"))
        full = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30, **config}
        (path / "tokenizer_config.json").write_text(json.dumps(full), encoding="utf-8")
        made[kind] = Folder(path, raw)
    return made


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


@pytest.fixture
def chatml_folder(folders):
    return folders["chatml"]


@pytest.fixture
def llama3_folder(folders):
    return folders["llama3"]
