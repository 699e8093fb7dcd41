"""What the bundled model becomes. After an intended change: `make golden`, and read the diff."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures import make_golden


@pytest.mark.parametrize("name", ["quantized", "merged"])
def test_the_bundled_model_becomes_what_it_became_before(name: str) -> None:
    expected = json.loads((Path(make_golden.GOLDEN) / f"{name}.json").read_text())

    found = json.loads(json.dumps(getattr(make_golden, name)()))

    assert expected == found
