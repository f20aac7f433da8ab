"""Errors as gRPC statuses, with details that a program can act on and never more than the caller may know."""

import logging
import secrets
from typing import Final

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from fullframe.errors import (
    DeadlinePassed,
    FullframeError,
    InvalidInput,
    NotFound,
    Overloaded,
    Unavailable,
)

DOMAIN: Final = "fullframe"
"""Of every ErrorInfo."""

# A status travels as HTTP/2 trailers, of which 8 KiB are taken in all, the text three times and percent-encoded.
_LONGEST_TEXT: Final = 800

_CODES: Final[dict[type[FullframeError], tuple[int, str]]] = {
    InvalidInput: (Code.INVALID_ARGUMENT, "INVALID_INPUT"),
    NotFound: (Code.NOT_FOUND, "MODEL_NOT_FOUND"),
    Overloaded: (Code.RESOURCE_EXHAUSTED, "OVERLOADED"),
    DeadlinePassed: (Code.DEADLINE_EXCEEDED, "DEADLINE_PASSED"),
    Unavailable: (Code.UNAVAILABLE, "UNAVAILABLE"),
}

_log = logging.getLogger(__name__)


def status_of(error: BaseException) -> Status:
    """A google.rpc.Status with ErrorInfo, and BadRequest or RetryInfo where they apply.

    What is no error of ours becomes INTERNAL with an id under which the log has it; its text stays here.
    """
    for kind, (code, reason) in _CODES.items():
        if isinstance(error, kind):
            return _status(code, _shortened(str(error)), ErrorInfo(reason=reason, domain=DOMAIN), *_details(error))
    incident = secrets.token_hex(6)
    _log.error("internal error", exc_info=error, extra={"fields": {"id": incident}})
    return _status(
        Code.INTERNAL,
        f"internal error; the server's log has it under id {incident}",
        ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"id": incident}),
    )


def trailers_of(status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata of a call that ends with `status`: the details, and when gRPC itself may retry."""
    trailers: list[tuple[str, str | bytes]] = list(rpc_status.to_status(status).trailing_metadata)
    retry = RetryInfo()
    if any(detail.Unpack(retry) for detail in status.details):
        trailers.append(("grpc-retry-pushback-ms", str(retry.retry_delay.ToMilliseconds())))
    return tuple(trailers)


def code_name(code: int) -> str:
    """A code's name: "OK", "NOT_FOUND"..."""
    return str(Code.Name(code))


def grpc_code(status: Status) -> grpc.StatusCode:
    """The same code in grpc's own enumeration."""
    return grpc.StatusCode[code_name(status.code)]


def _details(error: FullframeError) -> list[Message]:
    if isinstance(error, InvalidInput) and error.field:
        violation = BadRequest.FieldViolation(field=error.field, description=_shortened(str(error)))
        return [BadRequest(field_violations=[violation])]
    if isinstance(error, Overloaded):
        delay = Duration()
        delay.FromMilliseconds(max(1, round(error.retry_after * 1000)))
        return [RetryInfo(retry_delay=delay)]
    return []


def _status(code: int, message: str, *details: Message) -> Status:
    status = Status(code=code, message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _shortened(text: str) -> str:
    data = text.encode()
    if len(data) <= _LONGEST_TEXT:
        return text
    return data[:_LONGEST_TEXT].decode(errors="ignore") + "..."
