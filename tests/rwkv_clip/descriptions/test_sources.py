"""Sources: what cleaning takes away, what it keeps, and what it may cost."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_clip.descriptions import Sources
from rwkv_clip.descriptions.sources import MAX_TAG, MAX_TAGS, MAX_TEXT


@pytest.mark.parametrize(
    ("web_text", "cleaned"),
    [
        ("  a\tdog \r\n on\x00 a   beach ", "a dog on a beach"),
        ("a dog https://example.com/dog.jpg?x=1", "a dog"),
        ("a dog at www.example.org today", "a dog at today"),
        ("from dogs.example.com/puppies with love", "from with love"),
        ("IMG_1234.jpg", ""),
        ("DSC01234 a dog", "a dog"),
        ("my-dog(1).final.JPEG of Rex", "of Rex"),
        ("write to rex.dog+1@example.co.uk please", "write to please"),
        ("<b class='x'>a dog</b><br/>", "a dog"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("&lt;script&gt;a dog", "a dog"),
        ("a<|im_end|>b", "a b"),
        ("[INST] a dog [/INST] <<SYS>>", "INST a dog /INST"),
        ('a "good" dog', "a 'good' dog"),
        ("a\u202edog\u200b \U000e0041hidden", "adog hidden"),
        ("1 < 2 and 3 > 2", "1 2 and 3 2"),
        ("Zoe\u0308 at the café", "Zoë at the café"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("v1.5 of the U.S. team, no. 7", "v1.5 of the U.S. team, no. 7"),
    ],
)
def test_web_text_keeps_its_words_and_loses_what_no_reader_sees(web_text, cleaned):
    assert Sources(web_text).web_text == cleaned


def test_a_long_text_is_cut_between_words():
    text = Sources("lighthouse " * 1000).web_text
    assert MAX_TEXT - 11 < len(text) <= MAX_TEXT
    assert set(text.split()) == {"lighthouse"}


def test_ten_megabytes_cost_no_more_than_a_page():
    for text in ("a dog " * 1_700_000, "<" * 10_000_000, "&#" * 5_000_000, "a." * 5_000_000):
        start = time.perf_counter()
        Sources(text, text, (text,))
        assert time.perf_counter() - start < 0.25


@pytest.mark.parametrize("unit", ["a.", "%(", "a@", "a-", "<a", "www.", "data:", "9.", "\u0301"])
def test_no_text_makes_the_patterns_slow(unit):
    start = time.perf_counter()
    Sources(unit * 5000)
    assert time.perf_counter() - start < 0.25


def test_tags_are_cleaned_unique_and_bounded():
    tags = Sources("", None, ("dog", " Dog ", "", "<b>", "a" * 1000, *map(str, range(100)))).tags
    assert tags[:2] == ("dog", "a" * MAX_TAG)
    assert len(tags) <= MAX_TAGS


def test_what_cleaning_empties_is_absent():
    assert Sources("\n", " \t ", ("", "_")) == Sources()
    assert not Sources()
    assert Sources("", "a dog")


def test_a_row_may_lack_columns():
    row = {"web_text": None, "caption": None, "tags": None}
    assert Sources.from_row(row) == Sources.from_row({}) == Sources()
    nan = float("nan")  # what pandas makes of None
    assert Sources.from_row({"web_text": nan, "caption": nan, "tags": nan}) == Sources()
    for tags in (["c", "d"], np.array(["c", "d"], object), np.array(["c", "d"])):
        full = Sources.from_row({"web_text": "a", "caption": "b", "tags": tags})
        assert full == Sources("a", "b", ("c", "d"))
    assert Sources.from_row({"tags": np.array([], object)}) == Sources()


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"web_text": b"a dog"}, r"web_text is b'a dog' \(bytes\)"),
        ({"caption": 0.5}, r"caption is 0.5 \(float\)"),
        ({"tags": "dog, cat"}, "tags are 'dog, cat'"),
        ({"tags": 3}, "tags are 3"),
        ({"tags": ["dog", None]}, "one of the tags is None"),
    ],
)
def test_what_is_no_text_is_refused_by_its_name(row, told):
    with pytest.raises(TypeError, match=told):
        Sources.from_row(row)


@given(st.text(), st.none() | st.text(), st.lists(st.text(), max_size=5))
def test_any_text_gives_sources_that_can_be_sent_and_stored(web_text, caption, tags):
    sources = Sources(web_text, caption, tuple(tags))
    for text in sources.texts:
        text.encode("utf-8")
        assert "\n" not in text
        assert not set(text) & set('<>[]{}|"\\')
    assert len(sources.web_text) <= MAX_TEXT
