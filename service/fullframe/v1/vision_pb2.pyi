from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelRef(_message.Message):
    __slots__ = ("name", "version", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "raw")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    RAW_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    raw: RawImage
    def __init__(self, encoded: _Optional[bytes] = ..., raw: _Optional[_Union[RawImage, _Mapping]] = ...) -> None: ...

class RawImage(_message.Message):
    __slots__ = ("height", "width", "data")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    data: bytes
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Pooling(_message.Message):
    __slots__ = ("terms", "levels", "l2_normalize")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[Pooling.Kind]
        KIND_AVG: _ClassVar[Pooling.Kind]
        KIND_MAX: _ClassVar[Pooling.Kind]
        KIND_MIN: _ClassVar[Pooling.Kind]
        KIND_SUM: _ClassVar[Pooling.Kind]
        KIND_LP: _ClassVar[Pooling.Kind]
        KIND_GEM: _ClassVar[Pooling.Kind]
        KIND_LSE: _ClassVar[Pooling.Kind]
        KIND_STD: _ClassVar[Pooling.Kind]
    KIND_UNSPECIFIED: Pooling.Kind
    KIND_AVG: Pooling.Kind
    KIND_MAX: Pooling.Kind
    KIND_MIN: Pooling.Kind
    KIND_SUM: Pooling.Kind
    KIND_LP: Pooling.Kind
    KIND_GEM: Pooling.Kind
    KIND_LSE: Pooling.Kind
    KIND_STD: Pooling.Kind
    class Term(_message.Message):
        __slots__ = ("kind", "p")
        KIND_FIELD_NUMBER: _ClassVar[int]
        P_FIELD_NUMBER: _ClassVar[int]
        kind: Pooling.Kind
        p: float
        def __init__(self, kind: _Optional[_Union[Pooling.Kind, str]] = ..., p: _Optional[float] = ...) -> None: ...
    TERMS_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    L2_NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    terms: _containers.RepeatedCompositeFieldContainer[Pooling.Term]
    levels: _containers.RepeatedScalarFieldContainer[int]
    l2_normalize: bool
    def __init__(self, terms: _Optional[_Iterable[_Union[Pooling.Term, _Mapping]]] = ..., levels: _Optional[_Iterable[int]] = ..., l2_normalize: bool = ...) -> None: ...

class ClassScore(_message.Message):
    __slots__ = ("index", "label", "probability", "logit")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    index: int
    label: str
    probability: float
    logit: float
    def __init__(self, index: _Optional[int] = ..., label: _Optional[str] = ..., probability: _Optional[float] = ..., logit: _Optional[float] = ...) -> None: ...

class Vector(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class FeatureMap(_message.Message):
    __slots__ = ("channels", "height", "width", "data")
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    channels: int
    height: int
    width: int
    data: bytes
    def __init__(self, channels: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "compute_ms")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    compute_ms: float
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ...) -> None: ...

class ImageInfo(_message.Message):
    __slots__ = ("status", "height", "width", "timings")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.Status
    height: int
    width: int
    timings: Timings
    def __init__(self, status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ...) -> None: ...

class ClassifyRequest(_message.Message):
    __slots__ = ("model", "images", "top_k")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: _containers.RepeatedCompositeFieldContainer[Image]
    top_k: int
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., top_k: _Optional[int] = ...) -> None: ...

class ClassifyResponse(_message.Message):
    __slots__ = ("model", "results")
    class Result(_message.Message):
        __slots__ = ("info", "classes")
        INFO_FIELD_NUMBER: _ClassVar[int]
        CLASSES_FIELD_NUMBER: _ClassVar[int]
        info: ImageInfo
        classes: _containers.RepeatedCompositeFieldContainer[ClassScore]
        def __init__(self, info: _Optional[_Union[ImageInfo, _Mapping]] = ..., classes: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    results: _containers.RepeatedCompositeFieldContainer[ClassifyResponse.Result]
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., results: _Optional[_Iterable[_Union[ClassifyResponse.Result, _Mapping]]] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("model", "images", "pooling")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: _containers.RepeatedCompositeFieldContainer[Image]
    pooling: Pooling
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., pooling: _Optional[_Union[Pooling, _Mapping]] = ...) -> None: ...

class EmbedResponse(_message.Message):
    __slots__ = ("model", "results")
    class Result(_message.Message):
        __slots__ = ("info", "embedding")
        INFO_FIELD_NUMBER: _ClassVar[int]
        EMBEDDING_FIELD_NUMBER: _ClassVar[int]
        info: ImageInfo
        embedding: Vector
        def __init__(self, info: _Optional[_Union[ImageInfo, _Mapping]] = ..., embedding: _Optional[_Union[Vector, _Mapping]] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    results: _containers.RepeatedCompositeFieldContainer[EmbedResponse.Result]
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., results: _Optional[_Iterable[_Union[EmbedResponse.Result, _Mapping]]] = ...) -> None: ...

class PredictOptions(_message.Message):
    __slots__ = ("top_k", "poolings", "logits", "feature_map", "class_map", "max_map_side")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    POOLINGS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_MAP_FIELD_NUMBER: _ClassVar[int]
    CLASS_MAP_FIELD_NUMBER: _ClassVar[int]
    MAX_MAP_SIDE_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    poolings: _containers.RepeatedCompositeFieldContainer[Pooling]
    logits: bool
    feature_map: bool
    class_map: bool
    max_map_side: int
    def __init__(self, top_k: _Optional[int] = ..., poolings: _Optional[_Iterable[_Union[Pooling, _Mapping]]] = ..., logits: bool = ..., feature_map: bool = ..., class_map: bool = ..., max_map_side: _Optional[int] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("info", "classes", "embeddings", "logits", "feature_map", "class_map")
    INFO_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    LOGITS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_MAP_FIELD_NUMBER: _ClassVar[int]
    CLASS_MAP_FIELD_NUMBER: _ClassVar[int]
    info: ImageInfo
    classes: _containers.RepeatedCompositeFieldContainer[ClassScore]
    embeddings: _containers.RepeatedCompositeFieldContainer[Vector]
    logits: Vector
    feature_map: FeatureMap
    class_map: FeatureMap
    def __init__(self, info: _Optional[_Union[ImageInfo, _Mapping]] = ..., classes: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ..., embeddings: _Optional[_Iterable[_Union[Vector, _Mapping]]] = ..., logits: _Optional[_Union[Vector, _Mapping]] = ..., feature_map: _Optional[_Union[FeatureMap, _Mapping]] = ..., class_map: _Optional[_Union[FeatureMap, _Mapping]] = ...) -> None: ...

class PredictRequest(_message.Message):
    __slots__ = ("model", "images", "options")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    images: _containers.RepeatedCompositeFieldContainer[Image]
    options: PredictOptions
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ...) -> None: ...

class PredictResponse(_message.Message):
    __slots__ = ("model", "results")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    results: _containers.RepeatedCompositeFieldContainer[Prediction]
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., results: _Optional[_Iterable[_Union[Prediction, _Mapping]]] = ...) -> None: ...

class PredictStreamRequest(_message.Message):
    __slots__ = ("request_id", "model", "image", "options")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: ModelRef
    image: Image
    options: PredictOptions
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[ModelRef, _Mapping]] = ..., image: _Optional[_Union[Image, _Mapping]] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ...) -> None: ...

class PredictStreamResponse(_message.Message):
    __slots__ = ("request_id", "model", "result")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: ModelRef
    result: Prediction
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[ModelRef, _Mapping]] = ..., result: _Optional[_Union[Prediction, _Mapping]] = ...) -> None: ...

class PredictUploadRequest(_message.Message):
    __slots__ = ("start", "chunk")
    class Start(_message.Message):
        __slots__ = ("model", "options", "total_bytes")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        OPTIONS_FIELD_NUMBER: _ClassVar[int]
        TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
        model: ModelRef
        options: PredictOptions
        total_bytes: int
        def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., options: _Optional[_Union[PredictOptions, _Mapping]] = ..., total_bytes: _Optional[int] = ...) -> None: ...
    START_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    start: PredictUploadRequest.Start
    chunk: bytes
    def __init__(self, start: _Optional[_Union[PredictUploadRequest.Start, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PredictUploadResponse(_message.Message):
    __slots__ = ("progress", "done")
    class Progress(_message.Message):
        __slots__ = ("received_bytes", "computed")
        RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
        COMPUTED_FIELD_NUMBER: _ClassVar[int]
        received_bytes: int
        computed: float
        def __init__(self, received_bytes: _Optional[int] = ..., computed: _Optional[float] = ...) -> None: ...
    class Done(_message.Message):
        __slots__ = ("model", "result")
        MODEL_FIELD_NUMBER: _ClassVar[int]
        RESULT_FIELD_NUMBER: _ClassVar[int]
        model: ModelRef
        result: Prediction
        def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., result: _Optional[_Union[Prediction, _Mapping]] = ...) -> None: ...
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    progress: PredictUploadResponse.Progress
    done: PredictUploadResponse.Done
    def __init__(self, progress: _Optional[_Union[PredictUploadResponse.Progress, _Mapping]] = ..., done: _Optional[_Union[PredictUploadResponse.Done, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "limits")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    limits: Limits
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "default", "labels", "feature_channels", "stride", "receptive_field", "smallest_size", "has_class_map", "metadata")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    FEATURE_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    RECEPTIVE_FIELD_FIELD_NUMBER: _ClassVar[int]
    SMALLEST_SIZE_FIELD_NUMBER: _ClassVar[int]
    HAS_CLASS_MAP_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    model: ModelRef
    default: bool
    labels: _containers.RepeatedScalarFieldContainer[str]
    feature_channels: int
    stride: Extent
    receptive_field: Extent
    smallest_size: Extent
    has_class_map: bool
    metadata: _containers.ScalarMap[str, str]
    def __init__(self, model: _Optional[_Union[ModelRef, _Mapping]] = ..., default: bool = ..., labels: _Optional[_Iterable[str]] = ..., feature_channels: _Optional[int] = ..., stride: _Optional[_Union[Extent, _Mapping]] = ..., receptive_field: _Optional[_Union[Extent, _Mapping]] = ..., smallest_size: _Optional[_Union[Extent, _Mapping]] = ..., has_class_map: bool = ..., metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Extent(_message.Message):
    __slots__ = ("height", "width")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_pixels", "max_image_bytes", "max_message_bytes", "max_frames", "max_images_per_request", "formats", "max_upload_bytes")
    MAX_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    FORMATS_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_pixels: int
    max_image_bytes: int
    max_message_bytes: int
    max_frames: int
    max_images_per_request: int
    formats: _containers.RepeatedScalarFieldContainer[str]
    max_upload_bytes: int
    def __init__(self, max_pixels: _Optional[int] = ..., max_image_bytes: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., max_frames: _Optional[int] = ..., max_images_per_request: _Optional[int] = ..., formats: _Optional[_Iterable[str]] = ..., max_upload_bytes: _Optional[int] = ...) -> None: ...
