"""`fwd eval`: how well a model predicts a text. Its figures are those of `/v1/completions` with `echo`."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from fwd.cli import scoring
from fwd.cli.common import Line, plain
from fwd.cli.options import json_option, requant_option, uds_option
from fwd.cli.private import Private, private_daemon
from fwd.config import Config, Device, DType, KVDType
from fwd.protocol.local import Status
from fwd.protocol.values import MAX_CONTEXT
from fwd.text.tokenizer import Tokenizer

MAX_TEXT = 64 << 20
WINDOW = 4096
PIECE = 4096  # ids a piece of JSON
_LARGEST_EXPONENT = math.log(sys.float_info.max)
# a batch has time, and the chunks of a large model on a small machine take it
SERVE = ("--http", "none", "--log-level", "warning", "--max-seqs", str(scoring.IN_FLIGHT), "--hang-timeout", "3600")


@click.command()
@click.argument("model", default="demo")
@click.option("--text", "file", required=True, metavar="FILE", help="UTF-8 text; - is stdin.")
@click.option(
    "--context",
    type=click.IntRange(2, MAX_CONTEXT),
    help=f"Tokens of a window (default: the model's context, at most {WINDOW}).",
)
@click.option("--stride", type=click.IntRange(1), help="Tokens from one window to the next (default: half a window).")
@click.option("--device", type=click.Choice(get_args(Device)), help="auto: a GPU, else the CPU.")
@click.option("--dtype", type=click.Choice(get_args(DType)), help="auto is the checkpoint's.")
@click.option("--kv-dtype", type=click.Choice(get_args(KVDType)))
@requant_option
@click.option("--threads", type=int, help="CPU threads (default: one a core; one for a model up to 64 MiB).")
@uds_option
@json_option
def eval(  # noqa: A001, PLR0917  # the verb's name; one parameter an option
    model: str, file: str, context: int | None, stride: int | None, uds: str | None, as_json: bool, **flags: Any
) -> None:
    """Score a text with MODEL, a folder or `demo` (default): perplexity, nats a token, bits a byte.

    A text longer than a window is read in windows that overlap: each token is scored once, in the first window that
    holds it. A token that the tokenizer puts before a text stands before each window. With --json the ids, the tokens
    and their log-probabilities follow the figures. Needs no daemon and leaves none. With --requant the KL divergence
    from the model as it is follows, of whole distributions on the start of the text.
    """
    raw = _read(file)
    with private_daemon(model, *SERVE, *_flags({**flags, "context": context}), uds=uds) as private:
        private.connect().close()  # it has looked at the folder
        tokenizer = Tokenizer.load(Config(model=model).folder)
        text = _encoded(tokenizer, raw)
        status = private.ready()
        sizes = _sizes(status, context, stride, len(text.head))
        seconds = _score(private, text, sizes)
    figures = _figures(text, _scored_bytes(tokenizer, text, raw)) | _divergence(model, text, flags)
    found = {"file": file, **sizes, **figures, "seconds": seconds, **_engine(status)}
    if as_json:
        for piece in _json(found, text, tokenizer):
            click.echo(piece, nl=False)
    else:
        click.echo("\n".join(_lines(found)))


def _read(file: str) -> str:
    """The text; raises a usage error that says what is wrong with the file."""
    try:
        data = sys.stdin.buffer.read(MAX_TEXT + 1) if file == "-" else _start(Path(file))
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from error
    if len(data) > MAX_TEXT:
        raise click.UsageError(f"{file} is larger than {MAX_TEXT} bytes: split it")
    if not data:
        raise click.UsageError(f"{file} is empty: there is nothing to score")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} is not UTF-8: {error}") from error


def _start(path: Path) -> bytes:
    with path.open("rb") as opened:
        return opened.read(MAX_TEXT + 1)


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if value is not None:
            yield from (f"--{name.replace('_', '-')}", ",".join(value) if isinstance(value, tuple) else str(value))


def _encoded(tokenizer: Tokenizer, raw: str) -> scoring.Text:
    """The ids, and as head the token that marks the beginning of a text if the tokenizer puts one there."""
    ids = tokenizer.encode(raw)
    marked = tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
    text = scoring.Text(ids[:marked], ids[marked:])
    if text.scored < 1:
        raise click.UsageError(f"the text is too short: two tokens are needed to score one, it has {len(ids)}")
    return text


def _sizes(status: Status, context: int | None, stride: int | None, head: int) -> dict[str, int]:
    """Tokens of a window and from one to the next; something of the text stands before each token that is scored."""
    assert status.engine
    window = context or min(status.engine.context, WINDOW)
    room = window - head
    stride = stride or max(1, room // 2)
    if stride >= room:
        raise click.UsageError(f"a stride of {stride} needs a window of more than {stride + head} tokens, not {window}")
    return {"window": window, "stride": stride}


def _score(private: Private, text: scoring.Text, sizes: Mapping[str, int]) -> float:
    """Score the text; returns the seconds that took."""
    line, count = Line(), len(text.ids)
    begun = time.perf_counter()
    try:
        with private.connect() as daemon:
            plan = scoring.windows(count, sizes["window"] - len(text.head), sizes["stride"])
            text.score(daemon, plan, lambda done: line.show(f"{done:,} of {count:,} tokens, {done / count:.0%}"))
    finally:
        line.show("")
    return time.perf_counter() - begun


def _scored_bytes(tokenizer: Tokenizer, text: scoring.Text, raw: str) -> int:
    """Bytes of the tokens that are scored: not those of the first where it is not, nor a space put before them."""
    first = b"".join(map(tokenizer.token_bytes, text.ids[: text.unscored]))
    own = first.removeprefix(b" ") if tokenizer.strips_space else first
    return max(1, len(raw.encode()) - len(own))  # a normalizer may lengthen what it reads


def _figures(text: scoring.Text, size: int) -> dict[str, Any]:
    """What is printed first; `size` are the bytes of the tokens that are scored."""
    mean = text.nats / text.scored
    return {
        "tokens": len(text.ids),
        "scored": text.scored,
        "bytes": size,
        "nats_per_token": mean,
        "perplexity": math.inf if mean > _LARGEST_EXPONENT else math.exp(mean),
        "bits_per_byte": text.nats / math.log(2) / size,
    }


def _divergence(model: str, text: scoring.Text, flags: Mapping[str, Any]) -> dict[str, Any]:
    """How far the distributions are from those of the model as it is, where it is requantised."""
    if not flags["requant"]:
        return {}
    from fwd.models.divergence import divergence  # noqa: PLC0415  # the engine half, only where it is needed

    kinds = {name: flags[name] or "auto" for name in ("device", "dtype")}
    folder = Config(model=model).folder
    nats, tokens = divergence(folder, text.ids, requant=flags["requant"], head=text.head, **kinds)
    return {"kl_nats_per_token": nats, "kl_tokens": tokens}


def _engine(status: Status) -> dict[str, Any]:
    return {"model": status.name, "engine": plain(status.engine)}


def _json(found: Mapping[str, Any], text: scoring.Text, tokenizer: Tokenizer) -> Iterator[bytes]:
    """One document in pieces: the figures, then columns by the names of `/v1/completions`."""
    encode = msgspec.json.encode
    yield encode(found)[:-1] + b',"logprobs":{'
    for name in ("token_ids", "tokens", "token_logprobs"):
        yield encode(name) + b":["
        for begin in range(0, len(text.ids), PIECE):
            values = _column(name, text, slice(begin, begin + PIECE), tokenizer)
            yield (b"," if begin else b"") + encode(values)[1:-1]
        yield b"]}}\n" if name == "token_logprobs" else b"],"


def _column(name: str, text: scoring.Text, part: slice, tokenizer: Tokenizer) -> list[Any]:
    match name:
        case "token_ids":
            return list(text.ids[part])
        case "tokens":
            return [tokenizer.token_name(token) for token in text.ids[part]]
        case _:
            return [None if math.isnan(value) else value for value in text.logprobs[part]]


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    engine = found["engine"]
    weights = [kind.removeprefix("weights_") for kind in engine["memory"] if kind.startswith("weights_")]
    yield (
        f"perplexity {found['perplexity']:.4f}: {found['nats_per_token']:.4f} nats a token, "
        f"{found['bits_per_byte']:.4f} bits a byte"
    )
    yield (
        f"{found['scored']:,} of {found['tokens']:,} tokens scored, {found['bytes']:,} bytes, "
        f"in windows of {found['window']:,} with a stride of {found['stride']:,}"
    )
    if "kl_tokens" in found:
        yield (
            f"KL divergence from the model as it is: {found['kl_nats_per_token']:.6f} nats a token, "
            f"on the first {found['kl_tokens']:,}"
        )
    yield (
        f"{found['model']}: {engine['parameters'] / 1e6:,.1f} M parameters in {' and '.join(weights)}, KV in "
        f"{engine['kv_dtype']}, on {engine['device']} ({engine['kernel_set']}), "
        f"{found['tokens'] / found['seconds']:,.0f} tokens/s"
    )
