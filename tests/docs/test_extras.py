"""The extras have what tests and benchmarks import, and the lock files what the extras name."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.infra.manifests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Parts of what the extras name, which it brings.
BROUGHT = {
    "click", "cryptography", "fastapi", "opentelemetry", "packaging", "pandas", "requests",
    "starlette", "tqdm", "uvicorn", "werkzeug",
}  # fmt: skip


def names(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(folder: str) -> Iterator[str]:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


@pytest.mark.parametrize(("extra", "lock"), [("cpu", "cpu"), ("cuda", "cuda"), ("dev", "cpu")])
def test_a_lock_file_has_what_an_extra_names(extra, lock):
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", lines, re.MULTILINE))
    for wanted in map(Requirement, EXTRAS[extra]):
        assert canonicalize_name(wanted.name) in locked, wanted
        assert Version(locked[canonicalize_name(wanted.name)]) in wanted.specifier, wanted


def test_the_extras_have_what_tests_and_benchmarks_import():
    named = names([*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"], PROJECT["name"]])
    installed = packages_distributions()
    modules = {*imported("tests"), *imported("benchmarks")} - BROUGHT - sys.stdlib_module_names
    missing = [one for one in modules if one in installed and not named & names(installed[one])]
    assert missing == []
