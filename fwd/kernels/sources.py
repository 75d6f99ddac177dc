"""The text of the kernels and what is built from it: where both are, the hash that joins them, how a build is kept.

A build is a folder that appears in the cache as a whole or not at all. No torch here.
"""

import contextlib
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fwd.errors import KernelError

PACKAGE = Path(__file__).resolve().parents[1]
PLACES = (PACKAGE / "cuda", PACKAGE.parent / "cuda")  # in a wheel, in the source tree
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^<>"\n]+)[>"]', re.MULTILINE)
TOOLKIT = "cuda_bf16.h"  # by which the toolkit's headers are known
DRAFT, ABANDONED = ".draft-", 3600  # a folder that is being written, and seconds after which nobody writes it
READABLE = 0o755  # a folder of the cache may be read by the daemon's user when another one built it


def home() -> Path:
    """The folder `cuda/`."""
    return next((place for place in PLACES if place.is_dir()), PLACES[-1])


def toolkit(*more: str) -> Path:
    """The folder of CUDA's headers, `more` among them, of its packages or else of `CUDA_HOME`.

    They come in several packages, and torch brings some only. Raises `KernelError` if there is no such folder.
    """
    wanted = (TOOLKIT, *more)
    for folder in _toolkits():
        if all((folder / name).is_file() for name in wanted):
            return folder
    headers = " and ".join(wanted)
    raise KernelError(
        f"the headers of CUDA ({headers}) are not found: install them with `pip install 'fwd[cuda]'` or set CUDA_HOME"
    )


def _toolkits() -> Iterator[Path]:
    found = importlib.util.find_spec("nvidia")
    for place in (found and found.submodule_search_locations) or ():
        yield Path(place) / "cu13/include"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:
            yield Path(os.environ[variable]) / "include"
    yield Path("/usr/local/cuda/include")


def closure(file: Path, folders: Sequence[Path]) -> list[Path]:
    """The file and all it includes, directly or not, from beside the including file or from `folders`.

    Conditions are not looked at, and what is found nowhere is left out: it belongs to the compiler.
    """
    found = {file: None}  # a set in order
    pending = [file]
    while pending:
        current = pending.pop()
        for name in INCLUDE.findall(current.read_text(encoding="utf-8", errors="replace")):
            paths = ((folder / name).resolve() for folder in (current.parent, *folders))
            included = next((path for path in paths if path.is_file()), None)
            if included and included not in found:
                found[included] = None
                pending.append(included)
    return list(found)


def digest(files: Sequence[Path], *words: str) -> str:
    """SHA-256 of names and contents of the files in any order, and of the words in theirs."""
    parts = sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)
    return hashlib.sha256(repr((parts, words)).encode()).hexdigest()


def cache(kind: str) -> Path:
    """The folder of one kind of builds.

    Under the first folder of `CACHE_DIRECTORY` (systemd.exec(5)), else `XDG_CACHE_HOME/fwd`, else `~/.cache/fwd`.
    Raises `KernelError` where there is no home.
    """
    if given := os.environ.get("CACHE_DIRECTORY", "").split(":")[0]:
        return Path(given) / kind
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "fwd" / kind
    with contextlib.suppress(RuntimeError):
        return Path.home() / ".cache/fwd" / kind
    raise KernelError("no home folder for the kernel cache: set CACHE_DIRECTORY")


def publish(place: Path, files: Mapping[str, bytes]) -> None:
    """Make the folder `place` of these files: written beside it, synced, renamed; another's that is there stays.

    Raises OSError where that cannot be.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    _sweep(place.parent)
    draft = Path(tempfile.mkdtemp(prefix=DRAFT, dir=place.parent))
    try:
        for name, data in files.items():
            _write(draft / name, data)
        draft.chmod(READABLE)
        _sync(draft)
        _rename(draft, place)
        _sync(place.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def discard(place: Path) -> None:
    """Remove a folder of the cache, whole at once for all who look; raises OSError where that cannot be."""
    with (
        tempfile.TemporaryDirectory(prefix=DRAFT, dir=place.parent) as gone,
        contextlib.suppress(FileNotFoundError),
    ):
        place.rename(Path(gone) / place.name)


def _sweep(folder: Path) -> None:
    """Remove drafts of builders that were killed."""
    for draft in folder.glob(f"{DRAFT}*"):
        with contextlib.suppress(FileNotFoundError):
            if draft.stat().st_mtime < time.time() - ABANDONED:
                shutil.rmtree(draft, ignore_errors=True)


def _rename(draft: Path, place: Path) -> None:
    try:
        draft.rename(place)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:  # rename(2): the folder is there
            raise


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
