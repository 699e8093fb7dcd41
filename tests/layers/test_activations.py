from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from converter.errors import WriteFailed
from converter.layers.activations import Activations
from tests.limits import files_of_at_most


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    budget=st.integers(0, 800),
    rounds=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_what_is_kept_comes_back_whatever_the_budget(
    sizes: list[int], budget: int, rounds: int, dtype: torch.dtype
) -> None:
    with Activations(budget) as kept:
        for turn in range(rounds):
            values = [torch.full((2, size), turn + number, dtype=dtype) for number, size in enumerate(sizes)]
            for number, value in enumerate(values):
                kept.put(number, value)
            assert all(torch.equal(kept.get(number), value) for number, value in enumerate(values))
        total = sum(value.nbytes for value in values)

        assert total - budget <= kept.file_bytes <= total
        assert budget < total or kept.file_bytes == 0


def test_the_file_has_no_name(tmp_path: Path) -> None:
    with Activations(0, tmp_path) as kept:
        kept.put(0, torch.ones(5))

        assert kept.file_bytes == 20
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    with Activations(0, tmp_path) as kept, files_of_at_most(1000), pytest.raises(WriteFailed, match="activations"):
        kept.put(0, torch.ones(5000))
