"""gRPC statuses -> this package's errors."""

from collections.abc import Iterable
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.code_pb2 import Code
from google.rpc.error_details_pb2 import BadRequest, RetryInfo
from google.rpc.status_pb2 import Status

from fullframe.errors import (
    DeadlinePassed,
    FullframeError,
    InvalidInput,
    NotFound,
    Overloaded,
    ServerError,
    Unavailable,
)

DEFAULT_RETRY_AFTER: Final = 1.0
"""Seconds, where a server is overloaded and doesn't say for how long."""

_DETAILS_KEY: Final = "grpc-status-details-bin"
_CANCELLED_HERE: Final = ("Channel closed", "Locally cancelled")  # how grpc's texts for it begin
_Detail = TypeVar("_Detail", BadRequest, RetryInfo)


def error_from_status(status: Status) -> FullframeError:
    """The error that a google.rpc.Status other than OK stands for."""
    match status.code:
        case Code.INVALID_ARGUMENT:
            bad = _find(status.details, BadRequest)
            return InvalidInput(status.message, bad.field_violations[0].field if bad else "")
        case Code.NOT_FOUND:
            return NotFound(status.message)
        case Code.RESOURCE_EXHAUSTED:
            retry = _find(status.details, RetryInfo)
            seconds = retry.retry_delay.ToMilliseconds() / 1000 if retry else DEFAULT_RETRY_AFTER
            return Overloaded(status.message, seconds)
        case Code.DEADLINE_EXCEEDED:
            return DeadlinePassed(status.message)
        case Code.UNAVAILABLE:
            return Unavailable(status.message)
    return ServerError(status.message, Code.Name(status.code))


def error_from_call(error: grpc.RpcError, target: str, timeout: float) -> FullframeError:
    """The error that a failed call stands for; works for grpc's and grpc.aio's."""
    call: Any = error  # both kinds are calls too, which the base class does not say
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY:
            return error_from_status(Status.FromString(value))
    # No details: gRPC itself says so, not the server's code.
    code, text = call.code(), call.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlinePassed(f"{target} gave no answer within {timeout:g} s")
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(f"no server can be reached at {target}: {text}")
    if code is grpc.StatusCode.CANCELLED and not text.startswith(_CANCELLED_HERE):
        # A server that stops ends so what has reached it and was not begun: https://github.com/grpc/grpc/issues/41785
        return Unavailable(f"{target} is stopping, or cut the call off: ask another server, or this one later")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        return ServerError(f"a message is beyond its receiver's limit: {text}", code.name)
    return error_from_status(Status(code=code.value[0], message=text))


def _find(details: Iterable[AnyMessage], kind: type[_Detail]) -> _Detail | None:
    found = kind()
    return found if any(detail.Unpack(found) for detail in details) else None
