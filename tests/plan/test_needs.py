"""When files of the base are needed, and how many bytes of them lie on a disk at one time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from converter.plan.needs import Need, most_at_once, needs_of

MANY = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 100)), min_size=1, max_size=12)


def scene(drawn: list[tuple[int, int, int]]) -> tuple[list[Need], dict[str, int]]:
    """Needs in the order of their first tensors, and the sizes of the files."""
    spans = sorted((min(one, two), max(one, two), size) for one, two, size in drawn)
    needs = [Need(f"file {number}", first, last) for number, (first, last, _) in enumerate(spans)]
    return needs, {need.file: size for need, (_, _, size) in zip(needs, spans, strict=True)}


def peak(needs: list[Need], sizes: dict[str, int], room: int) -> int | None:
    """The most bytes on a disk onto which files come in their order as long as there is room, and from which they go
    after their last tensor; None if a tensor waits for ever."""
    coming, here, most = list(needs), list[Need](), 0
    for tensor in range(max(need.last for need in needs) + 1):
        while coming and sum(sizes[need.file] for need in [*here, coming[0]]) <= room:
            here.append(coming.pop(0))
            most = max(most, sum(sizes[need.file] for need in here))
        if coming and coming[0].first <= tensor:
            return None
        here = [need for need in here if need.last != tensor]
    return most


@given(MANY, st.integers(0, 3))
def test_with_as_much_room_no_tensor_waits_for_ever(drawn: list[tuple[int, int, int]], ahead: int) -> None:
    needs, sizes = scene(drawn)
    room = most_at_once(needs, sizes.__getitem__, ahead)

    found = peak(needs, sizes, room)

    assert found is not None
    assert found <= room <= sum(sizes.values())


@given(MANY)
def test_with_less_room_than_files_in_use_take_one_does(drawn: list[tuple[int, int, int]]) -> None:
    needs, sizes = scene(drawn)
    assert peak(needs, sizes, most_at_once(needs, sizes.__getitem__, 0) - 1) is None


def test_no_files_take_no_room() -> None:
    assert most_at_once([], len, 2) == 0
    assert needs_of([]) == []
