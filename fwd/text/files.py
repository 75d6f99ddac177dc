"""Reading the JSON files of a model folder."""

import hashlib
import stat
from pathlib import Path
from typing import Any

import msgspec

from fwd.errors import ModelError

TEXT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def read_text(path: Path) -> str:
    """Read a UTF-8 file; `ModelError` names the file that is missing or unreadable, or that could hang when read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelError(f"{path}: what stands there is no file")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: not UTF-8 ({error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; `ModelError` names the file that is missing, unreadable or broken."""
    try:
        value = msgspec.json.decode(read_text(path))
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """As `read_json`; an empty object where the file does not exist."""
    return read_json(path) if path.exists() else {}


def text_hash(folder: Path) -> str:
    """A hash of what makes ids of text and text of chats; a file that cannot be read counts as if it were not there."""
    found = hashlib.sha256()
    for path in (folder / name for name in TEXT):
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError:  # whoever needs it says so
            content = b""
        found.update(b"%d\n%b" % (len(content), content))
    return found.hexdigest()[:16]


def token_content(value: Any) -> str | None:
    """Read a special token as tokenizer_config.json spells it: a string, or an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
