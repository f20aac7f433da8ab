"""The training loop: batches in, a run folder with checkpoint, log and plot out."""

import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fullframe.errors import InvalidInput
from fullframe.files import write_atomically
from fullframe.learn.batches import (
    Batch,
    TrainingBatch,
    epoch_plan,
    training_batches,
    validation_batches,
)
from fullframe.learn.checkpoint import (
    FILE,
    load_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from fullframe.learn.data import ImageSet
from fullframe.learn.nets import Net
from fullframe.learn.replicas import gather, replica_of, threads_of_operators
from fullframe.learn.runs import SETTINGS, Row, begin_with, differences, read_settings, write_log
from fullframe.learn.settings import POOLINGS, NetConfig, Recipe


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass
class Progress:
    """Where a run stands: whole epochs done, steps done of the next one's, and that one's sums."""

    epoch: int = 0
    step: int = 0
    steps: int = 0
    loss: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0
    history: list[Row] = field(default_factory=list)


class Trainer:
    """One run in a folder.

    The order of the images and their augmentation are functions of (seed, epoch, step), so a run continued from a
    checkpoint goes on as if it had not stopped; on a CPU with as many threads, bit for bit.
    """

    def __init__(
        self,
        run: Path,
        net: NetConfig,
        recipe: Recipe,
        images: ImageSet,
        device: str = "auto",
        init: Path | None = None,
        pooling: str = "torch",
    ) -> None:
        """Nothing is written before `open`; `init` is a run whose averaged weights this one begins with.

        With pooling "fused", the pools are fusedpool's.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if len(images.train) < 2:
            raise InvalidInput("there is one training image; it takes two or more", "data")
        if pooling not in POOLINGS:
            raise InvalidInput(f"pooling is {pooling!r}; it must be one of {', '.join(POOLINGS)}", "pooling")
        self.run, self.recipe, self.images = run, recipe, images
        self.device = torch.device(device)
        torch.manual_seed(recipe.seed)
        self.net, self.pooling = Net(net), pooling
        if pooling == "fused":
            from fullframe.learn.pools import fuse_pools  # only those who ask for it need fusedpool

            fuse_pools(self.net)
        self.init = None if init is None else begin_with(self.net, init)
        if recipe.frozen_body:
            for name, parameter in self.net.named_parameters():
                parameter.requires_grad_(name.startswith(("classifier.", "gate.")))
        self.net.to(self.device)
        nn.utils.convert_conv2d_weight_memory_format(self.net, torch.channels_last)
        self.ema = deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = _optimizer(self.net, recipe)
        self.progress = Progress()
        self.stopping = False
        # Threads that share each operator wait for one another hundreds of times a step, and badly on a busy
        # machine; threads that share the batch wait once. Dropout draws from one generator, so it has one thread.
        alone = self.device.type != "cpu" or net.dropout > 0
        self._threads = 1 if alone else torch.get_num_threads()
        self._workers = ThreadPoolExecutor(self._threads)
        self._replicas = [self.net]
        self._mean = torch.tensor(recipe.mean, device=self.device).view(3, 1, 1) * 255
        self._std = torch.tensor(recipe.std, device=self.device).view(3, 1, 1) * 255

    # -- state on disk

    def open(self) -> None:
        """Make the run folder, or continue the run in it; raises InvalidInput where that one has other settings."""
        settings = self._settings()
        if not (self.run / SETTINGS).exists():
            self.run.mkdir(parents=True, exist_ok=True)
            write_atomically(self.run / SETTINGS, json.dumps(settings, indent=1).encode())
            return
        if found := differences(read_settings(self.run), settings):
            raise InvalidInput(
                f"{self.run} holds a run with other settings ({'; '.join(found)}); continue it with its own, "
                "or name another folder",
                "run",
            )
        if not (self.run / FILE).exists():
            return
        tensors, state = load_checkpoint(self.run / FILE)
        groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            group, rest = name.split(".", 1)
            groups[group][rest] = tensor
        self.net.load_state_dict(groups["net"])
        self.ema.load_state_dict(groups["ema"])
        restore_optimizer(self.optimizer, groups["optimizer"])
        self.progress = Progress(**state)
        torch.set_rng_state(groups["rng"]["cpu"])
        if "cuda" in groups["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(groups["rng"]["cuda"], self.device)

    def save(self) -> None:
        """Write the checkpoint, then the log and the plot."""
        rng = {"rng.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["rng.cuda"] = torch.cuda.get_rng_state(self.device)
        named = {
            "net": self.net.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        tensors = {f"{group}.{name}": tensor for group, values in named.items() for name, tensor in values.items()}
        save_checkpoint(self.run / FILE, tensors | rng, vars(self.progress))
        write_log(self.run, self.progress.history, self.init)

    def _settings(self) -> dict[str, Any]:
        return {
            "net": self.net.config.to_json(),
            "recipe": self.recipe.to_json(),
            "labels": list(self.images.labels),
            "source": self.images.source,
            "validation_share": self.images.validation_share,
            "data": self.images.fingerprint(),
            "train_images": len(self.images.train),
            "validation_images": len(self.images.validation),
            "torch": torch.__version__,
            "device": self._device_name(),
            "pooling": self.pooling,
        } | ({} if self.init is None else {"init": self.init})

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = self._threads
        return f"{threads} CPU thread{'s' if threads > 1 else ''}"

    # -- work

    def fit(
        self,
        on_step: Callable[[Progress], None] = lambda _: None,
        on_epoch: Callable[[Row], None] = lambda _: None,
    ) -> list[Row]:
        """Train to the last epoch, saving after each; returns the log. SIGINT or SIGTERM saves, then Interrupted."""
        with self._signals(), threads_of_operators(1 if self._threads > 1 else torch.get_num_threads()):
            while self.progress.epoch < self.recipe.epochs:
                self._train_epoch(on_step)
                self._close_epoch()
                self.save()
                on_epoch(self.progress.history[-1])
        return self.progress.history

    def _train_epoch(self, on_step: Callable[[Progress], None]) -> None:
        progress = self.progress
        self.net.train()
        if self.recipe.frozen_body or progress.epoch >= self.recipe.epochs - self.recipe.frozen_norm_epochs:
            self._freeze_norms()
        self._replicas = [self.net, *(replica_of(self.net) for _ in range(1, self._threads))]
        clock = time.perf_counter()
        plan = epoch_plan(len(self.images.train), self.recipe, progress.epoch)
        progress.steps = len(plan)
        for batch in training_batches(self.images.train, plan, self.recipe, progress.epoch, progress.step):
            loss, correct = self._step(batch)
            progress.step += 1
            progress.loss += loss * len(batch.labels)
            progress.correct += correct
            progress.seen += len(batch.labels)
            progress.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
            on_step(progress)
            if self.stopping:
                self.save()
                raise Interrupted

    def _step(self, batch: TrainingBatch) -> tuple[float, int]:
        """One update; returns the batch's mean loss and how many it had right."""
        progress, recipe = self.progress, self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.learning_rate_at(progress.epoch + (progress.step + 1) / progress.steps)
        size = len(batch.labels)
        replicas = self._replicas[: max(1, size // 2)]  # two images or more each (batch norm)
        count = len(replicas)
        shares = map(TrainingBatch, *(each.tensor_split(count) for each in batch))
        results = list(self._workers.map(self._share, replicas, shares, [size] * count))
        if count > 1:
            gather(replicas)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.optimizer.step()
        self._average(progress.epoch * progress.steps + progress.step)
        value = sum(loss for loss, _ in results) / size
        if not np.isfinite(value):
            raise InvalidInput(
                f"the loss became {value} in epoch {progress.epoch + 1}; a lower learning rate, a longer warm-up "
                "or clipping would be right",
                "learning_rate",
            )
        return value, sum(correct for _, correct in results)

    def _share(self, net: Net, batch: TrainingBatch, count: int) -> tuple[float, int]:
        """A replica's gradients on its share of a batch of `count`; returns the summed loss and how many are right."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = net(self._normalise(batch.images)).float()
        labels, others, share = (each.to(self.device) for each in batch[1:])
        loss = share @ self._losses(logits, labels) + (1 - share) @ self._losses(logits, others)
        net.zero_grad(set_to_none=True)
        (loss / count).backward()  # type: ignore[no-untyped-call]
        return loss.item(), int((logits.argmax(1) == labels).sum())

    def _losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="none")

    def _freeze_norms(self) -> None:
        """Let batch norms use the averaged statistics from here on."""
        for norm, averaged in zip(self.net.modules(), self.ema.modules(), strict=True):
            if isinstance(norm, nn.BatchNorm2d):
                norm.load_state_dict(dict(norm.named_parameters()) | dict(averaged.named_buffers()))
                norm.eval()

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Move the averaged weights (and batch norm's statistics) towards the current ones, faster at first."""
        decay = min(self.recipe.ema, (1 + step) / (10 + step))
        for mean, value in zip(self.ema.state_dict().values(), self.net.state_dict().values(), strict=True):
            if mean.is_floating_point():
                mean.lerp_(value, 1 - decay)
            else:
                mean.copy_(value)

    def _close_epoch(self) -> None:
        progress = self.progress
        clock = time.perf_counter()
        loss, accuracy = self.validate()
        progress.epoch += 1
        row = {
            "epoch": progress.epoch,
            "learning_rate": self.recipe.learning_rate_at(progress.epoch),
            "loss": progress.loss / progress.seen,
            "train_accuracy": progress.correct / progress.seen,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "seconds": progress.seconds + time.perf_counter() - clock,
        }
        self.progress = Progress(epoch=progress.epoch, history=[*progress.history, row])

    def validate(self) -> tuple[float, float]:
        """Loss and accuracy of the averaged weights on the validation images; NaN where there are none."""
        batches = validation_batches(self.images.validation, max(self.recipe.augmentation.sizes))
        results: list[tuple[float, int]] = []
        while some := list(islice(batches, self._threads)):
            results += self._workers.map(self._judge, some)
        count = len(self.images.validation) or float("nan")
        return sum(loss for loss, _ in results) / count, sum(correct for _, correct in results) / count

    @torch.no_grad()
    def _judge(self, batch: Batch) -> tuple[float, int]:
        """The averaged weights' summed loss on a batch, and how many they have right."""
        images, labels = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
            logits = self.ema(self._normalise(images)).float()
        labels = labels.to(self.device)
        return F.cross_entropy(logits, labels, reduction="sum").item(), int((logits.argmax(1) == labels).sum())

    def _normalise(self, images: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] on any device to normalised float32, channels last, on the run's."""
        pixels = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        return (pixels - self._mean) / self._std

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step."""

        def stop(_signal: int, _frame: FrameType | None) -> None:
            self.stopping = True

        if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
            yield
            return
        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _optimizer(net: Net, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer; biases and batch norm have no weight decay."""
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, recipe.learning_rate, momentum=0.9, nesterov=True, foreach=True)
    return torch.optim.AdamW(groups, recipe.learning_rate, foreach=True)
