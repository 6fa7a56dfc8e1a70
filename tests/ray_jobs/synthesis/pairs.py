"""Pairs that are ingested once for many tests."""

from pathlib import Path

from ray_jobs.storage import Storage


def with_pairs_of(storage: Storage, folder: Path) -> Storage:
    """A storage in a folder that has the pairs of another, and nothing made of them."""
    (folder / "pairs").symlink_to(storage.path("pairs"))
    return Storage.at(folder)
