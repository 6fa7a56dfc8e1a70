"""Writes docs/configuration.md: every key of a run's file, from the models that check it.

    make docs

Choices:
- It lives beside its page, because nothing else may import both the jobs and the server.
- A key's words are its field's, so the page says what an error does. A section without words of its
  own has those of its model.
- A section that was shown before, with the same defaults, is named and not shown again. Kinds are
  shown again, so that whoever searches the page for a key finds it.
"""

import re
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ray_jobs.pipeline import PipelineConfig
from serve.config import ServeConfig

Model = type[BaseModel]

PAGE = Path(__file__).with_suffix(".md")

_PLURALS = {"text": "texts", "section": "sections"}
INTRODUCTION = """\
# Every key of a run's file

<!-- Written by `make docs` from the models; what a key is said to be is changed there. -->

All commands take the same file: `rwkv-clip COMMAND --config FILE`. The jobs read every section but
`serve`, which is the endpoint's; of that they read `serve.model` alone, whose vectors `embed` makes
where `embed.model` is absent. The endpoint reads `storage` and `tracking` too, and needs neither
where `serve.model` is a folder or a URI. [configs/](../configs) holds whole files.

**On the command line** any key is set by `--set KEY=VALUE`, as often as wanted:

    --set train.batch=512 --set 'train_data.source={kind: folder, path: /data}'

The value is YAML. It goes before the file's, and a later one before an earlier one. Keys that the
file does not have are added; *N* is the place of an item in a list that the file has, from 0 on.

**The environment** changes no key that is given. Where `tracking.uri` is absent,
`MLFLOW_TRACKING_URI` is taken; where `ray.address` is, `RAY_ADDRESS`; where an S3's `region` is,
what AWS's tools take. Credentials come from there alone.

**Mistakes** end a command before any work. All are told at once, each with its line.

*absent* is a default that the description explains, and `null` says the same. A section without a
default is there, with its keys' defaults.
"""


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        key: dotted, as `--set` takes it; the name of a section that has a heading is a link.
        takes: its type, in words.
        default: as YAML; `required`, `absent`, or empty for a section that is there by default.
        text: what it is.
    """

    key: str
    takes: str
    default: str
    text: str


@dataclass(frozen=True)
class Table:
    """A heading, what is to be said of all its keys, and these.

    Attributes:
        kinds: a table for each kind of the sections that have one.
    """

    title: str
    text: str
    rows: list[Row] = field(default_factory=list)
    kinds: list["Table"] = field(default_factory=list)


class Reference:
    """The tables of a whole file.

    Attributes:
        file: the sections' names.
        sections: a table for each.
    """

    def __init__(self) -> None:
        self.file = Table("The file", "")
        self.sections: list[Table] = []
        self._shown: list[tuple[Model, BaseModel | None, str]] = []
        for name, about in PipelineConfig.model_fields.items():
            # The jobs check nothing of this section.
            model = ServeConfig if name == "serve" else _section(about.annotation)
            default = ServeConfig() if name == "serve" else _default(about)
            row = _row(name, about, default)
            if model is None:
                self.file.rows.append(row)
                continue
            title = Row(
                f"[`{name}`](#{name})", row.takes, row.default, row.text or _words_of(model)
            )
            self.file.rows.append(replace(title, takes="section") if name == "serve" else title)
            if (same := self._same(model, default)) is not None:
                table = Table(name, f"Has the keys of `{same}`.")
            else:
                table = Table(name, _words_of(model))
                self._fill(table, name, model, default)
            self.sections.append(table)

    def _fill(self, table: Table, path: str, model: Model, default: Any) -> None:
        """Add a section's keys; `default` is what the section is if a file does not have it."""
        filled = _filled(model, default)
        self._shown.append((model, filled, path))
        for name, about in model.model_fields.items():
            key = f"{path}.{name}"
            value = getattr(filled, name) if filled else _default(about)
            row = _row(key, about, value)
            inner = _section(about.annotation)
            if about.discriminator is not None:
                self._add_kinds(table, row, _members(about.annotation))
            elif inner is not None:
                self._add_section(table, row, inner, value)
            elif name != "kind":  # which stands above the table
                table.rows.append(row)

    def _add_section(self, table: Table, row: Row, model: Model, default: Any) -> None:
        text = row.text or _words_of(model)
        same = self._same(model, default)
        if same is not None and same != row.key:  # other kinds have their own of the same name
            end = "" if text.endswith(".") else "."
            table.rows.append(replace(row, text=f"{text}{end} Its keys are those of `{same}`"))
            return
        table.rows.append(replace(row, text=text))
        several = row.takes.startswith("list")
        self._fill(table, f"{row.key}.N" if several else row.key, model, default)

    def _add_kinds(self, table: Table, row: Row, models: Sequence[Model]) -> None:
        kinds = {typing.get_args(one.model_fields["kind"].annotation)[0]: one for one in models}
        which = Row(
            f"{row.key}.kind", _choice(sorted(kinds)), "required", "has keys of its own, below"
        )
        table.rows.extend([row, which])
        for kind, model in sorted(kinds.items()):
            inner = Table(f"{row.key}, kind: {kind}", _words_of(model))
            self._fill(inner, row.key, model, None)
            table.kinds.append(inner)

    def _same(self, model: Model, default: Any) -> str | None:
        """Where a section was shown with the same defaults."""
        wanted = model, _filled(model, default)
        return next((path for *shown, path in self._shown if tuple(shown) == wanted), None)


def _row(key: str, about: FieldInfo, default: Any) -> Row:
    takes = _type(about.annotation, about.metadata)
    if default is not None and type(None) in typing.get_args(about.annotation):
        takes += ", or null"
    told = "required" if about.is_required() and default is None else _told(default)
    return Row(key, takes, told, about.description or "")


def _filled(model: Model, default: Any) -> BaseModel | None:
    """A section with its defaults; None if it has keys without."""
    if isinstance(default, BaseModel):
        return default
    required = any(about.is_required() for about in model.model_fields.values())
    return None if required else model()


def _default(about: FieldInfo) -> Any:
    return None if about.is_required() else about.get_default(call_default_factory=True)


def _told(default: Any) -> str:
    if default is None:
        return "absent"
    if isinstance(default, BaseModel):
        return ""
    if isinstance(default, tuple):
        default = list(default)
    text = yaml.safe_dump(default, default_flow_style=True, allow_unicode=True, width=sys.maxsize)
    text = text.removesuffix("...\n").strip()
    return f"`{text}`"


def _members(annotation: Any) -> list[Any]:
    """A union's members but None; anything else alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [_members(one) for one in typing.get_args(annotation)]
        return [member for members in inner for member in members if member is not type(None)]
    return [annotation]


def _section(annotation: Any) -> Model | None:
    """The model of a section, or of a list's sections; None for anything else and for kinds."""
    members = _members(annotation)
    member = members[0] if len(members) == 1 else None
    if typing.get_origin(member) is tuple:
        member = typing.get_args(member)[0]
    return member if isinstance(member, type) and issubclass(member, BaseModel) else None


def _words_of(model: Model) -> str:
    """The first paragraph of what a model says of itself, without the classes it names."""
    text = " ".join((model.__doc__ or "").partition("\n\n")[0].split())
    return re.sub(r"; see \w+\.$", ".", text)


def _type(annotation: Any, limits: Sequence[Any] = ()) -> str:
    """A type in plain words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0], [*limits, *arguments[1:]])
    if origin in (typing.Union, types.UnionType):
        told = dict.fromkeys(_type(member, limits) for member in _members(annotation))
        return ", or ".join(told)
    if origin is typing.Literal:
        return _choice(arguments)
    if origin is tuple:
        item = _type(arguments[0])
        return f"list of {_PLURALS.get(item, item)}" + _not_empty(limits)
    if origin is dict:
        return "mapping of texts to texts" if arguments[1] is str else "mapping"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ", ".join(
            ["whole number" if annotation is int else "number", *_range(annotation, limits)]
        )
    if annotation is str:
        patterns = [pattern for one in limits if (pattern := getattr(one, "pattern", None))]
        return "text" + "".join(f" that matches `{one}`" for one in patterns) + _not_empty(limits)
    return "section"


def _not_empty(limits: Sequence[Any]) -> str:
    return ", not empty" if any(isinstance(one, MinLen) for one in limits) else ""


def _choice(values: Sequence[Any]) -> str:
    *first, last = [f"`{value}`" for value in values]
    return f"{', '.join(first)} or {last}" if first else last


def _range(number: type, limits: Sequence[Any]) -> list[str]:
    """What a number may be."""
    least = next((one.ge for one in limits if isinstance(one, Ge)), None)
    above = next((one.gt for one in limits if isinstance(one, Gt)), None)
    most = next((one.le for one in limits if isinstance(one, Le)), None)
    below = next((one.lt for one in limits if isinstance(one, Lt)), None)
    if number is int and above is not None:
        least, above = int(typing.cast(int, above)) + 1, None
    if least is not None and most is not None:
        return [f"{least} to {most}"]
    told = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    found = [f"{word} {limit}" for word, limit in told if limit is not None]
    return [" and ".join(found)] if found else []


def page() -> str:
    """The whole page."""
    reference = Reference()
    parts = [INTRODUCTION, *_lines(reference.file, 2)]
    for section in reference.sections:
        parts += _lines(section, 2)
    return "\n".join(parts)


def _lines(table: Table, level: int) -> Iterator[str]:
    yield f"{'#' * level} {table.title}\n"
    if table.text:
        yield table.text + "\n"
    if table.rows:
        yield "| key | takes | default | what it is |"
        yield "|---|---|---|---|"
        yield from map(_line, table.rows)
        yield ""
    for kind in table.kinds:
        yield from _lines(kind, level + 1)


def _line(row: Row) -> str:
    key = row.key if row.key.startswith("[") else f"`{row.key}`"
    cells = (key, row.takes, row.default, row.text)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
