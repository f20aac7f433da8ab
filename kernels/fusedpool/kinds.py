"""The kinds of pooling, once: each a monoid (lift, combine, identity, finish) and its gradient, as Triton functions.

A state is four tensors of one shape: three numbers a, b, c and the position i of a winner (-1: none yet). What they
hold, for values v, their positions, and a parameter p:

    kind             a             b                 c             finish
    max, min         best of +-v   -                 -             +-a
    avg, sum         sum v         -                 -             a / n, a
    lp               sum |v|^p     -                 -             a^(1/p)               ONNX LpPool
    gem              sum w^p       -                 sum w^p ln w  (a / n)^(1/p)         arXiv:1711.02512 eq. 3
    lse              max p v = m   sum exp(p v - m)  -             (m + ln(b / n)) / p   arXiv:1411.6228 eq. 6
    softpool         max v = m     sum exp(v - m)    sum exp() v   c / b                 arXiv:2101.00440 eq. 2
    stochastic       best w / e    its w             -             b                     arXiv:1301.3557 eq. 5
    stochastic_mean  sum w         sum w^2           -             b / a                 arXiv:1301.3557 eq. 6
    std              mean v        sum (v - mean)^2  count         sqrt(b / c)           Chan et al. 1979
    mixed            best of v     sum v             -             p a + (1 - p) b / n   arXiv:1509.08985 eq. 1

where w is max(v, 1e-6) for gem and max(v, 0) for stochastic, and e ~ Exp(1).

Sums are kept in float32 (float64 for float64 input). A NaN wins over everything; among equal values the first wins;
a state that nothing was combined into is the identity, whose i is -1.
"""

from dataclasses import dataclass
from typing import Final

from fusedpool._triton import tl, triton

GEM_FLOOR: Final = 1e-6


@dataclass(frozen=True)
class Kind:
    """What a domain has to know of a kind.

    Attributes:
        winner: the output is one value of its window; backward needs to know which.
        aux: backward needs one number per output, see `finish_aux`.
        default: of the parameter; None: there is none.
        learnable: the parameter may be a tensor that gets a gradient.
        uses_input: the gradient at a value depends on it.
        piecewise_linear: second derivatives by the input are zero.
    """

    winner: bool = False
    aux: bool = False
    default: float | None = None
    learnable: bool = False
    uses_input: bool = True
    piecewise_linear: bool = False


KINDS: Final[dict[str, Kind]] = {
    "max": Kind(winner=True, uses_input=False, piecewise_linear=True),
    "min": Kind(winner=True, uses_input=False, piecewise_linear=True),
    "avg": Kind(uses_input=False, piecewise_linear=True),
    "sum": Kind(uses_input=False, piecewise_linear=True),
    "lp": Kind(default=2.0),
    "gem": Kind(default=3.0, learnable=True, aux=True),
    "lse": Kind(default=1.0, aux=True),
    "softpool": Kind(aux=True),
    "stochastic": Kind(winner=True, uses_input=False, piecewise_linear=True),
    "stochastic_mean": Kind(aux=True),
    "std": Kind(aux=True),
    "mixed": Kind(winner=True, aux=True, default=0.5, learnable=True, uses_input=False, piecewise_linear=True),
}
"""All of them; `stochastic_mean` is what "stochastic" means in evaluation."""


@triton.jit
def power(base, exponent):
    """base ** exponent for base >= 0."""
    return tl.exp(exponent * tl.log(base))


@triton.jit
def exponential(seed, high, low, tap):
    """A number ~ Exp(1) for each counter (low, high, tap): Philox-4x32-10's first word as a uniform u, -ln u."""
    zero = tl.zeros_like(tap).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low.to(tl.uint32), high.to(tl.uint32), tap.to(tl.uint32), zero)
    return -tl.log(tl.uint_to_uniform_float(word))


@triton.jit
def identity(like, KIND: tl.constexpr):
    """(a, b, c, i) that leaves every other state as it is, in the shape and dtype of `like`."""
    zero = tl.zeros_like(like)
    a = zero
    if (KIND == "max") | (KIND == "min") | (KIND == "mixed") | (KIND == "lse") | (KIND == "softpool"):
        a = zero - float("inf")
    return a, zero, zero, tl.zeros_like(like).to(tl.int32) - 1


@triton.jit
def lift(v, valid, p, e, KIND: tl.constexpr):
    """The state (a, b, c) of single values v where `valid`, the identity elsewhere.

    e: samples ~ Exp(1) for stochastic (the largest w / e falls on each value with probability w / sum w), else unused.
    """
    a, b, c, _ = identity(v, KIND)
    if (KIND == "max") | (KIND == "avg") | (KIND == "sum"):
        a = tl.where(valid, v, a)
    elif KIND == "min":
        a = tl.where(valid, -v, a)
    elif KIND == "mixed":
        a = tl.where(valid, v, a)
        b = tl.where(valid, v, b)
    elif KIND == "lp":
        a = tl.where(valid, power(tl.abs(v), p), a)
    elif KIND == "gem":
        log = tl.log(tl.where(v < 1e-6, 1e-6, v))
        a = tl.where(valid, tl.exp(p * log), a)
        c = tl.where(valid, tl.exp(p * log) * log, c)
    elif KIND == "lse":
        a = tl.where(valid, p * v, a)
        b = tl.where(valid, 1.0, b)
    elif KIND == "softpool":
        a = tl.where(valid, v, a)
        b = tl.where(valid, 1.0, b)
        c = tl.where(valid, v, c)
    elif KIND == "stochastic":
        w = tl.where(v < 0, 0.0, v)
        a = tl.where(valid, w / e, a)
        b = tl.where(valid, w, b)
    elif KIND == "stochastic_mean":
        w = tl.where(v < 0, 0.0, v)
        a = tl.where(valid, w, a)
        b = tl.where(valid, w * w, b)
    elif KIND == "std":
        a = tl.where(valid, v, a)
        c = tl.where(valid, 1.0, c)
    return a, b, c


@triton.jit
def combine(a1, b1, c1, i1, a2, b2, c2, i2, KIND: tl.constexpr, ORDERED: tl.constexpr):
    """The state of both.

    ORDERED: all positions of the second come after those of the first, which saves comparing them.
    """
    i = i1
    if (KIND == "max") | (KIND == "min") | (KIND == "stochastic") | (KIND == "mixed"):
        if ORDERED:
            take = (a2 > a1) | (a2 != a2)
        else:
            take = (a2 > a1) | ((a2 == a1) & (i2 < i1)) | ((a2 != a2) & ((a1 == a1) | (i2 > i1)))
        if KIND != "stochastic":  # there, a window of zeros has no winner
            take = take | (i1 < 0)
        take = take & (i2 >= 0)
        a = tl.where(take, a2, a1)
        i = tl.where(take, i2, i1)
        b = b1 + b2
        if KIND == "stochastic":
            b = tl.where(take, b2, b1)
        c = c1
    elif (KIND == "lse") | (KIND == "softpool"):
        a = tl.where((a2 > a1) | (a2 != a2), a2, a1)
        # The side that holds the peak keeps its sum: an infinite peak has no difference to itself.
        scale1 = tl.where(a1 == a, 1.0, tl.exp(a1 - a))
        scale2 = tl.where(a2 == a, 1.0, tl.exp(a2 - a))
        b = b1 * scale1 + b2 * scale2
        # A weight of nothing takes nothing in, be the value -inf.
        c = tl.where(scale1 == 0, 0.0, c1 * scale1) + tl.where(scale2 == 0, 0.0, c2 * scale2)
    elif KIND == "std":
        c = c1 + c2
        share = c2 / tl.where(c == 0, 1.0, c)
        a = a1 + (a2 - a1) * share
        b = b1 + b2 + (a2 - a1) * c1 * share * (a2 - a1)  # in this order: c1 may be 0, the square infinite
    else:
        a = a1 + a2
        b = b1 + b2
        c = c1 + c2
    return a, b, c, i


@triton.jit
def _combine_best(a1, b1, c1, i1, a2, b2, c2, i2):
    return combine(a1, b1, c1, i1, a2, b2, c2, i2, "max", False)


@triton.jit
def _combine_stochastic(a1, b1, c1, i1, a2, b2, c2, i2):
    return combine(a1, b1, c1, i1, a2, b2, c2, i2, "stochastic", False)


@triton.jit
def _combine_exponentials(a1, b1, c1, a2, b2, c2):
    a, b, c, _ = combine(a1, b1, c1, 0, a2, b2, c2, 0, "softpool", False)
    return a, b, c


@triton.jit
def _combine_moments(a1, b1, c1, a2, b2, c2):
    a, b, c, _ = combine(a1, b1, c1, 0, a2, b2, c2, 0, "std", False)
    return a, b, c


@triton.jit
def reduce(a, b, c, i, KIND: tl.constexpr, AXIS: tl.constexpr):
    """The state of all states along an axis, whatever the order of their positions."""
    winner = tl.max(i, AXIS)
    if (KIND == "max") | (KIND == "min") | (KIND == "mixed"):
        total = tl.sum(b, AXIS)
        a, b, c, winner = tl.reduce((a, b, c, i), AXIS, _combine_best)
        b = total
    elif KIND == "stochastic":
        a, b, c, winner = tl.reduce((a, b, c, i), AXIS, _combine_stochastic)
        winner = tl.where(a == 0, -1, winner)
    elif (KIND == "lse") | (KIND == "softpool"):
        a, b, c = tl.reduce((a, b, c), AXIS, _combine_exponentials)
    elif KIND == "std":
        a, b, c = tl.reduce((a, b, c), AXIS, _combine_moments)
    else:
        a, b, c = tl.sum(a, AXIS), tl.sum(b, AXIS), tl.sum(c, AXIS)
    return a, b, c, winner


@triton.jit
def finish(a, b, c, n, p, KIND: tl.constexpr):
    """The pooled value of a state; n: the divisor of avg, gem, lse and mixed."""
    y = a
    if KIND == "min":
        y = -a
    elif KIND == "avg":
        y = a / n
    elif KIND == "lp":
        y = power(a, 1 / p)
    elif KIND == "gem":
        y = power(a / n, 1 / p)
    elif KIND == "lse":
        y = (a + tl.log(b / n)) / p
    elif KIND == "softpool":
        y = c / b
    elif KIND == "stochastic":
        y = b
    elif KIND == "stochastic_mean":
        y = tl.where(a == 0, 0.0, b / a)
    elif KIND == "std":
        y = tl.sqrt(b / c)
    elif KIND == "mixed":
        y = p * a + (1 - p) * (b / n)
    return y


@triton.jit
def finish_aux(a, b, c, n, p, y, KIND: tl.constexpr):
    """What backward needs of each output: dy/dp where p is learnable, else what `gradient` says."""
    aux = y
    if KIND == "gem":
        aux = y / p * (c / a - tl.log(y))
    elif KIND == "mixed":
        aux = a - b / n
    elif KIND == "softpool":
        aux = a + tl.log(b)
    elif (KIND == "std") | (KIND == "stochastic_mean"):
        aux = a
    return aux


@triton.jit
def gradient(g, v, y, aux, won, n, p, KIND: tl.constexpr):
    """g * dy/dv for one value v of an output y; won: v is its winner.

    aux: y unrounded for lse, ln sum exp v for softpool, the mean for std, sum w for stochastic_mean.
    """
    zero = tl.zeros_like(g)
    if (KIND == "max") | (KIND == "min") | (KIND == "stochastic"):
        d = tl.where(won, g, zero)
    elif KIND == "avg":
        d = g / n
    elif KIND == "sum":
        d = g
    elif KIND == "lp":
        size = tl.abs(v)
        d = tl.where((v == 0) | (y == 0), zero, g * power(size / y, p - 1) * tl.where(v < 0, -1.0, 1.0))
    elif KIND == "gem":
        d = tl.where(v < 1e-6, zero, g * power(v / y, p - 1) / n)
    elif KIND == "lse":
        d = g * tl.exp(p * (v - aux)) / n
    elif KIND == "softpool":
        weight = tl.exp(v - aux)
        d = tl.where(weight == 0, zero, g * weight * (1 + v - y))
    elif KIND == "stochastic_mean":
        d = tl.where((v > 0) & (aux != 0), g * (2 * v - y) / aux, zero)
    elif KIND == "std":
        d = tl.where(y == 0, zero, g * (v - aux) / (n * y))
    else:  # mixed
        d = tl.where(won, g * p, zero) + g * (1 - p) / n
    return d
