"""Opens the chat page of a server in a headless browser, sends a message, and takes a picture.

    v4jax serve --checkpoint nano
    python scripts/chat_page.py --url http://127.0.0.1:8000 --picture docs/chat.png

Needs `pip install playwright` and a Chromium: `apt install chromium`, or `playwright install chromium`.
"""

import argparse
import dataclasses
import pathlib
import shutil

from playwright.sync_api import Browser, Error, Page, Playwright, sync_playwright

NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the page showed of one answer."""

    lengths: list[int]  # characters of the turn, each time that it was looked at and had grown
    reasoning: str
    content: str
    is_folded: bool  # the reasoning, once the answer was there
    rate: str  # the line with tokens and tokens/s
    faults: list[str]  # of the page's script, and what it shows as errors


def open_browser(playwright: Playwright) -> Browser:
    """A Chromium of this machine, or playwright's own.

    Raises:
      Error: there is neither.
    """
    path = next(filter(None, map(shutil.which, NAMES)), None)
    return playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])


def ask(page: Page, url: str, message: str, *, mode: str, limit: int) -> Seen:
    """Sends a message in a mode, waits for the end of the answer, and says what was shown.

    Args:
      limit: tokens of the answer.

    Raises:
      Error: the answer did not end in two minutes.
    """
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(url)
    page.wait_for_selector(f"#mode option[value={mode}]", state="attached")
    page.select_option("#mode", mode)
    page.fill("#limit", str(limit))
    page.fill("#text", message)
    page.press("#text", "Enter")
    turn = page.locator(".turn:not(.user)").last
    lengths = [0]
    for _ in range(6000):
        length = len(turn.text_content() or "")
        if length > lengths[-1]:
            lengths.append(length)
        if page.text_content("#send") == "Send":
            break
        page.wait_for_timeout(20)
    else:
        raise Error("The answer did not end in two minutes.")
    fold, parts = turn.locator("details"), turn.locator("> div:not(.rate):not(.error)")
    has_fold = fold.count() > 0
    faults += turn.locator(".error").all_text_contents()
    return Seen(
        lengths,
        (fold.locator("div").text_content() or "") if has_fold else "",
        "".join(parts.all_text_contents()),
        has_fold and fold.get_attribute("open") is None,
        " ".join(turn.locator(".rate").all_text_contents()),
        faults,
    )


def main() -> None:
    """Asks once and saves the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--picture", type=pathlib.Path, required=True, help=".png to write")
    parser.add_argument("--message", default="Who is Emma?")
    parser.add_argument("--mode", default="think-high")
    parser.add_argument("--limit", type=int, default=200, help="tokens of the answer")
    args = parser.parse_args()
    with sync_playwright() as playwright, open_browser(playwright) as browser:
        page = browser.new_page(viewport={"width": 900, "height": 480})
        print(ask(page, args.url, args.message, mode=args.mode, limit=args.limit))
        page.screenshot(path=args.picture)


if __name__ == "__main__":
    main()
