"""A captioner of somebody else's, as the configuration `kind: python` names it."""

import os
import sys
import threading
from collections.abc import Callable, Sequence

from PIL import Image

from rwkv_clip.descriptions import Caption


def load(prefix: str) -> Callable[[Sequence[Image.Image]], list[Caption]]:
    """A captioner that can name reds, but not all of them."""

    def name_reds(images: Sequence[Image.Image]) -> list[Caption]:
        found = []
        for image in images:
            red = image.resize((1, 1)).getpixel((0, 0))[0]  # type: ignore[index]
            if red % 5 == 0:
                raise ValueError(f"no word for {red}")
            found.append(Caption(f"{prefix} {red}", ("red", str(red))))
        return found

    return name_reds


def fragile(deadly: int, end: str) -> Callable[[Sequence[Image.Image]], list[Caption]]:
    """A captioner that one red is the end of: it fails ever after, hangs, or ends."""
    well = threading.Event()
    well.set()

    def name_reds(images: Sequence[Image.Image]) -> list[Caption]:
        reds: list[int] = [image.resize((1, 1)).getpixel((0, 0))[0] for image in images]  # type: ignore[index, misc]
        if deadly in reds:
            if end == "exits":
                os._exit(3)
            if end == "leaves":
                sys.exit(3)
            if end == "hangs":
                threading.Event().wait()
            well.clear()
        if not well.is_set():
            raise RuntimeError("device-side assert triggered")
        return [Caption(f"red {red}", ()) for red in reds]

    return name_reds


def broken() -> Callable[[Sequence[Image.Image]], list[Caption]]:
    """A captioner that has no caption for anything."""

    def fail(images: Sequence[Image.Image]) -> list[Caption]:
        raise RuntimeError(f"the server is away, so none for {len(images)}")

    return fail
