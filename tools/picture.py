"""Make docs/report.png: the report of the bundled model, as a browser shows it.

Needs Chromium; nothing else of the project does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

REPOSITORY = Path(__file__).parent.parent
PICTURE = REPOSITORY / "docs" / "report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SIZE = (1080, 1090)
"""Pixels: what the README shows without scrolling for long."""
COLOURS = 64
"""Few colours make a small file; the page has few."""


def main() -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"picture: no Chromium on this machine: none of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as place:
        convert(place, "--base", "fixtures/tiny-base", "--adapter", "fixtures/tiny-adapter", "--out", f"{place}/demo")
        shot, page = Path(place, "shot.png"), Path(place, "demo-report.html")
        size = f"--window-size={SIZE[0]},{SIZE[1]}"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True, stderr=subprocess.DEVNULL)
        with Image.open(shot) as image:
            image.convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
    print(f"{PICTURE.relative_to(REPOSITORY)}: {PICTURE.stat().st_size:,} bytes")


def convert(place: str, *arguments: str) -> None:
    """A conversion with its report beside the output."""
    report = ["--report", f"{place}/demo-report.html", "--min-survival", "0.9"]
    subprocess.run([sys.executable, "cli.py", *arguments, *report, "--quiet"], cwd=REPOSITORY, check=True)


if __name__ == "__main__":
    main()
