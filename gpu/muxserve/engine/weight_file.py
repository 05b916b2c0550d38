"""A file that holds the contents of a weight memory, and notices if they have changed.

Magic, bytes of data (uint64), bytes of a chunk (uint32), CRC-32 of what is before it and of the table; the
table, a CRC-32 (uint32) of each chunk; zeros up to a multiple of 4096; data. Nothing follows. Byte order is
this machine's: such files are not for others.

Standard library only: a loader that finds its weights here has nothing else to import.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

_MAGIC = b"MUXWGHT1"
_FIELDS = struct.Struct("=8sQI")
_CHECK = struct.Struct("=I")
_PAGE = 4096

CHUNK = 8 * 2**20
"""Bytes that one checksum is of, and that a thread copies at a time."""

_BUFFER = 256 * 2**10
"""Bytes in flight: they are still in a core's cache when they are summed up and written."""


class DamagedFile(Exception):
    """A weight file is not what was written, or was written for memory of another size."""


def file_bytes(size: int) -> int:
    """Bytes of the file for `size` bytes of weights."""
    return _data_offset(size) + size


def write_weights(file: int, memory: int, size: int, threads: int) -> None:
    """Write `size` bytes of `memory` to the empty `file`; both are descriptors. Raises OSError."""
    offset = _data_offset(size)
    # Space is taken first: a disk that is full says so at once, not after most of the work.
    os.posix_fallocate(file, 0, offset + size)
    sums = _copy(memory, 0, file, offset, size, threads)
    _write(file, memoryview(_header(size, sums)), 0)


def read_weights(file: int, memory: int, size: int, threads: int) -> None:
    """Fill `size` bytes of `memory` from `file`; both are descriptors. Raises DamagedFile, OSError.

    After DamagedFile the memory holds rubbish.
    """
    offset = _data_offset(size)
    if (found := os.fstat(file).st_size) != offset + size:
        raise DamagedFile(f"it has {found} bytes, not {offset + size}")
    header = os.pread(file, offset, 0)
    sums = array("I", header[_FIELDS.size + _CHECK.size :][: 4 * -(-size // CHUNK)])
    if header != _header(size, sums):
        raise DamagedFile("its header is damaged")
    try:
        actual = _copy(file, offset, memory, 0, size, threads)
    except EOFError as error:
        raise DamagedFile("it ends early") from error
    wrong = sum(one != other for one, other in zip(sums, actual, strict=True))
    if wrong:
        raise DamagedFile(f"{wrong} of {len(actual)} checksums are wrong")


def _data_offset(size: int) -> int:
    header = _FIELDS.size + _CHECK.size + 4 * -(-size // CHUNK)
    return -(-header // _PAGE) * _PAGE


def _header(size: int, sums: Sequence[int]) -> bytes:
    fields, table = _FIELDS.pack(_MAGIC, size, CHUNK), array("I", sums).tobytes()
    check = _CHECK.pack(zlib.crc32(table, zlib.crc32(fields)))
    return (fields + check + table).ljust(_data_offset(size), b"\0")


def _copy(source: int, source_at: int, target: int, target_at: int, size: int, threads: int) -> list[int]:
    """Copy `size` bytes; the CRC-32 of every chunk. Raises EOFError if `source` ends before."""

    def one(start: int) -> int:
        buffer = memoryview(bytearray(min(_BUFFER, size)))
        at, stop, crc = start, min(start + CHUNK, size), 0
        while at < stop:
            count = os.preadv(source, [buffer[: stop - at]], source_at + at)
            if not count:
                raise EOFError
            crc = zlib.crc32(buffer[:count], crc)
            _write(target, buffer[:count], target_at + at)
            at += count
        return crc

    # Reading, summing and writing let go of the interpreter lock.
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(one, range(0, size, CHUNK)))


def _write(file: int, data: memoryview, at: int) -> None:
    while data:
        written = os.pwrite(file, data, at)
        data, at = data[written:], at + written
