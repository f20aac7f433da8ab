"""One network for several threads, each with a share of the batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch

from fullframe.learn.nets import Net


def replica_of(net: Net) -> Net:
    """A network that shares the net's parameters but has gradients and batch norm statistics of its own."""
    replica = deepcopy(net)
    for own, shared in zip(replica.parameters(), net.parameters(), strict=True):
        own.data = shared.data
    return replica


@torch.no_grad()
def gather(replicas: list[Net]) -> None:
    """Sum the gradients in the first replica; give all the mean of their statistics."""
    for parameters in zip(*(replica.parameters() for replica in replicas), strict=True):
        total, *parts = [parameter.grad for parameter in parameters]
        for part in parts:
            if total is not None:  # None: it is not trained
                total.add_(part)
    for statistics in zip(*(replica.buffers() for replica in replicas), strict=True):
        if statistics[0].is_floating_point():
            mean = torch.stack(statistics).mean(0)
            for each in statistics:
                each.copy_(mean)


@contextmanager
def threads_of_operators(count: int) -> Iterator[None]:
    """Within, each operator has `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
