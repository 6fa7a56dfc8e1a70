"""Keys that clients show, kept in the environment or in a file that may change.

`RWKV_CLIP_API_KEYS` holds keys with commas between them, or `@FILE` with a key on each line, which
is read again when it changes: how keys are exchanged without a restart. Without the variable no key
is needed; one that is set and empty is a mistake.
"""

import hashlib
import hmac
import logging
import os
from pathlib import Path

from serve.errors import ApiError

logger = logging.getLogger(__name__)

VARIABLE = "RWKV_CLIP_API_KEYS"


class Keys:
    """Keys that are good now.

    Args:
        told: the variable's value; that of the environment if None.

    Raises:
        ValueError: there are to be keys, and there are none.
    """

    def __init__(self, told: str | None = None) -> None:
        told = os.environ.get(VARIABLE) if told is None else told
        value = (told or "").strip()
        self._file = Path(value[1:]) if value.startswith("@") else None
        self._stamp: tuple[int, int] | None = None
        self._digests = _digests(value.split(","))
        self.needed = told is not None
        if self._file is not None:
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
            self._read(self._file)
        kind, _, key = (authorization or "").partition(" ")
        shown = _digest(key.strip())
        # All are compared, so that the time tells nothing of which one is near.
        good = sum(hmac.compare_digest(shown, digest) for digest in self._digests)
        return kind.lower() == "bearer" and bool(good)

    def _read(self, file: Path) -> None:
        """The file's keys, if it has changed; a file that is away or empty changes nothing."""
        try:
            state = file.stat()
            stamp = (state.st_mtime_ns, state.st_size)
            if stamp == self._stamp:
                return
            digests = _digests(file.read_text(encoding="utf-8").splitlines())
        except (OSError, UnicodeDecodeError) as error:
            logger.warning("the file of keys cannot be read: %s", type(error).__name__)
            return
        self._stamp = stamp
        if digests:
            self._digests = digests
        else:
            logger.warning("the file of keys holds none; those from before stay good")


def _digests(keys: list[str]) -> list[bytes]:
    stripped = (key.strip() for key in keys)
    return [_digest(key) for key in stripped if key and not key.startswith(("@", "#"))]


def _digest(key: str) -> bytes:
    """Of one length, whatever the key's."""
    return hashlib.sha256(key.encode()).digest()
