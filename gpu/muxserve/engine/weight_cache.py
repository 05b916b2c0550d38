"""Converted weights on disk, by the content of the file that they were made from: dequantised once, ever.

    DIRECTORY/{digest}-{dtype}-{layout}-{format}.weights  see `muxserve.engine.weight_file`; mtime = last use
    DIRECTORY/{hash of a path}.digest                     what the file at that path was when last read

Any number of processes may use a directory at once. Files appear whole, by renaming, and are not changed
after; whoever has opened one can read it to its end, though it be removed meanwhile. Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from muxserve.engine.weight_file import DamagedFile, file_bytes, read_weights, write_weights

Identity = tuple[int, int, int, int]
"""Inode, bytes, mtime and ctime (ns) of a file."""

FORMAT = 1
"""Part of every name. To be raised whenever the same file is to give other bytes: what was kept before is
then no longer found. A test notices if that was forgotten."""

_WEIGHTS, _DIGEST, _PARTIAL = ".weights", ".digest", ".partial"

_RESERVE = 0.1
_MOST_RESERVE = 8 * 2**30
"""What stays free of the file system: this part of it, and no more than these bytes."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the cache holds, or may come to hold, for a file. path: of the weights. digest: of the content."""

    file: Path
    identity: Identity
    digest: str
    path: Path


class WeightCache:
    """Weights made from single files. Whatever fails only means that nothing is kept, and is told to `warn`.

    limit: bytes of all files together; those that were not used for longest make room.
    """

    def __init__(self, directory: Path, limit: int, warn: Callable[[str], None]) -> None:
        self._directory = directory
        self._limit = limit
        self._warn = warn

    def entry(self, file: Path, dtype: str, layout: str) -> Entry | None:
        """The place of the weights of `file` in that dtype and layout. None: the file cannot be read."""
        try:
            with file.open("rb") as stream:
                identity = _identity(stream.fileno())
                digest = self._known_digest(file, identity)
                if digest is None:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    if _identity(stream.fileno()) != identity:
                        raise OSError("it changes while it is read")
                    self._remember(file, identity, digest)
        except OSError as error:
            self._warn(f"no digest of {file}: {error.strerror or error}")
            return None
        name = f"{digest}-{dtype}-{layout}-{FORMAT}{_WEIGHTS}"
        return Entry(file, identity, digest, self._directory / name)

    def load(self, entry: Entry, memory: int, threads: int) -> bool:
        """Fill the descriptor `memory`, all of it. False: there is nothing to fill it with; it is zero."""
        size = os.fstat(memory).st_size
        try:
            file = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            read_weights(file, memory, size, threads)
        except (DamagedFile, OSError) as error:
            self._warn(f"weights kept in {entry.path} are made again: {error}")
            if isinstance(error, DamagedFile):
                with suppress(OSError):
                    entry.path.unlink()
            os.ftruncate(memory, 0)
            os.ftruncate(memory, size)
            return False
        else:
            with suppress(OSError):  # of a cache that we may only read
                os.utime(file)
            return True
        finally:
            os.close(file)

    def store(self, entry: Entry, memory: int, threads: int) -> bool:
        """Keep all of the descriptor `memory`. False: that was not possible."""
        size = os.fstat(memory).st_size
        try:
            with entry.file.open("rb") as stream:
                if _identity(stream.fileno()) != entry.identity:
                    raise OSError(f"{entry.file} has changed")
            self._make_room(file_bytes(size), entry)
            with self._new_file(entry.path) as file:
                write_weights(file, memory, size, threads)
        except OSError as error:
            self._warn(f"weights cannot be kept in {self._directory}: {error.strerror or error}")
            return False
        return True

    def _note(self, file: Path) -> Path:
        return self._directory / (hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32] + _DIGEST)

    def _known_digest(self, file: Path, identity: Identity) -> str | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            known = json.loads(self._note(file).read_bytes())
            if tuple(known["identity"]) == identity:
                return str(known["digest"])
        return None

    def _remember(self, file: Path, identity: Identity, digest: str) -> None:
        # A failure is told when weights are to be kept; until then all it costs is time.
        with suppress(OSError), self._new_file(self._note(file)) as note:
            os.write(note, json.dumps({"identity": identity, "digest": digest}).encode())

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[int]:
        """A descriptor to write to; the file is at `path` when it is complete, and nowhere before.

        It is not synced: a file that a crash of the machine has left incomplete does not pass its checks.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(suffix=_PARTIAL, dir=self._directory)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # while it is locked it is not a leftover
            yield file
            Path(name).rename(path)
        except BaseException:
            with suppress(OSError):
                Path(name).unlink()
            raise
        finally:
            os.close(file)

    def _make_room(self, size: int, entry: Entry) -> None:
        """Remove leftovers, then what was not used for longest, until `size` bytes more are allowed.

        Raises OSError, and removes no weights, if they never are.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for partial in self._directory.glob(f"*{_PARTIAL}"):
            _remove_leftover(partial)
        kept = sorted(_uses(self._directory.glob(f"*{_WEIGHTS}")))
        total = sum(use.size for use in kept)
        disk = os.statvfs(self._directory)
        reserve = min(int(_RESERVE * disk.f_frsize * disk.f_blocks), _MOST_RESERVE)
        room = total + disk.f_frsize * disk.f_bavail - reserve
        if size > min(room, self._limit):
            raise OSError(
                f"they take {size} bytes; the cache is limited to {self._limit}, and to {max(room, 0)} by "
                f"the {reserve} bytes of the disk that stay free"
            )
        while total + size > min(room, self._limit):
            oldest = kept.pop(0)
            oldest.path.unlink(missing_ok=True)
            total -= oldest.size
        digests = {entry.digest, *(use.path.name.split("-")[0] for use in kept)}
        for note in self._directory.glob(f"*{_DIGEST}"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                if json.loads(note.read_bytes())["digest"] not in digests:
                    note.unlink()


@dataclass(frozen=True, slots=True, order=True)
class _Use:
    """time: of the last use, nanoseconds."""

    time: int
    size: int
    path: Path


def _uses(paths: Iterable[Path]) -> Iterator[_Use]:
    for path in paths:
        with suppress(FileNotFoundError):
            stat = path.stat()
            yield _Use(stat.st_mtime_ns, stat.st_size, path)


def _identity(file: int) -> Identity:
    """Changes whenever a file is written to or replaced: ctime is the kernel's own and cannot be set."""
    stat = os.fstat(file)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _remove_leftover(partial: Path) -> None:
    """Remove a file whose writer has died: its lock died with it. An empty one may not be locked yet."""
    with suppress(OSError), partial.open("rb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(stream.fileno()).st_size:
            partial.unlink()
