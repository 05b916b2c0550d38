"""Weights that are kept: found again when they are the same, and never a reason why a model does not load."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from muxserve.engine import weight_cache
from muxserve.engine.checkpoint import open_checkpoint
from muxserve.engine.checkpoint.base import Array, Checkpoint
from muxserve.engine.checkpoint.canonical import CanonicalTensor, canonical_tensors
from muxserve.engine.messages import WeightLayout
from muxserve.engine.spec import LayerSpec, ModelSpec, RopeSpec
from muxserve.engine.weight_cache import WeightCache
from muxserve.engine.weight_file import CHUNK
from muxserve.engine.weights import weights_memfd
from tests.engine.gguf_factory import write_gguf
from tests.engine.model_factory import make_model

LIMIT = 2**30
SIZE = CHUNK + 4097
"""Of the memories below: two chunks, the second of them not of whole pages."""


@pytest.fixture
def warnings() -> list[str]:
    return []


Disk = Callable[..., None]


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Says of how many blocks of 4096 bytes the disk is, and how many are free: of any machine's the same."""

    def set_disk(blocks: int, free: int) -> None:
        monkeypatch.setattr(
            os, "statvfs", lambda _: os.statvfs_result([4096, 4096, blocks, 0, free, 0, 0, 0, 0, 255])
        )

    set_disk(2**20, 2**19)
    return set_disk


@pytest.fixture
def cache(tmp_path: Path, warnings: list[str]) -> WeightCache:
    return WeightCache(tmp_path / "cache" / "weights", LIMIT, warnings.append)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and more")
    return path


Memory = Callable[[bytes], int]


@pytest.fixture
def memory() -> Iterator[Memory]:
    """Makes descriptors of SIZE bytes that hold what they are given, and zeros."""
    opened = []

    def make(content: bytes = b"") -> int:
        fd = weights_memfd(SIZE)
        opened.append(fd)
        os.pwrite(fd, content, 0)
        return fd

    yield make
    for fd in opened:
        os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, 2 * SIZE, 0)


def keep(cache: WeightCache, model: Path, fd: int) -> Path:
    """Store `fd` as the weights of `model`; where they are."""
    entry = cache.entry(model, "bfloat16", "panels")
    assert entry is not None
    assert cache.store(entry, fd, 2)
    return entry.path


def find(cache: WeightCache, model: Path, fd: int, dtype: str = "bfloat16") -> bool:
    entry = cache.entry(model, dtype, "panels")
    assert entry is not None
    return cache.load(entry, fd, 2)


def weights_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.weights"))


WEIGHTS = np.random.default_rng(0).bytes(SIZE)


def test_what_was_kept_is_found_again(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str]
) -> None:
    empty = memory(b"")
    assert not find(cache, model, empty)
    path = keep(cache, model, memory(WEIGHTS))
    assert find(cache, model, empty)
    assert content(empty) == WEIGHTS
    assert (warnings, weights_in(path.parent)) == ([], [path])
    assert [file.stat().st_mode & 0o077 for file in (path, path.parent)] == [0, 0]


def test_only_the_same_content_in_the_same_dtype_is_found(
    cache: WeightCache, model: Path, memory: Memory, tmp_path: Path
) -> None:
    keep(cache, model, memory(WEIGHTS))
    assert not find(cache, model, memory(b""), "float32")
    twin = Path(shutil.copy(model, tmp_path / "twin.gguf"))
    assert find(cache, twin, memory(b""))
    twin.write_bytes(b"GGUF and MORE")  # as many bytes
    assert not find(cache, twin, memory(b""))
    assert find(cache, model, memory(b""))


def test_a_file_is_hashed_once(
    cache: WeightCache, model: Path, memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(cache, model, memory(WEIGHTS))
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None)
        assert find(cache, model, memory(b""))
    stat = model.stat()
    model.write_bytes(b"GGUF and MORE")
    os.utime(model, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # it looks as if nothing had happened
    assert not find(cache, model, memory(b""))


@pytest.mark.parametrize("at", [0, 9, 17, 30, 2000, 4096, CHUNK, 4096 + SIZE - 1])
def test_a_flipped_bit_is_noticed_and_the_file_removed(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str], at: int
) -> None:
    path = keep(cache, model, memory(WEIGHTS))
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    fd = memory(b"")
    assert not find(cache, model, fd)
    assert content(fd) == bytes(SIZE)
    assert not path.exists()
    assert len(warnings) == 1 and str(path) in warnings[0]


@pytest.mark.parametrize("size", [0, 10, 4096, 4096 + SIZE - 1, 4096 + SIZE + 1])
def test_a_file_of_another_size_is_noticed(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str], size: int
) -> None:
    path = keep(cache, model, memory(WEIGHTS))
    os.truncate(path, size)
    assert not find(cache, model, memory(b""))
    assert not path.exists()
    assert f"{size} bytes" in warnings[0]


def test_memory_of_another_size_is_not_filled(cache: WeightCache, model: Path, memory: Memory) -> None:
    keep(cache, model, memory(WEIGHTS))
    fd = memory(b"")
    os.ftruncate(fd, SIZE - 1)
    assert not find(cache, model, fd)
    assert content(fd) == bytes(SIZE - 1)


def test_what_was_not_used_for_longest_makes_room(
    tmp_path: Path, memory: Memory, warnings: list[str]
) -> None:
    cache = WeightCache(tmp_path / "cache", 2 * (SIZE + 4096), warnings.append)
    models = [tmp_path / f"{name}.gguf" for name in "abc"]
    for hour, model in enumerate(models):
        model.write_bytes(model.name.encode())
        path = keep(cache, model, memory(WEIGHTS))
        os.utime(path, (3600 * hour, 3600 * hour))
        if hour == 1:
            assert find(cache, models[0], memory(b""))
    assert [find(cache, model, memory(b"")) for model in models] == [True, False, True]
    assert warnings == []
    # The notes of what is gone go with it; that of b came back when b was looked for.
    keep(cache, models[0], memory(WEIGHTS))
    assert len(list((tmp_path / "cache").glob("*.digest"))) == 2


def test_weights_beyond_the_limit_are_not_kept(
    tmp_path: Path, model: Path, memory: Memory, warnings: list[str]
) -> None:
    cache = WeightCache(tmp_path / "cache", SIZE - 1, warnings.append)
    entry = cache.entry(model, "bfloat16", "panels")
    assert entry is not None
    assert not cache.store(entry, memory(WEIGHTS), 2)
    assert f"limited to {SIZE - 1}" in warnings[0]
    assert weights_in(tmp_path / "cache") == []


def test_a_model_that_changed_while_it_was_converted_is_not_kept(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str]
) -> None:
    entry = cache.entry(model, "bfloat16", "panels")
    assert entry is not None
    model.write_bytes(b"GGUF and MORE")
    assert not cache.store(entry, memory(WEIGHTS), 2)
    assert "has changed" in warnings[0]
    assert not entry.path.exists()


def test_a_directory_that_cannot_be_made_is_a_warning(
    tmp_path: Path, model: Path, memory: Memory, warnings: list[str]
) -> None:
    (tmp_path / "file").write_text("not a directory")
    cache = WeightCache(tmp_path / "file" / "cache", LIMIT, warnings.append)
    entry = cache.entry(model, "bfloat16", "panels")
    assert entry is not None
    assert not cache.load(entry, memory(b""), 2)
    assert not cache.store(entry, memory(WEIGHTS), 2)
    assert len(warnings) == 1 and "Not a directory" in warnings[0]


def test_a_full_disk_is_a_warning_and_leaves_nothing(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = cache.entry(model, "bfloat16", "panels")
    assert entry is not None

    def full(*_: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert not cache.store(entry, memory(WEIGHTS), 2)
    assert "No space left" in warnings[0]
    assert [path.suffix for path in entry.path.parent.iterdir()] == [".digest"]


@pytest.mark.parametrize(
    ("blocks", "reserve"), [(100_000, 10_000), (2**30, 2**21)], ids=["a tenth of a small one", "8 GiB of any"]
)
def test_some_of_the_disk_stays_free(
    cache: WeightCache,
    model: Path,
    memory: Memory,
    warnings: list[str],
    disk: Disk,
    blocks: int,
    reserve: int,
) -> None:
    kept = keep(cache, model, memory(WEIGHTS))
    disk(blocks, reserve - 1)
    entry = cache.entry(model, "float32", "panels")
    assert entry is not None
    assert not cache.store(entry, memory(WEIGHTS), 2)
    assert f"the {4096 * reserve} bytes of the disk" in warnings[0]
    assert kept.exists()  # to remove it would not have been enough
    disk(blocks, reserve + 1)
    assert cache.store(entry, memory(WEIGHTS), 2)
    assert not kept.exists()


def test_leftovers_of_a_dead_writer_are_removed_and_those_of_a_live_one_are_not(
    cache: WeightCache, model: Path, memory: Memory
) -> None:
    directory = keep(cache, model, memory(WEIGHTS)).parent
    command = (
        "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT); os.write(fd, b'half')\n"
        "fcntl.flock(fd, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()"
    )
    leftover = directory / "x.partial"
    with subprocess.Popen(
        [sys.executable, "-c", command, leftover], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        keep(cache, model, memory(WEIGHTS))
        assert leftover.exists()
    keep(cache, model, memory(WEIGHTS))
    assert not leftover.exists()


def test_any_number_may_keep_and_find_at_once(
    cache: WeightCache, model: Path, memory: Memory, warnings: list[str]
) -> None:
    """Whoever finds anything finds all of it, while others write the same anew, and one takes it away."""
    paths = []

    def once(index: int) -> None:
        if index % 4 == 0:
            paths.append(keep(cache, model, memory(WEIGHTS)))
        elif index % 4 == 1:
            for path in paths[:1]:
                path.unlink(missing_ok=True)
        else:
            fd = memory(b"")
            found = find(cache, model, fd)
            assert content(fd) == (WEIGHTS if found else bytes(SIZE))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(once, range(40)))
    assert warnings == []
    assert {path.suffix for path in paths[0].parent.iterdir()} <= {".weights", ".digest"}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(
        make_model("llama", tmp_path / "hf"), tmp_path / "a.gguf", kind=GGMLQuantizationType.Q8_0
    )


def loader(path: Path, fd: int, *more: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "muxserve.engine.loader", "--path", str(path), "--dtype", "bfloat16"]
    command += ["--layout", "panels", "--fd", str(fd), "--threads", "1", *map(str, more)]
    return subprocess.Popen(command, pass_fds=[fd], stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> list[dict[str, object]]:
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return [json.loads(line) for line in stderr.splitlines()]


def test_the_loader_converts_once(gguf: Path, tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    size = open_checkpoint(gguf).weight_bytes("panels")
    memories = [weights_memfd(size) for _ in range(5)]
    plain, *others = memories
    assert said(loader(gguf, plain)) == []
    together = [loader(gguf, fd, "--cache", directory) for fd in others[:2]]
    assert [said(process)[-1].keys() for process in together] == [{"kept"}, {"kept"}]
    assert said(loader(gguf, others[2], "--cache", directory)) == [{"kept": True}]
    [path] = weights_in(directory)
    os.truncate(path, 5000)
    warning, kept = said(loader(gguf, others[3], "--cache", directory))
    assert str(path) in str(warning["warning"]) and kept == {"kept": False}
    assert weights_in(directory) == [path] and path.stat().st_size > size
    expected = os.pread(plain, size, 0)
    for fd in memories:
        assert os.pread(fd, size, 0) == expected
        os.close(fd)


def test_the_loader_keeps_no_directories(tmp_path: Path) -> None:
    model = make_model("llama", tmp_path / "hf")
    fd = weights_memfd(open_checkpoint(model).weight_bytes("panels"))
    assert said(loader(model, fd, "--cache", tmp_path / "cache")) == []
    os.close(fd)
    assert not (tmp_path / "cache").exists()


def test_a_loader_that_finds_its_weights_imports_no_numpy() -> None:
    code = "import sys, muxserve.worker.loader_process; assert not {'numpy', 'asyncio'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


class Numbers:
    """A checkpoint of made-up numbers."""

    def names(self, tensor: CanonicalTensor) -> tuple[str, ...]:
        return tuple(f"{tensor.name}:{part}" for part in range(len(tensor.parts)))

    def __init__(self, spec: ModelSpec) -> None:
        self._shapes = {
            name: shape
            for tensor in canonical_tensors(spec)
            for name, shape in zip(self.names(tensor), tensor.parts, strict=True)
        }

    def shape(self, name: str) -> tuple[int, ...] | None:
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        shape = self._shapes[name]
        count = int(np.prod(shape))
        seed = int.from_bytes(name.encode(), "big") % 2**31
        values = (np.arange(seed, seed + count, dtype=np.uint64) * 2654435761 % 2**32).astype(np.uint32)
        return (values.astype(np.float64) / 2**32).astype(np.float32).reshape(shape)[start:stop]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("canonical", "0c1f0efeae7876fbabbce5a57a85ab8e367d8db86e7b8add7a3c404e10c0932d"),
        ("panels", "6291cd81d7346fcdd07809f7d3aebec933b232c65736e563b7f6bbfe57369b30"),
    ],
)
def test_the_format_number_was_raised_if_weights_are_laid_out_anew(
    layout: WeightLayout, expected: str
) -> None:
    """If this fails, raise FORMAT, and then change the digest here."""
    spec = ModelSpec(
        architecture="llama",
        dtype="bfloat16",
        vocab_size=100,
        hidden_size=48,
        intermediate_size=72,
        heads=3,
        kv_heads=1,
        head_dim=16,
        context_length=64,
        layers=(LayerSpec(),) * 2,
        ropes=(RopeSpec(inverse_frequencies=(1.0,) * 8),),
        rms_eps=1e-5,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        qk_norm=True,
        post_norms=True,
    )
    checkpoint = Checkpoint(spec, Numbers(spec))
    digest = hashlib.sha256()
    for entry, (_, values) in zip(checkpoint.manifest(layout), checkpoint.tensors(layout), strict=True):
        digest.update(f"{entry.name} {entry.dtype} {entry.shape} {entry.offset}".encode())
        digest.update(values.tobytes())
    assert (weight_cache.FORMAT, digest.hexdigest()) == (1, expected)
