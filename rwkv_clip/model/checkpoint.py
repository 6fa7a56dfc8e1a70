"""Checkpoints: ours are a folder of safetensors and JSON, the published ones are .pt files.

Which one a path holds is told by its content, never by its name. Nothing in a file is executed.
Weights are float32 masters; the published files' bfloat16 parameters are read exactly, and
written back as bfloat16. Loading is strict, and all that is wrong is told in one error.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from rwkv_clip.checkpoint_files import CONFIG_DIGEST, CONFIG_FILE, WEIGHTS_FILE
from rwkv_clip.model.clip import RWKVCLIP, create_model
from rwkv_clip.model.config import CONFIGS, CLIPConfig, ImageConfig, TextConfig, named_config
from rwkv_clip.model.image import resize_positions

POSITIONS = "image_model.pos_embed"
_BFLOAT16_PUBLISHED = re.compile(r"text_model\.blocks\.\d+\.att\.(time_decay|time_faaaa)")
# Module wrappers of DistributedDataParallel, torch.compile and activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module"})
_STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where training scripts keep weights
_LISTED = 8  # of each kind of wrong key
_MOST_WRAPPINGS = 8  # of a state dict in others; one may hold itself
_GATHER = (
    "What is sharded is gathered by torch.distributed.checkpoint.state_dict.get_model_state_dict "
    "with full_state_dict=True; load that into a model of create_model, and save this"
)

PathLike = str | os.PathLike[str]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: what is wrong with which file."""


def save_checkpoint(model: nn.Module, folder: PathLike) -> None:
    """Write a model's float32 weights and configuration to a folder, which may exist.

    Each file appears whole or not at all. They change places one after the other; the weights name
    their configuration, so that what a crash in between leaves is refused and not mistaken.

    Args:
        model: an RWKVCLIP, which may be wrapped or compiled.
        folder: where to.

    Raises:
        CheckpointError: if `load_checkpoint` would refuse it, as with adapters, sharded, or with
            values that are not finite; nothing is written then, nor for a TypeError.
        TypeError: if the model is none.
        OSError: if the folder cannot be written.
    """
    folder = Path(folder)
    clip = _inside(model)
    config = clip.config.to_dict()
    metadata = {"format": "pt", CONFIG_DIGEST: _digest(config)}
    state = {
        key: value.detach().to("cpu", torch.float32).contiguous()
        for key, value in _state_to_save(clip, folder).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    # Weights first: older ones, which name no configuration, then never lie beside a new one.
    with _replacing(folder / WEIGHTS_FILE, folder / CONFIG_FILE) as (weights_file, config_file):
        save_file(_unshared(state), weights_file, metadata=metadata)
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_published_checkpoint(model: nn.Module, path: PathLike, prefix: str = "module.") -> None:
    """Write the .pt file that the published code reads.

    Args:
        model: an RWKVCLIP, which may be wrapped or compiled.
        path: the file; it appears whole or not at all.
        prefix: of every key; published training saves from within DistributedDataParallel.

    Raises:
        CheckpointError, TypeError: as `save_checkpoint` does.
        OSError: if the file cannot be written.
    """
    path = Path(path)
    state = {}
    for key, value in _state_to_save(_inside(model), path).items():
        published = torch.bfloat16 if _BFLOAT16_PUBLISHED.fullmatch(key) else torch.float32
        state[prefix + key] = value.detach().to("cpu", published)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _replacing(path) as (file,):
        torch.save(state, file)


def load_checkpoint(
    path: PathLike,
    *,
    config: CLIPConfig | str | None = None,
    image_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RWKVCLIP:
    """Read a model, in evaluation mode.

    Args:
        path: a folder of `save_checkpoint`, its model.safetensors, or a published .pt file:
            a state dict, alone or under "state_dict", "model_state_dict" or "model".
        config: the configuration, or a model's name, where the file's own is not wanted. Without
            it a file that has none gets the one that its shapes tell.
        image_size: make the position embedding fit another size of image.
        device: where the model goes; the CPU by default.
        dtype: of the weights, a floating one; float32 by default.

    Raises:
        CheckpointError: if there is no such file, if it is damaged or no checkpoint, if keys are
            unknown, missing or misshapen, if values are not finite, or not in `dtype`, or if the
            weights were saved with another configuration than the one beside them, or than their
            shapes tell.
        ValueError: for an unknown name of a model, or an image size that is none.
        TypeError: for a dtype that is not floating.
    """
    path = Path(path)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}; takes a floating type")
    wanted = named_config(config) if isinstance(config, str) else config
    state, own = _read(path, needs_config=wanted is None)
    made_for = wanted or own or infer_config(state, path)
    if image_size is not None:
        made_for = made_for.with_image_size(image_size)
        _resize(state, made_for)
    model = create_model(made_for, device="meta")
    kept = dtype or torch.float32
    _check(state, model, f"{path} does not fit the model {made_for.name}", kept)
    # Assigned: to make room for them by `to_empty` imports sympy, which takes half a second.
    copies = {
        name: value.to(kept, copy=True, memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    model.load_state_dict(copies, assign=True)
    return model.to(device=device).eval()


def infer_config(state: Mapping[str, Tensor], path: Path) -> CLIPConfig:
    """The configuration that a state dict's shapes tell; a known model's if they are one's.

    What shapes do not tell is as in the paper: texts of 77 tokens, square images, no
    regularisation.

    Raises:
        CheckpointError: if they do not tell.
    """
    try:
        positions, D = state[POSITIONS].shape[1:]
        side = state["image_model.patch_embed.projection.weight"].shape[-1]
        image_block, text_block = "image_model.layers", "text_model.blocks"
        image = ImageConfig(
            depth=_depth(state, image_block),
            heads=state[f"{image_block}.0.att.time_faaaa"].shape[0],
            embed_dim=D,
            hidden_dim=state[f"{image_block}.0.ffn.key.weight"].shape[0],
            patch_size=side,
            image_size=side * round(positions**0.5),
            class_token="image_model.cls_token" in state,
        )
        text = TextConfig(
            depth=_depth(state, text_block),
            heads=state[f"{text_block}.0.att.time_faaaa"].shape[0],
            embed_dim=D,
            hidden_dim=state[f"{text_block}.0.ffn.key.weight"].shape[0],
            vocab_size=state["text_model.emb.weight"].shape[0],
        )
        inferred = CLIPConfig(image, text)
    except (KeyError, ValueError, IndexError) as error:
        lacks = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path} does not tell its model's configuration ({lacks}). Give config= a model's "
            f"name ({', '.join(CONFIGS)}) or a CLIPConfig, if it is an RWKV-CLIP at all."
        ) from error
    shapes = _shapes(inferred)
    for known in CONFIGS.values():
        if _shapes(known) == shapes:
            return known
    return inferred


def _read(path: Path, *, needs_config: bool) -> tuple[dict[str, Tensor], CLIPConfig | None]:
    """The state dict under published names, and the configuration beside it, if any."""
    if path.is_dir():
        missing = [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (path / name).is_file()]
        if CONFIG_FILE in missing and not needs_config:
            missing.remove(CONFIG_FILE)
        if missing:
            there = ", ".join(sorted(entry.name for entry in path.iterdir())[:_LISTED])
            raise CheckpointError(
                f"{path} is no checkpoint: it lacks {' and '.join(missing)} (it has "
                f"{there or 'nothing'})"
            )
        path = path / WEIGHTS_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    kind = _kind(path)
    if kind == "safetensors":
        tensors, metadata = _read_safetensors(path)
        state, digest = _unwrap(tensors, path), metadata.get(CONFIG_DIGEST)
        beside = path.with_name(CONFIG_FILE)
        own = None
        if needs_config and beside.is_file():
            own = _read_config(beside, digest)
        elif needs_config and digest is not None:
            own = _infer_same(state, path, digest)
        return state, own
    return _unwrap(_read_pickle(path, zipped=kind == "zip"), path), None


def _kind(path: Path) -> str:
    """What a file is by its first bytes: safetensors, zip or pickle."""
    with path.open("rb") as file:
        head = file.read(9)
    # First of all: the header's length, before its brace, may begin as any other file does.
    if len(head) == 9 and head.endswith(b"{"):
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    raise CheckpointError(
        f"{path} is neither a safetensors nor a PyTorch file "
        f"({f'it begins with {head!r}' if head else 'it is empty'})"
    )


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return state, file.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def _read_pickle(path: Path, *, zipped: bool) -> dict[str, Any]:
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds Python objects or code, which is never run; takes tensors only. "
            f"Where it comes from somebody you trust, load it there and save its state_dict(). "
            f"({_first_line(error)})"
        ) from error
    except MemoryError:  # which is not the file's fault
        raise
    except Exception as error:  # PyTorch raises whatever a garbled file leads it to
        reason = _first_line(error)
        raise CheckpointError(f"{path} is damaged, or no checkpoint: {reason}") from error
    data = _innermost_state(data)
    if not isinstance(data, Mapping) or not data:
        found = "nothing" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        raise CheckpointError(f"{path} holds {found}; takes a state dict")
    odd = [
        f"{key!r} ({_nature(value)})"
        for key, value in data.items()
        if not isinstance(key, str) or _nature(value) != "dense"
    ]
    if odd:
        raise CheckpointError(f"{path} has what is not a dense tensor with a name: {_some(odd)}")
    return dict(data)


def _innermost_state(data: Any) -> Any:
    """What training scripts wrap in a dictionary beside their own notes."""
    for _ in range(_MOST_WRAPPINGS):
        if not isinstance(data, Mapping):
            break
        key = next((key for key in _STATE_KEYS if isinstance(data.get(key), Mapping)), None)
        if key is None:
            break
        data = data[key]
    return data


def _read_config(path: Path, digest: str | None) -> CLIPConfig:
    """The configuration in a file, which has to be that of the digest, if there is one."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        config = CLIPConfig.from_dict(data)
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be a configuration") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if digest is not None and digest != _digest(data):
        raise CheckpointError(
            f"{path} is not the configuration that the weights beside it were saved with: it was "
            "edited, or saving was interrupted. Give config= the one that is right."
        )
    return config


def _infer_same(state: Mapping[str, Tensor], path: Path, digest: str) -> CLIPConfig:
    """The configuration that the shapes tell, which has to be that of the digest."""
    inferred = infer_config(state, path)
    if _digest(inferred.to_dict()) != digest:
        raise CheckpointError(
            f"{path} was saved with another configuration than its shapes tell, and no "
            f"{CONFIG_FILE} is beside it. Put that there, or give config= the one that is right."
        )
    return inferred


def _digest(config: Mapping[str, Any]) -> str:
    """Of a configuration as JSON has it, but for its name, which changes nothing."""
    told = {key: value for key, value in config.items() if key != "name"}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _nature(value: object) -> str:
    """What a value is: "dense" if it is a tensor whose numbers lie in memory one by one."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_meta:
        return "without data"
    if value.is_nested or value.is_quantized:
        return "nested" if value.is_nested else "quantized"
    wraps: bool = is_traceable_wrapper_subclass(value)  # others, as DTensor does its share
    if wraps:
        return type(value).__name__
    return "dense" if value.layout == torch.strided else str(value.layout)


def _inside(model: nn.Module) -> RWKVCLIP:
    """The model within wrappers as DistributedDataParallel, which hide its attributes.

    Those of torch.compile and FSDP pass them on, and have a state dict that is to be asked for.
    """
    inner: object = model
    while not isinstance(getattr(inner, "config", None), CLIPConfig):
        inner = getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise TypeError(f"takes an RWKVCLIP, wrapped or not; got a {type(model).__name__}")
    return cast("RWKVCLIP", inner)


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each in memory of its own, as safetensors takes them: weights that are tied are copied."""
    seen: set[int] = set()
    own = {}
    for key, value in state.items():
        place = value.untyped_storage().data_ptr()
        own[key] = value.clone() if place in seen else value
        seen.add(place)
    return own


def _unwrap(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The state under published names, whatever wrapped the model, or parts of it, in training."""
    names = {key: ".".join(p for p in key.split(".") if p not in _WRAPPERS) for key in state}
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CheckpointError(f"{path} has these more than once, wrapped and not: {_some(twice)}")
    return {names[key]: value for key, value in state.items()}


def _state_to_save(model: RWKVCLIP, path: Path) -> dict[str, Tensor]:
    """The state under published names; raises CheckpointError if `load_checkpoint` refuses it."""
    state = _unwrap(model.state_dict(), path)
    own = create_model(model.config, device="meta")
    _check(state, own, f"The model is no plain {own.config.name}, and is not saved to {path}")
    return state


def _check(
    state: Mapping[str, Tensor], model: RWKVCLIP, title: str, dtype: torch.dtype = torch.float32
) -> None:
    """Raise one CheckpointError with all that keeps a state from being the model's.

    Args:
        state: under published names.
        model: which it is to fit.
        title: how the error begins.
        dtype: what the weights become.
    """
    takes = {key: list(value.shape) for key, value in model.state_dict().items()}
    natures = {key: _nature(state[key]) for key in takes if key in state}
    shared = {key: state[key] for key, nature in natures.items() if nature == "dense"}
    misshapen = [
        f"{key} (has {list(value.shape)}, takes {takes[key]})"
        for key, value in shared.items()
        if list(value.shape) != takes[key]
    ]
    weights = {key: value for key, value in shared.items() if value.is_floating_point()}
    finite = {key: value for key, value in weights.items() if _is_finite(value)}
    problems = {
        "missing": [key for key in takes if key not in state],
        "unknown": [key for key in state if key not in takes],
        "not a dense tensor": [f"{k} ({kind})" for k, kind in natures.items() if k not in shared],
        "of another shape": misshapen,
        "not of floating type": [f"{k} ({v.dtype})" for k, v in shared.items() if k not in weights],
        "not finite": [key for key in weights if key not in finite],
        f"not finite as {dtype}": [k for k, v in finite.items() if not _is_finite_as(v, dtype)],
    }
    found = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in problems.items() if keys]
    if found:
        if any(POSITIONS in text for text in misshapen):
            found.append("image_size= fits the position embedding to another size of image")
        if "DTensor" in natures.values():
            found.append(_GATHER)
        raise CheckpointError("\n  ".join([f"{title}. These keys are", *found]))


def _is_finite(value: Tensor) -> bool:
    # A sum is not finite where a value is not, and soon had; but that of large values overflows.
    wide = torch.float64 if value.dtype == torch.float64 else torch.float32
    return bool(value.sum(dtype=wide).isfinite() or value.to(wide).isfinite().all())


def _is_finite_as(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite values are still so in another type, as most always are."""
    wider = torch.finfo(dtype).max >= torch.finfo(value.dtype).max
    return wider or _is_finite(value.to(dtype))


def _resize(state: dict[str, Tensor], config: CLIPConfig) -> None:
    """Interpolate the position embedding to the configuration's grid."""
    positions = state.get(POSITIONS)
    grid = config.image.grid
    if positions is None or positions.ndim != 3 or positions.shape[1] == grid**2:
        return  # nothing to do, or the check that follows says what is wrong
    if round(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]:
        state[POSITIONS] = resize_positions(positions.float(), grid, grid).contiguous()


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    blocks = {match[1] for key in state if (match := pattern.match(key))}
    if not blocks:
        raise KeyError(f"{prefix}.0")
    return len(blocks)


def _shapes(config: CLIPConfig) -> dict[str, list[int]]:
    state = create_model(config, device="meta").state_dict()
    return {key: list(value.shape) for key, value in state.items()}


@contextlib.contextmanager
def _replacing(*paths: Path) -> Iterator[list[Path]]:
    """Files to write that take the places of `paths` if all are whole, and else leave no trace."""
    temporary = [path.with_name(f".{path.name}.{secrets.token_hex(4)}") for path in paths]
    try:
        for file in temporary:
            file.touch(exist_ok=False)
        mode = temporary[0].stat().st_mode  # as the user's umask has it; safetensors narrows it
        yield temporary
        for file in temporary:
            file.chmod(mode)
            with file.open("rb") as written:
                os.fsync(written.fileno())
        for file, path in zip(temporary, paths, strict=True):
            file.replace(path)
    except BaseException:
        for file in temporary:
            file.unlink(missing_ok=True)
        raise


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
