"""`make docs`: the site of README's longer companion builds without a warning, and has what it should have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import converter
from tests.conftest import REPOSITORY
from tests.limits import HANG

CONFIG = REPOSITORY / "mkdocs.yml"


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    ran = build(CONFIG, folder)
    assert ran.returncode == 0, ran.stderr
    assert "WARNING" not in ran.stderr
    return folder


def test_it_has_a_page_for_each_file_and_the_menu_names_all(site: Path) -> None:
    files = {path.name for path in (REPOSITORY / "docs").glob("*.md")}

    assert files <= {*re.findall(r"(\w[\w-]*\.md)", CONFIG.read_text())}
    assert {path.stem for path in site.glob("*.html")} == {name.removesuffix(".md") for name in files} | {"404"}


def test_the_page_of_python_has_every_public_name_with_what_it_says(site: Path) -> None:
    named = re.findall(r"^::: converter\.public\.(\w+)$", (REPOSITORY / "docs" / "python.md").read_text(), re.MULTILINE)
    page = (site / "python.html").read_text()

    assert sorted(named) == sorted(converter.__all__)
    assert "Merge an adapter into a base and write the result, quantized" in page
    assert "What the adapter's change is multiplied by." in re.sub("&#39;|&rsquo;", "'", page)


def test_security_is_the_page_at_the_top_of_the_repository(site: Path) -> None:
    assert "What is trusted, and what is not" in (site / "security.html").read_text()


def test_nothing_is_fetched_from_other_servers_when_a_page_is_read(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert loaded == [], page.name


@pytest.mark.parametrize("link", ["gone.md", "formats.md#gone", "/gone.html"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(f"# Here\n\n[there]({link})\n")
    (docs / "formats.md").write_text("# Formats\n")
    validation = yaml.safe_load(CONFIG.read_text())["validation"]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({"site_name": "one", "validation": validation}))

    ran = build(tmp_path / "mkdocs.yml", tmp_path / "site")

    assert ran.returncode != 0
    assert link in ran.stderr
