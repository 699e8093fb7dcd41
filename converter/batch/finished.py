"""What the receipt of a finished output says of it, for the outcome of its job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.seal.receipt import fidelity_of

_CHEAPEST_FIRST = ("hard", "reflink", "copy")


def figures_of(receipt: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes in bytes, kind of link and figures of an output: the same in each run that finds it made.

    A receipt whose figures can't be understood, as somebody has edited it, has none.
    """
    try:
        sizes = {name: int(file["bytes"]) for name, file in receipt["files"].items()}
        links = {name: str(shard["link"]) for name, shard in receipt["of_the_base_alone"].items() if "link" in shard}
        return {
            "output_bytes": sum(size for name, size in sizes.items() if name.endswith(".safetensors")),
            "shared_bytes": sum(sizes[name] for name in links),
            "link": max(links.values(), key=_CHEAPEST_FIRST.index, default=""),
            "fidelity": {
                name: fidelity
                for name, fidelity in fidelity_of(receipt).items()
                if "survival" in (tensor := receipt["tensors"][name]) or tensor["origin"] == "adapter"
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}
