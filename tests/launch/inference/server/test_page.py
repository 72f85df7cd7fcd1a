"""The chat page, in a real browser: it types, streams, stops, and still has the conversation after a reload."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.commandline import wait_for
from tests.launch.inference.server.parrot import COUNTING, GREETING
from tests.launch.inference.server.serving import ADAPTER, MODEL, Served

pytestmark = pytest.mark.timeout(600)

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE = 60


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """Debian's Chromium, with an empty profile."""
    if shutil.which("chromedriver") is None or shutil.which("chromium") is None:
        # Root could mend it (`make test` does), so as root it is a fault; without root these tests are left out, and it is said.
        (pytest.skip if os.geteuid() else pytest.fail)("the page's tests need chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}", "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def page(browser: webdriver.Chrome, endpoint: Served) -> Iterator[webdriver.Chrome]:
    """The page, opened as the tunnel's address opens it, without any conversation; no error may be on its console at the end."""
    browser.get(f"{endpoint.url}/health")  # a fragment alone would load nothing
    browser.execute_script("sessionStorage.clear()")
    browser.get(f"{endpoint.url}/#key={endpoint.key}")
    until(browser, lambda: text_of(browser, "#state") == "ready")
    yield browser
    problems = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not problems


def until(browser: webdriver.Chrome, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PATIENCE, poll_frequency=0.05).until(lambda _: condition())


def text_of(browser: webdriver.Chrome, selector: str) -> str:
    return browser.find_element(By.CSS_SELECTOR, selector).text


def turns(browser: webdriver.Chrome) -> list[str]:
    """What stands in each turn, facts left aside."""
    script = (
        "return [...document.querySelectorAll('.turn')].map((turn) => turn.querySelector(':scope > .text').textContent)"
    )
    return list(browser.execute_script(script))


def ask(browser: webdriver.Chrome, text: str) -> None:
    box = browser.find_element(By.ID, "question")
    box.send_keys(text)
    box.send_keys(Keys.ENTER)


def done(browser: webdriver.Chrome) -> bool:
    return browser.find_element(By.ID, "send").is_displayed() and not browser.find_elements(By.CSS_SELECTOR, ".writing")


def greedily(browser: webdriver.Chrome, longest: str = "") -> None:
    Select(browser.find_element(By.ID, "model")).select_by_visible_text(MODEL)
    browser.find_element(By.ID, "settings-toggle").click()
    browser.find_element(By.ID, "temperature").send_keys("0")
    browser.find_element(By.ID, "longest").send_keys(longest)
    browser.find_element(By.ID, "settings-toggle").click()


def test_it_asks_streams_and_remembers(page: webdriver.Chrome, endpoint: Served) -> None:
    assert page.current_url == f"{endpoint.url}/"  # the key is not left where it can be read over a shoulder
    greedily(page)
    ask(page, "Count")
    seen = set()

    def growing() -> bool:
        seen.add((turns(page) or [""])[-1])
        return done(page) and turns(page)[-1] == COUNTING

    until(page, growing)
    assert len(seen) > 2, "the answer came in one piece"
    facts = text_of(page, ".turn:last-of-type .facts")
    assert re.fullmatch(rf"{len(COUNTING) + 1} tokens · [\d.e+]+ tokens/s · [\d.]+ s to the first", facts)
    page.refresh()
    until(page, lambda: text_of(page, "#state") == "ready")
    assert turns(page) == ["Count", COUNTING]
    assert page.find_element(By.ID, "temperature").get_attribute("value") == "0"
    page.find_element(By.ID, "new").click()
    assert turns(page) == []
    ask(page, "Who are you?")
    until(page, lambda: done(page) and turns(page)[1:] == [GREETING])


def test_stop_ends_the_answer_here_and_on_the_server(page: webdriver.Chrome, endpoint: Served) -> None:
    greedily(page)
    ask(page, "Sing")  # which it does on and on
    until(page, lambda: len(turns(page)) == 2 and len(turns(page)[1]) > 3)
    cancelled = endpoint.metric("answers_total")
    page.find_element(By.ID, "stop").click()
    until(page, lambda: done(page))
    assert text_of(page, ".turn:last-of-type .facts").endswith("stopped")
    wait_for(endpoint.idle, seconds=60)
    assert endpoint.metric("answers_total") == cancelled + 1
    page.refresh()
    until(page, lambda: len(turns(page)) == 2)


def test_the_adapter_can_be_picked(page: webdriver.Chrome) -> None:
    picker = Select(page.find_element(By.ID, "model"))
    assert {option.text for option in picker.options} == {MODEL, ADAPTER}
    greedily(page, "24")
    answers = []
    for model in (MODEL, ADAPTER):
        Select(page.find_element(By.ID, "model")).select_by_visible_text(model)
        page.find_element(By.ID, "new").click()
        ask(page, "Who are you?")
        until(page, lambda: done(page) and len(turns(page)) == 2)
        answers.append(turns(page)[1])
    assert answers[0] == GREETING[:24]
    assert answers[1] != answers[0]


def test_what_is_said_never_becomes_markup(page: webdriver.Chrome) -> None:
    greedily(page, "24")
    ask(page, "<img src=x onerror=\"document.title='pwned'\"><b>bold</b>")
    until(page, lambda: done(page) and len(turns(page)) == 2)
    assert turns(page)[0].startswith("<img src=x")
    assert not page.find_elements(By.CSS_SELECTOR, "#talk img, #talk b")
    assert page.title != "pwned"


def test_without_the_key_it_asks_for_it(browser: webdriver.Chrome, endpoint: Served) -> None:
    browser.get(f"{endpoint.url}/health")
    browser.execute_script("sessionStorage.clear()")
    browser.get(f"{endpoint.url}/")
    box = browser.find_element(By.ID, "key")
    until(browser, box.is_displayed)
    box.send_keys(endpoint.key, Keys.ENTER)
    until(browser, lambda: text_of(browser, "#state") == "ready")
    browser.get_log("browser")  # the refusal is on its console


@pytest.mark.parametrize("width", [320, 375, 1200])
def test_it_fits_a_phone(page: webdriver.Chrome, width: int, tmp_path: Path) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 700, "deviceScaleFactor": 2, "mobile": width < 600},
    )
    try:
        greedily(page, "60")
        ask(page, "Who are you?")
        until(page, lambda: done(page) and len(turns(page)) == 2)
        ask(page, "x" * 200)
        until(page, lambda: done(page) and len(turns(page)) == 4)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        for selector in ("#question", "#send", "#model", "#new", "#settings-toggle"):
            box = page.find_element(By.CSS_SELECTOR, selector).rect
            assert box["x"] >= 0, selector
            assert box["x"] + box["width"] <= width, selector
            assert box["height"] >= 24, selector
        if folder := os.environ.get("SCREENSHOTS"):
            page.save_screenshot(f"{folder}/page-{width}.png")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_and_its_parts_forbid_everything_else(endpoint: Served) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = endpoint.ask(path, headers={"Authorization": ""})
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; ")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://|innerHTML|eval\(", answer.text)
