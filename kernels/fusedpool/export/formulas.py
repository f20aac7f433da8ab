"""The kinds and the prologue as ONNX nodes; the formulas are those of kinds.py and prologue.py."""

import math

import onnx_ir as ir

from fusedpool.export.cells import Domain, Sliding, Taps, Value, ints, number, op
from fusedpool.kinds import GEM_FLOOR
from fusedpool.prologue import LEAKY_SLOPE

AROUND_A_VALUE = ("lse", "softpool", "std")
"""Kinds that set each value against a number of its cell, which windows that overlap must be gathered for."""


def mapped(x: Value, scale: Value | None, shift: Value | None, activation: str, dtype: ir.DataType) -> Value:
    """activation(scale * x + shift) for maps [N, C, H, W], in `dtype`."""
    v = op.Cast(x, to=dtype)
    if scale is not None:
        v = op.Mul(v, op.Reshape(op.Cast(scale, to=dtype), ints(-1, 1, 1)))
    if shift is not None:
        v = op.Add(v, op.Reshape(op.Cast(shift, to=dtype), ints(-1, 1, 1)))
    match activation:
        case "relu":
            return op.Relu(v)
        case "leaky_relu":
            return op.LeakyRelu(v, alpha=LEAKY_SLOPE)
        case "gelu":
            grown = op.Add(op.Erf(op.Mul(v, number(math.sqrt(0.5), dtype))), number(1, dtype))
            return op.Mul(op.Mul(v, number(0.5, dtype)), grown)
        case "silu":
            return op.Mul(v, op.Sigmoid(v))
    return v


def pooled(domain: Domain, v: Value, kind: str, p: Value, power: float | None = None) -> Value:
    """One number for each cell; p: the parameter as a constant or an input, and power: it, where it is known."""
    d, zero = domain, number(0, domain.dtype)
    match kind:
        case "max":
            return d.peak(v)
        case "min":
            return op.Neg(d.peak(op.Neg(v)))
        case "avg":
            return d.average(v)
        case "sum":
            return d.total(v)
        case "mixed":
            rest = op.Sub(number(1, d.dtype), p)
            return op.Add(op.Mul(p, d.peak(v)), op.Mul(rest, d.average(v)))
        case "lp":
            if isinstance(d, Sliding) and not d.window.ceil_mode and power is not None and power == int(power):
                return d.norm(v, int(power))
            return op.Pow(d.total(op.Pow(op.Abs(v), p)), op.Reciprocal(p))
        case "gem":
            powers = op.Pow(op.Max(v, number(GEM_FLOOR, d.dtype)), p)
            return op.Pow(d.mean(powers), op.Reciprocal(p))
        case "stochastic_mean":
            w = op.Relu(v)
            total = d.total(w)
            nothing = op.Equal(total, zero)
            mean = op.Div(d.total(op.Mul(w, w)), op.Where(nothing, number(1, d.dtype), total))
            return op.Where(nothing, zero, mean)
    if kind not in AROUND_A_VALUE:
        raise NotImplementedError(
            f"kind {kind!r} has no meaning in evaluation; export with training=False (a module in eval mode)"
        )
    assert isinstance(d, Taps)
    match kind:
        case "lse":
            scaled = op.Mul(p, v)
            peak = d.peak(scaled)
            return op.Div(op.Add(peak, op.Log(d.mean(op.Exp(op.Sub(scaled, d.spread(peak)))))), p)
        case "softpool":
            weight = op.Exp(op.Sub(v, d.spread(d.peak(v))))
            return op.Div(d.total(op.Mul(weight, v)), d.total(weight))
        case _:  # std
            off = op.Sub(v, d.spread(d.mean(v)))
            return op.Sqrt(d.mean(op.Mul(off, off)))
