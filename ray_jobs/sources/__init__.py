"""Where pairs come from: one small interface, and a module a kind of source.

A source lists units of work and reads each unit's rows (`base.Source`); `ingest` does the rest. To
add a kind: a configuration with a `kind` of its own, a class with `units` and `read`, and a line
in SourceConfig and in `_SOURCES`.
"""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from ray_jobs.sources.base import Raw, Rejected, Source, SourceError, Unit
from ray_jobs.sources.emoji import EmojiConfig, EmojiSource
from ray_jobs.sources.folder import FolderConfig, FolderSource
from ray_jobs.sources.parquet import HfParquetConfig, ParquetConfig, ParquetSource
from ray_jobs.sources.urls import UrlsConfig, UrlsSource
from ray_jobs.sources.webdataset import WebdatasetConfig, WebdatasetSource

SourceConfig = Annotated[
    EmojiConfig | FolderConfig | HfParquetConfig | ParquetConfig | UrlsConfig | WebdatasetConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "EmojiConfig",
    "FolderConfig",
    "HfParquetConfig",
    "ParquetConfig",
    "Raw",
    "Rejected",
    "Source",
    "SourceConfig",
    "SourceError",
    "Unit",
    "UrlsConfig",
    "WebdatasetConfig",
    "open_source",
]

_SOURCES: dict[str, Callable[[Any], Source]] = {
    "emoji": EmojiSource,
    "folder": FolderSource,
    "hf_parquet": ParquetSource,
    "parquet": ParquetSource,
    "urls": UrlsSource,
    "webdataset": WebdatasetSource,
}


def open_source(config: SourceConfig) -> Source:
    """The source that a configuration asks for; nothing is read yet."""
    kind = getattr(config, "kind", None)
    if kind not in _SOURCES:
        raise SourceError(f"source.kind: got {kind!r}, takes {', '.join(sorted(_SOURCES))}")
    return _SOURCES[kind](config)
