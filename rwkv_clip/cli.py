"""The `rwkv-clip` command.

A command is a module with a one-line `SUMMARY`, `configure(parser)` and `run(args) -> int`. Those
of the library are named here; any installed package adds its own by an entry point of the group
`rwkv_clip.commands` whose value is the module. Only the module of the command asked for is
imported, so what one command needs is never the price of another.
"""

import argparse
import importlib
import logging
import os
import select
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import entry_points
from types import ModuleType
from typing import TextIO

from rwkv_clip._version import __version__
from rwkv_clip.config import ConfigError
from rwkv_clip.memory import importing

GROUP = "rwkv_clip.commands"
LIBRARY_COMMANDS = {"demo": "rwkv_clip.demo", "doctor": "rwkv_clip.doctor"}


class CommandError(Exception):
    """A command that cannot go on, with what to do about it; printed without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is its result, 2 for a mistake in how it was called."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        args = _parser(arguments).parse_args(arguments)
        status = int(args.run(args))
        if sys.stdout is not None:  # as it is where it was closed before the start
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _is_closed(sys.stdout):
            raise
        # Whoever read has gone, as `head` does. What is still held must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (CommandError, ConfigError) as error:
        print(f"rwkv-clip: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        return 130


def _is_closed(output: TextIO) -> bool:
    """Whether nobody reads an output any more."""
    poll = select.poll()
    poll.register(output.fileno(), 0)
    return bool(poll.poll(0))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rwkv-clip", description="RWKV-CLIP: image and text embeddings, fast on any machine."
    )
    parser.add_argument("--version", action="version", version=f"rwkv-clip {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    loaders = _commands()
    asked = next((name for name in arguments if not name.startswith("-")), None)
    for name, load in sorted(loaders.items()):
        if asked in loaders and name != asked:
            commands.add_parser(name)
            continue
        _add(commands, name, load, required=name == asked)
    return parser


def _commands() -> dict[str, Callable[[], ModuleType]]:
    """Every command's name, with the function that imports its module."""
    loaders: dict[str, Callable[[], ModuleType]] = {
        point.name: point.load for point in entry_points(group=GROUP)
    }
    for name, module in LIBRARY_COMMANDS.items():
        loaders[name] = partial(importlib.import_module, module)
    return loaders


def _add(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    load: Callable[[], ModuleType],
    required: bool,
) -> None:
    try:
        with importing():
            module = load()
    except ImportError as error:
        missing = f"not available here: {error}"
        if required:
            raise CommandError(f"{name} is {missing}; `rwkv-clip doctor` tells the mend") from error
        commands.add_parser(name, help=missing)
        return
    parser = commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY)
    module.configure(parser)
    parser.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
