"""The command line: how commands are found, and what a mistake costs."""

import argparse
import gc
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from rwkv_clip import __version__, cli
from rwkv_clip.config import BaseConfig, add_config_options, config_from_args


class Settings(BaseConfig):
    steps: int = 1


@pytest.fixture
def plugin(monkeypatch):
    """A command `count` that another package registers by an entry point."""
    module = ModuleType("counting")
    module.SUMMARY = "count to something"
    module.configure = add_config_options
    module.run = lambda args: config_from_args(Settings, args).steps
    monkeypatch.setitem(sys.modules, "counting", module)
    points = [
        EntryPoint("count", "counting", cli.GROUP),
        EntryPoint("broken", "no_such_module_anywhere", cli.GROUP),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    return module


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"rwkv-clip {__version__}\n"


def test_help_lists_every_command_and_survives_one_that_cannot_load(plugin, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "doctor show what is installed" in out
    assert "count count to something" in out
    assert "broken not available here: No module named 'no_such_module_anywhere'" in out


def test_a_command_of_another_package_runs_with_its_configuration(plugin):
    assert cli.main(["count"]) == 1
    assert cli.main(["count", "--set", "steps=7"]) == 7


def test_what_a_command_imports_is_not_searched_for_garbage(plugin, monkeypatch):
    def load() -> ModuleType:
        assert not gc.isenabled()
        monkeypatch.setitem(sys.modules, "counted", plugin)  # as an import does
        return plugin

    monkeypatch.setattr(cli, "_commands", lambda: {"count": load})
    before = gc.get_freeze_count()
    assert cli.main(["count"]) == 1
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    gc.unfreeze()


def test_a_configuration_mistake_is_an_error_message_and_status_2(plugin, capsys):
    assert cli.main(["count", "--set", "step=7"]) == 2
    error = capsys.readouterr().err
    assert "step: unknown key (did you mean 'steps'?)" in error
    assert "Traceback" not in error


def test_a_command_whose_requirements_are_absent_says_so(plugin, capsys):
    assert cli.main(["broken"]) == 2
    assert "broken is not available here" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["count", "--nonsense"]])
def test_a_wrong_call_prints_usage_and_status_2(plugin, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: rwkv-clip" in capsys.readouterr().err


def test_only_the_command_asked_for_is_imported(plugin, monkeypatch):
    monkeypatch.setitem(cli.LIBRARY_COMMANDS, "doctor", "a_module_that_would_fail_to_import")
    assert cli.main(["count"]) == 1


def test_whoever_reads_may_stop():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        command = [sys.executable, "-m", "rwkv_clip.cli", "doctor", "--json"]
        ended = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True)
    assert (ended.returncode, ended.stderr) == (1, "")


def test_interrupting_is_no_traceback(plugin):
    def interrupt(args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    plugin.run = interrupt
    assert cli.main(["count"]) == 130


def test_a_closed_output_costs_no_status(plugin, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["count", "--set", "steps=0"]) == 0
