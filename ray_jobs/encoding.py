"""Embeddings of stored images and pairs."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs
import ray
import ray.data
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

import rwkv_clip
from ray_jobs.execution import arrange, work_items
from ray_jobs.progress import Progress
from ray_jobs.room import Need, warn_without_room
from ray_jobs.storage import Storage
from ray_jobs.training.batches import TEXTS, PairFiles
from rwkv_clip.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from rwkv_clip.config import BaseConfig, Precision
from rwkv_clip.heap import kept_memory
from rwkv_clip.images import ImageDecodeError
from rwkv_clip.model import RWKVCLIP, load_checkpoint
from rwkv_clip.precision import products_in, round_weights
from rwkv_clip.transforms import TransformedBatch

logger = logging.getLogger(__name__)

_COPIED_AT_ONCE = 32_000_000  # bytes of a model, for each of which a server is asked


class EncoderConfig(BaseConfig):
    """What embeds."""

    batch: PositiveInt = Field(256, description="images or texts embedded at a time")
    workers: PositiveInt = Field(1, description="processes that embed")
    cpus_per_worker: PositiveFloat = Field(1.0, description="CPUs that each holds")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each holds")
    precision: Precision = "float32"
    compile: bool = Field(
        False, description="compile the model in each process, for GPUs and much to embed"
    )

    def need(self, section: str) -> Need:
        """What one of these processes holds, for a section of the configuration."""
        return Need(f"{section}.cpus_per_worker", self.cpus_per_worker, self.gpus_per_worker)

    @property
    def threads(self) -> int:
        """That decode images beside the model; alone on its CPUs, the model wants all of them."""
        return max(1, int(self.cpus_per_worker)) if self.gpus_per_worker else 1

    def embedded(
        self,
        section: str,
        work: Sequence[Mapping[str, Any]],
        encoder: Callable[..., Any],
        *arguments: Any,
        **named: Any,
    ) -> ray.data.Dataset:
        """What these processes give for items of work.

        Args:
            section: of the configuration; a warning names it if they do not fit anywhere.
            work: the items.
            encoder: a class, called with a batch of one item.
            arguments: that it is made with.
            named: the same, by name.
        """
        warn_without_room(self.need(section))
        return work_items(work).map_batches(
            encoder,
            fn_constructor_args=arguments,
            fn_constructor_kwargs=named,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self.workers),
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker or None,
            runtime_env={"env_vars": kept_memory(self.gpus_per_worker)},
        )

    def gather(
        self,
        told: str,
        total: int,
        unit: str,
        work: Sequence[Mapping[str, Any]],
        encoder: Callable[..., Any],
        *arguments: Any,
        **named: Any,
    ) -> pa.Table:
        """All that these processes give in an evaluation, in order, telling how far it is.

        Args:
            told: what is done.
            total: rows that there may be.
            unit: what a row is.
            work, encoder, arguments, named: as of `embedded`.
        """
        dataset = arrange(
            self.embedded("evaluation", work, encoder, *arguments, **named), ordered=True
        )
        tables: list[pa.Table] = []
        batches: Iterator[Any] = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        with Progress(told, total, unit) as progress:
            for batch in batches:
                tables.append(batch)
                progress.update(batch.num_rows)
        return pa.concat_tables(tables).combine_chunks()


@dataclass(frozen=True)
class Encoded:
    """Pairs with their embeddings, [B, D] each, of length 1."""

    ids: list[str]
    texts: list[str]
    image_emb: Tensor
    text_emb: Tensor


def given_device(gpus_key: str) -> torch.device:
    """This process's GPU, or the CPU where it was given none.

    Args:
        gpus_key: of the configuration, that says how many GPUs it is given; for errors.

    Raises:
        RuntimeError: it was given a GPU that PyTorch does not see.
    """
    # Ray hides no GPU from a task that holds none; training has the one that it would take.
    given = ray.is_initialized() and bool(ray.get_gpu_ids())
    if given and not torch.cuda.is_available():
        raise RuntimeError(
            f"{gpus_key}: PyTorch sees no GPU on this node; install requirements/cuda.txt "
            "there, or set it to 0"
        )
    return torch.device("cuda" if given else "cpu")


class ImageEncoder:
    """Embeds images, and texts, with a model on this process's device.

    Args:
        model: the model, which is the encoder's own from then on.
        config: how.
        gpus_key: of the configuration, that says how many GPUs it is given; for errors.

    Raises:
        RuntimeError: it was given a GPU that PyTorch does not see.
    """

    def __init__(self, model: RWKVCLIP, config: EncoderConfig, *, gpus_key: str) -> None:
        self.device = given_device(gpus_key)
        self.model = model.to(self.device).eval()
        self.precision = config.precision
        round_weights(self.model, self.precision)
        self._encode_image, self._encode_text = self.model.encode_image, self.model.encode_text
        if config.compile:
            self._encode_image = torch.compile(self._encode_image)
            self._encode_text = torch.compile(self._encode_text)
        self.transform = rwkv_clip.image_transform(self.model.config)
        self.pieces = config.threads
        self.threads = ThreadPoolExecutor(self.pieces, "decode") if self.pieces > 1 else None

    @torch.inference_mode()
    def encode_images(
        self, images: Sequence[bytes], names: Sequence[object]
    ) -> tuple[Tensor, list[int], list[ImageDecodeError]]:
        """Embeddings [n, D], the positions of the n images, and an error for each other one."""
        found = self._decode(images, names)
        for error in found.errors:
            logger.warning("left out: %s", error)
        with products_in(self.precision, self.device):
            embedded = self._encode_image(found.pixels.to(self.device))
        return embedded, found.indices, found.errors

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], at_once: int | None = None) -> Tensor:
        """Embeddings [n, D] of n texts, so many at a time."""
        tokens = rwkv_clip.tokenize(list(texts), self.model.config.context_length)
        parts = [tokens] if at_once is None else tokens.split(at_once)
        with products_in(self.precision, self.device):
            return torch.cat([self._encode_text(part.to(self.device)) for part in parts])

    def _decode(self, images: Sequence[bytes], names: Sequence[object]) -> TransformedBatch:
        if self.threads is None or not images:
            return self.transform.batch(images, names=names)
        step = math.ceil(len(images) / self.pieces)
        starts = range(0, len(images), step)

        def part(start: int) -> TransformedBatch:
            piece = slice(start, start + step)
            return self.transform.batch(images[piece], names=names[piece])

        parts = list(self.threads.map(part, starts))
        return TransformedBatch(
            torch.cat([done.pixels for done in parts]),
            [at + one for at, done in zip(starts, parts, strict=True) for one in done.indices],
            [error for done in parts for error in done.errors],
        )


class PairEncoder(ImageEncoder):
    """Embeds pairs.

    Args:
        model: the model.
        files: the pairs.
        text: the column whose texts are embedded.
        config: how.
        gpus_key: of the configuration, that says how many GPUs it is given; for errors.

    Raises:
        RuntimeError: it was given a GPU that PyTorch does not see.
    """

    def __init__(
        self,
        model: RWKVCLIP,
        files: PairFiles,
        text: str,
        config: EncoderConfig,
        *,
        gpus_key: str,
    ) -> None:
        super().__init__(model, config, gpus_key=gpus_key)
        self.files, self.text = files, text

    @torch.inference_mode()
    def encode(self, first: int, rows: int) -> Encoded:
        """The rows first .. first + rows; those whose image cannot be decoded are left out."""
        pairs = self.files.take(np.arange(first, first + rows))
        ids = [pair["id"] for pair in pairs]
        image_emb, usable, _ = self.encode_images([pair["image"] for pair in pairs], ids)
        texts = [pairs[at][self.text] or "" for at in usable]
        return Encoded([ids[at] for at in usable], texts, image_emb, self.encode_texts(texts))


class TextsError(ValueError):
    """There is nothing to search images by; the message says what to do."""


def check_texts(files: PairFiles, column: str, key: str, pairs: int | None = None) -> None:
    """Look whether pairs have a text to search images by.

    Args:
        files: of the pairs.
        column: that the text is in.
        key: of the configuration, that names the column.
        pairs: that are looked at, from the first on; all if absent.

    Raises:
        TextsError: none of them has one.
    """
    if files.beside:  # where it may be as well
        return
    if any(pair[column] for pair in islice(files.texts(), pairs)):
        return
    there = [name for name in TEXTS if name != column]
    some = pairs is not None and pairs < sum(files.flat_row_groups)
    among = f"none of the first {pairs:,} pairs" if some else "no pair"
    raise TextsError(
        f"{key}: {among} of {files.storage.child_uri(files.parts[0]).rpartition('/')[0]} has a "
        f"{column} to search images by; set it to {' or '.join(there)}, or give captions"
    )


def with_text(texts: Sequence[str]) -> npt.NDArray[np.intp]:
    """Places of the texts that are not empty; who searches by nothing finds anything."""
    return np.flatnonzero([bool(text.strip()) for text in texts])


def fetch_checkpoint(storage: Storage, name: str) -> RWKVCLIP:
    """A model from a checkpoint folder of any storage; raises CheckpointError."""
    return fetch_model(storage.filesystem, storage.path(name))


def fetch_model(filesystem: pafs.FileSystem, folder: str) -> RWKVCLIP:
    """The same from a folder of any file system."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return load_checkpoint(folder)
    # The optimizer's state beside them is larger.
    files = [f"{folder}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)]
    with TemporaryDirectory() as copies:
        for info in filesystem.get_file_info(files):
            if info.type == pafs.FileType.File:
                copy = str(Path(copies, info.base_name))
                pafs.copy_files(
                    info.path, copy, source_filesystem=filesystem, chunk_size=_COPIED_AT_ONCE
                )
        return load_checkpoint(Path(copies))


def vectors(values: Tensor) -> pa.FixedSizeListArray:
    """Embeddings as a column."""
    flat = values.float().cpu().numpy().reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])


def matrix(
    column: pa.ChunkedArray | pa.FixedSizeListArray,
) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """A column of embeddings as [N, D]."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    width: int = array.type.list_size
    values: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    values = array.flatten().to_numpy().reshape(-1, width)
    return values
