import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fullframe import learn
from fullframe.errors import InvalidInput
from fullframe.learn.checkpoint import FILE, load_checkpoint
from fullframe.learn.data import ImageSet, load_images
from fullframe.learn.runs import COLUMNS, load_run
from fullframe.learn.settings import Augmentation, NetConfig, Recipe
from fullframe.learn.train import Interrupted, Progress, Trainer
from tests.learn.shapes import write_shapes

NET = NetConfig(classes=3, width=16, depth=(1, 1), stem=8, dropout=0.1)
RECIPE = Recipe(
    epochs=3,
    batch_size=16,
    warmup_epochs=0.5,
    ema=0.9,
    frozen_norm_epochs=1,
    augmentation=Augmentation(sizes=(16, 24), size_weights=(2, 1)),
)
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 40)


@pytest.fixture(scope="module")
def images(shapes: Path) -> ImageSet:
    return load_images(shapes)


def trained(run: Path, images: ImageSet, recipe: Recipe = RECIPE) -> tuple[dict[str, torch.Tensor], list[object]]:
    trainer = Trainer(run, NET, recipe, images, "cpu")
    trainer.open()
    trainer.fit()
    return saved(run)


def saved(run: Path) -> tuple[dict[str, torch.Tensor], list[object]]:
    """All tensors of a checkpoint, and its log without the times."""
    tensors, state = load_checkpoint(run / FILE)
    return tensors, [{key: value for key, value in row.items() if key != "seconds"} for row in state["history"]]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def straight(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run = tmp_path_factory.mktemp("runs") / "straight"
    trained(run, images)
    return run


def test_shapes_are_learnt(straight: Path) -> None:
    rows = list(csv.DictReader((straight / "log.csv").open()))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[-1]["validation_accuracy"]) > 0.9
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    assert (straight / "curve.png").read_bytes().startswith(PNG)
    settings = json.loads((straight / "run.json").read_text())
    assert settings["recipe"]["seed"] == 0
    assert settings["labels"] == ["blue", "green", "red"]


def test_the_saved_network_is_the_averaged_one(straight: Path, images: ImageSet) -> None:
    net, _, progress = load_run(straight)
    trainer = Trainer(straight, NET, RECIPE, images, "cpu")
    trainer.open()
    assert same(net.state_dict(), trainer.ema.state_dict())
    assert not same(net.state_dict(), trainer.net.state_dict())
    _, accuracy = trainer.validate()
    assert accuracy == progress["history"][-1]["validation_accuracy"]


def test_nothing_on_disk_is_pickled(straight: Path) -> None:
    files = sorted(file.name for file in straight.iterdir())
    assert files == ["checkpoint.safetensors", "curve.png", "log.csv", "run.json"]
    header_length = int.from_bytes((straight / FILE).read_bytes()[:8], "little")
    json.loads((straight / FILE).read_bytes()[8 : 8 + header_length])
    for source in Path(learn.__path__[0]).glob("*.py"):
        assert not any(word in source.read_text() for word in ("import pickle", "torch.load(", "torch.save("))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    straight: Path, images: ImageSet, tmp_path: Path
) -> None:
    again, log = trained(tmp_path / "again", images)
    assert same(again, saved(straight)[0])
    assert log == saved(straight)[1]
    other, _ = trained(tmp_path / "other", images, replace(RECIPE, seed=1))
    assert not same(other, again)


def test_a_stop_in_mid_epoch_changes_nothing(straight: Path, images: ImageSet, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for place in ((0, 4), (1, 2), (1, 6), (2, 3)):  # 6 is an epoch's last step
        trainer = Trainer(run, NET, RECIPE, images, "cpu")
        trainer.open()

        def stop(progress: Progress, place: tuple[int, int] = place) -> None:
            if (progress.epoch, progress.step) == place:
                os.kill(os.getpid(), signal.SIGTERM)

        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            trainer.fit(stop)
        assert signal.getsignal(signal.SIGTERM) == before
        assert (trainer.progress.epoch, trainer.progress.step) == place
    trained(run, images)
    tensors, log = saved(run)
    assert same(tensors, saved(straight)[0])
    assert log == saved(straight)[1]


def test_a_killed_run_continues_to_the_same_bits(straight: Path, shapes: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the second epoch, the same command again: as if nothing had happened."""
    run = tmp_path / "run"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "import torch\n"
        "from fullframe.learn.data import load_images\n"
        "from fullframe.learn.train import Trainer\n"
        "from tests.learn.test_training import NET, RECIPE\n"
        "torch.set_num_threads(int(sys.argv[4]))\n"
        "trainer = Trainer(Path(sys.argv[1]), NET, RECIPE, load_images(Path(sys.argv[2])), 'cpu')\n"
        "trainer.open()\n"
        "print('at', trainer.progress.epoch, flush=True)\n"
        "def pause(progress):\n"
        "    if sys.argv[3] == 'pause' and (progress.epoch, progress.step) == (1, 3):\n"
        "        print('mid-epoch', flush=True)\n"
        "        time.sleep(600)\n"
        "trainer.fit(pause)\n"
    )

    def start(how: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", program, str(run), str(shapes), how, str(torch.get_num_threads())]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])

    with start("pause") as first:
        assert first.stdout is not None
        assert [next(first.stdout), next(first.stdout)] == ["at 0\n", "mid-epoch\n"]
        first.kill()
    assert len(saved(run)[1]) == 1
    # What a crash in the middle of a write would leave.
    (run / f".{FILE}.abc.tmp").write_bytes((run / FILE).read_bytes()[:1000])
    with start("go on") as second:
        assert second.stdout is not None
        assert next(second.stdout) == "at 1\n"
    assert second.returncode == 0
    tensors, log = saved(run)
    assert same(tensors, saved(straight)[0])
    assert log == saved(straight)[1]


def test_a_run_with_other_settings_is_not_continued(straight: Path, images: ImageSet, shapes: Path) -> None:
    other = replace(RECIPE, epochs=5)
    with pytest.raises(InvalidInput, match=r"recipe\.epochs 3, not 5"):
        Trainer(straight, NET, other, images, "cpu").open()
    with pytest.raises(InvalidInput, match="other images"):
        Trainer(straight, NET, RECIPE, load_images(shapes, seed=3), "cpu").open()


def test_a_run_can_begin_with_another_s_weights(straight: Path, images: ImageSet, tmp_path: Path) -> None:
    net, recipe = replace(NET, levels=2), replace(RECIPE, epochs=1, frozen_norm_epochs=1, warmup_epochs=0.0)
    trainer = Trainer(tmp_path / "run", net, recipe, images, "cpu", init=straight)
    before = load_run(straight)[0].state_dict()
    assert all(torch.equal(trainer.net.state_dict()[name], value) for name, value in before.items())
    trainer.open()
    trainer.fit()
    _, settings, progress = load_run(tmp_path / "run")
    assert settings["init"]["settings"]["recipe"]["epochs"] == 3
    assert len(settings["init"]["history"]) == 3
    assert progress["history"][-1]["validation_accuracy"] > 0.9
    Trainer(tmp_path / "run", net, recipe, images, "cpu", init=straight).open()
    with pytest.raises(InvalidInput, match="init"):
        Trainer(tmp_path / "run", net, recipe, images, "cpu").open()
    with pytest.raises(InvalidInput, match="holds no weights that fit"):
        Trainer(tmp_path / "other", replace(NET, width=32, stem=6), recipe, images, "cpu", init=straight)


def test_a_frozen_body_keeps_its_weights(straight: Path, images: ImageSet, tmp_path: Path) -> None:
    net, recipe = replace(NET, levels=2, dropout=0.0), replace(RECIPE, epochs=1, warmup_epochs=0.0, frozen_body=True)
    with threads(2):
        trainer = Trainer(tmp_path / "run", net, recipe, images, "cpu", init=straight)
        before = {name: value.clone() for name, value in trainer.net.state_dict().items()}
        trainer.open()
        trainer.fit()
    after = trainer.net.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {"gate.weight", "gate.bias", "classifier.weight", "classifier.bias"}
    again = Trainer(tmp_path / "run", net, recipe, images, "cpu", init=straight)
    again.open()
    assert again.progress.epoch == 1


def test_a_folder_without_a_run_has_no_network(tmp_path: Path, images: ImageSet) -> None:
    with pytest.raises(InvalidInput, match="holds no training run"):
        load_run(tmp_path)
    Trainer(tmp_path, NET, RECIPE, images, "cpu").open()
    with pytest.raises(InvalidInput, match="no checkpoint yet"):
        load_run(tmp_path)


def test_frozen_norms_keep_the_averaged_statistics(images: ImageSet, tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, NET, RECIPE, images, "cpu")
    trainer.open()
    at_step: dict[tuple[int, int], list[torch.Tensor]] = {}

    def watch(progress: Progress) -> None:
        statistics = [tensor.clone() for net in (trainer.net, trainer.ema) for tensor in net.buffers()]
        at_step[progress.epoch, progress.step] = statistics

    trainer.fit(watch)

    def equal(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return all(torch.equal(x, y) for x, y in zip(at_step[a], at_step[b], strict=True))

    assert not equal((1, 5), (1, 6))
    assert equal((2, 1), (2, 6))
    half = len(at_step[2, 1]) // 2
    assert all(torch.equal(x, y) for x, y in zip(at_step[2, 6][:half], at_step[1, 6][half:], strict=True))


def test_adamw_and_bfloat16_learn_too(images: ImageSet, tmp_path: Path) -> None:
    recipe = replace(
        RECIPE, optimizer="adamw", learning_rate=0.01, precision="bfloat16", clip=1.0, epochs=5, frozen_norm_epochs=0
    )
    _, log = trained(tmp_path / "run", images, recipe)
    row = log[-1]
    assert isinstance(row, dict)
    assert row["validation_accuracy"] > 0.9


def test_a_diverging_run_says_so(images: ImageSet, tmp_path: Path) -> None:
    recipe = replace(RECIPE, learning_rate=1e20, warmup_epochs=0)
    with pytest.raises(InvalidInput, match="lower learning rate"):
        trained(tmp_path / "run", images, recipe)


def test_warm_up_and_cosine() -> None:
    recipe = Recipe(epochs=10, learning_rate=0.4, warmup_epochs=2)
    rates = [recipe.learning_rate_at(epoch) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    short = replace(recipe, epochs=1)
    assert [short.learning_rate_at(epoch) for epoch in (0.25, 0.5, 0.75)] == pytest.approx([0.2, 0.4, 0.2])
    constant = replace(recipe, schedule="constant")
    assert [constant.learning_rate_at(epoch) for epoch in (1, 2, 6, 10)] == pytest.approx([0.2, 0.4, 0.4, 0.4])


def test_settings_survive_json() -> None:
    assert Recipe.from_json(json.loads(json.dumps(RECIPE.to_json()))) == RECIPE
    with pytest.raises(InvalidInput, match="unknown settings: colour"):
        Recipe.from_json(RECIPE.to_json() | {"colour": 1})


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 1},
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"batch_pixels": -1},
        {"learning_rate": 0.0},
        {"weight_decay": -1.0},
        {"warmup_epochs": -1.0},
        {"label_smoothing": 1.0},
        {"ema": 1.0},
        {"clip": -1.0},
        {"frozen_norm_epochs": 31},
        {"precision": "int8"},
        {"seed": -1},
        {"std": (1.0, 0.0, 1.0)},
    ],
)
def test_a_bad_setting_is_named(change: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match=next(iter(change))) as caught:
        Recipe(**change)  # type: ignore[arg-type]
    assert caught.value.field == next(iter(change))


def test_few_images_are_one_batch_and_one_is_too_few(images: ImageSet, tmp_path: Path) -> None:
    few = replace(images, train=images.train[::20])
    trainer = Trainer(tmp_path / "run", NET, replace(RECIPE, batch_size=128), few, "cpu")
    trainer.open()
    seen: list[tuple[int, int]] = []
    trainer.fit(lambda progress: seen.append((progress.seen, progress.steps)))
    assert seen == [(len(few.train), 1)] * 3
    with pytest.raises(InvalidInput, match="one training image"):
        Trainer(tmp_path / "none", NET, RECIPE, replace(images, train=images.train[:1]), "cpu")


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def test_threads_share_a_batch(images: ImageSet, tmp_path: Path) -> None:
    """With batch norm frozen the shares of a batch are independent, so that their number changes nothing."""
    net = replace(NET, dropout=0.0)
    for name, frozen in (("frozen", 1), ("live", 0)):
        recipe = replace(RECIPE, epochs=1, warmup_epochs=0.0, frozen_norm_epochs=frozen)
        weights = []
        for run, count in enumerate((1, 3, 3)):
            with threads(count):
                trainer = Trainer(tmp_path / f"{name}{run}", net, recipe, images, "cpu")
                trainer.open()
                trainer.fit()
            assert len(trainer._replicas) == count
            assert torch.get_num_threads() == 1
            first, *others = (dict(replica.named_buffers()) for replica in trainer._replicas)
            for other in others:
                assert all(torch.equal(first[key], other[key]) for key in first if "running" in key)
            weights.append(trainer.net.state_dict())
        alone, shared, again = weights
        assert same(shared, again)
        close = all(torch.allclose(alone[key], shared[key], atol=1e-3) for key in alone if "weight" in key)
        assert close == bool(frozen)
