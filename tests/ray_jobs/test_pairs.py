"""A pair is made of anything that can be one; of anything else comes a reason."""

import io
import json
import math
import re
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ray_jobs.pairs import (
    PAIR_SCHEMA,
    RejectedRowError,
    RowLimits,
    clean_id,
    clean_tags,
    clean_text,
    make_pair,
    pair_table,
)

LIMITS = RowLimits()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


PNG = encoded(picture())


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "image": PNG, "web_text": "a dog", **changes}


def reason(raw: dict[str, Any], limits: RowLimits = LIMITS) -> str:
    with pytest.raises(RejectedRowError) as caught:
        make_pair(raw, limits)
    return caught.value.reason


def animation(kind: str) -> bytes:
    frames = [picture("P" if kind == "GIF" else "RGB") for _ in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=20)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no such pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\x00" * 100))
        + chunk(b"IEND", b"")
    )


def test_a_row_keeps_its_bytes_and_texts() -> None:
    pair = make_pair(
        row(caption="a brown dog", tags=["dog", "grass", "dog"], description="A dog."), LIMITS
    )
    assert pair["image"] == PNG
    assert pair["tags"] == ["dog", "grass"]
    assert pair["description_source"] is None
    assert pair_table([pair]).schema == PAIR_SCHEMA


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(encoded(picture("CMYK"), "JPEG"), id="CMYK JPEG"),
        pytest.param(encoded(picture("L"), "JPEG"), id="grey JPEG"),
        pytest.param(
            encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100)),
            id="16-bit PNG",
        ),
        pytest.param(encoded(picture("RGBA")), id="transparent PNG"),
        pytest.param(animation("GIF"), id="animated GIF"),
        pytest.param(animation("WEBP"), id="animated WebP"),
        pytest.param(animation("PNG"), id="animated PNG"),
        pytest.param(encoded(picture(), "MPO", save_all=True, append_images=[picture()]), id="MPO"),
        pytest.param(encoded(picture(size=(20_000, 60)), "JPEG"), id="panorama"),
        pytest.param(encoded(picture(size=(1, 1))), id="one pixel"),
    ],
)
def test_odd_images_are_images(image: bytes) -> None:
    assert make_pair(row(image=image), LIMITS)["image"] == image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (None, "no_image"),
        (b"", "no_image"),
        ("dog.png", "no_image"),
        (b"<html>not found</html>", "image_undecodable"),
        (PNG[:100], "image_undecodable"),
        (PNG[:60] + b"\x00" * 40 + PNG[100:], "image_undecodable"),
        (encoded(picture(), "JPEG")[:-200], "image_undecodable"),
        (png_header(30_000, 30_000), "image_too_large"),
        (png_header(9_000, 9_000), "image_too_large"),
        (encoded(picture(), "ICO"), "image_format"),
    ],
)
def test_what_is_no_usable_image_has_a_reason(image: object, expected: str) -> None:
    assert reason(row(image=image)) == expected


def test_what_was_found_reads_the_same_on_every_machine() -> None:
    # An address of an object in it would make two runs write different bytes.
    with pytest.raises(RejectedRowError) as caught:
        make_pair(row(image=b"no image at all"), LIMITS)
    assert caught.value.detail == "no image begins with b'no image at all'"


def test_limits_hold() -> None:
    assert reason(row(), RowLimits(image_bytes=len(PNG) - 1)) == "image_too_large"
    assert reason(row(), RowLimits(image_pixels=1199)) == "image_too_large"
    assert reason(row(), RowLimits(min_side=31)) == "image_too_small"
    assert make_pair(row(), RowLimits(len(PNG), 1200, min_side=30))


def test_headers_only_lets_truncated_images_through() -> None:
    assert make_pair(row(image=PNG[:-50]), RowLimits(decode=False))


def test_ten_megabytes_of_text_are_cut() -> None:
    assert len(make_pair(row(web_text="word " * 2_000_000), LIMITS)["web_text"]) <= 10_000


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (b"caf\xe9 au lait", "caf  au lait"),
        ("lone \ud800 surrogate", "lone     surrogate"),
        ("nul\x00byte", "nul byte"),
        ("  spaces \n", "spaces"),
        ("👩\u200d🚒 日本", "👩\u200d🚒 日本"),
        (math.nan, ""),
        (7, ""),
        (None, ""),
    ],
)
def test_texts_are_what_arrow_takes(text: object, clean: str) -> None:
    assert clean_text(text, 100) == clean


@pytest.mark.parametrize(
    ("tags", "clean"),
    [
        ("dog, cat | dog,,", ["dog", "cat"]),
        (np.array(["dog", "cat"]), ["dog", "cat"]),
        (("dog", None, 3, math.nan, True), ["dog", "3"]),
        (json.loads('{"dog": 1}'), []),
        (b"dog, caf\xe9|dog", ["dog", "caf"]),
        ("['dog', 'guide dog']", ["dog", "guide dog"]),
        ('["dog", "cat"]', ["dog", "cat"]),
        (r'["caf\u00e9, bar", "\"x\"", 3]', ["café, bar", '"x"', "3"]),
        ("[dog], [cat]", ["dog", "cat"]),
        (None, []),
    ],
)
def test_tags_may_come_in_many_forms(tags: object, clean: list[str]) -> None:
    assert clean_tags(tags) == clean


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (["", None, " a cat ", "a dog"], "a cat"),
        ('["a \\ud800 cat", "a dog"]', "a     cat"),
        (b'["a cat"]', "a cat"),
        ('["a cat", 2]', '["a cat", 2]'),
        ('["SALE"] a cat ["NOW"]', '["SALE"] a cat ["NOW"]'),
        ('["[]"]', "[]"),
        ([], ""),
        ([["a cat"]], ""),
        ({"en": "a cat"}, ""),
        (2024, "2024"),
        (2.5, "2.5"),
        (math.inf, ""),
        (True, ""),
    ],
)
def test_of_several_texts_in_one_place_the_first_is_taken(value: object, text: str) -> None:
    assert make_pair(row(web_text=value, tags=["dog"]), LIMITS)["web_text"] == text


def test_what_there_is_in_place_of_a_text_is_told() -> None:
    with pytest.raises(RejectedRowError, match="no_text: web_text is a dict"):
        make_pair(row(web_text={"en": "a cat"}), LIMITS)


def test_a_row_needs_an_id_and_a_text() -> None:
    assert reason(row(id=" ")) == "no_id"
    assert reason(row(id=None)) == "no_id"
    assert reason(row(web_text="", tags=[], caption=None)) == "no_text"
    assert make_pair(row(web_text=None, tags=["dog"]), LIMITS)["web_text"] == ""


@pytest.mark.parametrize(
    ("identity", "clean"),
    [
        (" a b \n", "a b"),
        (b"caf\xc3\xa9\xc2\xa0", "caf\u00e9"),
        ("a\tb", "a\\tb"),
        ("\u200fa", "\\u200fa"),
        ("x" * 512, "x" * 512),
        ("x" * 513, "x" * 479 + ":35ade0090e64e74d6ad04204009c23a4"),
    ],
)
def test_an_id_that_is_a_text_is_that_text(identity: object, clean: str) -> None:
    assert clean_id(identity) == clean


def test_ids_that_differ_in_what_is_no_text_stay_different() -> None:
    shift_jis = [name.encode("shift_jis").decode("utf-8", "surrogateescape") for name in "猫犬鳥魚"]
    raw: list[str | bytes] = ["caf\ufffd", "caf", b"caf\xe9", b"caf\xe8", *shift_jis]
    raw += ["caf\x00", "caf\x00\x00", "caf\x1f", "a\x01b", "a\\x01b", "\x00", b"\xff", b"\xfe"]
    raw += ["x" * 600 + end for end in ("", "\x00", "\udce9", "\udce8")]
    ids = [clean_id(one) for one in raw]
    assert len(set(ids)) == len(raw)
    assert all(re.fullmatch(r"[\x20-\x7e]{3,512}", one) for one in ids)
    assert ids[1:3] == ["caf", "caf:dafd66c0b98965e688be1fc12942c09f"]


anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.binary(max_size=40),
    st.text(max_size=40),
    st.text(st.characters(categories=["Cs", "Cc", "Ll"]), max_size=10),
    st.lists(st.one_of(st.none(), st.text(max_size=5), st.integers()), max_size=4),
    st.just(PNG),
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([*PAIR_SCHEMA.names, "origin"]), anything))
def test_whatever_comes_is_a_pair_or_has_a_reason(raw: dict[str, Any]) -> None:
    try:
        pair = make_pair(raw, LIMITS)
    except RejectedRowError as error:
        assert error.reason
    else:
        assert pair_table([pair]).num_rows == 1
