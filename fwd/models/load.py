"""A model folder becomes a Model: config → spec → checkpoint → weights on the device."""

from dataclasses import replace
from pathlib import Path

import torch

from fwd.errors import ModelError
from fwd.kernels.select import select
from fwd.models.dense import Dense
from fwd.models.formats import Checkpoint, Progress
from fwd.models.model import Model
from fwd.models.spec import ModelSpec, read_spec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    folder: Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    context: int | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Model:
    """Load a Hugging Face folder for up to `context` positions; `progress` gets bytes done and in total.

    Raises ModelError for anything wrong with the folder, ConfigError for a device that this build has no kernels for.
    """
    spec = run_spec(read_spec(folder), dtype)
    ops = select(device)
    checkpoint = Checkpoint(folder, progress)
    return Dense(spec, ops, _DTYPES[spec.dtype], checkpoint, min(context or spec.max_context, spec.max_context))


def run_spec(spec: ModelSpec, dtype: str) -> ModelSpec:
    """Return the spec in the dtype it will run in: `auto` is the checkpoint's. Raises ModelError for any other."""
    match spec.dtype if dtype == "auto" else dtype:
        case "float32" | "bfloat16" as name:
            return replace(spec, dtype=name)
        case other:
            raise ModelError(f"{other} is not supported: use --dtype bfloat16 or float32")
