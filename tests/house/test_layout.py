"""The layout: one namespace over three roots, typed packages, and a wheel that holds all of it."""

from __future__ import annotations

import platform
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from muxserve.engine.cpu.library import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
ROOTS = [ROOT / "services", ROOT / "gpu", ROOT / "proto"]
NATIVE = "muxserve/engine/cpu/native"
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel; what `make setup` has compiled is not compiled again."""
    return _wheel(tmp_path_factory.mktemp("wheel"))


def _wheel(folder: Path) -> Path:
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    return Path(built)


def test_the_wheel_holds_every_package_with_its_stubs(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        path.relative_to(root).as_posix()
        for root in ROOTS
        for path in (root / "muxserve").rglob("*")
        if path.suffix in {".py", ".pyi", ".proto"} or path.name == "py.typed"
    }
    assert wanted
    assert wanted <= held
    assert not [name for name in held if name.startswith("tests/") or "__pycache__" in name]


def test_the_wheel_holds_the_library_for_every_processor_and_says_for_which_system(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")}
    builds = VARIANTS if platform.machine() == "x86_64" else ["generic"]
    assert held == {f"{NATIVE}/{build}.so" for build in builds}
    assert wheel.name.endswith(f"_{platform.machine()}.whl")


def test_a_wheel_without_the_library_is_for_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the SDK, and for images of services that hold no model."""
    monkeypatch.setenv("MUXSERVE_NATIVE", "0")
    built = _wheel(tmp_path)
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]


def test_the_source_archive_holds_what_the_library_is_compiled_from(tmp_path: Path) -> None:
    (built,) = SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with tarfile.open(built) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = {f"gpu/{NATIVE}/{path.name}" for path in (ROOT / "gpu" / NATIVE).glob("*.[ch]*")}
    assert sources
    assert sources | {"scripts/build_native.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".stamp"))]


@pytest.mark.parametrize("kind", ["", "services", "gateway", "worker", "server", "demo", "dev"])
def test_every_direct_requirement_is_pinned(kind: str) -> None:
    """Without a pin, a release of somebody else's can break a clean set-up overnight."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][kind] if kind else project["dependencies"]
    pins = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {canonicalize_name(Requirement(line).name) for line in lines} - pins <= {"muxserve"}


@pytest.mark.parametrize("package", ["cli", "common", "gateway", "placement", "scheduler", "worker"])
def test_a_service_starts_without_torch(package: str) -> None:
    """It costs seconds at start and hundreds of MB in each process."""
    root = ROOT / "services"
    folder = root / "muxserve" / package
    assert _heavy_imports([_module(path, root) for path in folder.rglob("*.py")]) == ""


def test_executors_and_loaders_on_cpu_start_without_torch() -> None:
    root = ROOT / "gpu"
    engine = root / "muxserve" / "engine"
    modules = [_module(path, root) for path in (engine / "cpu").rglob("*.py")]
    assert _heavy_imports([*modules, "muxserve.engine.executor", "muxserve.engine.loader"]) == ""


def _module(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _heavy_imports(modules: list[str]) -> str:
    """Those that come along in a new process."""
    code = (
        "import importlib, sys\n"
        f"for module in {sorted(modules)}: importlib.import_module(module)\n"
        "print(*sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
