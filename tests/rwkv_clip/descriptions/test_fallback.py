"""The fallback: one grammatical sentence from what there is, held to the guard's rule."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_clip.descriptions import MAX_DESCRIPTION, Sources, check, fallback_description


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            Sources("", "a dog on a beach.", ("sea", "waves")),
            "A dog on a beach, with sea and waves.",
        ),
        (Sources("", "a dog", ("dog", "animal", "Dogs")), "A dog."),
        (Sources("", "a man with a hat", ("tree",)), "A man with a hat, along with tree."),
        (
            Sources("", "a dog", ("sea", "sand", "shell")),
            "A dog, with sea, sand and shell.",
        ),
        (Sources("", "panda", ()), "A picture of panda."),
        (Sources("", "Is this a dog?", ()), "Is this a dog?"),
        (Sources("", None, ("cat", "sofa")), "A picture of cat and sofa."),
        (Sources("Sunset in Rome | IMG_2041.jpg", None, ()), "Sunset in Rome."),
        (Sources("Vintage neon sign in Las Vegas"), "Vintage neon sign in Las Vegas."),
        (Sources("ignored web text", "a dog", ()), "A dog."),
        (Sources("CLICK HERE to win", None, ()), None),
        (Sources("", None, ()), None),
        (Sources("!!! ???", None, ()), None),
        (Sources("A red kite", "- - -", ()), "A red kite."),
    ],
)
def test_the_sentence_is_made_of_what_there_is(sources, sentence):
    assert fallback_description(sources) == sentence


@pytest.mark.parametrize(
    "notice",
    [
        "Sign In",
        "Log In",
        "Sign up",
        "Sign Up Free",
        "Sign in / Register",
        "Member sign in",
        "Log-in page",
        "Share this",
        "Powered by Squarespace",
        "Powered by vBulletin",
    ],
)
def test_a_notice_of_a_web_page_gives_no_sentence(notice):
    assert fallback_description(Sources(notice)) is None


@pytest.mark.parametrize(
    "text", ["A stop sign in the snow.", "A log in a river.", "A toy boat powered by the wind."]
)
def test_what_only_holds_the_words_of_a_notice_gives_itself(text):
    assert fallback_description(Sources(text)) == text


def test_every_emoji_gets_a_sentence(emojis):
    for emoji in emojis:
        sentence = fallback_description(emoji.sources)
        assert sentence is not None, emoji.name
        assert sentence[-1] in ".!?"
        assert sentence[0] == sentence[0].upper()


def test_a_word_of_the_caption_is_not_told_again():
    tags = ("dog", "brown", "beach", "running", "child", "kite")
    sentence = fallback_description(Sources("", "brown dogs run on a beach with children", tags))
    assert sentence == "Brown dogs run on a beach with children, along with kite."


def test_long_sources_give_a_sentence_of_bounded_length():
    tags = tuple(f"lighthouse number {i}" for i in range(30))
    for sources in (Sources("sea and sand " * 99), Sources("", "sea sand " * 99, tags)):
        sentence = fallback_description(sources)
        assert sentence is None or len(sentence) <= MAX_DESCRIPTION


@given(st.text(), st.none() | st.text(), st.lists(st.text(), max_size=6))
def test_whatever_the_sources_the_guard_keeps_the_sentence(web_text, caption, tags):
    sources = Sources(web_text, caption, tuple(tags))
    sentence = fallback_description(sources)
    assert sentence is None or check(sentence, sources).kept
