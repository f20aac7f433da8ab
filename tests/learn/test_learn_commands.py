"""The three commands, as typed."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import typer
from typer.testing import CliRunner, Result

from fullframe.cli.convert import convert
from fullframe.convert.metadata import add_training_facts, get_contract, load_model
from fullframe.engine.ort import OrtEngine
from fullframe.errors import InvalidInput
from fullframe.learn import commands
from fullframe.learn.card import model_card, recipe_command
from fullframe.learn.data import load_images
from fullframe.learn.evaluate import accuracy_by_size, resize_shorter_side
from fullframe.learn.export import export_run
from fullframe.learn.options import spelled
from fullframe.learn.runs import read_settings
from fullframe.learn.settings import Augmentation, NetConfig, Recipe
from tests.learn.shapes import write_shapes


def fullframe(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fullframe", *map(str, words)], check=False, capture_output=True, text=True
    )


def here(*words: object) -> Result:
    """The same in this process, which has loaded torch already."""
    app = typer.Typer()
    for command in (commands.train, commands.export, commands.evaluate, convert):
        app.command()(command)
    return CliRunner().invoke(app, [str(word) for word in words])


OPTIONS = (
    "--width 16 --depth 1,1 --stem 4 --activation silu --epochs 3 --batch-size 16 --learning-rate 0.2 "
    "--warmup-epochs 0.5 --ema 0.8 --sizes 16:2,24:1 --area 0.6,1"
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", 40)


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, then its export with card."""
    run = tmp_path_factory.mktemp("runs") / "run"
    (shapes / "red" / "broken.jpg").write_text("no image")
    trained = fullframe("train", shapes, "-o", run, *OPTIONS.split(), "--threads", 1)
    assert trained.returncode == 0, trained.stderr
    assert "red/broken.jpg" in trained.stderr
    exported = fullframe(
        *("export", run, "-o", run / "shapes.onnx", "--evaluate", shapes, "--sizes", "0,16,32"),
        *("--card", run / "card.md", "--about", "Coloured rectangles."),
    )
    assert exported.returncode == 0, exported.stderr
    assert "differ" in exported.stderr
    return run


def test_a_finished_run_is_left_as_it_is(run: Path, shapes: Path) -> None:
    before = (run / "checkpoint.safetensors").read_bytes()
    again = here("train", shapes, "-o", run, *OPTIONS.split())
    assert again.exit_code == 0, again.output
    assert (run / "checkpoint.safetensors").read_bytes() == before


def test_a_run_goes_to_a_model_repository_or_is_converted_as_it_is_exported(run: Path, tmp_path: Path) -> None:
    there = here("export", run, "--repository", tmp_path, "--name", "shapes")
    assert there.exit_code == 0, there.output
    converted = here("convert", run, "-o", tmp_path / "again.onnx")
    assert converted.exit_code == 0, converted.output
    engines = OrtEngine(tmp_path / "shapes" / "1" / "model.onnx"), OrtEngine(tmp_path / "again.onnx")
    assert [engine.contract.name for engine in engines] == ["shapes", "again"]
    assert (tmp_path / "shapes" / "config.pbtxt").exists()
    assert (tmp_path / "shapes" / "labels.txt").read_text().split() == list(engines[1].contract.labels)
    picture = np.random.default_rng(0).integers(0, 256, (31, 45, 3), np.uint8)
    first, second = (engine.run(picture, ["logits"])["logits"] for engine in engines)
    np.testing.assert_array_equal(first, second)


def test_an_export_says_where_to(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes((run / "shapes.onnx").read_bytes())
    for words, reason in (
        (("export", run), "say where to"),
        (("export", tmp_path / "model.onnx", "--repository", tmp_path, "-o", tmp_path / "b.onnx"), "nothing else"),
        (("convert", run, "-o", tmp_path / "b.onnx", "--bgr"), "knows all this itself"),
    ):
        refused = here(*words)
        assert refused.exit_code == 2
        assert reason in " ".join(re.sub("[│─]", " ", refused.output).split())


def test_other_options_are_refused_by_name(run: Path, shapes: Path) -> None:
    other = here("train", shapes, "-o", run, *OPTIONS.replace("--ema 0.8", "--ema 0.7").split())
    assert isinstance(other.exception, InvalidInput)
    assert "recipe.ema 0.8, not 0.7" in str(other.exception)


@pytest.mark.slow
def test_a_run_can_go_into_a_file_for_batches_of_different_sizes(run: Path, tmp_path: Path) -> None:
    exported = fullframe("export", run, "--ragged", "-o", tmp_path / "shapes.onnx")
    assert exported.returncode == 0, exported.stderr
    assert "largest difference between an image in a batch and alone" in exported.stderr
    contract = OrtEngine(tmp_path / "shapes.onnx").contract
    assert contract.ragged and contract.name == "shapes"
    assert [path.name for path in tmp_path.iterdir()] == ["shapes.onnx"]


def test_the_card_s_command_is_the_one_that_was_typed(run: Path) -> None:
    settings = read_settings(run)
    net, recipe = NetConfig.from_json(settings["net"]), Recipe.from_json(settings["recipe"])
    command = recipe_command("shapes", net, recipe)
    assert command == f"fullframe train shapes --out RUN {OPTIONS}"
    assert command in (run / "card.md").read_text()
    assert recipe_command("d", NetConfig(3), Recipe()) == "fullframe train d --out RUN"
    assert recipe.augmentation == Augmentation(sizes=(16, 24), size_weights=(2, 1), area=(0.6, 1.0))


def test_the_card_s_figures_are_the_file_s(run: Path, shapes: Path) -> None:
    card, model = (run / "card.md").read_text(), run / "shapes.onnx"
    contract = OrtEngine(model).contract
    assert contract.name == "shapes"
    accuracy = contract.training["accuracy"]
    assert accuracy["images"] == 12
    held_out = load_images(shapes).validation
    by_size = accuracy_by_size(model, held_out, contract.labels, (0, 16, 32))
    assert accuracy["by_size"] == {str(size): value for size, value in by_size.items()}
    assert by_size[0] > 0.9
    assert f"| float32 | {' | '.join(f'{100 * value:.2f}' for value in by_size.values())} |" in card
    for words in (
        f"{contract.training['parameters']:,}",
        f"{contract.training['multiply_adds_per_pixel']:,} per pixel",
        "each seeing {} x {}".format(*contract.receptive_field),
        "Coloured rectangles.",
        "108 images to train on, 12 held out",
        "card-curve.png",
    ):
        assert words in card
    assert (run / "card-curve.png").read_bytes() == (run / "curve.png").read_bytes()


def test_the_card_of_a_run_begun_with_another_s_weights_has_both_commands(
    run: Path, shapes: Path, tmp_path: Path
) -> None:
    words = f"{OPTIONS.replace('--epochs 3', '--epochs 1')} --levels 2 --frozen-body"
    second = here("train", shapes, "-o", tmp_path / "second", "--init", run, *words.split(), "--threads", 1)
    assert second.exit_code == 0, second.output
    export_run(tmp_path / "second", tmp_path / "m.onnx", "m")
    card = model_card(tmp_path / "m.onnx")
    assert f"fullframe train shapes --out RUN1 {OPTIONS}\nfullframe train shapes --out RUN2 --init RUN1 " in card
    assert "--levels 2" in card and "--frozen-body " in card and "True" not in card
    assert len(re.findall(r"\d epochs? took", card)) == 2


def test_the_card_shows_what_else_was_measured(run: Path, tmp_path: Path) -> None:
    model = tmp_path / "shapes.onnx"
    model.write_bytes((run / "shapes.onnx").read_bytes())
    facts = {
        "neighbours": {"k": 20, "bank": 1234, "by_pooling": {"gem(3)": {"32": 0.5, "64": 0.25}}},
        "rival": {
            **get_contract(load_model(model)).training,
            **{"name": "Other-2", "by_size": {"32": 0.75, "64": 0.5}},
        },
        "photographs": [{"about": "Two squares.", "figure": "answer", "by_scale": {"0.5": "red", "2.0": "blue"}}],
    }
    assert "## Features" not in model_card(model)
    add_training_facts(model, facts)
    card = model_card(model, confusion="c.png", sizes="s.png")
    for words in (
        *("20 training images", "1,234", "| gem(3) | 50.00 | 25.00 |", "| answer | red | blue |", "(c.png)", "(s.png)"),
        *("| Other-2 | 75.00 | 50.00 |", "Other-2, to compare with: ", "for 3 epochs (this model: 3)"),
    ):
        assert words in card


def test_help_needs_no_torch() -> None:
    program = (
        "import sys; from fullframe.cli import main; sys.argv = ['fullframe', 'train', '--help']\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert shown.stdout.endswith("False\n"), shown.stderr
    for each in (NetConfig(1), Recipe(), Augmentation()):
        assert all(f"--{name.replace('_', '-')} " in shown.stdout for name in spelled(each))


def test_evaluate_prints_what_the_file_reaches(run: Path, shapes: Path) -> None:
    printed = here("evaluate", run / "shapes.onnx", shapes, "--sizes", "0,16,1", "--all")
    assert printed.exit_code == 0, printed.output
    images = load_images(shapes)
    by_size = accuracy_by_size(run / "shapes.onnx", images.train + images.validation, images.labels, (0, 16, 1))
    assert re.findall(r"([\d.]+)%", printed.stdout) == [f"{100 * value:.2f}" for value in by_size.values()]
    assert by_size[1] < by_size[0], "one pixel tells less"


def test_a_model_of_other_classes_is_not_evaluated(run: Path, tmp_path: Path) -> None:
    other = write_shapes(tmp_path / "d", 2)
    (other / "red").rename(other / "purple")
    images = load_images(other)
    with pytest.raises(InvalidInput, match="no class purple; it has blue, green, red"):
        accuracy_by_size(run / "shapes.onnx", images.train, images.labels, (0,))


def test_a_subset_of_the_classes_is_enough(run: Path, tmp_path: Path) -> None:
    subset = write_shapes(tmp_path / "d", 3)
    for file in (subset / "blue").iterdir():
        file.unlink()
    images = load_images(subset, validation=0)
    assert images.labels == ("green", "red")
    assert accuracy_by_size(run / "shapes.onnx", images.train, images.labels, (0,)) == {0: 1.0}


def test_resizing_keeps_the_shape() -> None:
    pixels = np.zeros((30, 60, 3), np.uint8)
    assert resize_shorter_side(pixels, 30) is pixels
    assert resize_shorter_side(pixels, 45).shape == (45, 90, 3)
    assert resize_shorter_side(pixels, 1).shape == (1, 2, 3)
    ramp = np.repeat(np.arange(0, 256, 4).astype(np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    bicubic = PIL.Image.fromarray(ramp).resize((32, 32), PIL.Image.Resampling.BICUBIC)
    assert np.array_equal(resize_shorter_side(ramp, 32), np.asarray(bicubic))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer", "lion"), "optimizer is 'lion'; it must be one of sgd, adamw"),
        (("--depth", "1;2"), "depth is '1;2'; it must be numbers with commas between"),
        (("--sizes", "16:x"), "sizes"),
        (("--area", "1"), "two numbers"),
        (("--width", "17"), "multiple of 16"),
    ],
)
def test_a_wrong_option_is_explained(shapes: Path, tmp_path: Path, words: tuple[str, str], message: str) -> None:
    refused = here("train", shapes, "-o", tmp_path / "run", *words)
    assert isinstance(refused.exception, InvalidInput)
    assert message in str(refused.exception)
    assert not (tmp_path / "run").exists()
