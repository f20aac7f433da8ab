"""A servicer's methods as gRPC handlers, each inside a Call, as the service's descriptor has them."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fullframe.errors import FullframeError
from fullframe.server.calls import Calls, Context
from fullframe.server.wire import parse


def handlers(service: ServiceDescriptor, servicer: object, calls: Calls) -> grpc.GenericRpcHandler:
    """All methods of `service`, from the coroutines of the same names.

    A method without streams is called with its Call and the request, and returns the response; one with streams is
    called with its Call alone, reads and writes there, and returns nothing.
    """
    methods = {method.name: _handler(method, getattr(servicer, method.name), calls) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, methods)


def _handler(method: MethodDescriptor, behaviour: Callable[..., Awaitable[Any]], calls: Calls) -> Any:
    async def answer(request: Message | FullframeError, context: Context) -> Message:
        async with calls.enter(method.name, context) as call:
            if isinstance(request, FullframeError):
                raise request
            response: Message = await behaviour(call, request)
            return response

    async def converse(requests: object, context: Context) -> None:
        async with calls.enter(method.name, context) as call:
            await behaviour(call)

    streams = method.client_streaming and method.server_streaming
    make: Any = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
    return make(
        converse if streams else answer,
        request_deserializer=partial(_parsed, GetMessageClass(method.input_type)),
        response_serializer=GetMessageClass(method.output_type).SerializeToString,
    )


def _parsed(kind: type[Message], data: bytes) -> Message | FullframeError:
    """The error in place of the message, since gRPC would tell callers what is raised here in words of its own."""
    try:
        return parse(kind, data)
    except FullframeError as error:
        return error
