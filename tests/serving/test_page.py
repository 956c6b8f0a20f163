"""The page in a real browser: it asks, shows answers and errors, and asks no other host."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser import HAS_BROWSER, Browser
from servers import KEY

pytestmark = pytest.mark.browser
SCREENSHOTS = os.environ.get("MLMJAX_SCREENSHOTS")
"""A folder to write pictures of the page into."""


@pytest.fixture(scope="module")
def browser():
    assert HAS_BROWSER
    with Browser() as one:
        yield one


def text_of(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent", name)


def ask(browser):
    browser.run("document.getElementById('ask').click()")
    done = "const one = document.getElementById('status').textContent;"
    done += "return /answers of|no answer/.test(one) && one"
    return browser.wait(done)


def fits(browser):
    """Tell whether nothing is wider than the window."""
    return browser.run("return document.documentElement.scrollWidth <= innerWidth")


def picture(browser, name):
    if SCREENSHOTS:
        browser.screenshot(Path(SCREENSHOTS) / name)


def test_examples_are_asked_and_shown_as_bars(client, browser):
    browser.open(f"http://127.0.0.1:{client.port}/")
    names = browser.run("return [...document.querySelectorAll('#examples button')].length")
    assert names == 4
    for number in range(names):
        browser.run(f"document.querySelectorAll('#examples button')[{number}].click()")
        browser.run("document.getElementById('answers').replaceChildren()")
        browser.run("document.getElementById('status').textContent = ''")
        assert "answers of mlmjax" in ask(browser)
        bars = browser.run("return [...document.querySelectorAll('.bar')].map(b => b.textContent)")
        assert len(bars) >= 4
        assert all(one.endswith(" %") for one in bars)
        assert "confidence" in text_of(browser, "answers")
    picture(browser, "page.png")
    program = text_of(browser, "python")
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "'choice': '" in run.stdout
    command = text_of(browser, "curl")
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert '"answers":' in run.stdout


def test_questions_are_added_by_keyboard_and_errors_are_shown(client, browser):
    browser.open(f"http://127.0.0.1:{client.port}/")
    browser.run("document.querySelector('[data-add=noul]').focus()")
    browser.press("\ue007")  # Enter adds a question, whose text has the focus then
    browser.press('Is it\'s "quoted" <b>?')
    assert "answers of mlmjax" in ask(browser)
    assert browser.run("return document.querySelectorAll('#answers article').length") == 4
    browser.run("document.querySelector('fieldset .row button').click()")
    assert browser.run("return document.querySelectorAll('fieldset').length") == 3
    browser.run("document.querySelector('[data-field=criteria]').value = ''")
    browser.run("document.querySelector('[data-add=choice]').click()")
    assert ask(browser) == "There is no answer."
    assert "criteria: has 0 options; expected 2 to 255" in text_of(browser, "error")
    browser.run("document.getElementById('state').value = '{broken'")
    browser.run("document.getElementById('ask').click()")
    assert "not valid JSON" in text_of(browser, "error")
    unnamed = (
        "return [...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length)"
    )
    assert browser.run(f"{unnamed}.length") == 0
    errors = [one["message"] for one in browser.logs("browser") if one["level"] == "SEVERE"]
    assert all("status of 422" in one for one in errors), errors  # the browser reports the status


def test_words_behind_answers_are_coloured(client, browser):
    browser.open(f"http://127.0.0.1:{client.port}/")
    text = "The refund <b>never</b> came."
    browser.run("document.getElementById('state').value = arguments[0]", text)
    browser.run("document.getElementById('explain').click()")
    assert "answers of mlmjax" in ask(browser)
    shown = "return [...document.querySelectorAll('.words')].map(one => one.textContent)"
    assert set(browser.run(shown)) == {text}
    marks = "return [...document.querySelectorAll('.words mark')].map(one => one.title)"
    assert len(browser.run(marks)) >= 5
    assert "x_explain" in text_of(browser, "curl")
    background = "getComputedStyle(document.querySelector('.words mark')).backgroundColor"
    assert browser.run(f"return {background}") != "rgba(0, 0, 0, 0)"
    picture(browser, "page_words.png")


def test_a_long_state_a_phone_and_a_dark_page(client, browser):
    browser.device(width=360, height=740, dark=True)
    browser.open(f"http://127.0.0.1:{client.port}/")
    browser.run("document.getElementById('state').value = 'word '.repeat(2000)")
    ask(browser)
    assert "tokens of the text did not fit" in text_of(browser, "answers")
    assert fits(browser)
    background = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(17, 23, 29)"
    browser.run("document.getElementById('answers').scrollIntoView()")
    picture(browser, "page_phone.png")
    browser.command("Emulation.clearDeviceMetricsOverride", {})
    hosts = {url.split("/")[2] for url in browser.requested() if url.startswith("http")}
    assert hosts == {f"127.0.0.1:{client.port}"}


def test_a_key_is_asked_for_where_there_is_one(locked, browser):
    browser.open(f"http://127.0.0.1:{locked.port}/")
    assert ask(browser) == "There is no answer."
    assert "send the key of this server" in text_of(browser, "error")
    browser.run("document.getElementById('key').value = arguments[0]", KEY)
    browser.run("document.getElementById('status').textContent = ''")
    assert "answers of mlmjax" in ask(browser)
    assert KEY not in text_of(browser, "curl")
