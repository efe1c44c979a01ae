"""The site: it builds without a warning, and looks and works as it should in a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Generator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parents[2]
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the site; every link and anchor in it leads somewhere."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_the_target_of_make_builds_as_this_test_does() -> None:
    # With --quiet, no warning is counted: --strict would let a broken link pass.
    assert "/mkdocs build --strict\n" in (ROOT / "Makefile").read_text()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections: half of the time

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Generator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[webdriver.Chrome]:
    if CHROMIUM is None or CHROMEDRIVER is None:
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        *("--headless", "--no-sandbox", "--disable-dev-shm-usage"),
        *("--disable-background-networking", f"--user-data-dir={profile}"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options, Service(CHROMEDRIVER))
    try:
        yield browser
    finally:
        browser.quit()


def look_at(browser: webdriver.Chrome, url: str, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)


def log_of(browser: webdriver.Chrome, kind: str) -> list[dict[str, Any]]:
    """Return what was logged since it was last asked for."""
    entries: list[dict[str, Any]] = browser.execute("getLog", {"type": kind})["value"]
    return entries


# Folded parts and tabs show what they have.
UNFOLD = """
    document.querySelectorAll(".md-content details").forEach(part => { part.open = true });
    document.head.insertAdjacentHTML("beforeend",
        "<style>.tabbed-content > .tabbed-block { display: block !important }</style>");
"""

# What reaches beyond the right edge, and is in nothing that scrolls by itself.
OVERFLOWING = """
    const scrolls = e => ["auto", "hidden", "scroll"].includes(getComputedStyle(e).overflowX);
    const width = document.documentElement.clientWidth;
    return [...document.querySelectorAll(".md-content *")].filter(element => {
        if (element.getBoundingClientRect().right <= width + 1) return false;
        for (let e = element; e !== document.body; e = e.parentElement)
            if (scrolls(e)) return false;
        return true;
    }).map(element => element.outerHTML.slice(0, 200));
"""

# By how much the page itself can be scrolled sideways.
BEYOND = "const page = document.documentElement; return page.scrollWidth - page.clientWidth"

# Code that has to be scrolled to be read.
CUT = """
    return [...document.querySelectorAll(".md-content pre, .md-content pre > code")]
        .filter(element => element.scrollWidth > element.clientWidth)
        .map(element => element.innerText.slice(0, 200));
"""

# What lies over code, which nobody has pointed at.
OVER_CODE = """
    return [...document.querySelectorAll(".md-content pre > :not(code)")]
        .filter(element => element.getBoundingClientRect().width > 0)
        .filter(element => getComputedStyle(element).opacity !== "0")
        .map(element => element.outerHTML.slice(0, 200));
"""

PAGES = sorted(
    str(page.relative_to(ROOT / "docs").with_suffix("")).removesuffix("index").rstrip("/") + "/"
    for page in (ROOT / "docs").rglob("*.md")
)


@pytest.mark.timeout(300)  # a machine that is busy takes seconds for a page
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_every_page_fits_and_loads_nothing_from_elsewhere(
    browser: webdriver.Chrome, address: str, width: int, scheme: str
) -> None:
    log_of(browser, "performance")
    for page in PAGES:
        look_at(browser, address + page.lstrip("/"), width, scheme)
        browser.execute_script(UNFOLD)
        assert browser.execute_script(OVERFLOWING) == [], page
        assert browser.execute_script(BEYOND) <= 0, page
        assert browser.execute_script(OVER_CODE) == [], page
        if width == 1280:
            assert browser.execute_script(CUT) == [], page
        body = browser.find_element(By.TAG_NAME, "body")
        wanted = {"light": "default", "dark": "slate"}[scheme]
        assert body.get_attribute("data-md-color-scheme") == wanted
        assert log_of(browser, "browser") == [], page
    messages = [json.loads(entry["message"])["message"] for entry in log_of(browser, "performance")]
    loaded = {
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    }
    assert len(loaded) > len(PAGES)
    assert [url for url in loaded if not url.startswith((address, "data:", "blob:"))] == []


def test_the_search_finds_db_session(browser: webdriver.Chrome, address: str) -> None:
    look_at(browser, address, 1280, "light")
    browser.find_element(By.CSS_SELECTOR, ".md-search__input").send_keys("db_session")
    found = WebDriverWait(browser, 10).until(
        lambda _: browser.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    addresses = [link.get_attribute("href") or "" for link in found]
    assert any("/api/" in found_at and "db_session" in found_at for found_at in addresses)


def test_the_button_that_copies_comes_when_code_is_pointed_at(
    browser: webdriver.Chrome, address: str
) -> None:
    look_at(browser, address + "why/", 1280, "light")
    code = browser.find_element(By.CSS_SELECTOR, ".language-python pre")
    button = code.find_element(By.CSS_SELECTOR, ".md-code__nav")
    assert button.value_of_css_property("opacity") == "0"
    ActionChains(browser).move_to_element(code).perform()
    assert button.value_of_css_property("opacity") == "1"


def test_the_icon_is_in_the_header_and_on_the_tab(browser: webdriver.Chrome, address: str) -> None:
    look_at(browser, address, 1280, "light")
    logo = browser.find_element(By.CSS_SELECTOR, ".md-header .md-logo img")
    assert logo.get_property("naturalWidth")
    tab = browser.find_element(By.CSS_SELECTOR, "link[rel=icon]").get_property("href")
    assert tab == logo.get_property("src") == address + "icon.svg"


def test_a_folded_part_opens(browser: webdriver.Chrome, address: str) -> None:
    look_at(browser, address + "reliability/", 1280, "light")
    part = browser.find_element(By.CSS_SELECTOR, ".md-content details")
    content = part.find_element(By.CSS_SELECTOR, "summary ~ *")
    assert not content.is_displayed()
    part.find_element(By.TAG_NAME, "summary").click()
    assert content.is_displayed()


def test_the_menu_has_few_entries(browser: webdriver.Chrome, address: str) -> None:
    look_at(browser, address, 1280, "light")
    entries = browser.find_elements(
        By.CSS_SELECTOR, ".md-nav--primary > .md-nav__list > .md-nav__item"
    )
    assert len([entry for entry in entries if entry.is_displayed()]) <= 10
