"""The built wheel: what is in it, and `fwd demo` run from it in a fresh environment."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = (*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    subprocess.run(command, check=True, timeout=120)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A fresh environment with the wheel; the dependencies, torch among them, are those of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(places["purelib"]) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = (*PIP, "--python", python, "install", "--no-deps", "--no-index", "--force-reinstall", wheel)
    subprocess.run(command, check=True, timeout=120)
    return folder / "bin"


def run(*command, cwd):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240, check=False)


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("fwd", "cuda"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                assert (f"fwd/{inside}" if folder == "cuda" else inside) in names
    assert {"fwd/demo/model/model.safetensors", "fwd/demo/draft/model.safetensors"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "bench", "cuda")) or "__pycache__" in name]


def test_demo(installed, tmp_path):
    where = run(installed / "python", "-c", "import fwd; print(fwd.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(installed.parent)
    done = run(installed / "fwd", "demo", "--max-tokens", "24", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def ")
    assert "tokens/s" in done.stdout
    assert "first token after" in done.stdout
    assert "acceptance" in done.stdout
    assert list(tmp_path.iterdir()) == []
