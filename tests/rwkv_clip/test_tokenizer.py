"""The tokenizer gives the published ids for every text, by whichever path it takes."""

import functools
import html
import itertools
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import ftfy
import instant_clip_tokenizer
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_clip import tokenizer
from rwkv_clip.tokenizer import decode, tokenize

regex = pytest.importorskip("regex")

Golden = Callable[[str], Path]

FRAGMENTS = [
    *"aZ s é ’ “ ‘ ʼ & ; # x  Ã â € ™ ſ ' < > ŉ ﬁ Ａ ñ ö 中 😀 ² ° « » œ İ Σ ς . ½ _ ?".split(" "),
    *"\n\r\t\x0b\x0c\x1b\x1c\x85\xa0\u2028\u3000\u0301\ufeff\ud83d\ude00\x00",
    *("&amp;", "&lt", "&eacute;", "&#55357;", "Ã©", "â€™", "<", "'S", "'ſ", "<ſtart_of_text>"),
    *("<start_of_text>", "<end_of_text>", " a photo of a dog", "it’s", "AT&T", "e\u0301"),
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.text(st.characters(max_codepoint=0x24F, exclude_categories=()), max_size=20),
)


def published_clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


class PublishedBpe:
    """CLIP's byte-pair encoding from its definition, on the merges the Rust library carries."""

    PATTERN = regex.compile(
        r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        regex.IGNORECASE,
    )

    def __init__(self) -> None:
        library = next(Path(instant_clip_tokenizer.__file__).parent.glob("*.so")).read_bytes()
        lines = library[library.index(b"#version: 0.2") :].split(b"\n")[1 : 49152 - 256 - 2 + 1]
        merges = [tuple(line.decode().split()) for line in lines]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        other = [byte for byte in range(256) if byte not in printable]
        names = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(other))]
        self.byte_name = dict(zip(printable + other, names, strict=True))
        vocabulary = names + [name + "</w>" for name in names] + ["".join(pair) for pair in merges]
        vocabulary += ["<start_of_text>", "<end_of_text>"]
        self.ids = {name: index for index, name in enumerate(vocabulary)}

    def word(self, word: str) -> list[int]:
        if word in ("<start_of_text>", "<end_of_text>"):
            return [self.ids[word]]
        parts = [self.byte_name[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 30), default=None)
            if best not in self.ranks:
                return [self.ids[part] for part in parts]
            merged: list[str] = []
            for part in parts:
                # A part that was merged just now is longer than best[0], so it cannot match again.
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged

    def row(self, text: str, width: int = 77) -> list[int]:
        words = self.PATTERN.findall(published_clean(text))
        ids = [49406, *(i for word in words for i in self.word(word))][: width - 1]
        ids.append(49407)
        return ids + [0] * (width - len(ids))


@functools.cache
def published() -> PublishedBpe:
    return PublishedBpe()


def test_ids_equal_the_golden_ones_alone_and_in_a_batch(golden: Golden) -> None:
    strings = json.loads(golden("tokenizer.json").read_text())["strings"]
    ids = torch.from_numpy(np.load(golden("tokenizer.npz"))["ids"].astype(np.int64))
    assert torch.equal(tokenize(strings), ids)
    for string, row in zip(strings, ids, strict=True):
        assert torch.equal(tokenize(string)[0], row), ascii(string)


def test_a_shorter_context_equals_the_golden_one(golden: Golden) -> None:
    sample = json.loads(golden("tokenizer.json").read_text())["samples_encode_15"]
    assert tokenize(sample["strings"], 15).tolist() == sample["ids"]


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_ids_follow_the_published_definition(text: str) -> None:
    assert tokenize(text)[0].tolist() == published().row(text)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_the_short_way_through_cleaning_changes_nothing(text: str) -> None:
    assert tokenizer.clean_text(text) == published_clean(text)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_a_row_does_not_depend_on_its_batch(texts: list[str]) -> None:
    alone = [tokenize(text)[0].tolist() for text in texts]
    assert tokenize(texts).tolist() == alone


def test_characters_of_every_block_are_classed_as_published() -> None:
    for code in range(0x80, 0x2FA20, 61):
        character = chr(code)
        # Cs: surrogates. Cn: younger than this Python's tables, perhaps than the encoder's too.
        if unicodedata.category(character) in ("Cs", "Cn"):
            continue
        text = f"a{character}b 1{character}1 !{character}!"
        assert tokenize(text)[0].tolist() == published().row(text), hex(code)


@pytest.mark.parametrize("text", ["'ſ", "a'ſb", "!'ſ", "<ſtart_of_text> x'ſ", "!<ſtart_of_text>"])
def test_a_long_s_counts_as_an_s_where_the_published_pattern_ignores_case(text: str) -> None:
    assert tokenize(text)[0].tolist() == published().row(text)


@pytest.mark.parametrize("part", ["!'ſ", "'ſ", "!<ſtart_of_text>", "a'ſb!"])
def test_many_long_s_are_read_in_time_that_grows_as_the_text(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = part * 20 + " " + part * 1200
    assert tokenize(text, 400)[0].tolist() == published().row(text, 400)

    class Counting:
        encoded = 0

        def encode(self, text: str) -> list[int]:
            self.encoded += len(text)
            return real.encode(text)

    real, counting = tokenizer._tokenizer(), Counting()
    monkeypatch.setattr(tokenizer, "_tokenizer", lambda: counting)
    tokenizer._encode_long_s(text, len(text))
    assert counting.encoded < 5 * len(text)


@pytest.mark.parametrize("number", ["1" * 5000, "0" * 5000, "0" * 5000 + "65", "1114111", "9" * 8])
@pytest.mark.parametrize("form", ["&#{};", "&#{} b", "&amp;#{};", "&amp;amp;#{}x"])
def test_a_reference_may_have_any_number_of_digits(number: str, form: str) -> None:
    short = number if len(number) < 5000 else str(int(number[-4000:]))
    assert tokenizer.clean_text(form.format(number)) == published_clean(form.format(short))


MARKS = "\u0300\u0316\u0344\u05b0\u0f73\u3099"


@settings(max_examples=400, deadline=None)
@given(TEXTS | st.text(st.sampled_from(MARKS + "aé<\n"), min_size=40, max_size=200))
def test_the_way_through_ftfy_for_long_texts_changes_nothing(text: str) -> None:
    assert tokenizer._fix_long(text) == ftfy.fix_text(text)


@pytest.mark.parametrize(
    "part",
    [MARKS, "".join(f"&#{ord(mark)};" for mark in MARKS), "Ì€Ì–", "I\u0300€I\u0300–"],
    ids=["marks", "references", "mojibake", "what is mojibake when normalized"],
)
def test_marks_are_in_order_before_a_long_text_is_normalized(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a" + part * 400
    expected = published().row(text)
    given: list[int] = []

    def watched(work: Callable[[str, str], object]) -> Callable[[str, str], object]:
        def watching(form: str, text: str) -> object:
            ranks = [unicodedata.combining(mark) for mark in text]
            given.append(sum(0 < after < before for before, after in itertools.pairwise(ranks)))
            return work(form, text)

        return watching

    for name in ("normalize", "is_normalized"):
        monkeypatch.setattr(unicodedata, name, watched(getattr(unicodedata, name)))
    assert tokenize(text)[0].tolist() == expected
    assert given
    assert max(given) < 2


def nested(digit: str, depth: int) -> str:
    """A digit as a reference one digit of which is such a reference, and so on."""
    heads = ""
    for _ in range(depth):
        code = str(ord(digit))
        heads, digit = f"{heads}&#{code[0]}", code[1]
    return heads + digit + ";" * depth


@pytest.mark.parametrize(
    "form", [lambda n: "&" + "amp;" * n, lambda n: "&" + "#38;" * n, lambda n: nested("8", n)]
)
def test_references_within_references_are_resolved_in_so_many_rounds(
    form: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = " and so on" * 110
    for depth in (3, tokenizer._MOST_ROUNDS - 1, tokenizer._MOST_ROUNDS):
        text = form(depth) + rest
        assert tokenizer.clean_text(text) == published_clean(text)
    unescape, rounds = tokenizer.fixes.unescape_html, []
    monkeypatch.setattr(
        tokenizer.fixes, "unescape_html", lambda text: rounds.append(text) or unescape(text)
    )
    tokenizer.clean_text(form(1000) + rest)
    assert len(rounds) == tokenizer._MOST_ROUNDS


@pytest.mark.parametrize("rest", ["", " and so on" * 110], ids=["short", "long"])
def test_mojibake_within_mojibake_is_mended_in_so_many_steps(
    rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth in (3, tokenizer._MOST_ROUNDS - 1):  # in "Ã " is one more
        text = "Ã" + "ƒ" * depth + rest
        assert tokenizer.clean_text(text) == published_clean(text)
    step, steps = ftfy._fix_encoding_one_step_and_explain, []
    monkeypatch.setattr(
        ftfy,
        "_fix_encoding_one_step_and_explain",
        lambda text, config: steps.append(text) or step(text, config),
    )
    tokenizer.clean_text("Ã" + "ƒ" * 700 + rest)
    # What a step finds within the text it mends as if it were a text of its own.
    assert sum("ƒƒ" in text for text in steps) == tokenizer._MOST_ROUNDS


def test_every_mark_that_normalizing_moves_is_known() -> None:
    taken_apart = (unicodedata.normalize("NFD", chr(code)) for code in range(0x110000))
    moved = [code for code, parts in enumerate(taken_apart) if unicodedata.combining(parts[0])]
    assert all(tokenizer._marks().fullmatch(chr(code) * tokenizer._LONG_RUN) for code in moved)


@pytest.mark.parametrize("alphabet", ["a", "ab", "aeinrst", "0123456789", "héllo", "a. ", "中文"])
def test_what_is_cut_off_a_very_long_word_cannot_be_seen(alphabet: str) -> None:
    letters = np.random.default_rng(0).choice([*alphabet], 12_000)
    text = "the " + "".join(letters) + " end"
    whole = tokenizer._tokenizer().encode(published_clean(text))
    for context_length in (5, 77):
        (row,) = tokenize([text], context_length).tolist()
        assert row == [tokenizer.START_ID, *whole[: context_length - 2], tokenizer.END_ID]
    with pytest.raises(ValueError, match="too many tokens"):
        tokenize([text], truncate=False)


def test_lone_surrogates_are_replaced_as_published() -> None:
    assert torch.equal(tokenize("a \ud800 b"), tokenize("a \ufffd b"))


def test_a_batch_of_nothing_has_no_rows() -> None:
    assert tokenize([]).shape == (0, 77)


def test_an_overlong_text_keeps_its_end_token() -> None:
    row = tokenize("cat " * 200)[0]
    assert row[-1] == 49407
    assert (row[1:-1] == row[1]).all()


def test_without_truncation_the_first_overlong_text_is_named() -> None:
    fits, too_long = "cat " * 75, "cat " * 76
    assert tokenize([fits], truncate=False)[0, -1] == 49407
    with pytest.raises(ValueError, match=r"texts\[1\] has too many tokens"):
        tokenize([fits, too_long], truncate=False)


@pytest.mark.parametrize("item", [b"bytes", None, 3])
def test_an_item_that_is_no_string_is_named(item: object) -> None:
    with pytest.raises(TypeError, match=rf"texts\[1\] is of type {type(item).__name__}"):
        tokenize(["a", item])  # type: ignore[list-item]


@pytest.mark.parametrize("text", [b"bytes", bytearray(b"bytes"), b""])
def test_bytes_are_refused_as_such(text: bytes | bytearray) -> None:
    with pytest.raises(TypeError, match=f"texts is of type {type(text).__name__}; takes strings"):
        tokenize(text)  # type: ignore[arg-type]


def test_a_context_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="context_length is 2"):
        tokenize("a", 2)


def test_more_ids_than_memory_holds_are_an_error_and_do_not_end_the_process() -> None:
    with pytest.raises(MemoryError):
        tokenize("a", 10**15)


def test_decoding_gives_the_words_back() -> None:
    assert decode(tokenize("A photo of a café, it's nice")[0]) == "a photo of a café , it 's nice"
    assert decode([]) == ""


def test_decoding_refuses_what_is_no_row_of_ids() -> None:
    with pytest.raises(ValueError, match="token 49408 at position 1"):
        decode([1, 49408])
    with pytest.raises(ValueError, match="one row"):
        decode(tokenize(["a", "b"]))
