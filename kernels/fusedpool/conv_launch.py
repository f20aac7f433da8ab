"""The launch of conv_kernels: how tensors are cut into tiles, and how many programs share what is left to sum."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fusedpool import conv_kernels, operators, runtime
from fusedpool._triton import tl
from fusedpool.kinds import KINDS
from fusedpool.runtime import pointer, present


@dataclass(frozen=True)
class _Tiling:
    """Tiles of block_pixels x block_outputs; input channels in steps of block_steps, of block_inputs for gradients.

    A function of channels, type and pixels alone: an image's answer must not depend on the batch that it came in.
    Limits are what compiles without keeping registers in memory.
    """

    pixels: int
    block_pixels: int
    block_outputs: int
    block_steps: int
    block_inputs: int

    @classmethod
    def of(cls, x: Tensor, outputs: int, most: tuple[int, int]) -> Self:
        """most: pixels and outputs of a tile."""
        pixels, inputs = x.shape[2] * x.shape[3], x.shape[1]
        # Input channels that one block may hold at most, and a step where none does.
        whole, step = {8: (32, 16), 4: (32, 32), 2: (128, 64)}[x.element_size()]
        if inputs <= whole:
            step = whole = _power(inputs, whole)
        return cls(pixels, _power(pixels, most[0]), _power(outputs, most[1]), step, min(whole, 2 * step))

    @classmethod
    def forward(cls, x: Tensor, outputs: int, whole: bool) -> Self:
        """whole: a state is more than one number."""
        return cls.of(x, outputs, {8: (32, 32), 4: (64, 64), 2: (64, 64 if whole else 128)}[x.element_size()])

    @classmethod
    def backward(cls, x: Tensor, outputs: int) -> Self:
        return cls.of(
            x, outputs, {8: (32, 32), 4: (32, 64), 2: (64, 32 if torch.version.hip else 64)}[x.element_size()]
        )

    @property
    def tiles(self) -> int:
        """Of an image."""
        return runtime.cdiv(self.pixels, self.block_pixels)

    def constants(self) -> dict[str, int]:
        return {
            "BP": self.block_pixels,
            "BC": self.block_outputs,
            "BK": self.block_steps,
            "BI": self.block_inputs,
        }


def _power(size: int, most: int) -> int:
    """The power of two that holds size, from 16, the least of a matrix product, to most."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def _warps(x: Tensor) -> int:
    """Of a program that holds several numbers for each element of its tile: 256 threads where tiles are large."""
    return 8 if x.element_size() == 2 and not torch.version.hip else 4


def _map(x: Tensor, weight: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments, and constants, that say where x [N, Cin, H, W] and weight [Cout, Cin] lie and what they hold."""
    n, c, h, w = x.stride()
    height, width = x.shape[2:]
    last = runtime.channels_last(x)
    flat = height == 1 or h == w * width
    outer = (n, h, w) if last else (n, c) if flat else (n, c, h)
    align = runtime.alignment(outer if last else (*outer, height * width))
    acc = runtime.accumulator(x)
    # The interpreter's numpy has no bfloat16.
    operand = torch.float32 if runtime.INTERPRETED and x.dtype is torch.bfloat16 else x.dtype
    places = {
        "PIXELS": height * width // (1 if last else align),
        "W": width,
        "x_n": n // align,
        "x_c": c // align,
        "x_h": h // align,
        "x_w": w // align,
        "x_inner": c if last else w,
        "w_o": weight.stride(0),
        "w_i": weight.stride(1),
    }
    constants = {
        "CIN": x.shape[1],
        "COUT": weight.shape[0],
        "CHANNELS_LAST": last,
        "FLAT": flat,
        "WIDE": runtime.wide(x) or x.numel() >= 2**31,
        "ALIGN": align,
        "P_ALIGN": 1 if last else align,
        "ACC": runtime.triton_type(acc),
        "OPERAND": getattr(tl, str(operand).removeprefix("torch.")),
    }
    return places, constants


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    param: Tensor | None,
    kind: str,
    p: float,
    activation: str,
    y: Tensor,
    winner: Tensor,
    saved: Tensor,
) -> None:
    """Fill y, winner and saved, see conv_kernels.merge; the latter two may be empty."""
    whole = kind not in ("avg", "sum")
    n, outputs = y.shape
    tiling = _Tiling.forward(x, outputs, whole)
    splits = min(runtime.cdiv(tiling.tiles, 8), 256)
    per = runtime.cdiv(tiling.tiles, splits)
    splits = runtime.cdiv(tiling.tiles, per)
    parts = x.new_empty((3 if whole else 1, n, splits, outputs), dtype=runtime.accumulator(x))
    positions = parts.new_empty((n, splits, outputs) if whole else 0, dtype=torch.int32)
    states = (parts[0], parts[-2] if whole else parts[0], parts[-1], positions)
    blocks = runtime.cdiv(outputs, tiling.block_outputs)
    places, constants = _map(x, weight)
    bias, _, param = operators.dense_parameters(x, bias, None, param, p)
    shared = {"KIND": kind, "ACTIVATION": activation, "WHOLE": whole, **present(param=param)}
    runtime.launch(
        conv_kernels.forward,
        n * splits * blocks,
        *(x, weight, pointer(bias, x), pointer(param, x), *states),
        **places,
        SPLITS=splits,
        PER=per,
        p=p,
        **shared,
        **present(bias=bias),
        **constants,
        **tiling.constants(),
        num_warps=_warps(x) if whole else 4,
    )
    runtime.launch(
        conv_kernels.merge,
        runtime.cdiv(n * outputs, 128),
        *(*states, pointer(param, x), y, winner, saved, n, tiling.pixels, splits, p),
        **shared,
        SAVE_WINNER=winner.dim() == 2,
        SAVE=saved.dim() == 3,
        COUT=outputs,
        ACC=constants["ACC"],
        B=128,
        num_warps=4,
    )


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    param: Tensor | None,
    winner: Tensor,
    saved: Tensor,
    kind: str,
    p: float,
    activation: str,
    outputs: Sequence[Tensor],
) -> None:
    """Fill dx, dweight and dbias; those that are empty are not wanted, and a dbias without a bias is not either."""
    dx, dweight, dbias = outputs
    (n, inputs), channels = x.shape[:2], weight.shape[0]
    tiling = _Tiling.backward(x, channels)
    if operators.masked(kind, activation):
        activation = "none"  # its mask is in the winner
    places, constants = _map(x, weight)
    bias, _, param = operators.dense_parameters(x, bias, None, param, p)
    tensors = (g.contiguous(), x, weight, pointer(bias, x), pointer(param, x), winner, saved)
    shared = {
        **places,
        "N": n,
        "p": p,
        "KIND": "sum" if kind == "avg" else kind,  # divided at the end, so that small numbers keep their digits
        "AVERAGE": kind == "avg",
        "ACTIVATION": activation,
        **present(bias=bias, param=param),
        "HAS_WINNER": KINDS[kind].winner,
        "HAS_SAVED": KINDS[kind].uses_input,
        "RECOMPUTE": KINDS[kind].uses_input or activation != "none",
        **constants,
        **tiling.constants(),
        "num_warps": _warps(x),
        "num_stages": 2,
    }
    ins, outs = runtime.cdiv(inputs, tiling.block_inputs), runtime.cdiv(channels, tiling.block_outputs)
    if dx.numel():
        runtime.launch(conv_kernels.backward_input, n * tiling.tiles * ins, *tensors, dx, **shared)
    if dweight.numel():
        # About 256 programs: enough to fill an accelerator, few enough for partial sums smaller than x.
        splits = min(runtime.cdiv(256, ins * outs), runtime.cdiv(n * tiling.tiles, 8))
        per = runtime.cdiv(n * tiling.tiles, splits)
        splits = runtime.cdiv(n * tiling.tiles, per)
        weights = g.new_empty((splits, channels, inputs), dtype=runtime.accumulator(x))
        biases = weights.new_empty((splits, channels))
        runtime.launch(conv_kernels.backward_weight, splits * ins * outs, *tensors, weights, biases, PER=per, **shared)
        operators.fill((dweight, dbias), (weights.sum(0), biases.sum(0)))
