"""Where MLflow keeps runs and models, and when a model becomes the champion."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from boto3.exceptions import Boto3Error  # type: ignore[import-untyped]
from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from pydantic import Field, PositiveFloat, field_validator

from ray_jobs.models import cache_folder
from ray_jobs.storage import Storage
from rwkv_clip.config import BaseConfig

# What a call of MLflow's client raises when the server, or the store of its artifacts, is away.
STORE_ERRORS = (MlflowException, OSError, Boto3Error, BotoCoreError, ClientError)
_ARTIFACTS = "mlflow/artifacts"  # in a storage


class TrackingError(RuntimeError):
    """MLflow cannot be used; the message says what to do."""


class TrackingConfig(BaseConfig):
    """How runs are tracked."""

    uri: str | None = Field(
        None,
        description="of MLflow; if absent MLFLOW_TRACKING_URI, else SQLite in the storage, or on "
        "the driver's machine if that is no file system",
    )
    experiment: str = Field("rwkv-clip", description="the experiment that holds the runs")
    model_name: str = Field("rwkv-clip", description="the registered model's name")
    champion_metric: str = Field(
        "text_to_image_recall_at_10", description="by which the alias `champion` is won"
    )
    system_metrics_seconds: PositiveFloat | None = Field(
        10.0, description="between two samples of the driver's machine; null for none"
    )

    @field_validator("model_name")
    @classmethod
    def _mlflow_takes_it(cls, name: str) -> str:
        if not name.strip() or (refused := sorted(set(name) & set("/:@'\""))):
            why = f"holds {' '.join(refused)}" if name.strip() else "is empty"
            raise ValueError(f"{why}; takes a name of letters, digits, blanks, - _ and dots")
        return name

    @field_validator("champion_metric")
    @classmethod
    def _larger_is_better(cls, name: str) -> str:
        if name.endswith("_rank"):
            raise ValueError(f"{name} is better when it is smaller; takes a recall or an accuracy")
        return name


@dataclass(frozen=True)
class Place:
    """A tracking store.

    Attributes:
        uri: MLflow's tracking URI.
        artifacts: where a new experiment puts its artifacts; None leaves it to the server.
        passing: whether it is on this machine alone, unlike the storage.
    """

    uri: str
    artifacts: str | None
    passing: bool = False


def tracking_place(config: TrackingConfig, storage: Storage) -> Place:
    """The store that the configuration and the environment ask for.

    MLflow finds a storage's own S3 server by the environment alone, so it is put there.
    """
    for name, value in (
        ("MLFLOW_S3_ENDPOINT_URL", storage.config.s3.endpoint_url),
        ("AWS_DEFAULT_REGION", storage.config.s3.region),
    ):
        if value:
            os.environ.setdefault(name, value)
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return Place(uri, _artifacts_beside(uri, storage))
    # SQLite needs a real file; when the storage has none, it stays with the user. One for each
    # storage, because an experiment's artifacts all go into the same.
    if storage.is_local:
        folder = Path(storage.path("mlflow"))
    else:
        own = hashlib.sha256(storage.uri.encode()).hexdigest()[:16]
        folder = cache_folder() / "mlflow" / own
    folder.mkdir(parents=True, exist_ok=True)
    return Place(
        f"sqlite:///{folder / 'mlflow.db'}",
        storage.child_uri(_ARTIFACTS),
        passing=not storage.is_local,
    )


def check_artifacts(place: Place, storage: Storage) -> None:
    """Raises TrackingError if MLflow would keep runs or artifacts outside of a storage.

    It ends a URI at such a character, also where that is written as %23.
    """
    wrong = sorted(set(storage.uri) & ({"?"} if storage.is_local else {"?", "#"}))
    if wrong and place.artifacts == storage.child_uri(_ARTIFACTS):
        raise TrackingError(
            f"storage.uri: {storage.uri} holds {' and '.join(wrong)}, where MLflow takes a URI to "
            "end; choose another name, name an MLflow server by tracking.uri, or set tracking to "
            "null"
        )


def _artifacts_beside(uri: str, storage: Storage) -> str | None:
    """Where a new experiment of a tracking URI puts its artifacts; None if a server knows.

    For a database that it reaches without a server MLflow takes the working directory, which is
    a submitted job's own and is removed after it.
    """
    if not is_database(uri):
        return None
    if (file := sqlite_file(uri)) is not None:
        return str(file.parent / "mlruns")
    return storage.child_uri(_ARTIFACTS)


def is_database(uri: str) -> bool:
    """Whether MLflow reaches its store without a server of its own."""
    return _scheme(uri) in DATABASE_ENGINES


def sqlite_file(uri: str) -> Path | None:
    """The file that holds a store; None for other stores, and for one in memory."""
    file = uri.partition(":///")[2].partition("?")[0]
    if _scheme(uri) != "sqlite" or file in ("", ":memory:"):
        return None
    return Path(file).absolute()


def _scheme(uri: str) -> str:
    return uri.partition(":")[0].partition("+")[0]
