"""`fwd eval` on real engines: its log-probabilities are those of `echo` to the bit, and those of `transformers`."""

import json
import math
import random
import socket
from http.client import HTTPConnection
from itertools import pairwise

import checkpoints
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fwd.cli import main
from fwd.cli.private import private_daemon
from fwd.cli.scoring import windows
from fwd.config import Config

DEMO = Config().folder
TEXT = '''def parse(path, default=None):
    """Return the entries of a file as a dictionary; „größer" and 🦊 are text, <|im_end|> as well."""
    with open(path, encoding="utf-8") as file:
        return dict(line.split("=", 1) for line in file if line.strip())
'''


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT)
    return path


def evaluated(*arguments):
    result = CliRunner().invoke(main, ["eval", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def echoed(uds, **body):
    """The columns of `/v1/completions` with echo."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(uds))
        http = HTTPConnection("localhost")
        http.sock = sock
        asked = json.dumps({"echo": True, "max_tokens": 0, "logprobs": 0, "return_token_ids": True, **body})
        http.request("POST", "/v1/completions", asked, {"Content-Type": "application/json"})
        answer = http.getresponse()
        found = json.loads(answer.read())
        assert answer.status == 200, found
    return found["choices"][0]


def reference(folder, ids):
    """The log-probability of each id after the first, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `fwd eval` says of TEXT and the embedded model in float32."""
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text(TEXT)
    return evaluated("demo", "--text", path, "--dtype", "float32")


def test_it_gives_the_figures_of_echo_to_the_bit(found, tmp_path):
    with private_daemon("demo", "--dtype", "float32", "--http", f"unix:{tmp_path / 'http'}") as private:
        private.ready()
        choice = echoed(tmp_path / "http", model="demo", prompt=TEXT)
    columns = {name: choice["logprobs"][name] for name in ("tokens", "token_logprobs")}
    assert found["logprobs"] == {"token_ids": choice["prompt_token_ids"], **columns}
    assert (columns["token_logprobs"][0], any(name.startswith("bytes:") for name in columns["tokens"])) == (None, True)


def test_it_agrees_with_transformers(found):
    ids, logprobs = found["logprobs"]["token_ids"], torch.tensor(found["logprobs"]["token_logprobs"][1:])
    expected = reference(DEMO, ids)
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    first = len(found["logprobs"]["tokens"][0].encode())
    nats, size = -expected.double().sum().item(), len(TEXT.encode()) - first
    assert (found["tokens"], found["scored"], found["bytes"]) == (len(ids), len(ids) - 1, size)
    assert found["nats_per_token"] == pytest.approx(nats / found["scored"], abs=1e-4)
    assert found["perplexity"] == pytest.approx(math.exp(nats / found["scored"]), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_windows_score_each_token_once_behind_enough_others():
    rng = random.Random(8)
    for _ in range(2000):
        count, size = rng.randrange(1, 200), rng.randrange(2, 50)
        stride = rng.randrange(1, size)
        plan = list(windows(count, size, stride))
        assert [token for each in plan for token in range(each.scored, each.end)] == list(range(count))
        assert plan[0] == (0, min(size, count), 0)
        assert all(each.end - each.start == size for each in plan[1:])
        assert all(each.scored - each.start >= size - stride for each in plan[1:])
        assert all(later.end - each.end <= stride for each, later in pairwise(plan))


@pytest.fixture(scope="module", params=["llama", "marked"])
def folder(request, tmp_path_factory):
    """A random model; the tokenizer of `marked` puts a token before a text."""
    path = tmp_path_factory.mktemp(request.param)
    checkpoints.make("llama", path)
    if request.param == "marked":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        mark, number = checkpoints.SPECIAL[3], checkpoints.VOCAB - 1
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{mark} $0", special_tokens=[(mark, number)]
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, bos_token=mark).save_pretrained(path)
    return path


def test_a_long_text_is_scored_in_windows(text, folder):
    """Each scores what a sequence that begins where the window does would; a token is a byte."""
    found = evaluated(folder, "--text", text, "--dtype", "float32", "--context", "100", "--stride", "40")
    head = [checkpoints.VOCAB - 1] if folder.name.startswith("marked") else []
    ids, logprobs = found["logprobs"]["token_ids"], found["logprobs"]["token_logprobs"]
    assert len(ids) == len(TEXT.encode())
    assert found["scored"] == len(ids) - (not head)
    assert found["bytes"] == found["scored"]
    assert (logprobs[0] is None) == (not head)
    assert found["logprobs"]["tokens"][:3] == ["d", "e", "f"]
    for start, end, scored in windows(len(ids), 100 - len(head), 40):
        begin = max(scored, 1 - len(head))
        expected = reference(folder, [*head, *ids[start:end]])[len(head) + begin - start - 1 :]
        torch.testing.assert_close(torch.tensor(logprobs[begin:end]), expected, atol=1e-4, rtol=0)


def test_a_space_that_the_tokenizer_puts_before_a_text_and_a_perplexity_beyond_all_numbers(tmp_path):
    checkpoints.make("llama", tmp_path)
    vocab = {"<unk>": 0, "\u2581": 1, "\u2581a": 2, "a": 3, "b": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] *= 1e9
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "text").write_text("ab")
    found = evaluated(tmp_path, "--text", tmp_path / "text")
    assert (found["logprobs"]["tokens"], found["bytes"]) == ([" a", "b"], 1)
    assert found["nats_per_token"] > 1000
    assert found["perplexity"] is None


def test_what_it_prints(fwd):
    result = fwd("eval", "--text", "-", "--context", "64", "--kv-dtype", "fp8", input="for line in file:")
    assert result.exit_code == 0, result.output
    figures, text, engine = result.stdout.splitlines()
    assert figures.startswith("perplexity ")
    assert figures.endswith("bits a byte")
    assert text == "4 of 5 tokens scored, 14 bytes, in windows of 64 with a stride of 32"
    assert "demo: 5.8 M parameters in bfloat16, KV in fp8, on cpu (reference), " in engine


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty: there is nothing to score"),
        (b"\xff\xfe", "is not UTF-8: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (b"x", "the text is too short: two tokens are needed to score one, it has 1"),
        (b"long enough", "a stride of 50 needs a window of more than 50 tokens, not 50"),
    ],
)
def test_a_text_that_cannot_be_scored_is_one_line(fwd, tmp_path, data, words):
    (tmp_path / "text").write_bytes(data)
    result = fwd("eval", "--text", tmp_path / "text", "--context", 50, "--stride", 50)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert words in result.stderr


def test_what_is_not_there_is_one_line(fwd, text, tmp_path):
    for arguments, words in (
        (["--text", tmp_path / "none"], f"{tmp_path / 'none'}: No such file or directory"),
        (["--text", tmp_path], f"{tmp_path}: Is a directory"),
        ([tmp_path / "none", "--text", text], "is no folder: give a Hugging Face model folder, or `demo`"),
        (["--text", text, "--context", "99999"], "context: 99999 is more than the 2048 tokens of the model"),
        ([], "Missing option '--text'."),
    ):
        result = fwd("eval", *arguments)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert words in result.stderr
