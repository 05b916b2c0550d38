"""The protos: everything has a comment, and enumerations start at nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc_tools
import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parents[2] / "proto"
PROTOS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("muxserve/v1/*.proto"))

# Numbers of fields in descriptor.proto, of which the paths of source comments are made.
_MESSAGES, _ENUMS, _SERVICES, _NESTED, _NESTED_ENUMS = 4, 5, 6, 3, 4
_FIELDS, _ONEOFS, _VALUES, _METHODS = 2, 8, 2, 2

Named = tuple[tuple[int, ...], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FileDescriptorProto]:
    """The protos, compiled with their comments."""
    out = tmp_path_factory.mktemp("protos") / "set"
    own = Path(grpc_tools.__file__).parent / "_proto"
    flags = [f"-I{ROOT}", f"-I{own}", "--include_source_info", f"--descriptor_set_out={out}"]
    assert protoc.main(["protoc", *flags, *PROTOS]) == 0
    return {file.name: file for file in FileDescriptorSet.FromString(out.read_bytes()).file}


def _enum(enum: EnumDescriptorProto, path: tuple[int, ...], name: str) -> Iterator[Named]:
    yield path, name
    yield from ((((*path, _VALUES, i)), f"{name}.{v.name}") for i, v in enumerate(enum.value))


def _message(message: DescriptorProto, path: tuple[int, ...], name: str) -> Iterator[Named]:
    if message.options.map_entry:
        return
    yield path, name
    yield from (((*path, _FIELDS, i), f"{name}.{f.name}") for i, f in enumerate(message.field))
    optional = {f.oneof_index for f in message.field if f.proto3_optional}
    for i, oneof in enumerate(message.oneof_decl):
        if i not in optional:  # a field that is `optional` is stored as a oneof of its own
            yield (*path, _ONEOFS, i), f"{name}.{oneof.name}"
    for i, nested in enumerate(message.nested_type):
        yield from _message(nested, (*path, _NESTED, i), f"{name}.{nested.name}")
    for i, enum in enumerate(message.enum_type):
        yield from _enum(enum, (*path, _NESTED_ENUMS, i), f"{name}.{enum.name}")


def _named(file: FileDescriptorProto) -> Iterator[Named]:
    """Everything in a file that can carry a comment: where it is, and its name."""
    for i, message in enumerate(file.message_type):
        yield from _message(message, (_MESSAGES, i), message.name)
    for i, enum in enumerate(file.enum_type):
        yield from _enum(enum, (_ENUMS, i), enum.name)
    for i, service in enumerate(file.service):
        yield (_SERVICES, i), service.name
        yield from (
            ((_SERVICES, i, _METHODS, j), f"{service.name}.{method.name}")
            for j, method in enumerate(service.method)
        )


@pytest.mark.parametrize("proto", PROTOS)
def test_everything_in_a_proto_has_a_comment(files: dict[str, FileDescriptorProto], proto: str) -> None:
    file = files[proto]
    commented = {
        tuple(where.path)
        for where in file.source_code_info.location
        if (where.leading_comments + where.trailing_comments).strip()
    }
    named = list(_named(file))
    assert named
    assert [name for path, name in named if path not in commented] == []


@pytest.mark.parametrize("proto", PROTOS)
def test_enumerations_start_at_unspecified(files: dict[str, FileDescriptorProto], proto: str) -> None:
    for enum in files[proto].enum_type:
        assert enum.value[0].number == 0
        assert enum.value[0].name.endswith("_UNSPECIFIED")
