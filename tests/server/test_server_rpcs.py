"""Every RPC over a real connection: right answers at every size, and one bad image fails alone."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import grpc
import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fullframe.v1 import vision_pb2 as pb
from fullframe.v1.vision_pb2_grpc import VisionServiceStub
from tests.models import LABELS, write_model
from tests.pictures import Pixels, encode, pixels
from tests.serving import Running, serving_here, stub

SIZES = [(1, 1), (1, 500), (7, 5), (31, 33), (224, 224), (300, 451)]
FloatArray = NDArray[np.float32]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[VisionServiceStub]:
    with stub(server.target) as it:
        yield it


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ort.InferenceSession:
    return ort.InferenceSession(tiny_model, providers=["CPUExecutionProvider"])


def expected(reference: ort.InferenceSession, picture: Pixels) -> dict[str, FloatArray]:
    names = ["features", "logits", "feature_map", "class_map"]
    return {name: v[0] for name, v in zip(names, reference.run(names, {"images": picture[None]}), strict=True)}


def same(given: object, wanted: FloatArray) -> bool:
    """Within the promise: 1e-4 of the largest value, or of 1."""
    error = np.abs(np.asarray(given, np.float32) - wanted).max()
    return bool(error <= 1e-4 * max(1, np.abs(wanted).max()))


def file(picture: Pixels) -> pb.Image:
    return pb.Image(encoded=encode(picture))


def raw(picture: Pixels) -> pb.Image:
    height, width, _ = picture.shape
    return pb.Image(raw=pb.RawImage(height=height, width=width, data=picture.tobytes()))


def array(message: pb.FeatureMap) -> FloatArray:
    return np.frombuffer(message.data, "<f4").reshape(message.channels, message.height, message.width)


def test_classify_mixed_sizes_in_one_request(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    pictures = [pixels(*size) for size in SIZES]
    images = [raw(p) if i % 2 else file(p) for i, p in enumerate(pictures)]
    response = client.Classify(pb.ClassifyRequest(images=images, top_k=7))
    assert (response.model.name, response.model.version) == ("tiny", "1")
    assert len(response.results) == len(SIZES)
    for picture, result in zip(pictures, response.results, strict=True):
        assert result.info.status.code == 0
        assert (result.info.height, result.info.width) == picture.shape[:2]
        assert result.info.timings.compute_ms > 0
        logits = expected(reference, picture)["logits"]
        assert [c.index for c in result.classes] == list(np.argsort(-logits, kind="stable"))
        assert same([c.logit for c in result.classes], np.sort(logits)[::-1])
        assert [c.label for c in result.classes] == [LABELS[c.index] for c in result.classes]
        assert sum(c.probability for c in result.classes) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("top_k", "classes"), [(0, 5), (1, 1), (7, 7), (8, 7), (1_000_000, 7)])
def test_top_k(client: VisionServiceStub, top_k: int, classes: int) -> None:
    result = client.Classify(pb.ClassifyRequest(images=[file(pixels(9, 9))], top_k=top_k)).results[0]
    assert len(result.classes) == classes


def test_embed_is_the_average_by_default(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    pictures = [pixels(*size) for size in SIZES]
    response = client.Embed(pb.EmbedRequest(images=map(file, pictures)))
    for picture, result in zip(pictures, response.results, strict=True):
        assert same(result.embedding.values, expected(reference, picture)["features"])


def test_embed_pools_as_asked(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    picture = pixels(40, 30)
    feature_map = expected(reference, picture)["feature_map"].astype(np.float64)

    def embed(*terms: tuple[pb.Pooling.Kind, float | None], levels: tuple[int, ...] = (), l2: bool = False) -> object:
        pooling = pb.Pooling(terms=[pb.Pooling.Term(kind=k, p=p) for k, p in terms], levels=levels, l2_normalize=l2)
        return client.Embed(pb.EmbedRequest(images=[file(picture)], pooling=pooling)).results[0].embedding.values

    kinds = pb.Pooling
    largest = feature_map.max((1, 2))
    assert same(embed((kinds.KIND_MAX, None)), largest)
    assert same(embed((kinds.KIND_STD, None)), feature_map.std((1, 2)))
    assert same(embed((kinds.KIND_GEM, 3.3)), (np.maximum(feature_map, 1e-6) ** 3.3).mean((1, 2)) ** (1 / 3.3))
    assert same(embed((kinds.KIND_UNSPECIFIED, None)), feature_map.mean((1, 2)))
    both = np.concatenate([feature_map.mean((1, 2)), largest])
    assert same(embed((kinds.KIND_AVG, None), (kinds.KIND_MAX, None)), both)
    assert same(embed((kinds.KIND_MAX, None), l2=True), largest / np.linalg.norm(largest))
    halves = [feature_map[:, rows, columns].max((1, 2)) for rows in _halves(10) for columns in _halves(8)]
    assert same(embed((kinds.KIND_MAX, None), levels=(1, 2)), np.concatenate([largest, *halves]))


def _halves(length: int) -> tuple[slice, slice]:
    return slice(0, -(-length // 2)), slice(length // 2, length)


def test_predict_returns_all_that_is_asked(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    picture = pixels(61, 47)
    options = pb.PredictOptions(
        top_k=2, poolings=[pb.Pooling(), pb.Pooling(levels=[2])], logits=True, feature_map=True, class_map=True
    )
    result = client.Predict(pb.PredictRequest(images=[file(picture)], options=options)).results[0]
    wanted = expected(reference, picture)
    assert len(result.classes) == 2
    assert [len(e.values) for e in result.embeddings] == [16, 64]
    assert same(result.embeddings[0].values, wanted["features"])
    assert same(result.logits.values, wanted["logits"])
    assert same(array(result.feature_map), wanted["feature_map"])
    assert same(array(result.class_map), wanted["class_map"])
    assert same(array(result.class_map).mean((1, 2)), wanted["logits"])


def test_predict_returns_nothing_unasked(client: VisionServiceStub) -> None:
    options = pb.PredictOptions(top_k=-1)
    result = client.Predict(pb.PredictRequest(images=[file(pixels(8, 8))], options=options)).results[0]
    assert result.info.status.code == 0
    assert not result.classes and not result.embeddings
    assert not any(map(result.HasField, ("logits", "feature_map", "class_map")))


def test_one_bad_image_fails_alone(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    good = [pixels(20 + i, 30) for i in range(4)]
    images = [file(good[0]), pb.Image(encoded=encode(good[1])[:200]), file(good[1]), pb.Image(), file(good[2])]
    results = client.Embed(pb.EmbedRequest(images=images)).results
    assert [r.info.status.code for r in results] == [0, 3, 0, 3, 0]
    for picture, result in zip(good, (results[0], results[2], results[4]), strict=False):
        assert same(result.embedding.values, expected(reference, picture)["features"])
    assert "ends early" in results[1].info.status.message
    assert "set encoded" in results[3].info.status.message


def test_stream_answers_every_request_by_its_id(client: VisionServiceStub, reference: ort.InferenceSession) -> None:
    pictures = {f"image {i}": pixels(1 + 7 * i % 90, 1 + 13 * i % 80, i) for i in range(60)}
    options = pb.PredictOptions(top_k=-1, logits=True)

    def requests() -> Iterator[pb.PredictStreamRequest]:
        for name, picture in pictures.items():
            yield pb.PredictStreamRequest(request_id=name, image=file(picture), options=options)

    responses = list(client.PredictStream(requests()))
    assert sorted(r.request_id for r in responses) == sorted(pictures)
    for response in responses:
        wanted = expected(reference, pictures[response.request_id])["logits"]
        assert same(response.result.logits.values, wanted)
        assert response.model.name == "tiny"


def test_stream_goes_on_after_a_failure(client: VisionServiceStub) -> None:
    good, options = file(pixels(12, 12)), pb.PredictOptions()
    requests = {
        "good 1": pb.PredictStreamRequest(image=good),
        "bad image": pb.PredictStreamRequest(image=pb.Image(encoded=b"not an image")),
        "bad model": pb.PredictStreamRequest(image=good, model=pb.ModelRef(name="nobody")),
        "bad option": pb.PredictStreamRequest(image=good, options=pb.PredictOptions(top_k=-2)),
        "no image": pb.PredictStreamRequest(options=options),
        "good 2": pb.PredictStreamRequest(image=good),
    }
    for name, request in requests.items():
        request.request_id = name
    codes = {r.request_id: r.result.info.status.code for r in client.PredictStream(iter(requests.values()))}
    assert codes == {"good 1": 0, "bad image": 3, "bad model": 5, "bad option": 3, "no image": 3, "good 2": 0}


def test_stream_answers_before_the_caller_is_done(client: VisionServiceStub) -> None:
    requests: SimpleQueue[pb.PredictStreamRequest | None] = SimpleQueue()
    responses = client.PredictStream(iter(requests.get, None), timeout=20)
    for name in ("a", "b", "c"):
        requests.put(pb.PredictStreamRequest(request_id=name, image=file(pixels(8, 8))))
        assert next(responses).request_id == name
    requests.put(None)
    assert list(responses) == []


def uploads(data: bytes, size: int, start: pb.PredictUploadRequest.Start) -> Iterator[pb.PredictUploadRequest]:
    yield pb.PredictUploadRequest(start=start)
    for begin in range(0, len(data), size):
        yield pb.PredictUploadRequest(chunk=data[begin : begin + size])


@pytest.mark.parametrize("announce", [True, False])
def test_upload(client: VisionServiceStub, reference: ort.InferenceSession, announce: bool) -> None:
    picture = pixels(900, 1100)
    data = encode(picture)
    options = pb.PredictOptions(top_k=1, poolings=[pb.Pooling()])
    start = pb.PredictUploadRequest.Start(options=options, total_bytes=len(data) if announce else 0)
    *progress, last = client.PredictUpload(uploads(data, 100_000, start))
    received = [p.progress.received_bytes for p in progress]
    assert received == sorted(received)
    assert received[-1] == len(data)
    assert last.done.model.name == "tiny"
    assert same(last.done.result.embeddings[0].values, expected(reference, picture)["features"])


def test_models(client: VisionServiceStub) -> None:
    [model] = client.ListModels(pb.ListModelsRequest()).models
    assert model == client.GetModel(pb.GetModelRequest(model=pb.ModelRef(name="tiny", version="1"))).model
    assert model.default
    assert tuple(model.labels) == LABELS
    assert model.feature_channels == 16
    assert (model.stride.height, model.receptive_field.width, model.smallest_size.height) == (4, 15, 1)
    assert model.has_class_map
    assert model.metadata["training"] == '{"data": "none: random weights"}'


def test_a_request_may_name_the_very_file(client: VisionServiceStub, tiny_model: Path) -> None:
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    picture = file(pixels(5, 5))

    def answered(digest: str) -> list[pb.ModelRef]:
        ref = pb.ModelRef(name="tiny", digest=digest)
        *_, upload = client.PredictUpload(uploads(picture.encoded, 1000, pb.PredictUploadRequest.Start(model=ref)))
        [streamed] = client.PredictStream(iter([pb.PredictStreamRequest(model=ref, image=picture)]))
        assert streamed.result.info.status.code == 0, streamed.result.info.status.message
        return [
            client.Classify(pb.ClassifyRequest(model=ref, images=[picture])).model,
            streamed.model,
            upload.done.model,
        ]

    assert answered("") == answered(digest) == 3 * [pb.ModelRef(name="tiny", version="1", digest=digest)]
    other = pb.ModelRef(name="tiny", digest="0" * 64)
    [streamed] = client.PredictStream(iter([pb.PredictStreamRequest(model=other, image=picture)]))
    assert streamed.result.info.status.code == grpc.StatusCode.NOT_FOUND.value[0]
    for ask in (
        lambda: client.Classify(pb.ClassifyRequest(model=other, images=[picture])),
        lambda: client.GetModel(pb.GetModelRequest(model=other)),
        lambda: list(client.PredictUpload(uploads(b"", 1, pb.PredictUploadRequest.Start(model=other)))),
    ):
        with pytest.raises(grpc.RpcError, match=f"of another file here, of SHA-256 {digest[:12]}") as refused:
            ask()
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_limits_are_published(client: VisionServiceStub) -> None:
    limits = client.GetModel(pb.GetModelRequest()).limits
    assert limits.max_pixels == 32_000_000
    assert limits.max_image_bytes == 64 * 2**20
    assert limits.max_upload_bytes == 2**30
    assert limits.max_message_bytes == 128 * 2**20
    assert (limits.max_frames, limits.max_images_per_request) == (1000, 128)
    assert {"jpeg", "png"} <= set(limits.formats)


def test_several_models_and_versions(tmp_path: Path) -> None:
    for name, version, seed in (("a", "2", 1), ("a", "10", 2), ("b", "1", 3)):
        (tmp_path / name / version).mkdir(parents=True)
        write_model(tmp_path / name / version / "model.onnx", name=name, seed=seed)
    with serving_here(models=str(tmp_path)) as here, stub(here.target) as client:
        served = {(m.model.name, m.model.version): m.default for m in client.ListModels(pb.ListModelsRequest()).models}
        assert set(served) == {("a", "2"), ("a", "10"), ("b", "1")}
        answers = {}
        for name, version in [("", ""), ("a", ""), ("a", "2"), ("a", "10"), ("b", ""), ("b", "1")]:
            request = pb.EmbedRequest(model=pb.ModelRef(name=name, version=version), images=[file(pixels(20, 20))])
            response = client.Embed(request)
            answers[name, version] = tuple(response.results[0].embedding.values)
            assert name in ("", response.model.name) and version in ("", response.model.version)
        assert answers["", ""] == answers["a", ""] == answers["a", "10"]
        assert answers["b", ""] == answers["b", "1"]
        assert len({answers["a", "2"], answers["a", "10"], answers["b", "1"]}) == 3
