"""Convolutions, pools over windows, and padding."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fullframe.engine.graph.ir import Node, refused
from fullframe.engine.graph.operators.table import Given, accumulator, ints, number, operator

_CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class Side(NamedTuple):
    """A window along one side of a map.

    Attributes:
        cells: of the map.
        windows: how many there are.
        before, after: padding of the operator's own.
        ceil: the last window may hang over that.
    """

    cells: int
    windows: int
    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    ceil: bool = False

    @property
    def reach(self) -> tuple[int, int]:
        """Cells before and behind the map (below 0: fewer than the map's) such that the windows lie within."""
        if not self.ceil:
            return self.before, self.after
        end = (self.windows - 1) * self.stride + (self.kernel - 1) * self.dilation + 1
        return self.before, end - self.before - self.cells

    def counts(self, padding: bool, device: torch.device) -> Tensor:
        """int64 [windows]: taps of each that lie in the map or, with `padding`, in the operator's own padding."""
        least, end = (-self.before, self.cells + self.after) if padding else (0, self.cells)
        first = torch.arange(self.windows, device=device) * self.stride - self.before
        taps = first[:, None] + torch.arange(self.kernel, device=device) * self.dilation
        return ((taps >= least) & (taps < end)).sum(1)


def sides_of(node: Node, shape: tuple[int, ...], kernel: list[int]) -> list[Side]:
    """How a node's windows lie on a map of that shape [N, C, ...], by ONNX's rules."""
    rank = len(kernel)
    strides, dilations = (node.get(name, None) or [1] * rank for name in ("strides", "dilations"))
    pads, auto = node.get("pads", None) or [0] * 2 * rank, node.get("auto_pad", "NOTSET")
    ceil = bool(node.get("ceil_mode", 0))
    found = []
    for axis, (cells, size, stride, dilation) in enumerate(zip(shape[2:], kernel, strides, dilations, strict=True)):
        extent = (size - 1) * dilation + 1
        before, after = pads[axis], pads[axis + rank]
        if auto.startswith("SAME"):
            windows = -(-cells // stride)
            padding = max(0, (windows - 1) * stride + extent - cells)
            before = padding // 2 if auto == "SAME_UPPER" else padding - padding // 2
            after = padding - before
        else:
            before, after = (0, 0) if auto == "VALID" else (before, after)
            slack = cells + before + after - extent
            windows = (-(-slack // stride) if ceil else slack // stride) + 1
            if ceil and (windows - 1) * stride >= cells + before:  # it would begin behind the map
                windows -= 1
        found.append(Side(cells, windows, size, stride, dilation, before, after, ceil))
    return found


def symmetric(node: Node) -> bool:
    """Whether its padding is the same before and after, written out."""
    pads = node.get("pads", None) or []
    half = len(pads) // 2
    return node.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and pads[:half] == pads[half:]


def _reached(x: Tensor, sides: list[Side], value: float) -> Tensor:
    """The map with the padding that its windows see."""
    pads = [each for side in reversed(sides) for each in side.reach]
    return F.pad(x, pads, value=value) if any(pads) else x


@operator("Conv", fresh=True)
def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Along one to three sides."""
    kernel, group = list(weight.shape[2:]), node.get("group", 1)
    x = x.to(weight.dtype)
    strides, dilations = (node.get(name, None) or [1] * len(kernel) for name in ("strides", "dilations"))
    if symmetric(node):
        padding = [0] * len(kernel)
        if node.get("auto_pad", "NOTSET") == "NOTSET":
            padding = (node.get("pads", None) or padding)[: len(kernel)]
    else:
        x, padding = _reached(x, sides_of(node, tuple(x.shape), kernel), 0.0), [0] * len(kernel)
    return _CONVOLUTIONS[x.dim()](x, weight, bias, strides, padding, dilations, group)


def _pools_maps(node: Node) -> None:
    if len(node.attributes["kernel_shape"]) != 2:
        raise refused(node, "pools along other than two sides, which the PyTorch engine does not")
    if len([name for name in node.outputs if name]) > 1:
        raise refused(node, "gives the places of its maxima, which the PyTorch engine does not")


@operator("MaxPool", check=_pools_maps)
def max_pool(node: Node, x: Tensor) -> Tensor:
    """Padding counts for nothing."""
    sides = sides_of(node, tuple(x.shape), node.attributes["kernel_shape"])
    stride, dilation, kernel = ([getattr(side, name) for side in sides] for name in ("stride", "dilation", "kernel"))
    padding = [side.before for side in sides]
    if symmetric(node) and all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        return F.max_pool2d(x, kernel, stride, padding, dilation, bool(node.get("ceil_mode", 0)))
    return F.max_pool2d(_reached(x, sides, -torch.inf), kernel, stride, 0, dilation)


@operator("AveragePool", check=_pools_maps)
def average_pool(node: Node, x: Tensor) -> Tensor:
    """Padding counts with `count_include_pad`; what ceil_mode adds beyond it never does."""
    sides = sides_of(node, tuple(x.shape), node.attributes["kernel_shape"])
    pads = bool(node.get("count_include_pad", 0))
    stride, dilation, kernel = ([getattr(side, name) for side in sides] for name in ("stride", "dilation", "kernel"))
    padding, plain = [side.before for side in sides], max(dilation) == 1
    if plain and symmetric(node) and all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)):
        return F.avg_pool2d(x, kernel, stride, padding, bool(node.get("ceil_mode", 0)), pads)
    rows, columns = (side.counts(pads, x.device) for side in sides)
    shares = 1 / (rows[:, None] * columns).to(accumulator(x) or x.dtype)
    return (_window_sums(x, sides) * shares).to(x.dtype)


def _window_sums(x: Tensor, sides: list[Side]) -> Tensor:
    """In float32 or wider."""
    wide = _reached(x, sides, 0.0).to(accumulator(x) or x.dtype)
    stride, dilation, kernel = ([getattr(side, name) for side in sides] for name in ("stride", "dilation", "kernel"))
    if max(dilation) == 1:
        return F.avg_pool2d(wide, kernel, stride, divisor_override=1)
    ones = wide.new_ones(x.shape[1], 1, *kernel)
    return F.conv2d(wide, ones, None, stride, 0, dilation, x.shape[1])


@operator("LpPool", check=_pools_maps)
def lp_pool(node: Node, x: Tensor) -> Tensor:
    """The p-norm of each window."""
    p = node.get("p", 2)
    sums = _window_sums(x.abs().pow(p), sides_of(node, tuple(x.shape), node.attributes["kernel_shape"]))
    return sums.pow(1 / p).to(x.dtype)


_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def _known_mode(node: Node) -> None:
    if node.get("mode", "constant") not in _MODES:
        raise refused(node, f"has mode {node.attributes['mode']!r}; there are {', '.join(_MODES)}")


@operator("Pad", host_from=1, check=_known_mode)
def pad(node: Node, x: Tensor, pads: Given, value: Given = None, axes: Given = None) -> Tensor:
    """Pads below 0 cut off; other modes than constant along the last two or three axes."""
    rank, given = x.dim(), ints(pads) or []
    along = [axis % rank for axis in ints(axes) or range(rank)]
    before, after = [0] * rank, [0] * rank
    for place, axis in enumerate(along):
        before[axis], after[axis] = given[place], given[place + len(along)]
    mode = _MODES[node.get("mode", "constant")]
    flat = [each for axis in reversed(range(rank)) for each in (before[axis], after[axis])]
    if mode == "constant":
        return F.pad(x, flat, value=number(value) or 0)
    while len(flat) > 2 and not any(flat[-2:]):
        flat = flat[:-2]
    if not any(flat):
        return x
    if len(flat) // 2 > rank - 2:
        raise refused(node, f"pads images or channels in mode {node.attributes['mode']!r}")
    flat += [0] * (2 * (rank - 2) - len(flat))
    return F.pad(x, flat, mode=mode)


@operator("LRN")
def lrn(node: Node, x: Tensor) -> Tensor:
    """x / (bias + alpha / size * the sum of squares of `size` channels around)^beta."""
    size = node.attributes["size"]
    wide = x.to(accumulator(x) or x.dtype)
    before = (size - 1) // 2
    squares = F.pad(wide.square().flatten(2)[:, None], [0, 0, before, size - 1 - before])
    sums = F.avg_pool2d(squares, (size, 1), 1, divisor_override=1)[:, 0].reshape(x.shape)
    scale = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * sums
    found: Tensor = wide * scale.pow(-node.get("beta", 0.75))
    return found.to(x.dtype)
