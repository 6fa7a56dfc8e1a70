"""Configurations: what is read, what is refused, and how the refusal reads."""

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator

from rwkv_clip.config import BaseConfig, ConfigError, load_config


class Optimizer(BaseConfig):
    kind: Literal["adamw", "lion"] = "adamw"
    rate: float = Field(1e-3, gt=0)
    betas: tuple[float, float] = (0.9, 0.98)
    label: str = ""


class Folder(BaseConfig):
    folder: str


class Table(BaseConfig):
    table: str
    rows: int = 1


class Run(BaseConfig):
    name: str = "run"
    label: Annotated[str, Field(min_length=1)] | None = None
    level: float | str = 0.0
    options: dict[str, Any] = {}
    steps: int = Field(10, ge=1, description="how many updates")
    optimizer: Optimizer = Optimizer()
    sources: tuple[Folder | Table, ...] = ()
    workers: dict[str, Optimizer] = {}

    @field_validator("name")
    @classmethod
    def no_slash(cls, name: str) -> str:
        if "/" in name:
            raise ValueError("a name has no slash")
        return name


class Runs(BaseConfig):
    a: Run
    b: Run


class Required(BaseConfig):
    steps: int = Field(description="how many updates")


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refusal(cls, path, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(cls, path, overrides)
    return str(caught.value)


def test_defaults_need_no_file():
    assert load_config(Run, None) == Run()


def test_an_empty_file_is_the_defaults(write):
    assert load_config(Run, write("# nothing yet\n")) == Run()


def test_a_file_is_read(write):
    config = load_config(Run, write("steps: 3\noptimizer: {kind: lion, rate: 1e-4}\n"))
    assert config == Run(steps=3, optimizer=Optimizer(kind="lion", rate=1e-4))


def test_set_overrides_the_file_in_order(write):
    path = write("steps: 3\noptimizer:\n  rate: 0.1\n")
    config = load_config(Run, path, ["optimizer.rate=1e-4", "steps=4", "steps=5"])
    assert (config.steps, config.optimizer.rate) == (5, 1e-4)


def test_set_reaches_into_lists_and_takes_yaml(write):
    path = write("sources: [{folder: a}, {table: b}]\n")
    config = load_config(Run, path, ["sources.1.rows=7", "optimizer={kind: lion}", "name=2026"])
    assert config.sources == (Folder(folder="a"), Table(table="b", rows=7))
    assert config.optimizer.kind == "lion"
    assert config.name == "2026"


@pytest.mark.parametrize(
    "text",
    ["20260101_0930", "1.10", "007", "12:30", "0x1f", "2026-02-30", "2026-01-01", "2026", "-1"],
)
def test_a_text_is_what_was_written_whatever_yaml_makes_of_it(write, text):
    path = write(f"name: {text}\nsources: [{{folder: {text}}}]\n")
    config = load_config(Run, path, [f"label={text}", f"sources.0.folder={text}"])
    assert (config.name, config.label, config.sources[0]) == (text, text, Folder(folder=text))
    assert load_config(Run, path, ["name=other"]).name == "other"


def test_a_number_is_one_however_it_is_written(write):
    path = write("steps: 1_000\noptimizer: {rate: 0.10}\noptions: {share: 0.90}\nlevel: 1.50\n")
    config = load_config(Run, path, ["options.tokens=4_096"])
    assert (config.steps, config.optimizer.rate, config.level) == (1000, 0.1, 1.5)
    assert config.options == {"share": 0.9, "tokens": 4096}


@pytest.mark.parametrize("how", ["*one", "{<<: *one}"])
def test_what_an_anchor_is_repeated_in_has_a_value_of_its_own(write, how):
    path = write(f"workers:\n  a: &one {{rate: 0.10}}\n  b: {how}\n")
    workers = load_config(Run, path, ["workers.b.rate=0.5"]).workers
    assert (workers["a"].rate, workers["b"].rate) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("anchor", "own", "expected"),
    [
        ("name: 1.10", "name: hello", {"name": "hello"}),
        ("name: 1.10", "name: 5", {"name": "5"}),
        ("name: hello", "name: 1.10", {"name": "1.10"}),
        ("options: {v: 1.10}", "options: {w: hi}", {"options": {"w": "hi"}}),
        ("sources: [{folder: 1.10}]", "sources: []", {"sources": ()}),
    ],
)
def test_what_is_written_goes_before_what_an_anchor_says(write, anchor, own, expected):
    path = write(f"a: &one {{{anchor}}}\nb: {{<<: *one, {own}}}\n")
    runs = load_config(Runs, path)
    assert {name: getattr(runs.b, name) for name in expected} == expected


def test_a_key_may_look_like_a_number(write):
    path = write("workers: {1: {label: 007}}\n")
    assert load_config(Run, path).workers["1"].label == "007"


def test_set_makes_the_sections_it_needs():
    assert load_config(Run, None, ["workers.gpu.rate=2"]).workers["gpu"].rate == 2


def test_values_do_not_change_after_loading():
    with pytest.raises(ValidationError):
        Run().steps = 2


def test_every_mistake_is_told_at_once_with_its_line(write):
    path = write("steps: many\noptimizer:\n  kind: adam\n  rat: 1\n  rate: -1\n")
    text = refusal(Run, path, "name=a/b")
    assert text.startswith("5 errors")
    assert f"{path}:1: steps: got 'many', takes a valid integer" in text
    assert f"{path}:3: optimizer.kind: got 'adam', takes 'adamw' or 'lion'" in text
    assert "(did you mean 'adamw'?)" in text
    assert f"{path}:4: optimizer.rat: unknown key (did you mean 'rate'?); takes betas, kind" in text
    assert f"{path}:5: optimizer.rate: got -1, takes greater than 0" in text
    assert "--set name=a/b: name: got 'a/b': a name has no slash" in text


def test_a_missing_key_says_what_it_takes(write):
    path = write("{}")
    assert f"{path}: steps: missing; takes int: how many updates" in refusal(Required, path)


def test_mistakes_below_a_union_and_a_list_keep_their_path_and_line(write):
    path = write("sources:\n  - folder: a\n  - table: b\n    rows: few\n")
    assert f"{path}:4: sources.1.rows: got 'few', takes a valid integer" in refusal(Run, path)


def test_unknown_keys_inside_a_mapping_of_models_are_explained(write):
    path = write("workers:\n  gpu: {ratee: 1}\n")
    assert "workers.gpu.ratee: unknown key (did you mean 'rate'?)" in refusal(Run, path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("steps", "takes KEY.PATH=VALUE"),
        ("=3", "takes KEY.PATH=VALUE"),
        ("a..b=3", "takes KEY.PATH=VALUE"),
        ("steps=[1", "the value is not YAML"),
        ("sources.1.folder=x", "sources.1: its parent is a list of 1"),
        ("sources.first.folder=x", "sources.first: its parent is a list of 1"),
        (f"sources.{'9' * 5000}=x", "its parent is a list of 1; takes an index below that"),
        ("steps=!!bool maybe", "steps: the value is not YAML: 'maybe' is no bool"),
        ("steps.more=3", "steps.more: its parent is 3, which has no keys"),
    ],
)
def test_a_set_that_cannot_be_applied_is_named(write, override, words):
    path = write("steps: 3\nsources: [{folder: a}]\n")
    text = refusal(Run, path, override)
    assert f"--set {override}" in text
    assert words in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("steps: [1\n", "is not YAML"),
        ("- a\n", "takes a mapping of keys to values, got ['a']"),
        ("steps: &a [*a]\n", "an alias stands inside its own anchor"),
        ("sources: [&a {<<: [*a]}]\n", "an anchor is merged into itself"),
        (f"steps: {'[' * 3000}{']' * 3000}\n", "is nested too deeply"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in pairwise("abcdefg")),
            "stand for more than 100,000 values",
        ),
        ("steps: !!int many\n", ":1: is not YAML: 'many' is no int (invalid literal"),
        ("steps: 1\nflag: !!bool maybe\n", ":2: is not YAML: 'maybe' is no bool"),
        ('steps: 1\na:\n  - !!int ""\n', ":3: is not YAML: '' is no int"),
        ("steps: !!timestamp x\n", ":1: is not YAML: 'x' is no timestamp"),
        (f"steps: 0x{'f' * 5000}\n", ":1: is not YAML: '0xfff"),
        ("steps: 1\nsteps: 2\n", ":2: steps: written twice, first at"),
        ("steps: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(write, content, words):
    assert words in refusal(Run, write(content))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert f"{absent}: cannot be read: No such file or directory" in refusal(Run, absent)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refusal(Run, binary)


@pytest.mark.parametrize("copied", [copy.copy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_is_the_same_in_another_process(copied):
    with pytest.raises(ConfigError) as caught:
        load_config(Run, None, ["steps=x", "more=1"])
    again = copied(caught.value)
    assert str(again) == str(caught.value)
    assert again.problems == caught.value.problems


@given(st.text(max_size=40))
def test_any_override_is_applied_or_refused_with_a_config_error(text):
    try:
        load_config(Run, None, [text])
    except ConfigError as error:
        assert str(error)


@given(st.integers(1, 10**6), st.floats(1e-9, 1e9))
def test_what_yaml_writes_is_what_is_read(steps, rate):
    config = load_config(Run, None, [f"steps={steps}", f"optimizer.rate={rate!r}"])
    assert (config.steps, config.optimizer.rate) == (steps, rate)


class Circle(BaseConfig):
    kind: Literal["circle"]
    radius: float = 1.0


class Square(BaseConfig):
    kind: Literal["square"]
    side: float = 1.0


class Drawing(BaseConfig):
    shape: Annotated[Circle | Square, Field(discriminator="kind")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("shape: {kind: cirle}", "shape.kind: got 'cirle', takes 'circle', 'square'"),
        ("shape: {kind: cirle}", "did you mean 'circle'?"),
        ("shape: {radius: 2}", "shape.kind: missing"),
    ],
)
def test_a_kind_that_does_not_exist_is_told_by_its_key(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Drawing, path)
    assert words in str(caught.value)
