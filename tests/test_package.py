"""What is shipped: a wheel that has every room."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

from tests.conftest import REPOSITORY


def test_a_wheel_has_every_module_and_can_be_imported_from_elsewhere(tmp_path: Path) -> None:
    copy = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if name.startswith("converter/") or "/" not in name:
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if (REPOSITORY / name).exists():
                target.write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", "."]
    subprocess.run([*build, str(copy)], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")

    modules = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "converter").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        pages = {f"converter/templates/{name}.html" for name in ("layout", "page", "head", "style", "batch")}
        assert modules | pages | {"converter/py.typed"} <= set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    (stated,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    metadata = message_from_string(stated.read_text())
    assert {"peft", "ray"} <= {*metadata.get_all("Provides-Extra", [])}
    assert "Programming Language :: Python :: 3.11" in metadata.get_all("Classifier", [])
    assert metadata.get_payload() == (REPOSITORY / "README.md").read_text()
    program = "import converter, converter.cli.main, sys; print(converter.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "installed"), "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(ran.stdout.strip()).is_relative_to(tmp_path / "installed")
