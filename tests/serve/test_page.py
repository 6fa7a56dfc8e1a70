"""The search page: from this server alone, and in a browser."""

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
        seen, there = self.browser.execute_script(
            "return [innerWidth, document.documentElement.scrollWidth]"
        )
        assert seen == width
        assert there <= width
        file.write_bytes(self.browser.get_screenshot_as_png())


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

    # By keyboard alone: to the tabs, to the other tab, to its labels.
    page.one("#tab-search").send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_property("id") == "tab-classify"
    page.one("#classify-image").send_keys(str(file))
    page.one("#labels").clear()
    page.one("#labels").send_keys("a cat\na dog")
    page.one("#classify button").send_keys(Keys.ENTER)
    page.until(lambda: len(page.all("#chances tbody tr")) == 2)
    assert "fits best" in page.one("#panel-classify .status").text
    page.shot(360, 740, tmp_path / "classify-phone.png")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    loaded = browser.execute_script("return performance.getEntries().map((one) => one.name)")
    assert [one for one in loaded if "//" in one and not one.startswith(endpoint)] == []


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
