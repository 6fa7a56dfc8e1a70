"""What to do about Ray's errors where a program joins a cluster or starts one; no Ray."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from rwkv_clip.cli import CommandError

_ANSWER_SECONDS = 20


@contextmanager
def joining(address: str | None) -> Iterator[None]:
    """A block that joins the cluster at an address, or starts one on this machine if it is None.

    Raises:
        CommandError: nobody answers there, the cluster does not take this program, or the one here
            does not come up in time.
    """
    named = f"ray.address, or RAY_ADDRESS: {address}"
    if address:
        _check_answer(address, named)
    try:
        yield
    except (ConnectionError, RuntimeError) as error:
        if not address:
            raise
        raise CommandError(
            f"{named} cannot be joined: {error}. A cluster has to run there, of Ray "
            f"{version('ray')} and this Python; for one that asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
        ) from error
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
