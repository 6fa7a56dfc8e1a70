"""What the deployments say to each other; to read it takes neither PyTorch nor MLflow."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Tower = Literal["image", "text"]
TOWERS: tuple[Tower, ...] = ("image", "text")

REPORT_SECONDS = 1.0
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ModelPlace:
    """Where the files of one version of a model are.

    Attributes:
        name: of the model, as answers give it.
        version: of the model; tells it from every other one.
        uri: of the folder that holds the files, or of the version in the registry.
        tracking_uri: of the registry, if it is there.
    """

    name: str
    version: str
    uri: str
    tracking_uri: str | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a served model is.

    Attributes:
        name, version: as in `ModelPlace`.
        digest: SHA-256 of its weights' file.
        dimensions: of an embedding.
        scale: that similarities are multiplied by before a softmax.
    """

    name: str
    version: str
    digest: str
    dimensions: int
    scale: float


@dataclass(frozen=True)
class Encoded:
    """What a tower made of a request's items.

    Attributes:
        vectors: [n, D], of the items that could be read.
        indices: of these n among the items that were sent.
        failures: messages by the index of each other item.
        tokens: that went through the tower, for `usage`.
        seconds: of `preprocess`, `queue` and `inference`.
    """

    vectors: Vectors
    indices: list[int]
    failures: dict[int, str]
    tokens: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Elsewhere:
    """The replica does not hold the model that was asked for; `serving` is the one to ask for."""

    serving: ModelPlace


@dataclass(frozen=True)
class Report:
    """What a replica of a tower says of itself.

    Attributes:
        tower, replica: which it is.
        serving: the model that it took for the current one until now.
        holds: models in its memory, that are good.
        refused: models that it could not take, with the reason.
    """

    tower: Tower
    replica: str
    serving: ModelPlace | None = None
    holds: tuple[ModelPlace, ...] = ()
    refused: tuple[tuple[ModelPlace, str], ...] = ()


@dataclass(frozen=True)
class Orders:
    """What a replica is to do.

    Attributes:
        current: the model that is served.
        hold: models to have in memory, the current one among them.
    """

    current: ModelPlace
    hold: tuple[ModelPlace, ...]


@dataclass(frozen=True)
class Standing:
    """How things stand.

    Attributes:
        current: the model that is served.
        coming: the one that is being loaded.
        refused: reasons by version.
        trouble: why no other model can be looked for.
        ending: whether the server takes no more requests.
    """

    current: ModelPlace
    coming: ModelPlace | None = None
    refused: tuple[tuple[str, str], ...] = ()
    trouble: str | None = None
    ending: bool = False
