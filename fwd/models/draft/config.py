"""`--draft-model` and what a folder's config.json says → DraftSpec, checked against the target. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwd.errors import ModelError
from fwd.models.architectures import ARCHITECTURES
from fwd.models.config import read_object, read_spec, run_spec
from fwd.models.draft.costs import sizes, widest
from fwd.models.draft.dflash_config import read_dflash
from fwd.models.draft.eagle_config import FIRST, read_eagle
from fwd.models.draft.mtp_config import read_mtp
from fwd.models.draft.spec import DraftKind, DraftSpec
from fwd.models.draft.tokens import difference, have_tokenizers
from fwd.models.fields import short
from fwd.models.layout import State
from fwd.models.safetensors import Entry, headers
from fwd.models.spec import ModelSpec, parts

SUPPORTED = "supported are plain language models, EAGLE-3 (its own layout and that of speculators) and DFlash"
_DEMO = Path(__file__).resolve().parents[2] / "demo"  # the embedded model and its drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageSpec(DraftSpec):
    """A model of its own."""

    body: ModelSpec


def read_draft(wanted: str, folder: Path, target: ModelSpec) -> DraftSpec | None:
    """Return the drafter that `--draft-model` names for the target in `folder`, whose spec is in its run dtype.

    "" is what the model comes with, `none` no drafter, `mtp` the target's own layers, else a folder. Raises ModelError,
    one line, for what is wrong with it, not supported, or not made for this target.
    """
    match wanted:
        case "none":
            return None
        case "":
            embedded = folder.resolve() == _DEMO / "model"
            return read_folder(_DEMO / "draft", folder, target) if embedded else read_mtp(folder, target)
        case "mtp":
            if (found := read_mtp(folder, target)) is None:
                raise ModelError(f"draft_model: {folder} has no layers that predict further tokens: leave out mtp")
            return found
    return read_folder(Path(wanted), folder, target)


def read_folder(draft: Path, folder: Path, target: ModelSpec) -> DraftSpec:
    """Return what a drafter's folder says of it."""
    try:
        return _read(draft, folder, target)
    except ModelError as error:
        where = "" if str(draft) in error.message else f"{draft}: "
        raise ModelError(f"draft_model: {where}{error.message}") from None


def _read(draft: Path, folder: Path, target: ModelSpec) -> DraftSpec:
    config = read_object(draft / "config.json")
    if config is None:
        raise ModelError(f"{draft} is no model folder: it has no config.json")
    files = headers(draft)
    match kind_of(config, files):
        case "eagle":
            _check_verifier(config, target)
            return read_eagle(draft, config, files, target)
        case "dflash":
            return read_dflash(draft, config, files, target)
    return read_language(draft, folder, target)


def kind_of(config: Mapping[str, Any], files: Mapping[str, Entry]) -> DraftKind:
    """Return the kind of a drafter's folder; raises ModelError for one that is not supported, by its name."""
    kind = config.get("speculators_model_type")
    if kind is not None:
        if kind != "eagle3":
            raise ModelError(f"speculators_model_type {short(kind)} is not supported: {SUPPORTED}")
        return "eagle"
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if name == "DFlashDraftModel":
        return "dflash"
    known = isinstance(name, str) and (name in ARCHITECTURES or "eagle3" in name.lower())
    if not known:
        raise ModelError(f"drafters of architecture {short(name, 80)} are not supported: {SUPPORTED}")
    if "eagle3" in str(name).lower() or config.get("draft_vocab_size") or any(each.startswith(FIRST) for each in files):
        return "eagle"
    if "fc.weight" in files:
        raise ModelError(f"fc.weight and no {FIRST}: EAGLE and EAGLE-2 are not supported: {SUPPORTED}")
    return "model"


def read_language(draft: Path, folder: Path, target: ModelSpec) -> LanguageSpec:
    """Return an ordinary model as a drafter, which knows the target's tokens."""
    body = run_spec(read_spec(draft), target.dtype)
    _check_tokens(draft, body, folder, target)
    if any(isinstance(layout, State) for layout in body.cache):
        raise ModelError(f"{draft} keeps states, which drafters may not: {SUPPORTED}")
    logits = 0 if body.vocab == target.vocab else 4 * body.vocab
    reference, kernels = sizes(body, parts(body), target, width=widest(body), logits=logits)
    return LanguageSpec(
        kind="model",
        folder=draft,
        shift=0,
        block=1,
        taps=(),
        features=0,
        hidden=body.hidden,
        cache=body.cache,
        context=body.max_context,
        rotated=body.rotated,
        reference=reference,
        kernels=kernels,
        body=body,
    )


def _check_tokens(draft: Path, body: ModelSpec, folder: Path, target: ModelSpec) -> None:
    """The same ids stand for the same tokens; tables that are padded differently do no harm where both are known."""
    if have_tokenizers(draft, folder):
        if found := difference(folder, draft):
            raise ModelError(f"{draft} has another tokenizer than the target: {found}")
    elif body.vocab != target.vocab:
        raise ModelError(
            f"{draft}: vocab_size is {body.vocab}, the target's {target.vocab}, and not both have a tokenizer.json"
        )


def _check_verifier(config: Mapping[str, Any], target: ModelSpec) -> None:
    """`speculators` names the model that a drafter was made for."""
    table = config.get("speculators_config")
    verifier = table.get("verifier") if isinstance(table, dict) else None
    if not isinstance(verifier, dict):
        return
    names = verifier.get("architectures")
    if isinstance(names, list) and names and target.architecture not in names:
        made = f"{short(verifier.get('name_or_path'), 80)}, {', '.join(map(str, names))[:80]}"
        raise ModelError(f"made for another target ({made}), this one is {target.architecture}")
