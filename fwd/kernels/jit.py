"""Kernels built by NVRTC and kept: one cubin for each file of `cuda/` and architecture, with a record of what is in it.

A build is found by the hash of its source, of all it includes and of the options, by the compiler's version and by the
hash of the toolkit's headers. Without a compiler any version's build of that very text serves. No torch here.
"""

import hashlib
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec
import structlog

from fwd.errors import KernelError
from fwd.kernels import nvrtc, sources
from fwd.kernels.builds import BUILDS, Bound

log = structlog.get_logger("fwd.kernels")
CUBIN, RECORD = "kernels.cubin", "record.json"


class Record(msgspec.Struct, frozen=True):
    """What stands beside a cubin."""

    source: str  # "gemv.cu"
    arch: str  # "sm_90a"
    compiler: str  # "13.0"
    options: tuple[str, ...]
    length: int  # of the cubin
    sha256: str
    built: float  # seconds since 1970
    seconds: float  # that the build took
    warnings: tuple[str, ...]
    kernels: dict[str, nvrtc.Usage]


class Build(NamedTuple):
    """One cubin in the cache."""

    path: Path  # of the cubin
    record: Record
    fresh: bool  # built by this call


class Jit:
    """Builds the kernels of `folder` (`cuda/`) into a cache, or takes them from it. Many may do so at once.

    Where `fallback`, a cache that cannot be written is replaced by a folder of this process alone.
    """

    def __init__(
        self,
        cache: Path | None = None,
        *,
        folder: Path | None = None,
        table: Mapping[str, Mapping[str, Bound]] | None = None,
        debug: bool = False,
        fallback: bool = False,
    ) -> None:
        self.cache = cache / "kernels" if cache else sources.cache("kernels")
        self.folder = folder or sources.home()
        self.table = BUILDS if table is None else table
        self.fallback = fallback
        self._defines = ("-DFWD_DEBUG",) if debug else ()
        self._private: Path | None = None

    def builds(self, arches: Sequence[str], jobs: int = 1) -> Iterator[Build]:
        """All files of the table for each architecture, in order, `jobs` at a time."""
        wanted = [(source, arch) for source in self.table for arch in arches]
        with ThreadPoolExecutor(jobs) as pool:
            yield from pool.map(lambda pair: self.build(*pair), wanted)

    def trouble(self, arch: str) -> str | None:
        """Why there are no kernels: not all are in the cache, and they cannot be built. None if there are."""
        try:
            nvrtc.version()
            sources.toolkit()
        except KernelError as error:
            return None if all(self.find(source, arch) for source in self.table) else error.message
        return None

    def build(self, source: str, arch: str) -> Build:
        """The cubin of one file, from the cache or else compiled.

        Raises `KernelError` without a compiler, for text that does not compile, and for a cache that cannot be written.
        """
        if found := self.find(source, arch):
            return found
        nvrtc.version()  # or its error, before any other
        began, name = time.perf_counter(), self._name(source, arch)
        cubin, text = self._compile(source, arch)
        if name != self._name(source, arch):
            raise KernelError(f"{source} changed while it was built: start again")
        record = Record(
            source,
            arch,
            self.compiler,
            self._options(arch),
            len(cubin),
            hashlib.sha256(cubin).hexdigest(),
            time.time(),
            time.perf_counter() - began,
            tuple(nvrtc.warnings(text)),
            nvrtc.usage(text),
        )
        log.info("kernels_built", source=source, arch=arch, seconds=round(record.seconds, 3))
        return self._keep(name, cubin, record)

    def find(self, source: str, arch: str) -> Build | None:
        """The same from the cache only, None if it is not there; one that is broken is removed, which is logged."""
        for place in self._candidates(source, arch):
            if not place.is_dir():
                continue
            try:
                return _read(place)
            except (OSError, ValueError) as error:
                log.warning("kernels_broken", path=str(place), reason=str(error), way_out="they are built again")
                self._discard(place)
        return None

    def stale(self, build: Build) -> bool:
        """Whether a build in the cache is of other text, options or compiler than this one's."""
        source, arch = build.record.source, build.record.arch
        return source not in self.table or build.path.parent not in self._candidates(source, arch)

    def kept(self) -> list[Build]:
        """All builds in the cache that are whole, by source, architecture and age."""
        found = []
        for file in self.cache.glob(f"[!.]*/{RECORD}"):  # no drafts
            try:
                found.append(_read(file.parent))
            except (OSError, ValueError):
                continue
        return sorted(found, key=lambda build: (build.record.source, build.record.arch, -build.record.built))

    @cached_property
    def compiler(self) -> str:
        """The version of the compiler, "" where there is none."""
        try:
            return nvrtc.version()
        except KernelError:
            return ""

    def _options(self, arch: str) -> tuple[str, ...]:
        """What shapes a build; where headers are looked for does not."""
        return (*nvrtc.OPTIONS, f"-arch={arch}", *self._defines)

    def _compile(self, source: str, arch: str) -> tuple[bytes, str]:
        paths = (f"-I{self.folder}", f"-I{sources.toolkit()}")
        return nvrtc.compile_cubin((self.folder / source).read_bytes(), source, (*self._options(arch), *paths))

    def _name(self, source: str, arch: str) -> str:
        """The folder of a build: what it is of, and what it is made by."""
        toolkit = sources.toolkit()
        files = sources.closure(self.folder / source, (self.folder, toolkit))
        made_by = sources.digest([file for file in files if file.is_relative_to(toolkit)], self.compiler)
        return f"{self._of(source, arch)}-{self.compiler}-{made_by[:8]}"

    def _of(self, source: str, arch: str) -> str:
        files = sources.closure(self.folder / source, (self.folder,))
        return f"{Path(source).stem}-{arch}-{sources.digest(files, *self._options(arch))[:16]}"

    def _candidates(self, source: str, arch: str) -> list[Path]:
        """Where a build may be: by name, or without a compiler all of that text, the latest first."""
        roots = (self.cache, *filter(None, [self._private]))
        try:
            name = self._name(source, arch) if self.compiler else ""
        except KernelError:  # no headers to compile with
            name = ""
        if name:
            return [root / name for root in roots]
        found = (place for root in roots for place in root.glob(f"{self._of(source, arch)}-*"))
        return sorted(found, key=lambda place: place.stat().st_mtime, reverse=True)

    def _keep(self, name: str, cubin: bytes, record: Record) -> Build:
        files = {CUBIN: cubin, RECORD: msgspec.json.encode(record)}
        root = self._private or self.cache
        try:
            kept = _published(root / name, files)
        except OSError as error:
            kept = _published(self._instead(error) / name, files)
        return kept._replace(fresh=True)

    def _instead(self, error: OSError) -> Path:
        """The folder of this process, if it may have one."""
        trouble = f"the kernel cache {self.cache} cannot be written ({error.strerror})"
        if not self.fallback:
            raise KernelError(f"{trouble}: give another with --cache or CACHE_DIRECTORY") from error
        if not self._private:
            self._private = Path(tempfile.mkdtemp(prefix="fwd-kernels-"))
            weakref.finalize(self, shutil.rmtree, self._private, ignore_errors=True)
            way_out = "kernels are built for this process alone; set CACHE_DIRECTORY to keep them"
            log.warning("kernel_cache_unwritable", path=str(self.cache), reason=error.strerror, way_out=way_out)
        return self._private

    def _discard(self, place: Path) -> None:
        try:
            sources.discard(place)
        except OSError as error:
            self._instead(error)


def _published(place: Path, files: Mapping[str, bytes]) -> Build:
    """The build that stands at the place: this one, or another's unless that is broken or gone by now."""
    sources.publish(place, files)
    try:
        return _read(place)
    except (FileNotFoundError, ValueError):
        sources.discard(place)
        sources.publish(place, files)
        return _read(place)


def _read(place: Path) -> Build:
    """Raises OSError or ValueError where a build is not whole."""
    record = msgspec.json.decode((place / RECORD).read_bytes(), type=Record)
    cubin = (place / CUBIN).read_bytes()
    if len(cubin) != record.length:
        raise ValueError(f"the cubin has {len(cubin)} bytes of {record.length}")
    if hashlib.sha256(cubin).hexdigest() != record.sha256:
        raise ValueError("the cubin is not the one that was built")
    return Build(place / CUBIN, record, fresh=False)
