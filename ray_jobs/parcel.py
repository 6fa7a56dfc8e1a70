"""What travels to a cluster with a job: a small archive of configuration and code.

Choices:
- What is sent is named, not what is left out: the configuration, what it needs beside it, and on
  request this program's own Python files. Data and models are the storage's.
- Compiled libraries stay here. They belong to the nodes' image, or to a wheel that is installed
  once on each node.
- The same content gives the same bytes, so Ray uploads it once.
"""

import zipfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

# Ray's job server takes no more, and says so only after the upload.
LIMIT_BYTES = 100 * 1024**2
PACKAGES = ("rwkv_clip", "ray_jobs", "serve")
_LEFT_OUT = frozenset({"__pycache__", "node_modules"})
_COMPILED = frozenset({".so", ".pyc", ".pyo", ".o", ".d"})
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can hold
_TOLD = 5  # largest files, in an error


class ParcelError(ValueError):
    """Something that cannot be sent; the message says what to do."""


def code_files() -> dict[str, Path]:
    """This program's packages as they are here, by their names in the archive."""
    found: dict[str, Path] = {}
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            continue
        root = Path(spec.origin).parent
        for file in _below(root):
            found[f"{package}/{file.relative_to(root).as_posix()}"] = file
    return found


def chosen_files(paths: Sequence[Path], base: Path) -> dict[str, Path]:
    """Files and folders by their names below a base folder.

    Raises:
        ParcelError: there is no such file, or it is not below the base.
    """
    found: dict[str, Path] = {}
    root = base.resolve()
    for path in paths:
        whole = (root / path).resolve()
        if not whole.exists():
            raise ParcelError(f"{path} does not exist in {root}")
        if not whole.is_relative_to(root):
            raise ParcelError(
                f"{path} is not below {root}, where the job's paths begin; start from a folder "
                "that holds it"
            )
        files = _below(whole) if whole.is_dir() else iter([whole])
        found |= {file.relative_to(root).as_posix(): file for file in files}
    return found


def _below(folder: Path) -> Iterator[Path]:
    """The files of a folder that are worth sending, sorted."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _LEFT_OUT:
            continue
        if path.is_dir():
            yield from _below(path)
        elif path.suffix not in _COMPILED:
            yield path


def pack(files: Mapping[str, Path], target: Path, limit: int = LIMIT_BYTES) -> int:
    """Write the archive; gives its size in bytes.

    Raises:
        ParcelError: it is larger than a job server takes; names the largest files.
    """
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in sorted(files.items()):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, file.read_bytes())
        sizes = {one.filename: one.compress_size for one in archive.infolist()}
    size = target.stat().st_size
    if size >= limit:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_TOLD]
        told = ", ".join(f"{name} {_mib(sizes[name])}" for name in largest)
        raise ParcelError(
            f"what would be sent has {_mib(size)}, and a job takes {_mib(limit)}. The largest are "
            f"{told}. Leave them out: data and models belong into the storage"
        )
    return size


def _mib(size: int) -> str:
    return f"{size / 1024**2:.1f} MiB"
