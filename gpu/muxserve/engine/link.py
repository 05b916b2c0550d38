"""`Link`: messages and file descriptors over a Unix SOCK_SEQPACKET socket, between a worker and an executor.

A message is one datagram, or several where it is larger than a socket takes at once: each begins with one
byte, 1 if more of the same message follows. Descriptors travel with the first (SCM_RIGHTS). No torch.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

_LAST, _MORE = b"\0", b"\1"
_PIECE = 64 << 10
"""Payload bytes of a datagram: below the smallest send buffer that kernels come with."""
_MAX_DESCRIPTORS = 8

M = TypeVar("M")


class LinkClosed(ConnectionError):
    """The other side is gone, or has closed its end."""


class Link(Generic[M]):
    """One end. Receives messages of type `M` (a union of tagged structs) and sends any struct.

    `received` = descriptors that came with a message; they belong to the caller, who closes them.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self._sock = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(receives)
        self._buffer = bytearray(_PIECE + 1)
        self._pieces: list[bytes] = []
        self._descriptors: list[int] = []

    @staticmethod
    def pair() -> tuple[socket.socket, socket.socket]:
        """Two connected sockets, neither inherited by a child that does not ask for it."""
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket and whatever descriptors of an unfinished message came with it."""
        self._sock.close()
        while self._descriptors:
            socket.close(self._descriptors.pop())

    def pieces(self, message: msgspec.Struct) -> list[bytes]:
        """`message` as datagrams."""
        data = self._encoder.encode(message)
        if len(data) <= _PIECE:
            return [_LAST + data]
        cuts = [data[i : i + _PIECE] for i in range(0, len(data), _PIECE)]
        return [_MORE + cut for cut in cuts[:-1]] + [_LAST + cuts[-1]]

    def send_piece(self, piece: bytes, descriptors: Sequence[int] = (), *, block: bool = True) -> None:
        """Send one datagram. Raises BlockingIOError if it would block and may not, LinkClosed."""
        flags = socket.MSG_NOSIGNAL | (0 if block else socket.MSG_DONTWAIT)
        try:
            if descriptors:
                socket.send_fds(self._sock, [piece], list(descriptors), flags)
            else:
                self._sock.send(piece, flags)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise LinkClosed(str(error)) from error

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Send, waiting until the socket has room. Raises LinkClosed."""
        for piece in self.pieces(message):
            self.send_piece(piece, descriptors)
            descriptors = ()

    def receive(self) -> tuple[M, list[int]]:
        """The next message, waiting for it. Raises LinkClosed, msgspec.DecodeError."""
        while True:
            if (message := self._receive_piece(0)) is not None:
                return message

    def try_receive(self) -> tuple[M, list[int]] | None:
        """The next message if one is there. Raises LinkClosed, msgspec.DecodeError."""
        try:
            while True:
                if (message := self._receive_piece(socket.MSG_DONTWAIT)) is not None:
                    return message
        except BlockingIOError:
            return None

    def _receive_piece(self, flags: int) -> tuple[M, list[int]] | None:
        """Take one datagram; the message, if that was its last."""
        space = socket.CMSG_LEN(_MAX_DESCRIPTORS * 4)
        try:
            count, ancillary, _, _ = self._sock.recvmsg_into(
                [self._buffer], space, flags | socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError as error:
            raise LinkClosed(str(error)) from error
        for level, kind, raw in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                self._descriptors += memoryview(raw[: len(raw) // 4 * 4]).cast("i").tolist()
        if count == 0:
            raise LinkClosed("the other side has closed the socket")
        if self._buffer[:1] == _MORE:
            self._pieces.append(bytes(self._buffer[1:count]))
            return None
        last = memoryview(self._buffer)[1:count]
        data: bytes | memoryview = b"".join([*self._pieces, last]) if self._pieces else last
        self._pieces.clear()
        descriptors, self._descriptors = self._descriptors, []
        return self._decoder.decode(data), descriptors
