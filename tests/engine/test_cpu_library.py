"""The native library: which build is taken, what is said where there is none, and its structures."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest

from muxserve.engine.cpu import library
from muxserve.engine.cpu.errors import NativeLibraryError
from muxserve.engine.messages import LENGTH, STOP, UNFINISHED

ZEN4 = {
    *("fpu", "sse2", "ssse3", "sse4_2", "avx", "avx2", "fma", "f16c", "bmi1", "bmi2"),
    *("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_bf16"),
}


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (ZEN4, "avx512bf16"),
        (ZEN4 - {"avx512_bf16"}, "avx2"),
        (ZEN4 - {"avx512vl"}, "avx2"),
        (ZEN4 - {"fma"}, "generic"),
        ({"sse2", "avx", "avx2"}, "generic"),
        ({"fp", "asimd", "bf16"}, "generic"),
        (set(), "generic"),
    ],
)
def test_the_build_is_the_best_that_the_processor_runs(flags: set[str], name: str) -> None:
    assert library.variant(frozenset(flags)) == name


def test_flags_are_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t:\n\nprocessor\t: 1\nflags : x\n")
    assert library.cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}


def test_a_machine_that_tells_no_flags_gets_the_generic_build(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    assert library.variant(library.cpu_flags(cpuinfo)) == "generic"
    cpuinfo.write_text("processor : 0\nFeatures : fp asimd\n")
    assert library.variant(library.cpu_flags(cpuinfo)) == "generic"


def test_a_build_that_is_not_there_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(NativeLibraryError, match=r"generic-none\.so is missing.*make setup"):
        library.load("generic-none")


def test_a_file_that_is_no_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.so").write_bytes(b"\x7fELF, but not really")
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    with pytest.raises(NativeLibraryError, match=r"broken\.so"):
        library.load("broken")


def test_every_build_is_there() -> None:
    """A package without one of them would fail on some machine only."""
    here = {file.stem for file in library.FOLDER.glob("*.so")}
    assert here >= set(library.VARIANTS)


HEADER = (library.FOLDER / "model.h").read_text()
SIZES = {"float": 4, "double": 8, "int32_t": 4, "int64_t": 8, "uint64_t": 8}


def c_fields(name: str) -> list[tuple[str, str]]:
    """Names and types of a structure of model.h, in order. Pointers are "*", atomics what they hold."""
    found = re.search(rf"struct {name} \{{(.*?)^\}};", HEADER, re.DOTALL | re.MULTILINE)
    assert found
    fields = []
    for declaration in re.sub(r"//.*", "", found[1]).split(";"):
        words = re.match(r"\s*(?:const )?(?:std::atomic<)?(\w+)>?(\*?)\s(.*)", declaration, re.DOTALL)
        if words:
            fields += [(each.strip(), words[2] or words[1]) for each in words[3].split(",")]
    return fields


def size_of(kind: str) -> int:
    return ctypes.sizeof(ctypes.c_void_p) if kind == "*" else SIZES[kind]


@pytest.mark.parametrize("mirror", [library.Layer, library.Frequencies, library.Model, library.Job])
def test_structures_have_the_fields_of_the_header(mirror: type[ctypes.Structure]) -> None:
    """In its order and sizes: both compilers then lay them out alike."""
    mirrored = [(field[0], ctypes.sizeof(field[1]), field[1]) for field in mirror._fields_]
    declared = []
    for name, kind in c_fields(mirror.__name__):
        field, _, count = name.partition("[")
        times = len(library.PARTS) if count == "PARTS]" else 1
        declared.append((field, size_of(kind) * times, kind))
    assert [m[:2] for m in mirrored] == [d[:2] for d in declared]
    floats = {name for name, _, kind in declared if kind in ("float", "double")}
    doubles = ctypes.c_double * len(library.PARTS)
    assert floats == {
        name for name, _, kind in mirrored if kind in (ctypes.c_float, ctypes.c_double) or kind is doubles
    }


def test_a_rows_parameters_have_the_fields_of_the_header() -> None:
    fields = library.SAMPLING.fields
    assert fields is not None
    offset = 0
    for name, kind in c_fields("Sampling"):
        dtype, at, *_ = fields[name]
        size = size_of(kind)
        offset = -(-offset // size) * size
        assert (at, dtype.itemsize) == (offset, size)
        assert (np.dtype(dtype).kind == "f") == (kind in ("float", "double"))
        offset += size
    assert list(fields) == [name for name, _ in c_fields("Sampling")]
    assert library.SAMPLING.itemsize == -(-offset // 8) * 8


def c_enum(name: str) -> dict[str, int]:
    found = re.search(rf"enum {name}[^{{]*\{{(.*?)\}}", HEADER)
    assert found
    values: dict[str, int] = {}
    for each in found[1].split(","):
        key, _, value = each.partition("=")
        values[key.strip()] = int(value) if value else len(values)
    return values


def test_numbers_of_outcomes_are_those_of_the_header() -> None:
    assert c_enum("Finished") == {
        "UNFINISHED": UNFINISHED,
        "STOP": STOP,
        "LENGTH": LENGTH,
        "NOT_FINITE": library.NOT_FINITE,
        "ABSENT": library.ABSENT,
    }
    names = ("NO_BLOCK", "OUT_OF_RANGE", "NO_TOKEN")
    assert c_enum("Failure") == {"NONE": 0} | {name: getattr(library, name) for name in names}
    parts = c_enum("Part")
    assert parts.pop("PARTS") == len(library.PARTS)
    assert [name.lower() for name in parts] == list(library.PARTS)
