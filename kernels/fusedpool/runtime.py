"""Which path runs an operator, how tensors lie in memory, and how many programs a kernel takes."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor

from fusedpool._triton import INSTALLED, tl

Path = Literal["triton", "reference"]

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton kernels run on the CPU, in its interpreter."""

_ELEMENTS: Final = 1024  # of a program's tile: 8 for each of 128 threads, 16 bytes of a half

# Of the process, not of a thread: backward runs in threads of autograd's own.
_forced: list[Path] = []


@contextmanager
def force(path: Path) -> Iterator[None]:
    """Run every operator inside by that path; "triton" on CPU tensors needs TRITON_INTERPRET=1."""
    _forced.append(path)
    try:
        yield
    finally:
        _forced.pop()


def use_triton(x: Tensor) -> bool:
    """Whether kernels work on x: on an accelerator, where Triton is installed, unless forced."""
    if _forced:
        return _forced[-1] == "triton"
    return x.is_cuda and INSTALLED


def channels_last(x: Tensor) -> bool:
    """Whether x [N, C, H, W] lies in memory with its channels innermost; a C of 1 counts as NCHW."""
    return x.stride(1) == 1 and x.shape[1] > 1 and not x.is_contiguous()


def empty_map(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense [N, *shape] for the images of `like`, in its memory format."""
    return torch.empty(
        (like.shape[0], *shape),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last(like) else torch.contiguous_format,
    )


def dense(x: Tensor, last: bool, channel: int = 1) -> Tensor:
    """x dense, its channels innermost if `last`: a copy where, say, a hook on saved tensors has laid it out otherwise.

    What is not 4-dimensional is empty, for nothing was saved.
    """
    if not last or x.dim() != 4:
        return x.contiguous()
    return x.movedim(channel, -1).contiguous().movedim(-1, channel)


def alignment(strides: tuple[int, ...]) -> int:
    """The largest power of two up to 16 that divides all strides: what vector loads may count on."""
    align = 16
    while any(stride % align for stride in strides):
        align //= 2
    return align


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def warps() -> int:
    """Those of 128 threads, so that 1024 elements are 8 for each: a warp is 64 threads on AMD, else 32."""
    return 2 if torch.version.hip else 4


def accumulator(x: Tensor) -> torch.dtype:
    """What sums over x are kept in: float64 for float64, else float32."""
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def wide(*tensors: Tensor | None) -> bool:
    """Whether offsets into one of the tensors need 64 bits."""
    return any(
        1 + sum((size - 1) * abs(stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size) >= 2**31
        for t in tensors
        if t is not None
    )


def triton_type(dtype: torch.dtype) -> Any:
    """float32 or float64, in Triton's terms."""
    return tl.float64 if dtype is torch.float64 else tl.float32


@dataclass(frozen=True)
class Strides:
    """A map's strides as kernels take them: outer ones in units of `align` elements, so that loads can be wide.

    Attributes:
        outer: of n, c, h, w; the inner one is there too, and not used.
        inner: of c for channels_last, else of w.
    """

    outer: tuple[int, int, int, int]
    inner: int
    align: int

    @classmethod
    def of(cls, x: Tensor, last: bool | None = None, vectors: bool = True) -> Self:
        """Those of x [N, C, H, W].

        Args:
            last: as channels_last or not, instead of as it lies.
            vectors: whether loads can be wide; where they cannot, an alignment is nothing to compile for.
        """
        last = channels_last(x) if last is None else last
        n, c, h, w = x.stride()
        align = alignment((n, h, w) if last else (n, c, h)) if vectors else 1
        return cls((n // align, c // align, h // align, w // align), c if last else w, align)


def line_block(width: int) -> int:
    """The columns of a tile for NCHW: few classes of lines, not their length, since each is a compilation."""
    return next((size for size in (8, 16, 32, 64) if width <= size), 128)


@dataclass(frozen=True)
class Tile:
    """How programs share a dense map [N, C, height, width]: blocks of rows x columns, columns contiguous.

    channels_last: pixels x channels; else (image, channel, line) x the line's pixels.
    """

    last: bool
    channels: int
    images: int
    rows: int
    columns: int
    block_rows: int
    block_columns: int

    @classmethod
    def over(cls, like: Tensor, height: int, width: int, last: bool | None = None) -> Self:
        """For a map of that size with the images, channels and, unless `last` is given, memory format of `like`."""
        n, c = like.shape[:2]
        if channels_last(like) if last is None else last:
            block = min(128, 1 << (c - 1).bit_length())
            return cls(True, c, n, n * height * width, c, _ELEMENTS // block, block)
        block = line_block(width)
        return cls(False, c, n, n * c * height, width, _ELEMENTS // block, block)

    @property
    def align(self) -> int:
        """In units of which kernels take the columns of NCHW.

        1 for a lone channel: such maps, of attention say, are small, and come with channels_last ones, of which no size
        needs a compilation of its own.
        """
        return 1 if self.last or self.channels == 1 else alignment((self.columns,))

    @property
    def partials(self) -> tuple[int, int]:
        """The shape of one sum per tile and channel."""
        if self.last:
            return cdiv(self.rows, self.block_rows), self.columns
        return self.rows, cdiv(self.columns, self.block_columns)

    def per_channel(self, partials: Tensor) -> tuple[Tensor, ...]:
        """[k, *self.partials] summed, in a fixed order, to k tensors [C]."""
        if self.last:
            return partials.sum(1).unbind()
        lines = partials[0].numel() // max(1, self.images * self.channels)
        return partials.view(len(partials), self.images, self.channels, lines).sum((1, 3)).unbind()

    def launch(self, kernel: Any, *args: Any, **constants: Any) -> None:
        """Run one program for each block."""
        programs = cdiv(self.rows, self.block_rows) * cdiv(self.columns, self.block_columns)
        launch(kernel, programs, *args, **constants, **self.constants)

    @property
    def constants(self) -> dict[str, int]:
        """Of a kernel that works on such blocks."""
        return {"CHANNELS_LAST": self.last, "BR": self.block_rows, "BC": self.block_columns}


def launch(kernel: Any, programs: int, *args: Any, num_warps: int | None = None, **constants: Any) -> None:
    """Run so many programs where the first argument is."""
    if programs:
        with torch.cuda.device_of(args[0]):
            kernel[(programs,)](*args, **constants, num_warps=num_warps or warps())


def pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """The tensor, or another in its place: a kernel takes a pointer even where it follows none."""
    return other if tensor is None else tensor


def present(**tensors: Tensor | None) -> dict[str, bool]:
    """HAS_NAME for each name: whether its tensor is there."""
    return {f"HAS_{name.upper()}": tensor is not None for name, tensor in tensors.items()}
