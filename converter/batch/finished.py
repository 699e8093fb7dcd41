"""What the receipt of a finished output says of it, for the outcome of its job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converter.quantize.measure import Fidelity

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
                name: _fidelity(tensor)
                for name, tensor in sorted(receipt["tensors"].items())
                if "survival" in tensor or tensor["origin"] == "adapter"
            },
        }
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
        return {}


def _fidelity(tensor: Mapping[str, Any]) -> Fidelity:
    survival = tensor.get("survival")
    return Fidelity(float(tensor["error"]), None if survival is None else float(survival))
