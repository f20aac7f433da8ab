"""Arguments of the operators, checked by PyTorch's own rules before anything is launched."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from fusedpool.kinds import KINDS
from fusedpool.prologue import ACTIVATIONS

IntPair: TypeAlias = int | Sequence[int]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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


def _is_int(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _is_static(side: int) -> bool:
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, and only exports need it

    return has_static_value(side)


def check_tensors(**values: object) -> None:
    """Raise ValueError naming the one that is not a tensor."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}; it must be a tensor")


def check_map(x: Tensor, name: str = "x") -> None:
    """Raise ValueError unless x is a floating-point [N, C, H, W] with no empty maps (N may be 0)."""
    check_tensors(**{name: x})
    if x.dim() != 4:
        raise ValueError(f"{name} has shape {list(x.shape)}; it must be [N, C, H, W]")
    check_dtype(x, name)
    if 0 in x.shape[1:]:
        raise ValueError(f"{name} has shape {list(x.shape)}; only N may be 0")


def check_dtype(x: Tensor, name: str = "x") -> None:
    """Raise ValueError unless x is of a floating-point type that is pooled."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} is {x.dtype}; it must be float32, bfloat16, float16 or float64")


def check_kind(kind: str, allowed: Sequence[str] = tuple(KINDS), where: str = "") -> None:
    """Raise ValueError if there is no kind of that name, NotImplementedError if `where` lacks it."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    if kind not in allowed:
        raise NotImplementedError(f"{where} has no kind {kind!r}; it has {', '.join(allowed)}")


def kind_in(kind: str, training: bool) -> str:
    """The kind in training or evaluation, where stochastic is its expectation; raises ValueError if there is none."""
    check_kind(kind)
    return "stochastic_mean" if kind == "stochastic" and not training else kind


def check_prologue(x: Tensor, scale: Tensor | None, shift: Tensor | None, activation: str | None, channel: int) -> str:
    """The activation's name ("none" for None); raises ValueError for a wrong one, or affine tensors not [C]."""
    name = activation or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)} or None")
    check_channels(x, channel, scale=scale, shift=shift)
    return name


def check_channels(x: Tensor, channel: int, **tensors: Tensor | None) -> None:
    """Raise ValueError naming the tensor that is not floating-point [C] on x's device."""
    for label, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensors(**{label: tensor})
        if tensor.dim() != 1 or tensor.shape[0] != x.shape[channel]:
            raise ValueError(f"{label} has shape {list(tensor.shape)}; it must be [C] = [{x.shape[channel]}]")
        if tensor.device != x.device or not tensor.is_floating_point():
            raise ValueError(f"{label} is {tensor.dtype} on {tensor.device}; it must be floating-point on {x.device}")


def check_normalisation(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """Raise ValueError for what torch.nn.functional.batch_norm would refuse."""
    if not training and (running_mean is None or running_var is None):
        raise ValueError("running_mean or running_var is None; both must be given in evaluation (training=False)")
    if not training and eps < 0:
        raise ValueError(f"eps is {eps}; it must not be negative")
    if training and eps <= 0:
        raise ValueError(f"eps is {eps}; it must be positive in training")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x has shape {list(x.shape)}; expected more than 1 value per channel when training")
    if not isinstance(momentum, (int, float)):
        raise ValueError(f"momentum is {momentum!r}; it must be a number")


def parameter(kind: str, p: float | Tensor | None, x: Tensor) -> tuple[float, Tensor | None]:
    """(p, None) or (0, p as a tensor); raises ValueError for a p that the kind does not take."""
    known = KINDS[kind]
    if p is None:
        return known.default or 0.0, None
    if known.default is None:
        raise ValueError(f"p is {p!r}; the kind {kind!r} has no parameter")
    if isinstance(p, Tensor):
        if not known.learnable and p.requires_grad:
            raise ValueError(f"p requires a gradient, which the kind {kind!r} does not give; only gem and mixed do")
        if p.numel() != 1 or not p.is_floating_point() or p.device != x.device:
            raise ValueError(f"p is {p.dtype} {list(p.shape)} on {p.device}; it must be one number on {x.device}")
        return 0.0, p
    if kind == "mixed" and not 0 <= p <= 1:
        raise ValueError(f"p is {p}; for mixed it must be in [0, 1]")
    if kind != "mixed" and not 0 < p < float("inf"):
        raise ValueError(f"p is {p}; for {kind} it must be positive and finite")
    return float(p), None


def check_kinds(kinds: Sequence[str]) -> Sequence[str]:
    """The kinds; raises ValueError unless they are at least one, all known, none twice."""
    if isinstance(kinds, str) or not isinstance(kinds, Sequence) or not kinds:
        raise ValueError(f"kinds is {kinds!r}; it must be a sequence of at least one kind, such as ('avg', 'max')")
    for kind in kinds:
        check_kind(kind)
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds is {kinds!r}; no kind may be there twice")
    return kinds


def parameters(
    kinds: Sequence[str], p: float | Tensor | Mapping[str, float | Tensor] | None, x: Tensor
) -> tuple[list[float], Tensor | None]:
    """(p of each kind, None), or all as one tensor where one of them is; raises ValueError for those not taken."""
    takers = [kind for kind in kinds if KINDS[kind].default is not None]
    if p is None:
        p = {}
    elif not isinstance(p, Mapping):
        if len(takers) != 1:
            raise ValueError(
                f"p is {p!r}; the kinds that take a parameter are {takers}, so it must be a mapping from their names"
            )
        p = {takers[0]: p}
    if unknown := [name for name in p if name not in kinds]:
        raise ValueError(f"p has parameters of {unknown}; the kinds are {list(kinds)}")
    found = [parameter(kind, p.get(kind), x) for kind in kinds]
    numbers = [number for number, _ in found]
    if all(tensor is None for _, tensor in found):
        return numbers, None
    like = torch.float64 if x.dtype is torch.float64 else torch.float32
    return numbers, torch.stack(
        [
            torch.full((), number, dtype=like, device=x.device) if tensor is None else tensor.reshape(()).to(like)
            for number, tensor in found
        ]
    )


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


def adaptive_size(x: Tensor, output_size: int | Sequence[int | None]) -> tuple[int, int]:
    """(OH, OW), where None is x's own; raises ValueError for other things and for sizes below 1."""
    values = tuple(output_size) if isinstance(output_size, Sequence) else (output_size, output_size)
    if len(values) != 2 or not all(value is None or (_is_int(value) and value >= 1) for value in values):
        raise ValueError(f"output_size is {output_size!r}; it must be an int or two, (OH, OW), each at least 1 or None")
    rows, columns = (own if size is None else size for own, size in zip(x.shape[2:], values, strict=True))
    return rows, columns


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """The levels of a pyramid; raises ValueError unless they are at least one, each at least 1."""
    sides = tuple(levels) if isinstance(levels, Sequence) else ()
    if not sides or not all(_is_int(side) and side >= 1 for side in sides):
        raise ValueError(f"levels is {levels!r}; it must be a sequence of ints, each at least 1")
    return sides


def check_bounds(bounds: Tensor, name: str, shape: tuple[int | None, ...], x: Tensor) -> None:
    """Raise ValueError unless bounds is int64 of that shape (None: any size but 0), on x's device."""
    check_tensors(**{name: bounds})
    fits = bounds.dim() == len(shape)
    fits = fits and all(a == b if b is not None else a > 0 for a, b in zip(bounds.shape, shape, strict=True))
    if not fits or bounds.dtype is not torch.int64 or bounds.device != x.device:
        wanted = ", ".join("N + 1" if size is None else str(size) for size in shape)
        raise ValueError(
            f"{name} is {bounds.dtype} {list(bounds.shape)} on {bounds.device}; "
            f"it must be int64 [{wanted}] on {x.device}"
        )


def check_groups(x: Tensor, groups: int) -> None:
    """Raise ValueError unless groups divides the channels of x."""
    if not _is_int(groups) or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups is {groups!r}; it must be a divisor of x's {x.shape[1]} channels")


def check_indices(kind: str, return_indices: bool) -> None:
    """Raise ValueError where indices are asked of a kind that has none."""
    if return_indices and kind not in ("max", "min"):
        raise ValueError(f"return_indices is True; only max and min have indices, not {kind}")


def seed_for(x: Tensor, generator: Any) -> Tensor:
    """A random seed, int64 [1] on x's device, from a torch.Generator or PyTorch's own state."""
    options = {} if generator is None else {"generator": generator}  # without one, it exports
    return torch.randint(2**62, (1,), device=x.device, **options)
