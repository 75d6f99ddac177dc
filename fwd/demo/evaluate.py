"""How good the demo models are on the held-out files: `python -m fwd.demo.evaluate` prints one JSON object."""

import json
import math
from pathlib import Path

import click
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from fwd.demo import DRAFT, MODEL, batches, llama, tokenizer

WINDOW = 1024
KINDS = ("code", "chat")


def load(folder: Path) -> llama.Llama:
    """A model folder as the training code's module, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = llama.Llama(llama.Shape(layers=config["num_hidden_layers"]))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): w.float() for name, w in weights.items()})
    return model.eval()


def windows(ids: Tensor, length: int) -> list[Tensor]:
    """The text in pieces of length + 1 ids that overlap by one, so that every id but the first is predicted once."""
    return [ids[at : at + length + 1] for at in range(0, len(ids) - 1, length)]


@torch.inference_mode()
def compare(model: llama.Llama, draft: llama.Llama, ids: Tensor, length: int = WINDOW) -> dict[str, float]:
    """Mean loss of both in nats per token, and the share of positions where their greedy tokens are equal."""
    sums = torch.zeros(3, dtype=torch.float64)
    for window in windows(ids, length):
        ours, theirs = (m(window[None, :-1])[0] for m in (model, draft))
        losses = [functional.cross_entropy(logits, window[1:], reduction="sum").item() for logits in (ours, theirs)]
        sums += torch.tensor([*losses, (ours.argmax(-1) == theirs.argmax(-1)).sum().item()])
    model_loss, draft_loss, agree = (sums / (len(ids) - 1)).tolist()
    return {"tokens": len(ids), "model_nats": model_loss, "draft_nats": draft_loss, "agreement": agree}


def measure(model: Path, draft: Path) -> dict[str, dict[str, float]]:
    """The comparison on held-out modules and chats, with the loss in bits per byte too."""
    tok = tokenizer.load(model)
    both = load(model), load(draft)
    docs, pools = batches.held_out(tok)
    result = {}
    for name in KINDS:
        row = compare(*both, torch.from_numpy(pools[name].ids.astype("int64")))
        tokens_per_byte = row["tokens"] / sum(len(text.encode()) for text in getattr(docs, name))
        for who in ("model", "draft"):
            row[f"{who}_bits_per_byte"] = row[f"{who}_nats"] / math.log(2) * tokens_per_byte
        result[name] = {key: round(value, 4) for key, value in row.items()}
    return result


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=MODEL)
@click.option("--draft", type=click.Path(path_type=Path, exists=True), default=DRAFT)
def main(model: Path, draft: Path) -> None:
    """Loss of the model and its drafter on the held-out files, and how often they agree."""
    click.echo(json.dumps(measure(model, draft), indent=2))


if __name__ == "__main__":
    main()
