"""Trains the embedded model, or its drafter: `python -m fwd.demo.train --out DIR`, then `--teacher DIR` for the drafter.

Warm-up, stable, decay: the decay can start from any checkpoint, so a run that must end early is cut without loss.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fwd.demo import batches, llama, tokenizer

WARM_UP = 100
DECAY = 0.3
LONG = 0.12
FLOOR = 0.02
SAVE_EVERY = 240.0


@dataclass(frozen=True)
class Plan:
    """What a run is asked to do; minutes, when given, may end it before tokens do."""

    out: Path
    tokens: int
    minutes: float
    rate: float
    seed: int
    device: str
    compile: bool
    muon: bool = True
    rows: int = 16
    length: int = 256


@dataclass
class Progress:
    """How far a run is; share is of the budget that is nearest its end, and never falls."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    share: float = 0.0

    def advance(self, plan: Plan, tokens: int, seconds: float) -> None:
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        timed = self.seconds / (60 * plan.minutes) if plan.minutes else 0.0
        self.share = max(self.share, self.tokens / plan.tokens, timed)


def rate(progress: Progress) -> float:
    """The learning rate as a share of its peak."""
    warm = min(1.0, (progress.step + 1) / WARM_UP)
    return warm * max(FLOOR, min(1.0, (1 - progress.share) / DECAY))


def shape(plan: Plan, progress: Progress) -> tuple[int, int]:
    """Rows and tokens of a batch: short rows first, in the last part of the run four times longer ones."""
    return (plan.rows // 4, plan.length * 4) if progress.share > 1 - LONG else (plan.rows, plan.length)


def optimizers(model: llama.Llama, plan: Plan) -> list[torch.optim.Optimizer]:
    """Matrices of the layers by Muon (with AdamW's step size), the embedding and the norms by AdamW."""
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    if not plan.muon:
        rest = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": [*matrices, model.embed_tokens.weight]}, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    rest = [model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim < 2)]
    adam = torch.optim.AdamW(rest, lr=plan.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=plan.rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [muon, adam]


class Run:
    """A model in training with all that a checkpoint holds."""

    def __init__(self, plan: Plan, teacher: llama.Llama | None) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.teacher = plan, teacher
        self.model = llama.Llama(llama.DRAFT if teacher else llama.MODEL).to(plan.device)
        if teacher:
            inherit(self.model, teacher)
        self.optimizers = optimizers(self.model, plan)
        self.progress = Progress()
        self.loss = torch.compile(self.eager_loss, dynamic=False) if plan.compile else self.eager_loss

    def eager_loss(self, batch: Tensor) -> Tensor:
        """Nats per token: against the text, or against the teacher's distribution where there is one."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = self.model(inputs).float().flatten(0, 1)
        if self.teacher is None:
            return F.cross_entropy(logits, targets.flatten())
        with torch.no_grad():
            wanted = self.teacher(inputs).float().flatten(0, 1).softmax(-1)
        return F.cross_entropy(logits, wanted)

    def step(self, batch: Tensor) -> float:
        with torch.autocast(self.plan.device, torch.bfloat16):
            loss = self.loss(batch.to(self.plan.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.rate * rate(self.progress)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": asdict(self.progress),
        }
        torch.save(state, self.plan.out / "checkpoint.tmp")
        (self.plan.out / "checkpoint.tmp").rename(self.plan.out / "checkpoint.pt")

    def load(self, decay: bool) -> None:
        """Continue from the checkpoint; with decay, at the point of the schedule where the decay starts."""
        state: dict[str, Any] = torch.load(self.plan.out / "checkpoint.pt", map_location=self.plan.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        if decay:
            self.progress.share = max(self.progress.share, 1 - DECAY)


def inherit(draft: llama.Llama, teacher: llama.Llama) -> None:
    """The drafter starts from its teacher's embedding, norm and first layer."""
    wanted = draft.state_dict()
    draft.load_state_dict({name: p for name, p in teacher.state_dict().items() if name in wanted})


def train(run: Run, pools: batches.Pools) -> Iterator[tuple[Progress, float]]:
    """Steps until the budget is spent; yields the progress and the loss of each."""
    plan, progress = run.plan, run.progress
    rng = np.random.default_rng([plan.seed, progress.step])
    while progress.share < 1:
        start = time.monotonic()
        rows, length = shape(plan, progress)
        loss = run.step(batches.draw(pools, rng, rows, length))
        progress.advance(plan, rows * length, time.monotonic() - start)
        yield progress, loss


def export(run: Run) -> None:
    """The model folder, complete, beside the checkpoint."""
    folder = run.plan.out / "export"
    llama.save(run.model, folder)
    vocabulary = tokenizer.Tokenizer.from_file(str(run.plan.out / "tokenizer.json"))
    tokenizer.save(vocabulary, folder, llama.CONTEXT)


def report(progress: Progress, losses: list[float], out: Path) -> None:
    line = {**asdict(progress), "loss": sum(losses) / len(losses), "rate": rate(progress), "tokens_s": progress.tokens / progress.seconds}
    text = json.dumps({k: round(v, 4) for k, v in line.items()})
    click.echo(text)
    with (out / "log.jsonl").open("a") as log:
        log.write(text + "\n")


def teacher_of(folder: Path | None, device: str) -> llama.Llama | None:
    if folder is None:
        return None
    teacher = llama.Llama(llama.MODEL).to(device)
    teacher.load_state_dict(torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)["model"])
    return teacher.eval().requires_grad_(requires_grad=False)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for checkpoint, log and export/.")
@click.option("--tokens", default=15_000_000, help="Budget of training tokens.")
@click.option("--minutes", default=0.0, help="Budget of time; the one that ends first counts.")
@click.option("--rate", default=5e-3, help="Peak learning rate.")
@click.option("--seed", default=0)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option("--compile", "compiled", is_flag=True, help="Use torch.compile.")
@click.option("--resume", is_flag=True, help="Continue from the checkpoint in --out.")
@click.option("--decay", is_flag=True, help="With --resume: start the decay now.")
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), help="The model's --out: train the drafter on its output.")
@click.option("--adamw", is_flag=True)
def main(out: Path, *, resume: bool, decay: bool, compiled: bool, teacher: Path | None, device: str, adamw: bool, **budget: Any) -> None:
    """Train the demo model, or with --teacher its drafter."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = Plan(out, device=device, compile=compiled, muon=not adamw, **budget)
    out.mkdir(parents=True, exist_ok=True)
    _, pools = batches.load(out, plan.seed)
    click.echo(json.dumps({name: len(pool.ids) for name, pool in pools.items()}))
    run = Run(plan, teacher_of(teacher, device))
    if resume:
        run.load(decay)
    losses: list[float] = []
    saved = time.monotonic()
    for progress, loss in train(run, pools):
        losses.append(loss)
        if progress.step % 20 == 0:
            report(progress, losses, out)
            losses.clear()
        if time.monotonic() - saved > SAVE_EVERY:
            run.save()
            export(run)
            saved = time.monotonic()
    run.save()
    export(run)


if __name__ == "__main__":
    main()
