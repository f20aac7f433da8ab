"""Arguments of the operators but for sizes, checked before anything is launched."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedpool.kinds import KINDS
from fusedpool.prologue import ACTIVATIONS

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


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
    momentum: float | Tensor,
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
    if not isinstance(momentum, int | float) and not (isinstance(momentum, Tensor) and momentum.numel() == 1):
        raise ValueError(f"momentum is {momentum!r}; it must be a number, or a tensor of one")


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
    if not isinstance(p, int | float) and not hasattr(p, "__float__"):  # numpy's are numbers too
        raise ValueError(f"p is {p!r}; it must be a number, or a tensor of one")
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
        if not takers:
            raise ValueError(f"p is {p!r}; none of the kinds {list(kinds)} has a parameter")
        if len(takers) > 1:
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


def check_indices(kind: str, return_indices: bool) -> None:
    """Raise ValueError where indices are asked of a kind that has none."""
    if return_indices and kind not in ("max", "min"):
        raise ValueError(f"return_indices is True; only max and min have indices, not {kind}")


def seed_for(x: Tensor, generator: Any) -> Tensor:
    """A random seed, int64 [1] on x's device, from a torch.Generator or PyTorch's own state."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator is of type {type(generator).__name__}; it must be a torch.Generator")
    options: dict[str, Any] = {} if generator is None else {"generator": generator}  # without one, it exports
    return torch.randint(2**62, (1,), device=x.device, **options)
