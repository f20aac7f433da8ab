"""Heads cut out of their graphs: the logits that the whole graph makes of the same features, or a reason."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from fullframe.errors import InvalidModel
from fullframe.model.heads import head_graph
from tests.models import Head, write_model
from tests.pictures import pixels


@pytest.mark.parametrize("head", ["layers", "windows", "linear"])
def test_a_head_makes_the_logits_that_its_graph_makes(tmp_path: Path, head: Head) -> None:
    path = write_model(tmp_path / "m.onnx", head=head)
    if head == "linear":  # logits come from the class map, past the features
        with pytest.raises(InvalidModel, match="more of the image than its 'features'"):
            head_graph(path)
        return
    images = np.stack([pixels(40, 50, seed=seed) for seed in range(3)])
    features, logits = ort.InferenceSession(path).run(["features", "logits"], {"images": images})
    cut = ort.InferenceSession(head_graph(path))
    assert [each.name for each in cut.get_inputs()] == ["features"]
    np.testing.assert_array_equal(cut.run(["logits"], {"features": features})[0], logits)
    assert np.abs(cut.run(["logits"], {"features": features * 2})[0] - 2 * logits).max() > 0.1  # it is not linear


def test_a_head_that_sees_more_than_the_features_cannot_be_cut(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="more of the image than its 'features'"):
        head_graph(write_model(tmp_path / "m.onnx", head="peeks"))
