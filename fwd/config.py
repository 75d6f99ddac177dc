"""One frozen `Config`: defaults < TOML file < `FWD_*` environment < flags."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fwd.errors import ConfigError

Device = Literal["auto", "cuda", "cpu", "host"]
DType = Literal["auto", "float32", "bfloat16"]
Requant = Literal["fp8-head", "fp8-attn"]
KVDType = Literal["auto", "bfloat16", "fp8"]
DRAFTERS = ("", "mtp", "none")  # what the model comes with, its own layers that predict further tokens, none
Positive = Annotated[float, Meta(gt=0)]


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that can be set. Sizes are in bytes, times in seconds, `context` and `max_queue` in tokens.

    `model` is a Hugging Face folder or `demo`. `http` holds `HOST:PORT`, `unix:PATH` or `none`. `kv_bytes` bounds
    the KV pool; 0 is 1 GiB on the CPU, and on a GPU what the plan leaves. `context` 0 is the model's own, or what
    the pool holds if that is less. `max_queue` bounds what waits for the engine, except for one request alone.
    `threads` 0 is one, and one a core for a model over 64 MiB. `strict` refuses a model of which kernels would not
    take a quantised matrix as it is; `requant` makes the head, or the projections of attention, FP8 where they are
    plain. `draft_model` is the folder of a drafter for this model, or one of DRAFTERS. `state_dir` holds what outlives
    the daemon: the secret of the prefix cache, and in up to `draft_log_bytes` (0: 16 MiB) earlier answers in ids, from
    which drafts come. `keys` is a file with one lower-case SHA-256 of a key a line; `hosts` are Host headers allowed
    besides the addresses bound.
    """

    model: str = "demo"
    name: str = ""
    http: tuple[str, ...] = ("127.0.0.1:8393",)
    uds: str = ""
    device: Device = "auto"
    dtype: DType = "auto"
    context: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    kv_dtype: KVDType = "auto"
    kv_bytes: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    strict: bool = False
    requant: tuple[Requant, ...] = ()
    draft_model: str = ""
    max_seqs: Annotated[int, Meta(ge=1, le=16)] = 16
    max_queue: Annotated[int, Meta(ge=1, le=2**40)] = 1 << 20
    max_body: Annotated[int, Meta(ge=1024, le=1 << 30)] = 32 << 20
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0
    keys: str = ""
    state_dir: str = ""
    draft_log_bytes: Annotated[int, Meta(ge=0, le=2**30)] = 0
    hosts: tuple[str, ...] = ()
    hang_timeout: Positive = 30.0
    load_timeout: Positive = 120.0
    ping_interval: Positive = 1.0
    keep_alive: Positive = 10.0
    stop_timeout: Annotated[float, Meta(ge=0)] = 10.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @property
    def folder(self) -> Path:
        """The model folder; `demo` is the embedded one."""
        return Path(__file__).parent / "demo" / "model" if self.model == "demo" else Path(self.model)

    @property
    def drafter(self) -> str:
        """The folder of the draft model, or one of DRAFTERS."""
        return self.draft_model if self.draft_model in DRAFTERS else str(Path(self.draft_model).resolve())

    @property
    def served_name(self) -> str:
        """The model id clients use: `name`, else the folder's base name."""
        return self.name or Path(self.model).resolve().name

    @property
    def socket_path(self) -> Path:
        """Where the fwd protocol listens (DESIGN §7)."""
        return Path(self.uds) if self.uds else default_socket()

    @property
    def state_path(self) -> Path | None:
        """The state directory: `state_dir`, else the first of systemd's `$STATE_DIRECTORY`, else none."""
        first = self.state_dir or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
        return Path(first) if first else None


def default_socket() -> Path:
    """`$RUNTIME_DIRECTORY/fwd.sock`, else `$XDG_RUNTIME_DIR/fwd/fwd.sock`, else `/run/fwd/fwd.sock`."""
    if runtime := os.environ.get("RUNTIME_DIRECTORY"):
        return Path(runtime.split(":")[0]) / "fwd.sock"
    return Path(os.environ.get("XDG_RUNTIME_DIR") or "/run") / "fwd" / "fwd.sock"


def load(flags: Mapping[str, Any], file: str | None = None, env: Mapping[str, str] = os.environ) -> Config:
    """The effective configuration; `None` in `flags` means not given. Raises `ConfigError` naming key and origin."""
    file = file or env.get("FWD_CONFIG")
    values: dict[str, Any] = {}
    for origin, layer in (
        (file or "file", _toml(file) if file else {}),
        ("environment", _environment(env)),
        ("flags", {key: value for key, value in flags.items() if value is not None}),
    ):
        values |= layer
        _checked(values, origin)
    config = _checked(values, "configuration")
    if config.drafter not in DRAFTERS and not Path(config.drafter).is_dir():
        raise ConfigError(f"draft_model: {config.draft_model} is no folder: name a draft model's, mtp or none")
    return config


def _toml(file: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: {error}") from error


def _environment(env: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in msgspec.structs.fields(Config):
        text = env.get(f"FWD_{field.name.upper()}")
        if text is not None:
            found[field.name] = [part.strip() for part in text.split(",")] if isinstance(field.default, tuple) else text
    return found


def _checked(values: Mapping[str, Any], origin: str) -> Config:
    try:
        return msgspec.convert(values, Config, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{origin}: {error}") from error
