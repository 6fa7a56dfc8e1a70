"""Opening MLflow's store, whose tables are made whole or not at all.

MLflow makes a database's tables by dozens of migrations, for seconds. It does not look whether
another process is at that, and cannot go on from where a killed one was.
"""

import os
import shutil
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from ray_jobs.tracking.config import TrackingError, is_database, sqlite_file


def open_store(uri: str) -> MlflowClient:
    """A client of a store, which is made first if it is a file that does not exist.

    Raises:
        TrackingError: the store cannot be used.
    """
    if not is_database(uri):
        return MlflowClient(tracking_uri=uri)
    # Which take most of a second, and nobody else needs them.
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        return _opened(uri)
    except (SQLAlchemyError, CommandError, MlflowException, OSError) as error:
        told = str(error).partition("\n")[0]
        if (file := sqlite_file(uri)) is None:
            advice = "mend tracking.uri or MLFLOW_TRACKING_URI, or set tracking to null"
        elif "_alembic_tmp_" in told or isinstance(error, CommandError):
            advice = (
                f"a process was killed while it made or upgraded the tables in {file}, or two did "
                "that at once; put a backup of that file in its place, or delete it (what it says "
                "of runs and models is lost, what is in the storage is not), and start again"
            )
        else:
            advice = (
                f"look at {file}, which holds it, name another store by tracking.uri or "
                "MLFLOW_TRACKING_URI, or set tracking to null"
            )
        raise TrackingError(f"MLflow at {uri} cannot be used ({told}); {advice}") from error


def _opened(uri: str) -> MlflowClient:
    file = sqlite_file(uri)
    if file is None:
        return MlflowClient(tracking_uri=uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(file.parent, os.W_OK):  # whoever reads another's models needs no lock
        return MlflowClient(tracking_uri=uri)
    with FileLock(f"{file}.lock"):
        if not file.exists() or not file.stat().st_size:
            _make(file)
        # With the lock, because a newer MLflow upgrades the tables here.
        return MlflowClient(tracking_uri=uri)


def _make(file: Path) -> None:
    """Make a store beside its place, and put it there; whoever calls this is alone."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    # A folder, because SQLite has a journal beside a file, which would undo the next attempt's.
    folder = Path(f"{file}.new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = folder / file.name
    engine = create_sqlalchemy_engine(f"sqlite:///{made}")  # type: ignore[no-untyped-call]
    try:
        _initialize_tables(engine)  # type: ignore[no-untyped-call]
    finally:
        engine.dispose()
    made.replace(file)
    folder.rmdir()
