"""What README.md says to run, runs."""

import re
import subprocess
import sys
from pathlib import Path

import fullframe
from fullframe.model.repository import BUNDLED
from tests.pictures import encode, pixels

README = Path(__file__).parents[1] / "README.md"


def test_a_models_file_runs_with_nothing_of_ours(tmp_path: Path) -> None:
    [script] = [
        block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "onnxruntime" in block
    ]
    assert "fullframe" not in re.sub(r'"fullframe\.labels"', "", script)
    (tmp_path / "mine.onnx").write_bytes(BUNDLED.read_bytes())
    picture = encode(pixels(123, 217), "PNG")
    (tmp_path / "cat.jpg").write_bytes(picture)
    (tmp_path / "script.py").write_text(
        f"{script}\nimport sys\nassert not {{'fullframe', 'torch', 'onnx'}} & set(sys.modules)\nprint(features.shape)\n"
    )
    ran = subprocess.run([sys.executable, "-I", "script.py"], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    [best] = fullframe.load().classify(picture, top_k=1)
    assert ran.stdout.splitlines() == [best.label, "(1, 192)"]
