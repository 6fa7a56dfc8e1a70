"""The configuration base: pydantic models read from a YAML file and `--set key.path=value`.

Every command validates its whole configuration before any work. All mistakes are told at once,
each with where it stands (file and line, or the `--set`), the key's path, what was given and what
it takes. The environment is not consulted: a run is what its file and its command line say.
"""

import argparse
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Config = TypeVar("Config", bound=BaseModel)
KeyPath = tuple[str | int, ...]
Precision = Annotated[  # see rwkv_clip.precision
    Literal["float32", "bfloat16"],
    Field(description="of matrix products; bfloat16 is for GPUs, and CPUs with matrix units"),
]

_MOST_VALUES = 100_000  # of one file


class BaseConfig(BaseModel):
    """The base of every configuration: unknown keys are refused, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        coerce_numbers_to_str=True,  # a name may be 2026; see _Document.keep_texts for 1.10
        allow_inf_nan=False,
    )


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Attributes:
        where: The file and line, or the `--set` it came from; empty when only absent.
        key: The dotted path of the key; empty for the document as a whole.
        text: What was given and what the key takes.
    """

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.text) if part)


class ConfigError(ValueError):
    """A configuration that cannot be used, with everything that is wrong in it."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, problems)]))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.problems,)


def load_config(cls: type[Config], path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Args:
        cls: The configuration's model.
        path: A YAML file; None starts from the defaults.
        overrides: `key.path=value` each, applied in order. The value is YAML, a number in the
            path is a list's index, and keys that the file does not have are added.

    Raises:
        ConfigError: naming every mistake found.
    """
    document = _Document({}, {}) if path is None else _read(path)
    problems = [problem for text in overrides if (problem := document.override(text))]
    document.keep_texts(cls)
    try:
        config = cls.model_validate(document.data)
    except ValidationError as error:
        problems += _explain(error, cls, document)
    else:
        if not problems:
            return config
    raise ConfigError(problems)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE` and `--set KEY.PATH=VALUE` to a command."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="the run's YAML file")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="override one value (YAML); may be repeated",
    )


def config_from_args(cls: type[Config], args: argparse.Namespace) -> Config:
    """The configuration that `add_config_options`' arguments ask for; raises ConfigError."""
    return load_config(cls, args.config, args.overrides)


@dataclass
class _Document:
    """A configuration as written.

    Attributes:
        data: what YAML makes of it.
        sources: where each key path comes from.
        written: the texts of numbers that Python would write otherwise: 1.10, 007, 20260101_0930.
    """

    data: Any
    sources: dict[KeyPath, str]
    written: dict[KeyPath, str] = field(default_factory=dict)

    def keep_texts(self, cls: type[BaseModel]) -> None:
        """Put what was written where a model takes a text and YAML saw a number."""
        for path, text in self.written.items():
            takes = {member for one in _annotations_at(cls, path) for member in _members(one)}
            if str in takes and not takes & {int, float}:
                holder = self.data
                for step in path[:-1]:
                    holder = holder[step]
                holder[path[-1]] = text

    def where(self, path: KeyPath) -> str:
        """The source of the path, or of the nearest ancestor that was written down."""
        while path and path not in self.sources:
            path = path[:-1]
        return self.sources.get(path, "")

    def override(self, text: str) -> Problem | None:
        """Apply one `key.path=value`; the problem, if it cannot be."""
        source = f"--set {text}"
        key, equals, written = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            return Problem(source, "", "takes KEY.PATH=VALUE")
        try:
            node, value = _parse(written)
        except yaml.YAMLError as error:
            return Problem(source, key, f"the value is not YAML: {_one_line(error)}")
        holder: Any = self.data
        path: KeyPath = ()
        for depth, name in enumerate(names):
            try:
                step = _step(holder, name)
            except LookupError as error:
                return Problem(source, ".".join(names[: depth + 1]), str(error))
            path = (*path, step)
            if depth == len(names) - 1:
                holder[step] = value
            else:
                holder = _descend(holder, step)
        _forget(self.sources, path)
        _forget(self.written, path)
        self.sources[path] = source
        self.written |= _texts_of_numbers(node, path)
        return None


def _forget(texts: dict[KeyPath, str], path: KeyPath) -> None:
    """Remove what is known of a path and of all below it."""
    for old in [old for old in texts if old[: len(path)] == path]:
        del texts[old]


def _step(holder: Any, name: str) -> str | int:
    """The key or index that `name` means in `holder`; raises LookupError saying why it cannot."""
    if isinstance(holder, dict):
        return name
    if not isinstance(holder, list):
        raise LookupError(f"its parent is {holder!r}, which has no keys")
    digits = len(str(_MOST_VALUES))  # of an index; Python reads no number of thousands of them
    if not name.isdecimal() or len(name) > digits or int(name) >= len(holder):
        raise LookupError(f"its parent is a list of {len(holder)}; takes an index below that")
    return int(name)


def _descend(holder: Any, step: str | int) -> Any:
    """The value at `step`, made a mapping where there is none yet."""
    if isinstance(holder, dict) and holder.get(str(step)) is None:
        holder[step] = {}
    return holder[step]


def _read(path: Path) -> _Document:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise ConfigError([Problem(str(path), "", f"cannot be read: {reason}")]) from error
    try:
        merged, data = _parse(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError([Problem(where, "", f"is not YAML: {_one_line(error)}")]) from error
    if node is None:
        return _Document({}, {(): str(path)})
    if not isinstance(data, dict):
        text = f"takes a mapping of keys to values, got {_show(data)}"
        raise ConfigError([Problem(f"{path}:{node.start_mark.line + 1}", "", text)])
    sources: dict[KeyPath, str] = {(): str(path)}
    twice = []
    try:
        below = list(_below(node, ()))
    except RecursionError:
        raise ConfigError([Problem(str(path), "", "an anchor is merged into itself")]) from None
    for key_path, at, _ in below:
        where = f"{path}:{at.start_mark.line + 1}"
        if key_path in sources:
            text = f"written twice, first at {sources[key_path]}"
            twice.append(Problem(where, _dotted(key_path), text))
        sources[key_path] = where
    if twice:
        raise ConfigError(twice)
    return _Document(data, sources, _texts_of_numbers(merged, ()))


class _Loader(yaml.SafeLoader):
    """YAML without dates, which no configuration has: a name may look like one. Keys are texts."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # a ValueError of thousands of digits, which hexadecimal ones may have
            return value
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            problem = f"{_show(node.value)} is no {node.tag.rpartition(':')[2]}"
            if isinstance(error, ValueError):  # others are PyYAML's own, as of a key that it lacks
                problem += f" ({_one_line(error)})"
            raise yaml.constructor.ConstructorError(
                problem=problem, problem_mark=node.start_mark
            ) from error


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """A text's node, with what its anchors merge into it, and its value; raises YAMLError."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        value = None if node is None else loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()
    try:
        return node, _unshared(value, iter(range(_MOST_VALUES)))
    except RecursionError:
        raise yaml.YAMLError("an alias stands inside its own anchor") from None


def _unshared(value: Any, left: Iterator[int]) -> Any:
    """A copy in which no two places are one object, as an anchor and its aliases are.

    Aliases of aliases may stand for any number of values, of which so many are `left`.
    """
    if next(left, None) is None:
        raise yaml.YAMLError(f"its anchors and aliases stand for more than {_MOST_VALUES:,} values")
    if isinstance(value, dict):
        return {key: _unshared(item, left) for key, item in value.items()}
    return [_unshared(item, left) for item in value] if isinstance(value, list) else value


def _texts_of_numbers(node: yaml.Node | None, path: KeyPath) -> dict[KeyPath, str]:
    """What was written for each number below a node that Python would write otherwise."""
    if node is None:
        return {}
    found: dict[KeyPath, str] = {}
    for at, child in [(path, node), *((at, value) for at, _, value in _below(node, path))]:
        _forget(found, at)  # an anchor's, which is merged before what is written here
        number = isinstance(child, yaml.ScalarNode) and child.tag.endswith((":int", ":float"))
        if number and str(yaml.safe_load(child.value)) != child.value:
            found[at] = child.value
    return found


def _below(node: yaml.Node | None, path: KeyPath) -> Iterator[tuple[KeyPath, yaml.Node, yaml.Node]]:
    """Every value below a node: its key path, its key (an item has none: itself), and itself."""
    children: list[tuple[str | int, yaml.Node, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        children = [(key.value, key, value) for key, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = [(index, item, item) for index, item in enumerate(node.value)]
    for name, at, value in children:
        yield (*path, name), at, value
        yield from _below(value, (*path, name))


def _explain(
    error: ValidationError, cls: type[BaseModel], document: _Document
) -> Iterator[Problem]:
    seen = set()
    for details in error.errors(include_url=False):
        path = _written_path(details["loc"], document.data, details["type"])
        if details["type"].startswith("union_tag"):  # the key that says which member is meant
            path = (*path, details["ctx"]["discriminator"].strip("'"))
        problem = Problem(document.where(path), _dotted(path), _say(details, cls, path))
        if problem not in seen:
            seen.add(problem)
            yield problem


def _written_path(loc: KeyPath, data: Any, kind: str) -> KeyPath:
    """The location without the names of union members, which pydantic puts between the keys."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        present = (isinstance(data, Mapping) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        absent = kind == "missing" and index == len(loc) - 1
        if present or absent:
            path.append(part)
            data = data[part] if present else None
    return tuple(path)


def _say(details: Mapping[str, Any], cls: type[BaseModel], path: KeyPath) -> str:
    kind, message = str(details["type"]), str(details["msg"])
    known = [name for model in _models_at(cls, path[:-1]) for name in model.model_fields]
    if kind == "extra_forbidden":
        return f"unknown key{_meant(str(path[-1]), known)}; takes {', '.join(sorted(set(known)))}"
    if kind == "missing":
        return f"missing; takes {_takes(cls, path)}"
    if kind == "union_tag_not_found":
        return "missing; it says which of several kinds this is"
    if kind == "union_tag_invalid":
        tag, takes = str(details["ctx"]["tag"]), str(details["ctx"]["expected_tags"])
        return f"got {_show(tag)}, takes {takes}{_meant(tag, takes.split(', '))}"
    if kind in ("value_error", "assertion_error"):
        message = message.partition(", ")[2] or message
        return f"got {_show(details['input'])}: {message}"
    takes = message.removeprefix("Input should be ").partition(", unable to parse")[0]
    if kind == "literal_error":
        takes += _meant(str(details["input"]), takes.replace(" or ", ", ").split(", "))
    return f"got {_show(details['input'])}, takes {takes}"


def _takes(cls: type[BaseModel], path: KeyPath) -> str:
    """What a missing key takes: its description, or its type's name."""
    for model in _models_at(cls, path[:-1]):
        field = model.model_fields.get(str(path[-1]))
        if field is not None:
            name = getattr(field.annotation, "__name__", None) or str(field.annotation)
            return f"{name}: {field.description}" if field.description else name
    return "a value"


def _models_at(cls: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """The models that may stand at a path, several where a union allows them."""
    members = [member for one in _annotations_at(cls, path) for member in _members(one)]
    return [member for member in members if _is_model(member)]


def _annotations_at(cls: type[BaseModel], path: KeyPath) -> list[Any]:
    """What may stand at a path."""
    annotations: list[Any] = [cls]
    for part in path:
        annotations = [
            inner
            for annotation in annotations
            for member in _members(annotation)
            for inner in _inside(member, part)
        ]
    return annotations


def _members(annotation: Any) -> list[Any]:
    """A union's members; a list of anything else alone."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return [annotation]
    return [inner for member in typing.get_args(annotation) for inner in _members(member)]


def _inside(annotation: Any, part: str | int) -> list[Any]:
    """What a model's field, a list's item or a mapping's value may be."""
    if not _is_model(annotation):
        inner = list(typing.get_args(annotation))
        return inner[1:] if typing.get_origin(annotation) is dict else inner
    field = annotation.model_fields.get(str(part))
    return [] if field is None else [field.annotation]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _meant(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, [option.strip("'") for option in known], n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _dotted(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _show(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _one_line(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())
