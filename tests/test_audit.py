"""`make audit` passes nothing that the service didn't answer for: by pip-audit itself, and a service on 127.0.0.1."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from tests.conftest import REPOSITORY

LOCKED = {
    (canonicalize_name(name), version)
    for name, _, version in (line.partition("==") for line in (REPOSITORY / "constraints.txt").read_text().split())
}
CONTROL = ("jinja2", "2.10")


class Advisories:
    """A service that speaks OSV's protocol and knows what a test tells it."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.broken: set[str] = set()
        self.asked: set[tuple[str, str]] = set()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                package = (query["package"]["name"], query["version"])
                service.asked.add(package)
                body = json.dumps({"vulns": [service.known[package]]} if package in service.known else {}).encode()
                self.send_response(500 if package[0] in service.broken else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()

    def tell(self, package: tuple[str, str], identifier: str, alias: str, fixed: str) -> None:
        events = [{"introduced": "0"}, {"fixed": fixed}]
        affected = {
            "package": {"name": package[0], "ecosystem": "PyPI"},
            "ranges": [{"type": "ECOSYSTEM", "events": events}],
        }
        self.known[package] = {"id": identifier, "aliases": [alias], "summary": "…", "affected": [affected]}

    def audit(self) -> subprocess.CompletedProcess[str]:
        url = f"http://127.0.0.1:{self.server.server_port}/v1/query"
        command = [sys.executable, "tools/audit.py", "--vulnerability-service", "osv", "--osv-url", url]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture
def advisories() -> Iterator[Advisories]:
    service = Advisories()
    service.tell(CONTROL, "PYSEC-2019-217", "CVE-2019-10906", "2.10.1")
    yield service
    service.server.shutdown()
    service.server.server_close()


def test_packages_of_which_no_vulnerability_is_known_pass_and_each_was_asked_for(advisories: Advisories) -> None:
    ran = advisories.audit()

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"audit: {len(LOCKED)} packages, no known vulnerability\n"
    assert advisories.asked == LOCKED | {CONTROL}


def test_a_known_vulnerability_of_any_locked_package_is_told_with_its_names_and_what_fixes_it(
    advisories: Advisories,
) -> None:
    package = next(entry for entry in LOCKED if entry[0] == "urllib3")
    advisories.tell(package, "PYSEC-2099-1", "CVE-2099-1", "99.0")

    ran = advisories.audit()

    assert ran.returncode == 1
    assert f"urllib3 {package[1]}: PYSEC-2099-1 CVE-2099-1, fixed in 99.0\n" in ran.stderr
    assert ran.stdout == ""


def test_a_service_without_advisories_is_no_proof(advisories: Advisories) -> None:
    advisories.known.clear()

    ran = advisories.audit()

    assert ran.returncode == 1
    assert "the service does not know CVE-2019-10906 of jinja2 2.10: it has no advisories" in ran.stderr


@pytest.mark.parametrize("package", ["jinja2", "urllib3"])
def test_a_package_that_the_service_can_not_answer_for_is_not_passed(advisories: Advisories, package: str) -> None:
    advisories.broken.add(package)

    ran = advisories.audit()

    assert ran.returncode == 1
    assert "the service did not answer" in ran.stderr


def test_a_service_that_is_not_there_is_told_in_one_line(advisories: Advisories) -> None:
    advisories.server.shutdown()
    advisories.server.server_close()

    ran = advisories.audit()

    assert ran.returncode == 1
    assert ran.stderr.startswith("audit: the service did not answer: ")
    assert ran.stderr.count("\n") == 1
