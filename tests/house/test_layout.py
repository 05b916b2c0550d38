"""The layout: one namespace over three roots, typed packages, and a wheel that holds all of it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [ROOT / "services", ROOT / "gpu", ROOT / "proto"]
PACKAGES = sorted(path.parent for root in ROOTS for path in (root / "muxserve").glob("*/__init__.py"))


def test_the_namespace_has_no_module_of_its_own() -> None:
    """A stray `muxserve/__init__.py` hides the other two roots at run time, while mypy stays green."""
    strays = [path for root in ROOTS for path in (root / "__init__.py", root / "muxserve" / "__init__.py")]
    assert not [path for path in strays if path.exists()]


def test_no_two_roots_have_a_package_of_one_name() -> None:
    names = [path.name for path in PACKAGES]
    assert sorted(set(names)) == sorted(names)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_each_package_says_that_it_is_typed(package: Path) -> None:
    assert (package / "py.typed").exists()


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_each_folder_of_modules_is_a_package(package: Path) -> None:
    folders = {path.parent for path in package.rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_the_import_contracts_cover_every_package() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert contracts["root_packages"] == sorted(f"muxserve.{path.name}" for path in PACKAGES)


def test_the_wheel_holds_every_package_with_its_stubs(tmp_path: Path) -> None:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    held = set(zipfile.ZipFile(built).namelist())
    wanted = {
        path.relative_to(root).as_posix()
        for root in ROOTS
        for path in (root / "muxserve").rglob("*")
        if path.suffix in {".py", ".pyi", ".proto"} or path.name == "py.typed"
    }
    assert wanted
    assert wanted <= held
    assert not [name for name in held if name.startswith("tests/") or "__pycache__" in name]


@pytest.mark.parametrize("kind", ["", "services", "gateway", "worker", "server", "demo", "dev"])
def test_every_direct_requirement_is_pinned(kind: str) -> None:
    """Without a pin, a release of somebody else's can break a clean set-up overnight."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][kind] if kind else project["dependencies"]
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {canonicalize_name(Requirement(line).name) for line in lines} - pins <= {"muxserve"}


@pytest.mark.parametrize("package", ["cli", "common", "gateway", "placement", "scheduler", "worker"])
def test_a_service_starts_without_torch(package: str) -> None:
    """Torch is the executors' alone: it costs seconds at start and hundreds of MB in each process."""
    modules = sorted(
        ".".join(path.relative_to(ROOT / "services").with_suffix("").parts)
        for path in (ROOT / "services" / "muxserve" / package).rglob("*.py")
    )
    code = (
        "import importlib, sys\n"
        f"for module in {modules}: importlib.import_module(module.removesuffix('.__init__'))\n"
        "sys.exit(', '.join({'torch', 'transformers', 'numba'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
