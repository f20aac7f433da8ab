"""Where windows and cells lie: the sizes that operators are asked for, checked by PyTorch's own rules."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

IntPair: TypeAlias = int | Sequence[int]


@dataclass(frozen=True)
class Window:
    """A sliding window, as in torch.nn.functional's pools; `divisor` 0 means none is given.

    Sizes may be symbolic. Raises ValueError for what PyTorch would refuse.
    """

    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_h: int
    dilation_w: int
    ceil_mode: int = 0
    count_include_pad: int = 1
    divisor: int = 0

    @property
    def taps(self) -> int:
        """Cells of the window."""
        return self.kernel_h * self.kernel_w

    @property
    def overlap(self) -> tuple[int, int]:
        """The most windows that a row, and a column, can lie in."""
        return (
            -(-((self.kernel_h - 1) * self.dilation_h + 1) // self.stride_h),
            -(-((self.kernel_w - 1) * self.dilation_w + 1) // self.stride_w),
        )

    def to_ints(self) -> list[int]:
        """For an operator's schema."""
        return [getattr(self, field.name) for field in fields(self)]

    @classmethod
    def from_ints(cls, values: Sequence[int]) -> Self:
        """The inverse."""
        return cls(*values)

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """(oh, ow) for a map of height x width."""
        return (
            _output_size(height, self.kernel_h, self.stride_h, self.padding_h, self.dilation_h, self.ceil_mode),
            _output_size(width, self.kernel_w, self.stride_w, self.padding_w, self.dilation_w, self.ceil_mode),
        )


def _output_size(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: int) -> int:
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    if not ceil_mode:
        return span // stride + 1
    # The last window must start inside the input or its left padding.
    windows: int = torch.sym_min((span + stride - 1) // stride + 1, (size + padding - 1) // stride + 1)
    return windows


def window(
    x: Tensor,
    kernel_size: IntPair,
    stride: IntPair | None,
    padding: IntPair,
    dilation: IntPair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Window:
    """The window that the arguments of `pool2d` describe; raises ValueError naming the one that is wrong."""
    kernel = pair(kernel_size, "kernel_size", 1)
    strides = kernel if stride is None else pair(stride, "stride", 1)
    pads, dilations = pair(padding, "padding", 0), pair(dilation, "dilation", 1)
    for pad, size, step in zip(pads, kernel, dilations, strict=True):
        effective = (size - 1) * step + 1
        if pad > effective // 2:
            raise ValueError(f"padding is {pad}; it must be at most half the effective kernel size, {effective} // 2")
    for name, flag in (("ceil_mode", ceil_mode), ("count_include_pad", count_include_pad)):
        if flag not in (False, True):
            raise ValueError(f"{name} is {flag!r}; it must be True or False")
    if divisor_override is not None and (not _is_int(divisor_override) or divisor_override == 0):
        raise ValueError(f"divisor_override is {divisor_override!r}; it must be an int other than 0, or None")
    result = Window(*kernel, *strides, *pads, *dilations, int(ceil_mode), int(count_include_pad), divisor_override or 0)
    height, width = result.output_size(x.shape[2], x.shape[3])
    if height < 1 or width < 1:
        raise ValueError(
            f"kernel_size is {kernel}; with padding {pads} and dilation {dilations} it does not fit into x, whose maps "
            f"are {x.shape[2]} x {x.shape[3]}: the output would be {height} x {width}"
        )
    return result


def pair(value: IntPair, name: str, least: int) -> tuple[int, int]:
    """(vertical, horizontal) of an int or two; raises ValueError for other things and for less than `least`."""
    values = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(values) == 1:
        values *= 2
    if len(values) != 2 or not all(_is_int(v) for v in values):
        raise ValueError(f"{name} is {value!r}; it must be an int or two of them, (vertical, horizontal)")
    if min(values) < least:
        raise ValueError(f"{name} is {value!r}; it must be at least {least}")
    return values


def adaptive_size(x: Tensor, output_size: int | Sequence[int | None]) -> tuple[int, int]:
    """(OH, OW), where None is x's own; raises ValueError for other things and for sizes below 1."""
    values = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(values) != 2 or not all(value is None or (_is_int(value) and value >= 1) for value in values):
        raise ValueError(f"output_size is {output_size!r}; it must be an int or two, (OH, OW), each at least 1 or None")
    rows, columns = (own if size is None else size for own, size in zip(x.shape[2:], values, strict=True))
    return rows, columns


def fractional_size(
    x: Tensor, kernel: tuple[int, int], output_size: IntPair | None, output_ratio: float | Sequence[float] | None
) -> tuple[int, int]:
    """(OH, OW) of fractional windows; raises ValueError naming the argument that is wrong."""
    sides = (x.shape[2], x.shape[3])
    if (output_size is None) == (output_ratio is None):
        raise ValueError("output_size or output_ratio must be given, and only one of them")
    if output_size is not None:
        name, size = "output_size", pair(output_size, "output_size", 1)
    else:
        name, ratios = "output_ratio", _ratios(output_ratio)
        if torch.compiler.is_exporting() and not all(_is_static(side) for side in sides):
            # A graph would take the example's size, or a product rounded to float32, which can be one output more.
            raise ValueError("output_ratio is of sizes that may differ, for which it does not export; use output_size")
        size = (int(sides[0] * ratios[0]), int(sides[1] * ratios[1]))
    for side, window, outputs in zip(sides, kernel, size, strict=True):
        if not 1 <= outputs <= side - window + 1:
            raise ValueError(
                f"{name} asks for {size[0]} x {size[1]} outputs; windows of {kernel[0]} x {kernel[1]} have "
                f"1 x 1 to {sides[0] - kernel[0] + 1} x {sides[1] - kernel[1] + 1} places on maps of "
                f"{sides[0]} x {sides[1]}"
            )
        if side > 2**21:
            raise ValueError(f"x has maps of {sides[0]} x {sides[1]}; each side may be at most {2**21}")
    return size


def _ratios(value: Any) -> tuple[float, float]:
    ratios = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(ratios) != 2 or not all(0 < ratio < 1 for ratio in ratios):
        raise ValueError(
            f"output_ratio is {value!r}; it must be a number between 0 and 1 or two, (vertical, horizontal)"
        )
    return ratios


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels of a pyramid; raises ValueError unless they are at least one, each at least 1."""
    sides = tuple(levels) if isinstance(levels, Sequence) else ()
    if not sides or not all(_is_int(side) and side >= 1 for side in sides):
        raise ValueError(f"levels is {levels!r}; it must be a sequence of ints, each at least 1")
    return sides


def check_groups(x: Tensor, groups: int) -> None:
    """Raise ValueError unless groups divides the channels of x."""
    if not _is_int(groups) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups is {groups!r}; it must be a divisor of x's {x.shape[1]} channels")


def _is_int(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _is_static(side: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, and only exports need it

    return has_static_value(side)
