"""The page of a comparison in a real browser."""

import json
import re

import numpy as np
import pytest

from tests.support import browser
from tests.support.comparisons import INVENTED, hostile_comparison
from trl_ext.comparison.page import write_report
from trl_ext.comparison.results import ComparisonResults, MethodResult

in_browser = pytest.mark.skipif(browser.FOUND is None, reason=browser.WHY_NOT)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser.Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    comparison, folder = hostile_comparison(prompts=40), tmp_path_factory.mktemp("full")
    write_report(comparison, folder)
    return comparison, folder / "comparison.html"


SIZES = """
(() => [...document.querySelectorAll("figure:has(svg)")].map(figure => {
  const svg = figure.querySelector("svg").getBoundingClientRect(), box = figure.firstChild.getBoundingClientRect();
  const outside = [...figure.querySelectorAll("text")].filter(text => {
    const own = text.getBoundingClientRect();
    return Math.min(own.left - svg.left, svg.right - own.right, own.top - svg.top, svg.bottom - own.bottom) < -2;
  });
  return {
    width: svg.width, height: svg.height, left: box.left, right: box.right,
    outside: outside.map(one => one.textContent),
    label: figure.querySelector("svg").getAttribute("aria-label"),
    caption: figure.querySelector("figcaption").textContent,
    texts: [...figure.querySelectorAll("text")].map(one => one.textContent),
  };
}))()
"""


def two_methods(tmp_path, *, length=10, nll=9.0, reward=0.5, curve=()) -> tuple[str, dict[str, str]]:
    """Page of a method beside SFT, whose figures are 10 tokens, 9 nats and 0.5, and its captions by section."""
    noise = np.random.default_rng(0).normal(0, 0.01, size=50)

    def result(method, length, nll, reward, curve):
        scores = {"reward": (reward + noise).tolist()}
        measured = {"lengths": [length] * 50, "nll": [nll] * 50, "kl": [0.0] * 50}
        return MethodResult(method, method.upper(), 1, "done", scores=scores, measured=measured, curve=list(curve))

    results = [result("sft", 10, 9.0, 0.5, ()), result("new", length, nll, reward, curve)]
    write_report(ComparisonResults("two", "sft", 50, results), tmp_path)
    page = (tmp_path / "comparison.html").read_text()
    captions = re.findall(r'<section id="([^"]+)">(?:(?!</section>).)*?<figcaption>(.*?)</figcaption>', page, re.S)
    return page, dict(captions)


def test_more_of_what_is_worse_is_no_praise(tmp_path):
    page, captions = two_methods(tmp_path, nll=18.0, length=12, reward=0.9)
    marks = re.findall(r'<span class="(\w+)" role="img" aria-label="([^"]+)">(.)</span>', page)
    assert ("down", "above the base, worse", "▲") in marks  # perplexity
    assert ("neither", "above the base", "▲") in marks  # tokens
    assert ("up", "above the base, better", "▲") in marks  # reward
    assert "(orange: worse)" in captions["perplexity"] and "blue" not in captions["perplexity"]
    page, captions = two_methods(tmp_path, nll=4.0)
    assert ("up", "below the base, better", "▼") in re.findall(
        r'<span class="(\w+)" role="img" aria-label="([^"]+)">(.)</span>', page
    )
    assert "▼: below SFT" in captions["perplexity"] and "(blue: better)" in captions["perplexity"]


def test_captions_speak_of_what_is_drawn(tmp_path):
    page, captions = two_methods(tmp_path)
    for section, caption in captions.items():
        for absent in ("▲", "▼", "blue", "orange", "Bold", "Lines", "dotted"):
            assert absent not in caption, (section, absent)
    assert "○: not to be told apart from SFT. ◆: SFT." in captions["scores-0"]
    assert "only watched" not in captions["scores-0"]  # there is no other scorer
    point = {"updates": 1, "chosen_logps": None, "rejected_logps": None}
    curve = [{**point, "share": share, "reward": 0.5, "kl": share} for share in (0.5, 1.0)]
    page, captions = two_methods(tmp_path, reward=0.9, curve=curve)
    assert "Lines: what was measured along training" in captions["paths"]
    assert "Bold and coloured" in captions["wins-0"] and "▲: above SFT" in captions["scores-0"]
    assert "▼" not in captions["scores-0"] and "orange" not in captions["scores-0"]


@in_browser
@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_reads_well(chromium, full_page, width, dark):
    comparison, file = full_page
    page = chromium.open(file, width=width, dark=dark)
    assert page.problems == []
    assert page.addresses == [file.resolve().as_uri()]
    assert page.evaluate("document.title").startswith("<script>")
    assert page.evaluate("document.documentElement.scrollWidth") <= width

    figures = page.evaluate(SIZES)
    assert len(figures) == 5
    for figure in figures:
        assert figure["width"] > 300 and figure["height"] > 150 and figure["outside"] == []
        assert 0 <= figure["left"] < figure["right"] <= width
        assert len(figure["label"]) > 20 and len(figure["caption"]) > 40
    shown = [*INVENTED.values()]
    for label in (label for label, *_ in shown if label != INVENTED["best_of_n"][0]):
        for figure in figures[:4]:
            assert any(text.startswith(label) for text in figure["texts"])
        assert page.evaluate(f"document.querySelector('#results').innerText.includes({json.dumps(label)})")
    assert page.evaluate("document.querySelector('#failed').innerText").count("A method that has failed") == 1

    contrasts = page.evaluate(browser.CONTRASTS)
    assert len(contrasts) > 1000
    assert [one for one in contrasts if one[1] < 4.5] == []
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")
    assert (sum(map(int, brightness)) < 200) is dark


@in_browser
@pytest.mark.parametrize(("width", "least"), [(400, 9), (1200, 0)])
def test_what_is_wider_than_the_page_says_that_it_scrolls(chromium, full_page, width, least):
    page = chromium.open(full_page[1], width=width)
    boxes = page.evaluate(
        """[...document.querySelectorAll(".scroll")].map(box => [
             box.scrollWidth > box.clientWidth + 1,
             getComputedStyle(box, "::before").content.includes("scroll sideways")
           ])"""
    )
    assert sum(wide for wide, _ in boxes) >= least
    assert all(wide == said for wide, said in boxes)


@in_browser
def test_headings_sort_and_the_button_changes_the_theme(chromium, full_page):
    page = chromium.open(full_page[1], width=1200)

    def column(number):
        return page.evaluate(
            f"[...document.querySelectorAll('#results tbody tr')].map(row => row.cells[{number}].dataset.value)"
        )

    rewards = [float(value) for value in column(2) if value]
    assert rewards == sorted(rewards, reverse=True) and len(rewards) == 13
    for order in (True, False):
        page.evaluate("document.querySelectorAll('#results thead button')[7].click()")
        found = column(7)
        kl = [float(value) for value in found if value]
        assert kl == sorted(kl, reverse=order) and found[-1] == ""  # what has failed comes last
    background = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(background)
    page.evaluate("document.querySelector('.theme').click()")
    assert page.evaluate(background) != before
    assert page.evaluate("document.querySelector('.theme').textContent") == "Light theme"
    assert page.problems == []


@in_browser
def test_the_page_reads_without_scripts(chromium, full_page):
    page = chromium.open(full_page[1], width=1200, script=False)
    page.browser.call("Emulation.setScriptExecutionDisabled", page.session, value=False)
    assert page.evaluate("document.querySelectorAll('button').length") == 0
    assert page.evaluate("document.querySelectorAll('#results tbody tr').length") == 14
    assert len(page.evaluate(SIZES)) == 5


@in_browser
def test_what_is_wrong_with_a_page_is_noticed(chromium, tmp_path):
    """The checks above can fail."""
    (tmp_path / "bad.html").write_text(
        "<body style='background:#fff'><p style='color:#999'>pale</p><p "
        "style='color:#000;background:#222'>dark</p><svg width=60 height=30><rect width=60 height=30 fill='#333' "
        "opacity=.9 /><text y=20 fill='#000'>cell</text></svg><p style='width:3000px;color:#111'>wide</p><img "
        "src='https://example.org/a.png'><script>console.error('x');y()</script>"
    )
    page = chromium.open(tmp_path / "bad.html", width=400)
    assert "https://example.org/a.png" in page.addresses
    assert len(page.problems) == 3  # the picture, the console, the script
    assert page.evaluate("document.documentElement.scrollWidth") > 400
    contrasts = dict(page.evaluate(browser.CONTRASTS))
    assert contrasts.pop("wide") > 15
    assert contrasts.pop("pale") == pytest.approx(2.85, abs=0.01)
    assert set(contrasts) == {"dark", "cell"} and max(contrasts.values()) < 3
