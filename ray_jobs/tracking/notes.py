"""What a storage remembers of its runs in MLflow.

Each run has a file of its own, so stages and configurations that are at work on one storage at the
same time do not undo each other's notes.
"""

from collections.abc import Mapping
from typing import Any

from ray_jobs.storage import Storage, digest_of_json

_FOLDER = "tracking"
_OLDER_FILE = "tracking.json"  # of releases that kept all of a storage's in one file


class Notes:
    """What a storage remembers of the runs of one configuration in one tracking store."""

    def __init__(self, storage: Storage, uri: str, settings: Mapping[str, Any]) -> None:
        self._storage = storage
        self._of = {"uri": uri, "settings": digest_of_json(settings)}
        self._folder = f"{_FOLDER}/{digest_of_json(self._of)[:16]}"
        self._stages = f"{self._folder}/stages"
        if not self.parent():
            self._take_over()

    def parent(self) -> dict[str, Any]:
        """Its `run_id`, and whether it is `complete`: has all settings; empty if there is none."""
        return self._read(f"{self._folder}/parent.json")

    def note_parent(self, run_id: str | None, *, complete: bool) -> None:
        value = {**self._of, "run_id": run_id, "complete": complete}
        self._storage.write_json(f"{self._folder}/parent.json", value)

    def stage(self, name: str) -> dict[str, Any]:
        """Its `run_id`, whether that is `complete`, and what it is `of`; empty if there is none."""
        return self._read(f"{self._stages}/{name}.json")

    def note_stage(self, name: str, value: Mapping[str, Any]) -> None:
        self._storage.write_json(f"{self._stages}/{name}.json", value)

    def runs(self) -> list[str]:
        """The ids of all runs."""
        notes = [self.parent(), *map(self._read, self._storage.names(self._stages, ".json"))]
        return [one["run_id"] for one in notes if one.get("run_id")]

    def forget(self) -> None:
        self._storage.delete(self._folder)

    def _read(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self._storage.find_json(name) or {}
        return found

    def _take_over(self) -> None:
        """Note what an older release did."""
        held = self._read(_OLDER_FILE)
        for one in held.get("records", [held]):
            if all(one.get(key) == value for key, value in self._of.items()):
                for name, value in one["stages"].items():
                    self.note_stage(name, value)
                self.note_parent(one["parent"], complete=bool(one.get("told")))
