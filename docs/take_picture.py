#!/usr/bin/env python3
"""Take the screenshot of a report that docs/scripts.md shows: python docs/take_picture.py REPORT PICTURE

Needs the package playwright and a Chromium: apt-get install chromium.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1180, 1075


def launch(playwright: Any) -> Any:
    """A headless browser; None where there is none."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    # A container's root has no user namespace for the browser's sandbox; the page is our own.
    return program and playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])


def main() -> None:
    from playwright.sync_api import sync_playwright

    report, picture = map(Path, sys.argv[1:])
    with sync_playwright() as playwright:
        browser = launch(playwright)
        if browser is None:
            sys.exit("no browser: apt-get install chromium")
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        page.wait_for_selector("html[data-drawn=yes]")
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
