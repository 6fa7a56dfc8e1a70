"""The endpoint's configuration: the section `serve` of a run's file, beside its `storage`."""

import ipaddress
import os
import re
from typing import Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from yarl import URL

from rwkv_clip.config import BaseConfig, Precision

Format = Literal["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"]
FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

_HOST = re.compile(r"(?:[a-z0-9_-]+\.)*[a-z0-9_-]+")


class LimitsConfig(BaseConfig):
    """What a request may ask for; more is refused before any work."""

    body_bytes: PositiveInt = Field(32 << 20, description="of a request")
    items: PositiveInt = Field(256, description="texts and images in a request")
    image_bytes: PositiveInt = Field(16 << 20, description="of an encoded image")
    image_pixels: PositiveInt = Field(40_000_000, description="width times height")
    request_pixels: PositiveInt = Field(
        640_000_000,
        description="of all images in a request, by what they take to decode: a JPEG's count a "
        "sixteenth for each scan and a fourth at least, a WEBP's one and a half, those of a PNG of "
        "16 bits twice",
    )
    prompts: PositiveInt = Field(4096, description="labels times templates to classify by")
    text_characters: PositiveInt = Field(100_000, description="of a text")
    formats: tuple[Format, ...] = Field(FORMATS, description="of images")
    bodies_bytes: PositiveInt = Field(
        512 << 20,
        description="of all requests that an ingress reads at once, for which the server takes "
        "up to four times as much memory; 429 answers more",
    )


class RemoteConfig(BaseConfig):
    """Images that requests name by address. Fetching is off unless this section is there."""

    hosts: tuple[str, ...] = Field(
        min_length=1, description="names that may be asked; *.NAME means all names below one"
    )
    seconds: PositiveFloat = Field(10.0, description="for an image, redirects included")
    redirects: NonNegativeInt = Field(3, description="that are followed")
    at_once: PositiveInt = Field(16, description="fetches in each ingress")

    @field_validator("hosts")
    @classmethod
    def _as_addresses_have_them(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_host(entry) for entry in hosts)


def _host(entry: str) -> str:
    """An entry of `hosts` as the hosts of addresses are written; ValueError if it is none."""
    below = "*." if entry.startswith("*.") else ""
    name = entry.removeprefix(below).rstrip(".").removeprefix("[").removesuffix("]")
    try:
        host = URL.build(scheme="https", host=name).raw_host or ""
        if not _HOST.fullmatch(host):
            ipaddress.IPv6Address(host)
    except ValueError:
        raise ValueError(
            f"{entry!r} is no host; write a name alone, such as images.example.com, or "
            "*.example.com for all names below one"
        ) from None
    return below + host


class EncoderConfig(BaseConfig):
    """The replicas of one tower."""

    replicas: PositiveInt = Field(1, description="that there are at least")
    max_replicas: PositiveInt | None = Field(
        None, description="that load may bring about; absent for a fixed number"
    )
    cpus: float = Field(0.5, ge=0, description="that each holds")
    gpus: float = Field(0.0, ge=0, description="that each holds; a fraction shares a GPU")
    threads: PositiveInt = Field(1, description="of PyTorch, where there is no GPU")
    precision: Precision = "float32"
    compile: bool = Field(False, description="compile the model before it is served, for GPUs")
    decode_threads: PositiveInt = Field(2, description="that decode images and tokenize")
    batch: PositiveInt = Field(64, description="items that travel through the model together")
    max_ongoing: PositiveInt = Field(256, description="requests in a replica at once")
    max_queued: PositiveInt = Field(
        512, description="requests that wait in each ingress; 429 answers more"
    )

    @model_validator(mode="after")
    def _most_is_not_least(self) -> "EncoderConfig":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(
                f"max_replicas is {self.max_replicas}, fewer than replicas={self.replicas}"
            )
        return self


class IngressConfig(BaseConfig):
    """The replicas that read requests and write answers."""

    replicas: PositiveInt = Field(1, description="that there are at least")
    max_replicas: PositiveInt | None = Field(
        None, description="that load may bring about; absent for a fixed number"
    )
    cpus: float = Field(0.1, ge=0, description="that each holds")
    max_ongoing: PositiveInt = Field(
        256, description="requests in a replica at once; 429 answers more"
    )


class FaissConfig(BaseConfig):
    """An index of cells, which are made when the server starts."""

    cells: PositiveInt | None = Field(
        None,
        description="that the vectors are put into; 4 times the root of their number if absent",
    )
    probes: PositiveInt = Field(32, description="cells that a search looks into")
    codes: Literal["float32", "float16", "int8"] = Field(
        "float16", description="what a vector's numbers are kept as"
    )


class SearchConfig(BaseConfig):
    """What is searched, and how."""

    data: str = Field("test", description="the data set that `rwkv-clip embed` embedded")
    text: str = Field("caption", description="its column of texts that results show")
    results: PositiveInt = Field(100, description="that a search gives at most")
    picture_side: PositiveInt = Field(160, description="of a result's picture, in pixels")
    method: Literal["auto", "exact", "faiss"] = Field(
        "auto",
        description="exact is a product with all vectors; faiss looks at a part of them; auto is "
        "exact up to exact_rows",
    )
    exact_rows: PositiveInt = Field(1_000_000, description="that auto searches exactly at most")
    faiss: FaissConfig = FaissConfig()
    replicas: PositiveInt = Field(1, description="that hold all vectors each")
    cpus: float = Field(0.25, ge=0, description="that each holds")
    max_ongoing: PositiveInt = Field(64, description="searches at once")
    max_queued: PositiveInt = Field(512, description="searches that wait; 429 answers more")


class ServeConfig(BaseConfig):
    """The endpoint."""

    model: str | None = Field(
        None,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint's folder or URI; "
        "the champion of the configuration's registry if absent",
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is every one")
    port: PositiveInt = Field(8000, le=65535, description="to listen on")
    request_seconds: PositiveFloat = Field(60.0, description="that an answer may take")
    watch_seconds: PositiveFloat = Field(
        10.0,
        description="between looks at the registry for another version of the model, and at the "
        "storage for other vectors to search",
    )
    limits: LimitsConfig = LimitsConfig()
    remote: RemoteConfig | None = Field(None, description="images by address; absent for none")
    ingress: IngressConfig = IngressConfig()
    image: EncoderConfig = EncoderConfig()
    text: EncoderConfig = EncoderConfig()
    search: SearchConfig | None = Field(
        SearchConfig(), description="what is searched if its vectors are there; null for nothing"
    )
    docs: bool = Field(True, description="whether /docs and /openapi.json are open")
    metrics: bool = Field(True, description="whether /metrics is open")
    traces: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of requests that are traced, to the server that OTEL_* variables name",
    )

    def least(self, searched: bool) -> dict[str, float]:
        """CPUs and GPUs that all replicas hold when none is added for load."""
        towers = (self.image, self.text)
        cpus = [(one.replicas, one.cpus) for one in (*towers, self.ingress)]
        if searched and self.search is not None:
            cpus.append((self.search.replicas, self.search.cpus))
        return {
            "CPU": sum(replicas * each for replicas, each in cpus),
            "GPU": sum(one.replicas * one.gpus for one in towers),
        }


class _Section(BaseConfig):
    """A section that belongs to the jobs, read here for the keys that are needed."""

    model_config = ConfigDict(extra="ignore")


class S3Section(_Section):
    """How S3 is reached."""

    endpoint: str | None = None
    region: str | None = None
    attempts: PositiveInt = 10


class StorageSection(_Section):
    """Where a run keeps what it makes."""

    uri: str
    s3: S3Section = S3Section()


class TrackingSection(_Section):
    """Where MLflow is."""

    uri: str | None = None
    model_name: str = "rwkv-clip"


class ServeFile(_Section):
    """A run's file, as the endpoint reads it: the jobs check their own sections."""

    storage: StorageSection | None = None
    tracking: TrackingSection | None = TrackingSection()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _model_can_be_found(self) -> "ServeFile":
        if self.serve.model is None and self.storage is None and not self.tracking_uri():
            raise ValueError(
                "serve.model is absent, and there is neither storage nor tracking to find a "
                "champion in; set serve.model"
            )
        return self

    def s3(self) -> S3Section:
        """How S3 is reached."""
        return self.storage.s3 if self.storage else S3Section()

    def tracking_uri(self) -> str | None:
        """Of MLflow; None if only the storage has one."""
        section = self.tracking.uri if self.tracking else None
        return section or os.environ.get("MLFLOW_TRACKING_URI")

    def model_name(self) -> str:
        """What is served, in the terms of `serve.model`."""
        if self.serve.model:
            return self.serve.model
        section = self.tracking or TrackingSection()
        return f"models:/{section.model_name}@champion"
