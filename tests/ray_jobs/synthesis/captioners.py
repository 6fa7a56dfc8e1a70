"""A captioner of somebody else's, as the configuration `kind: python` names it."""

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
