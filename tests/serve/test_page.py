"""The search page: from this server alone, and in a browser."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rwkv_clip.config import load_config
from serve.app import build
from serve.config import ServeFile
from tests.serve.small import picture

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "outputs" / "emoji"
BROWSER = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage",
]  # fmt: skip


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    loaded = re.findall(r"""(?:src|href)="([^"]+)""", answer.text)
    assert "page/page.js" in loaded
    for place in loaded:
        if not place.startswith("data:"):
            assert client.get(f"/{place}").status_code == 200
            assert "//" not in place


def test_what_the_page_does_not_have_is_told(client):
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/nothing.js").json()["error"]["code"] == "not_found"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    if BROWSER is None or DRIVER is None:
        pytest.skip("Debian's packages chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Page:
    """The page in a browser.

    Args:
        browser: that has opened it.
    """

    def __init__(self, browser: webdriver.Chrome) -> None:
        self.browser = browser
        self.wait = WebDriverWait(browser, 30)

    def one(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], object]) -> None:
        self.wait.until(lambda _: condition())

    def search(self, words: str) -> list[str]:
        """Type words and press Enter; the results' texts."""
        self.browser.execute_script("document.querySelector('#results').replaceChildren()")
        field = self.one("#words")
        field.clear()
        field.send_keys(words, Keys.ENTER)
        self.until(lambda: self.all("#results li"))
        return [one.text.splitlines()[0] for one in self.all("#results li")]

    def shot(self, width: int, height: int, file: Path) -> None:
        """A picture of the page at a size; nothing of it may lie outside the width."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        seen, there, room = self.browser.execute_script(
            "const { scrollWidth, clientWidth } = document.documentElement;"
            "return [innerWidth, scrollWidth, clientWidth]"
        )
        assert seen == width
        assert there <= room  # which a scroll bar makes less
        file.write_bytes(self.browser.get_screenshot_as_png())

    def status(self, panel: str = "#panel-search") -> str:
        return str(self.one(f"{panel} .status").text)

    def focused(self) -> str:
        """The selector of what has the keyboard's focus."""
        element = self.browser.switch_to.active_element
        return f"{element.tag_name}#{element.get_property('id')}"

    def answer(self, script: str) -> None:
        """Let a function of JavaScript answer instead of the server, as a proxy would."""
        self.browser.execute_script(f"window.fetch = {script}")

    def drop(self, selector: str, given: str, kind: str = "drop") -> bool:
        """Drop what a line of JavaScript puts into `data`; whether it is left to the browser."""
        left = self.browser.execute_script(
            f"""const data = new DataTransfer();
            {given};
            const about = {{ dataTransfer: data, bubbles: true, cancelable: true }};
            return document.querySelector(arguments[0])
              .dispatchEvent(new DragEvent("{kind}", about))""",
            selector,
        )
        return bool(left)


@pytest.fixture
def page(endpoint: str, browser: webdriver.Chrome) -> Page:
    browser.get(endpoint)
    made = Page(browser)
    made.until(lambda: "small, version 1" in made.one("#model").text)
    return made


def file_of(name: str, kind: str) -> str:
    return f'data.items.add(new File(["words"], "{name}", {{ type: "{kind}" }}))'


LINK = 'data.setData("text/uri-list", "https://example.com/")'


def test_a_search_and_a_classification_in_a_browser(endpoint, browser, tmp_path):
    browser.get(endpoint)
    page = Page(browser)
    page.until(lambda: "small, version 1" in page.one("#model").text)
    assert len(page.search("data:image/png,words")) == 24
    assert len(page.search("a red heart")) == 24
    for image in page.all("#results img"):
        assert image.get_property("naturalWidth") > 0
        assert image.get_property("alt")
    assert "24 results" in page.one("#panel-search .status").text

    file = tmp_path / "picture.png"
    file.write_bytes(picture(0))
    browser.execute_script("document.querySelector('#results').replaceChildren()")
    page.one("#search-image").send_keys(str(file))
    page.until(lambda: len(page.all("#results li")) == 24)
    page.shot(1280, 900, tmp_path / "search.png")
    page.shot(360, 740, tmp_path / "search-phone.png")

    # Words take the image's place, and then the same image takes theirs.
    assert page.one("#search img").is_displayed()
    page.search("a red heart")
    assert not page.one("#search img").is_displayed()
    assert page.one("#search-image").get_property("value") == ""
    browser.execute_script("document.querySelector('#results').replaceChildren()")
    page.one("#search-image").send_keys(str(file))
    page.until(lambda: len(page.all("#results li")) == 24)
    assert page.one("#words").get_property("value") == ""

    # By keyboard alone: to the tabs, to the other tab, to its labels.
    page.one("#tab-search").send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_property("id") == "tab-classify"
    page.one("#classify-image").send_keys(str(file))
    page.one("#labels").clear()
    page.one("#labels").send_keys("a cat\na dog")
    page.one("#classify button").send_keys(Keys.ENTER)
    page.until(lambda: len(page.all("#chances tbody tr")) == 2)
    assert "fits best" in page.status("#panel-classify")
    assert page.focused() == "button#"
    page.shot(360, 740, tmp_path / "classify-phone.png")
    # What was found for one image is not shown beside another.
    page.drop("#classify .drop", file_of("words.png", "image/png"))
    assert not page.one("#chances").is_displayed()
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = browser.execute_script("return performance.getEntries().map((one) => one.name)")
    assert [one for one in loaded if "//" in one and not one.startswith(endpoint)] == []


def test_a_file_that_is_of_no_use_is_told(page, browser, tmp_path):
    said = "Drop an image file, one at a time."
    page.drop("#search .drop", LINK)
    assert page.status() == said
    page.drop("#search .drop", file_of("words.txt", "text/plain"))
    page.until(lambda: page.status() == "words.txt is no image file.")
    page.drop("#search .drop", 2 * (file_of("a.png", "image/png") + ";"))
    assert page.status() == said
    assert not page.one("#search img").is_displayed()

    large = tmp_path / "large.png"
    large.touch()
    os.truncate(large, 65_000_000)  # which takes no room on the disk
    page.one("#search-image").send_keys(str(large))
    page.until(lambda: page.status() == "large.png has 65 MB; send 64 MB at most.")
    assert page.one("#search-image").get_property("value") == ""

    # Chosen, and away when it is read.
    file = tmp_path / "picture.png"
    file.write_bytes(picture(0))
    page.one("#classify-image").send_keys(str(file))
    page.until(lambda: page.one("#classify img").get_property("src"))
    file.unlink()
    again = "data.items.add(document.querySelector('#classify-image').files[0])"
    page.drop("#search .drop", again)
    page.until(lambda: page.status() == "picture.png cannot be read.")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    # Only the server can tell that this one is none, and there is nothing to show of it.
    page.drop("#search .drop", file_of("words.png", "image/png"))
    page.until(lambda: page.status().startswith("input: "))
    page.until(lambda: not page.one("#search img").is_displayed())
    assert page.one("#search-image").get_property("value").endswith("words.png")


def test_what_is_dropped_beside_the_boxes_leaves_the_page_as_it_is(page):
    image = file_of("a.png", "image/png")
    for kind in ("dragover", "drop"):
        assert not page.drop("h1", image, kind)
        assert not page.drop("h1", LINK, kind)
        assert not page.drop("#words", image, kind)
        assert page.drop("#words", "data.setData('text/plain', 'a heart')", kind)
    assert page.status() == ""


def test_the_keyboard_keeps_its_place_and_asks_once(page, browser):
    page.one("#words").send_keys("a red heart")
    button = page.one("#search button")
    button.send_keys(Keys.ENTER)
    page.until(lambda: page.all("#results li"))
    assert page.focused() == "button#"

    page.answer("() => { window.asked = (window.asked ?? 0) + 1; return new Promise(() => {}) }")
    button.send_keys(Keys.ENTER)
    page.one("#words").send_keys(Keys.ENTER)
    assert browser.execute_script("return window.asked") == 1
    assert page.status() == "One moment …"
    page.one("#words").send_keys("s", Keys.ENTER)  # other words need not wait
    assert browser.execute_script("return window.asked") == 2


def test_a_key_is_asked_for_and_tried(page, browser):
    page.answer(
        """async (path, { headers }) => headers.Authorization === "Bearer good"
          ? Response.json({ data: [{ id: "kept", version: 2, score: 0.5 }] })
          : new Response("", { status: 401 })"""
    )
    page.one("#words").send_keys("a red heart", Keys.ENTER)
    page.until(lambda: page.status() == "The server wants a key.")
    assert page.focused() == "input#key-value"
    for key, said in (
        ("ключ", "No key has such characters; copy it once more."),
        ("bad", "The server does not know this key."),
    ):
        page.one("#key-value").clear()
        page.one("#key-value").send_keys(key, Keys.ENTER)
        page.until(lambda said=said: page.status("#key") == said)
    page.one("#key-value").clear()
    page.one("#key-value").send_keys(" good ", Keys.ENTER)
    page.until(lambda: page.status() == "One result")
    assert page.one("#results li").text.startswith("kept")
    assert page.one("#model").text == "kept, version 2"
    assert not page.one("#key").is_displayed()
    assert page.focused() == "input#words"


def test_an_answer_of_another_shape_is_told_as_what_it_is(page):
    cases = {
        "new Response('<html>', { status: 502, headers: { 'Content-Type': 'text/html' } })": (
            "The server answered 502."
        ),
        "new Response('slow down', { status: 429 })": "The server answered 429: slow down",
        "Response.json({}, { status: 503 })": "The server answered 503.",
        "Response.json({ detail: 'no route' }, { status: 404 })": (
            "The server answered 404: no route"
        ),
        "Response.json({ error: { message: 'no vectors' } }, { status: 503 })": "no vectors",
        "new Response('<html>Log in</html>')": (
            "The server's answer is none that this page can read."
        ),
        "Promise.reject(new TypeError('Failed to fetch'))": "The server cannot be reached.",
        "Response.json({ data: [] })": "Nothing was found.",
    }
    for answer, said in cases.items():
        page.answer(f"async () => {answer}")
        page.one("#words").send_keys("a", Keys.ENTER)
        page.until(lambda said=said: page.status() == said)


def test_what_is_told_is_of_the_last_answer(page):
    """Nothing that was found before stays for what fails, nor a model that is served no more."""
    page.search("a red heart")
    page.answer("() => Promise.reject(new TypeError())")
    page.one("#words").send_keys("s", Keys.ENTER)
    page.until(lambda: page.status() == "The server cannot be reached.")
    assert not page.one("#results").is_displayed()
    page.answer(
        """async () => Response.json({
          data: [{ id: "kept", score: 0.5 }], model: "another", model_version: "2" })"""
    )
    page.one("#words").send_keys(Keys.ENTER)
    page.until(lambda: page.one("#results").is_displayed())
    assert page.status() == "One result"
    assert page.one("#model").text == "another, version 2"


def test_long_labels_and_texts_stay_within_a_narrow_page(page, tmp_path):
    long = "https://example.com/" + "path/" * 20
    page.answer(
        f"""async () => Response.json({{ data: [
          {{ id: "{long}", label: "{long}", score: 1, probability: 1 }}] }})"""
    )
    page.search("a red heart")
    page.shot(320, 700, tmp_path / "search-narrow.png")
    page.one("#tab-classify").click()
    page.drop("#classify .drop", file_of("a.png", "image/png"))
    page.one("#classify button").click()
    page.until(lambda: page.all("#chances tbody tr"))
    page.shot(320, 700, tmp_path / "classify-narrow.png")


def luminance(colour: str) -> float:
    """Of `rgb(…)`, as WCAG 2.2 defines it."""
    red, green, blue = (int(one) / 255 for one in re.findall(r"\d+", colour)[:3])
    linear = [
        one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4
        for one in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_edges_of_what_is_typed_into_are_seen(page, browser, scheme):
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
    for inside, around in (("#words", "body"), ("#search-image", ".drop"), ("#labels", "body")):
        edge = page.one(inside).value_of_css_property("border-top-color")
        for beside in (inside, around):
            ground = page.one(beside).value_of_css_property("background-color")
            low, high = sorted((luminance(edge), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (inside, beside)  # WCAG 2.2, 1.4.11


def test_what_has_no_name_for_a_screen_reader_is_not_there(endpoint, browser):
    browser.get(endpoint)
    unnamed = browser.execute_script(
        """return [...document.querySelectorAll("input, textarea, button, img, [role]")]
          .filter((one) => !(one.labels?.length || one.textContent.trim() || one.alt
            || one.ariaLabel || one.getAttribute("aria-labelledby") || one.role === "status"))
          .map((one) => one.outerHTML)"""
    )
    assert unnamed == []
    assert browser.execute_script("return document.documentElement.lang") == "en"


@pytest.mark.skipif(not (DEMO / "vectors/test/manifest.json").is_file(), reason="make demo first")
def test_the_demos_model_finds_red_hearts(endpoint, browser, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configuration's storage is relative to it
    changes = ["serve.image.cpus=0.1", "serve.text.cpus=0.1", "serve.search.cpus=0"]
    config = load_config(ServeFile, ROOT / "configs" / "emoji.yaml", changes)
    serve.run(build(config), name="demo", route_prefix="/demo")
    try:
        browser.get(f"{endpoint}/demo/")
        page = Page(browser)
        found = page.search("a red heart")
        page.shot(1280, 900, tmp_path / "hearts.png")
        page.shot(360, 740, tmp_path / "hearts-phone.png")
    finally:
        serve.delete("demo")
    assert any("heart" in text for text in found[:3]), found
