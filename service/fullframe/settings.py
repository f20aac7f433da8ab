"""What a server can be told: one documented field each, from an option, else from the environment, else the default."""

from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, FiniteFloat, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from fullframe import defaults
from fullframe.engine.choice import Compute, EngineName
from fullframe.engine.jobs import Batching
from fullframe.errors import InvalidInput, plainly
from fullframe.model.repository import Precision

PREFIX = "FULLFRAME_"

_MIB = 2**20
_MEGA = 10**6


class Settings(BaseSettings):
    """Every field can be given as FULLFRAME_NAME in the environment; byte counts take units ("64MiB")."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid")

    # Loopback, since there is no authentication: a container, whose network is the boundary, sets 0.0.0.0.
    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(8001, ge=0, le=65535, description="gRPC port; 0: any free one")
    metrics_port: int = Field(8002, ge=-1, le=65535, description="Prometheus port; 0: any free one, -1: none")
    models: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="models as NAME=PATH or PATH, the first the default; in the environment with commas between"
    )
    precision: Precision = Field(
        "float32", description="int8: the copies that quantize made, not under the promise; auto: where there are such"
    )
    engine: EngineName = Field(
        "auto",
        description="what runs the models; torch: PyTorch with fused kernels, of the gpu extra; auto: that where there "
        "is a CUDA or ROCm device, else onnx",
    )
    compute: Compute = Field(
        "float32", description="what the torch engine computes in; the promise is about float32, on either engine"
    )
    workers: int = Field(
        0, ge=0, description="images worked on at once; 0: one for each core, and two more for batches on a device"
    )
    batching: Batching = Field(
        "auto",
        description="ragged: images that wait are computed together, padded and masked; one: one by one; auto: ragged "
        "on an accelerator, one by one on a CPU, where that is the faster",
    )
    max_megapixels: FiniteFloat = Field(
        defaults.MAX_PIXELS // _MEGA, gt=0, description="largest image, in megapixels, uploads included"
    )
    tile_pixels: int = Field(
        defaults.TILE_PIXELS, ge=1, description="an image of more pixels is computed piece by piece"
    )
    max_image_bytes: ByteSize = Field(
        ByteSize(defaults.MAX_BYTES),
        ge=defaults.LEAST_LIMIT_BYTES,
        description="largest encoded image in a request",
    )
    spool_folder: str = Field(
        "", description="where uploads are kept while they are worked on; none: the system's, else memory"
    )
    max_upload_bytes: ByteSize = Field(ByteSize(1024 * _MIB), gt=0, description="largest upload")
    max_spool_bytes: ByteSize = Field(ByteSize(4096 * _MIB), gt=0, description="bytes of all uploads kept together")
    min_free_bytes: ByteSize = Field(
        ByteSize(256 * _MIB), ge=0, description="bytes of that disk that uploads leave free"
    )
    max_frames: int = Field(
        defaults.MAX_FRAMES, ge=1, description="most frames or pages of one file, of which the first is read"
    )
    # The default lets 32 megapixels come as raw RGB.
    max_message_bytes: ByteSize = Field(
        ByteSize(128 * _MIB),
        ge=defaults.LEAST_LIMIT_BYTES,
        le=2**31 - 1,
        description="largest message in either direction",
    )
    max_images_per_request: int = Field(128, ge=1, le=1024, description="most images of one request")
    max_megapixels_in_flight: FiniteFloat = Field(
        defaults.MAX_PIXELS_IN_FLIGHT // _MEGA, gt=0, description="megapixels queued and computed together"
    )
    memory_budget: ByteSize = Field(
        ByteSize(0),
        ge=0,
        description="bytes that images may take while they are computed, by an estimate from the models' graphs; "
        "0: three quarters of the machine's or the container's, or of what is free on the device",
    )
    max_held_megapixels: FiniteFloat = Field(
        defaults.MAX_HELD_PIXELS // _MEGA,
        gt=0,
        description="largest image in megapixels of a kind that is decoded whole: progressive JPEG, WebP, GIF ...",
    )
    max_turning_bytes: ByteSize = Field(
        ByteSize(defaults.MAX_TEMPORARY_BYTES),
        ge=0,
        description="temporary disk for a larger image that is stored turned",
    )
    max_bytes_in_flight: ByteSize = Field(ByteSize(512 * _MIB), gt=0, description="bytes of all requests held together")
    max_concurrent_rpcs: int = Field(256, ge=1, description="calls answered at once, health checks not counted")
    max_stream_images: int = Field(16, ge=1, description="images of one stream read ahead of their answers")
    drain_delay: FiniteFloat = Field(
        0,
        ge=0,
        description="seconds between NOT_SERVING and refusing calls; as long as balancers take to notice",
    )
    grace: FiniteFloat = Field(30, ge=0, description="seconds that calls in flight are given to end at shutdown")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level logged; debug has a line for every call"
    )
    log_format: Literal["auto", "json", "text"] = Field("auto", description="auto: text on a terminal, else JSON lines")

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """An upload that is asked for by name must have room; the default one shrinks to the room that there is."""
        if "max_upload_bytes" in self.model_fields_set and self.max_upload_bytes > self.max_spool_bytes:
            raise InvalidInput(
                f"setting 'max_upload_bytes' is {int(self.max_upload_bytes)}, more than 'max_spool_bytes', "
                f"{int(self.max_spool_bytes)}, which holds all uploads: lower the one or raise the other",
                "max_upload_bytes",
            )
        return self


def describe(name: str) -> str:
    """The doc line of one setting, for a command line's help."""
    return Settings.model_fields[name].description or ""


def read_settings(**given: Any) -> Settings:
    """Settings from what is given (None: not given), else the environment; raises InvalidInput naming what is wrong."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise InvalidInput(
            f"setting {name!r} (in the environment {PREFIX}{name.upper()}) is {first['input']!r}: "
            f"{plainly(first['msg'])}",
            name,
        ) from error


def address(host: str, port: int) -> str:
    """Host and port as gRPC takes them; an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
