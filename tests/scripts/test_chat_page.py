"""The chat page in a headless browser, of a server on nano."""

import dataclasses
import re

import pytest

import v4jax
from tests.conftest import NANO
from tests.v4jax.test_server import FakeEngine, Live
from v4jax import Engine
from v4jax.text.format import THINK_END
from v4jax.text.tokenizer import Tokenizer

browsers = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from scripts.chat_page import ask, open_browser


@pytest.fixture(scope="module")
def browser():
    with browsers.sync_playwright() as playwright:
        try:
            opened = open_browser(playwright)
        except browsers.Error as error:
            pytest.skip(f"no Chromium is installed, or it does not start: {error.message[:200]}")
        with opened:
            yield opened


@pytest.fixture
def page(browser):
    page = browser.new_page(viewport={"width": 900, "height": 480})
    yield page
    page.close()


class Seeded(Engine):
    """Draws the same whenever the test runs, and thinks for a while, not for long."""

    def submit(self, prompt, sampling, **options):
        bias = {self.tokenizer.id(THINK_END): 3.0}
        return super().submit(
            prompt, dataclasses.replace(sampling, seed=6, logit_bias=bias), **options
        )


def test_an_answer_of_nano_streams(page, tmp_path):
    engine = Seeded(v4jax.load(NANO, v4jax.plain("float32")), Tokenizer(NANO), slots=2)
    engine.generate("Emma", v4jax.Sampling(max_new_tokens=9))  # compiles
    with Live(engine) as live:
        seen = ask(page, live.url, "Who is Emma?", mode="think-high", limit=400)
        page.screenshot(path=tmp_path / "chat.png")
    assert not seen.faults
    assert len(seen.lengths) > 5
    assert seen.reasoning and seen.content and seen.is_folded
    assert re.match(r"\d+ tokens, \d+\.\d tokens/s; prompt \d+, cached \d+", seen.rate)
    assert (tmp_path / "chat.png").stat().st_size > 1000


def test_faults_and_cut_answers_are_shown(page):
    engine = FakeEngine("It was fine.")
    with Live(engine) as live:
        cut = ask(page, live.url, "Well?", mode="non-think", limit=2)
        assert "cut: the limit of tokens is reached" in cut.rate and not cut.is_folded
        assert cut.content and not cut.faults
        engine.fault = "out of luck"
        failed = ask(page, live.url, "Well?", mode="non-think", limit=20)
        assert failed.faults == ["The engine failed: out of luck."]
