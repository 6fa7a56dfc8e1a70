"""Keys that clients show, kept in the environment or in a file that may change.

`RWKV_CLIP_API_KEYS` holds keys with commas between them, or `@FILE` with a key on each line, which
is read again when it changes: how keys are exchanged without a restart. Its lines that begin with #
are remarks. Without the variable no key is needed; one that is set and empty is a mistake.

A key is compared by its bytes, in UTF-8, since a header holds bytes.
"""

import hashlib
import hmac
import logging
import os
import re
from pathlib import Path

from serve.errors import ApiError

logger = logging.getLogger(__name__)

VARIABLE = "RWKV_CLIP_API_KEYS"
_UNREADABLE = (0, -1)  # no file's time and size
_NO_HEADER = re.compile(r"[\x00-\x1f\x7f]")


class Keys:
    """Keys that are good now.

    Args:
        told: the variable's value; that of the environment if None.

    Raises:
        ValueError: there are to be keys, and there are none, or one that nobody could show.
    """

    def __init__(self, told: str | None = None) -> None:
        told = os.environ.get(VARIABLE) if told is None else told
        value = (told or "").strip()
        self._file = Path(value[1:]) if value.startswith("@") else None
        self._stamp: tuple[int, int] | None = None
        self._digests: list[bytes] = []
        self.needed = told is not None
        if self._file is None:
            self._digests = _digests(_listed(value))
        else:
            self._read(self._file)
        if self.needed and not self._digests:
            raise ValueError(f"{VARIABLE} holds no key; give one, or unset it to need none")

    def check(self, authorization: str | None) -> None:
        """Raise ApiError unless the header Authorization shows a good key."""
        if not self.good(authorization):
            raise ApiError(
                401, "invalid_api_key", "send a key of this server as Authorization: Bearer KEY"
            )

    def good(self, authorization: str | None) -> bool:
        """Whether the header Authorization shows a good key, or none is needed."""
        if not self.needed:
            return True
        if self._file is not None:
            self._reread(self._file)
        kind, _, key = (authorization or "").partition(" ")
        # What came was bytes, and Starlette makes a character of each.
        shown = _digest(key.encode("latin-1").strip())
        # All are compared, so that the time tells nothing of which one is near.
        good = sum(hmac.compare_digest(shown, digest) for digest in self._digests)
        return kind.lower() == "bearer" and bool(good)

    def _reread(self, file: Path) -> None:
        """The file's keys; one with a key that nobody could show changes nothing."""
        try:
            self._read(file)
        except ValueError as error:
            logger.warning("%s; those from before stay good", error)

    def _read(self, file: Path) -> None:
        """The file's keys, if it has changed; a file that is away or empty changes nothing.

        Raises:
            ValueError: it holds a key that nobody could show.
        """
        try:
            state = file.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            if stamp == self._stamp:
                return
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            if self._stamp != _UNREADABLE:  # told once, and not with every request
                logger.warning("the file of keys cannot be read: %s", type(error).__name__)
            self._stamp = _UNREADABLE
            return
        self._stamp = stamp
        digests = _digests(["" if line.lstrip().startswith("#") else line for line in lines])
        if digests:
            self._digests = digests
        else:
            logger.warning("the file of keys holds none; those from before stay good")


def _listed(value: str) -> list[str]:
    """The keys between commas; raises ValueError for what is meant for a file, or may be."""
    keys = value.split(",")
    for at, key in enumerate(keys, 1):
        if key.strip().startswith(("@", "#")):
            raise ValueError(
                f"{VARIABLE}: key {at} begins with {key.strip()[0]}, which means something else in "
                "a file of keys; take a key that begins otherwise, or give @FILE alone"
            )
    return keys


def _digests(keys: list[str]) -> list[bytes]:
    """Those of keys; raises ValueError for one that cannot be in a header."""
    stripped = [key.strip() for key in keys]
    for at, key in enumerate(stripped, 1):
        if _NO_HEADER.search(key):
            raise ValueError(
                f"{VARIABLE}: key {at} holds a control character, which no header can bring"
            )
    # An environment's bytes that are no UTF-8 are what they were again.
    return [_digest(key.encode("utf-8", "surrogateescape")) for key in stripped if key]


def _digest(key: bytes) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key).digest()
