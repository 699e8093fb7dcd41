"""The base that an adapter names, where it is gone: that it was the adapter who named it, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from converter.errors import ConversionRefused
from converter.plan.inputs import Inputs
from tests.merge.adapters import save


@pytest.mark.parametrize("name", ["/home/someone/models/Llama", "./models/llama", "models/llama", "..\\models\\llama"])
def test_a_base_that_is_gone_is_said_to_be_the_adapters(name: str, tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter", base_model_name_or_path=name)

    with pytest.raises(ConversionRefused) as caught:
        Inputs(None, adapter, offline=True)

    message = str(caught.value)
    assert message.startswith(f"{adapter}: adapter_config.json names {name!r} as the base, but ")
    assert message.endswith("; give `base`")


def test_an_adapter_that_names_no_base_asks_for_one(tmp_path: Path) -> None:
    adapter = save(tmp_path / "adapter")

    with pytest.raises(ConversionRefused) as caught:
        Inputs(None, adapter, offline=True)

    assert str(caught.value) == f"{adapter}: does not name its base; give `base`"
