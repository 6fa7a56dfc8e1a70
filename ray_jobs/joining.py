"""Joining a cluster of Ray's, or starting one on this machine, with errors that say what to do."""

import socket
from typing import Any

import ray

from rwkv_clip.cli import CommandError

_ANSWER_SECONDS = 20


def join(address: str, logging_level: int) -> None:
    """Join the cluster at an address, or the one that runs on this machine by `auto`.

    Raises:
        CommandError: it does not take this program.
    """
    named = f"ray.address, or RAY_ADDRESS: {address}"
    _check_answer(address, named)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging_level)
    except (ConnectionError, RuntimeError) as error:
        raise CommandError(
            f"{named} cannot be joined: {error}. A cluster has to run there, of Ray "
            f"{ray.__version__} and this Python; for one that asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error


def start(logging_level: int, **options: Any) -> None:
    """Start a cluster on this machine, without a dashboard, that ends with this program.

    Raises:
        CommandError: it does not come up in time.
    """
    try:
        ray.init(
            "local",  # without an address Ray would join what `ray start` began on this machine
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging_level,
            **options,
        )
    except Exception as error:  # Ray has no class for it
        if "timed out during startup" not in str(error):
            raise
        raise CommandError(
            "Ray has not started on this machine in the half minute that it gives itself; stop "
            "what keeps the cores busy, and start again"
        ) from error


def _check_answer(address: str, named: str) -> None:
    """Raise CommandError where nobody listens: Ray would try for many minutes."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal():  # auto, and Ray's client
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except OSError as error:
        raise CommandError(
            f"{named} does not answer ({error}); start that cluster, or leave the address out for "
            "one of this program's own"
        ) from error
