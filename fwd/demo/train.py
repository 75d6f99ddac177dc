"""Trains the embedded model (`python -m fwd.demo.train --out DIR`) and its drafter (the same with `--teacher DIR`).

Warm-up, stable, decay: the decay can start from any checkpoint, so a run that must end early is cut without loss.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fwd.demo import batches, llama, tokenizer

WARM_UP = 100
DECAY = 0.3
LONG = 0.12
FLOOR = 0.02
REPORT_EVERY = 20
SAVE_EVERY = 240.0


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do; minutes, when given, may end it before tokens do."""

    out: Path
    teacher: Path | None
    tokens: int
    minutes: float
    rate: float
    seed: int
    device: str
    compile: bool
    rows: int = 16
    length: int = 256

    @property
    def vocabulary(self) -> Path:
        """The folder of the tokenizer and the encoded text: the drafter uses its teacher's."""
        return self.teacher or self.out


@dataclass
class Progress:
    """How far a run is; share is of the budget that is nearest its end."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    share: float = 0.0

    def advance(self, plan: Plan, tokens: int, seconds: float) -> None:
        """Count one step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.share = self.share_of(plan)

    def share_of(self, plan: Plan) -> float:
        """The share of the plan's budget that is spent."""
        timed = self.seconds / (60 * plan.minutes) if plan.minutes else 0.0
        return max(self.tokens / plan.tokens, timed)


def rate(progress: Progress) -> float:
    """The learning rate as a share of its peak."""
    warm = min(1.0, (progress.step + 1) / WARM_UP)
    return warm * max(FLOOR, min(1.0, (1 - progress.share) / DECAY))


def shape(plan: Plan, progress: Progress) -> tuple[int, int]:
    """Rows and tokens of a batch: short rows first, in the last part of the run four times longer ones."""
    return (plan.rows // 4, plan.length * 4) if progress.share > 1 - LONG else (plan.rows, plan.length)


def optimizers(model: llama.Llama, peak: float) -> list[torch.optim.Optimizer]:
    """Matrices of the layers by Muon (with AdamW's step size), the embedding and the norms by AdamW."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    rest = [model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim < 2)]
    adam = torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=peak, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


class Run:
    """A model in training with all that a checkpoint holds."""

    def __init__(self, plan: Plan) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.progress = plan, Progress()
        self.teacher = load_teacher(plan.teacher, plan.device) if plan.teacher else None
        self.model = llama.Llama(llama.DRAFT if self.teacher else llama.MODEL).to(plan.device)
        if self.teacher:
            inherit(self.model, self.teacher)
        self.optimizers = optimizers(self.model, plan.rate)
        self.loss = torch.compile(self.eager_loss, dynamic=False) if plan.compile else self.eager_loss

    def eager_loss(self, batch: Tensor) -> Tensor:
        """Nats per token: against the text, or against the teacher's distribution where there is one."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = self.model(inputs).float().flatten(0, 1)
        if self.teacher is None:
            return functional.cross_entropy(logits, targets.flatten())
        with torch.no_grad():
            wanted = self.teacher(inputs).float().flatten(0, 1).softmax(-1)
        return functional.cross_entropy(logits, wanted)

    def step(self, batch: Tensor) -> float:
        """One update of the weights; the loss before it."""
        with torch.autocast(self.plan.device, torch.bfloat16):
            loss = self.loss(batch.to(self.plan.device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate * rate(self.progress)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def save(self) -> None:
        """The checkpoint, replaced as a whole, and the model folder export/ beside it."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, self.plan.out / "checkpoint.tmp")
        (self.plan.out / "checkpoint.tmp").rename(self.plan.out / "checkpoint.pt")
        llama.save(self.model, self.plan.out / "export")
        tokenizer.save(tokenizer.load(self.plan.vocabulary), self.plan.out / "export", llama.CONTEXT)

    def load(self, decay: bool) -> None:
        """Continue from the checkpoint; with decay, under a plan whose decay starts here."""
        state = read_checkpoint(self.plan.out, self.plan.device)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        if decay:
            self.plan = replace(self.plan, tokens=round(self.progress.tokens / (1 - DECAY)), minutes=0.0)
        self.progress.share = self.progress.share_of(self.plan)


def read_checkpoint(folder: Path, device: str) -> dict[str, Any]:
    """What `Run.save` wrote; tensors and numbers only, never code."""
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
    return state


def load_teacher(folder: Path, device: str) -> llama.Llama:
    """The trained model, frozen."""
    teacher = llama.Llama(llama.MODEL).to(device)
    teacher.load_state_dict(read_checkpoint(folder, device)["model"])
    return teacher.eval().requires_grad_(requires_grad=False)


def inherit(draft: llama.Llama, teacher: llama.Llama) -> None:
    """The drafter starts from its teacher's embedding, norm and first layer."""
    wanted = draft.state_dict()
    draft.load_state_dict({name: p for name, p in teacher.state_dict().items() if name in wanted})


def train(run: Run, pools: batches.Pools) -> Iterator[float]:
    """Steps until the budget is spent; yields the loss of each."""
    plan, progress = run.plan, run.progress
    rng = np.random.default_rng([plan.seed, progress.step])
    while progress.share < 1:
        start = time.monotonic()
        rows, length = shape(plan, progress)
        loss = run.step(batches.draw(pools, rng, rows, length))
        progress.advance(plan, rows * length, time.monotonic() - start)
        yield loss


def follow(run: Run, steps: Iterator[float]) -> None:
    """Report and save at intervals, and save at the end."""
    losses: list[float] = []
    saved = time.monotonic()
    for loss in steps:
        losses.append(loss)
        if len(losses) == REPORT_EVERY:
            report(run.progress, losses, run.plan.out)
            losses.clear()
        if time.monotonic() - saved > SAVE_EVERY:
            run.save()
            saved = time.monotonic()
    run.save()


def report(progress: Progress, losses: list[float], out: Path) -> None:
    """One line of JSON to the terminal and to log.jsonl."""
    speed = progress.tokens / progress.seconds
    line = asdict(progress) | {"loss": sum(losses) / len(losses), "rate": rate(progress), "tokens_s": speed}
    text = json.dumps({key: round(value, 4) for key, value in line.items()})
    click.echo(text)
    with (out / "log.jsonl").open("a") as log:
        log.write(text + "\n")


FOLDER = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--out", type=FOLDER, required=True, help="Folder for the checkpoint, the log and export/.")
@click.option("--teacher", type=FOLDER, help="The model's --out: train the drafter on what it predicts.")
@click.option("--tokens", default=15_000_000, help="Budget of training tokens.")
@click.option("--minutes", default=0.0, help="Budget of time, if any; the one that ends first counts.")
@click.option("--rate", default=5e-3, help="Peak learning rate.")
@click.option("--seed", default=0, help="Of the initial weights and the order of the text.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to train.")
@click.option("--compile/--no-compile", default=False, help="Use torch.compile: a fifth less time on a CPU.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
@click.option("--decay", is_flag=True, help="With --resume: start the decay now, whatever the budget.")
def main(out: Path, *, device: str, resume: bool, decay: bool, **budget: Any) -> None:
    """Train the demo model, or with --teacher its drafter."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan(out, device=device, **budget)
    out.mkdir(parents=True, exist_ok=True)
    pools = batches.load(plan.vocabulary, plan.seed)
    run = Run(plan)
    if resume:
        run.load(decay)
    follow(run, train(run, pools))


if __name__ == "__main__":
    main()
