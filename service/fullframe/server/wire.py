"""Parsing requests without letting a small message become a large one in memory.

An empty submessage is 2 bytes on the wire and about 48 once parsed, so that the limit on a message's length alone would
let one request take gigabytes.
"""

from typing import Final, TypeVar, cast

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from fullframe.errors import InvalidInput

MAX_FIELDS: Final = 20_000
"""Of one message, those of its submessages included."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types; the others, of groups, have no length
_OPAQUE: Final = (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING)

M = TypeVar("M", bound=Message)


def parse(kind: type[M], data: bytes) -> M:
    """The message; raises InvalidInput if it is malformed or of too many fields."""
    if _too_many_fields(data, cast(Descriptor, kind.DESCRIPTOR)):
        raise InvalidInput(f"the request holds more than {MAX_FIELDS} fields: send its images in several requests")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidInput(f"the request is no well-formed {kind.DESCRIPTOR.full_name}") from error


def _too_many_fields(data: bytes, descriptor: Descriptor) -> bool:
    """Whether there are more than MAX_FIELDS, each element of a packed field counted as its bytes.

    Follows https://protobuf.dev/programming-guides/encoding/; what is malformed is left for the parser to refuse.
    """
    count = 0
    pending: list[tuple[int, int, Descriptor]] = [(0, len(data), descriptor)]
    while pending:
        position, end, descriptor = pending.pop()
        while position < end:
            if count >= MAX_FIELDS:
                return True
            count += 1
            tag, position = _varint(data, position)
            kind = tag & 7
            if kind == _VARINT:
                _, position = _varint(data, position)
            elif kind == _BYTES:
                size, position = _varint(data, position)
                field = descriptor.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    pending.append((position, min(position + size, end), field.message_type))
                elif field is not None and field.type not in _OPAQUE:
                    count += size
                position += size
            elif kind in (_FIXED64, _FIXED32):
                position += 8 if kind == _FIXED64 else 4
    return count > MAX_FIELDS


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number that begins at `position`, and where the next thing begins; beyond the end there are zeros."""
    number = shift = 0
    while shift < 70 and position < len(data):
        byte = data[position]
        number |= (byte & 0x7F) << shift
        position += 1
        shift += 7
        if byte < 0x80:
            break
    return number, position
