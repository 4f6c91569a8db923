"""Pictures of every page of the built site, for a look at them: wide and narrow, light and dark.

    python docs/site/screenshots.py build/site build/screenshots [PAGE ...]

Needs ``pip install playwright`` and a Chromium (``apt install chromium``). Prints what is broken:
pages wider than the window, pictures that did not load, requests that leave the machine or find
nothing, errors of scripts.
"""

import argparse
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

WIDTHS = {"desktop": 1280, "phone": 390}
SCHEMES = ("light", "dark")
MOST_PIXELS_HIGH = 16_000  # Chromium's own limit of a picture


def main() -> None:
    """Take the pictures; exit with 1 if a page is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("pages", nargs="*", help="such as recipe.html; default: all")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    found = (path.relative_to(options.site).as_posix() for path in options.site.rglob("*.html"))
    pages = options.pages or sorted(set(found) - {"404.html"})
    options.output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        with ThreadingHTTPServer(
            ("localhost", 0), partial(Quiet, directory=options.site)
        ) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            home = f"http://localhost:{server.server_port}"
            whole = True
            for fault in photograph(browser, home, options.output, pages):
                whole = False
                print(fault, flush=True)
            server.shutdown()
        browser.close()
    raise SystemExit(not whole)


class Quiet(SimpleHTTPRequestHandler):
    """Serves the site without a line for each request."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def photograph(browser: "Browser", home: str, output: Path, pages: list[str]) -> Iterator[str]:
    """One picture for each page, width and scheme; yields what is wrong with them."""
    for scheme in SCHEMES:
        for device, width in WIDTHS.items():
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme
            )
            for page_name in pages:
                page, seen = context.new_page(), f"{page_name}, {device}, {scheme}"
                page.set_default_timeout(0)  # a busy machine takes its time
                requests: list[str] = []
                errors: list[str] = []
                missing: list[str] = []
                page.on("request", lambda request, urls=requests: urls.append(request.url))
                page.on(
                    "response",
                    lambda reply, urls=missing: urls.extend([reply.url] * (not reply.ok)),
                )
                page.on("pageerror", lambda error, texts=errors: texts.append(str(error)))
                page.goto(f"{home}/{page_name}")
                page.wait_for_load_state("networkidle")
                wide = page.evaluate("document.documentElement.scrollWidth")
                broken = page.evaluate(
                    "[...document.images]"
                    ".filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
                )
                yield from (f"{seen}: is {wide} pixels wide" for _ in range(wide > width))
                yield from (f"{seen}: picture {source} is broken" for source in broken)
                abroad = [url for url in requests if not url.startswith((home, "data:"))]
                yield from (f"{seen}: asks for {url}" for url in abroad)
                yield from (f"{seen}: does not find {url}" for url in missing)
                yield from (f"{seen}: script error: {error}" for error in errors)
                height = min(page.evaluate("document.body.scrollHeight"), MOST_PIXELS_HIGH)
                page.set_viewport_size({"width": width, "height": height})
                name = page_name.replace("/", "_").removesuffix(".html")
                page.screenshot(path=output / f"{name}_{device}_{scheme}.png")
                page.close()
            context.close()


if __name__ == "__main__":
    main()
