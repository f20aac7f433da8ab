"""What can go wrong, said so that a caller can mend it; every transport maps these, none of them knows one.

Messages are built from the request alone: no paths, no internal names.
"""


class FullframeError(Exception):
    """Anything this package raises on purpose."""


class InvalidInput(FullframeError):
    """The request, or one image of it, can never work as it is.

    Args:
        message: what is wrong and what would be right.
        field: the argument at fault, as the caller named it ("images", "top_k"...).
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class NotFound(FullframeError):
    """No model of that name or version."""


class Overloaded(FullframeError):
    """No room now; the same request may be sent again.

    Args:
        message: which budget is full.
        retry_after: seconds to wait before trying again.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlinePassed(FullframeError):
    """The caller's deadline passed, or cannot be met, before the work began."""


class Unavailable(FullframeError):
    """Loading or draining; nothing was done, so another try is safe."""


class InvalidModel(FullframeError):
    """A model file breaks the contract: which part, and what it should be."""


class ServerError(FullframeError):
    """A server failed in a way that the caller cannot mend.

    Args:
        message: what it said.
        code: the transport's name for it ("INTERNAL", "UNIMPLEMENTED"...).
    """

    def __init__(self, message: str, code: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


def quoted(text: str) -> str:
    """A caller's words, short enough for a message however long they are."""
    return repr(text if len(text) <= 60 else text[:60] + "...")


def plainly(message: str) -> str:
    """What pydantic says of a value, without its own terms."""
    message = message.removeprefix("Value error, ")
    return message.replace("Input should", "it should", 1) if message.startswith("Input should") else message


def first_line(error: Exception) -> str:
    """What a foreign exception says, without what follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
