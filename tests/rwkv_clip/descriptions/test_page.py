"""Web texts without what pages put around the words of an image."""

import pytest

from rwkv_clip.descriptions import Sources, fallback_description
from rwkv_clip.descriptions.guard import check
from rwkv_clip.descriptions.page import without_page


@pytest.mark.parametrize(
    ("web_text", "left"),
    [
        ("flag of Timor-Leste - $4.99", "flag of Timor-Leste"),
        ("Leather sofa 1,299.00 € (brown)", "Leather sofa (brown)"),
        ("A mug, EUR 12", "A mug"),
        ("Sunrise - Page 20 of 31", "Sunrise"),
        ("Untitled-44 black flag by user684651", "black flag"),
        ("Ping Pong wallpaper HD 1080p", "Ping Pong wallpaper"),
        ("Sunset in the Alps (1920 x 1080 px)", "Sunset in the Alps"),
        ("Poster of a fox, 24x36 inches", "Poster of a fox"),
        ("tomato PNG 72x72", "tomato"),
        ("29 best kitchen ideas", "kitchen ideas"),
        ("Re: Fwd: our cat", "our cat"),
        ("Buy a red kettle", "a red kettle"),
        ("armenia #181888", "armenia"),
        ("spider sticker sheet (pack of 72)", "spider sticker sheet"),
        ("flag of Benin #FlagOfBenin", "flag of Benin"),
        ("Sheep #cute #followme #like4like", "Sheep cute"),
        ("Sunset #LakeComo #golden_hour #nofilter", "Sunset Lake Como golden hour"),
        ("#桜 京都", "桜 京都"),
        ("a red fox | Royalty-free stock photo", "a red fox"),
        ("wine glass in stock, ships in 24 h", "wine glass"),
        ("Free download ant ... click to enlarge", "ant ..."),
        ("★★★★☆ outbox tray, a ★ on it", "outbox tray, a ★ on it"),
        ("72x72", ""),
    ],
)
def test_what_the_page_put_there_is_gone(web_text, left):
    assert without_page(web_text) == left


@pytest.mark.parametrize(
    "web_text",
    [
        "a dog on a beach - in the evening,",
        "the 3 best friends at 10 Downing Street",
        "keycap: # and C#, a #1 foam hand",
        "a shopping page boy, an HDMI cable and 5 dollars",
        "2 x 4 beams, a pack of 7 wolves, V8 engine, 1920s car",
        "buy now, a re-used buyer's bag on the stock exchange, in stock market news",
    ],
)
def test_what_may_be_in_the_image_stays(web_text):
    assert without_page(web_text) == web_text


def test_a_description_that_says_it_again_is_refused_unless_the_image_shows_it():
    web_text = "Crocodile €41,50 #cute #followme"
    assert check("A crocodile for €41,50.", Sources(web_text)).reason == "unsupported_number"
    assert check("Crocodile #followme", Sources(web_text)).unsupported == ("followme",)
    assert check("A tag of €41,50.", Sources(web_text, "a tag that says €41,50")).kept
    assert fallback_description(Sources("Red crocodile - $81.99")) == "Red crocodile."
