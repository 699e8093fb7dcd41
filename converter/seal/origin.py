"""What goes into an output, by contents; and whether OUT was made of just that already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from converter.read.digests import digests_of
from converter.read.hub.folder import is_repo_id
from converter.read.side_files import read_side_files
from converter.seal.receipt import Origin, fingerprint_of

if TYPE_CHECKING:
    from converter.plan.inputs import Inputs
    from converter.plan.plan import Plan
    from converter.seal.destination import Destination


def origin_of(plan: Plan, inputs: Inputs, device: str, digests: Mapping[str, str]) -> Origin:
    """What goes in. `digests` are the xxh3-128 of what is read of the base; the Hub has its files' own."""
    read = {tensor.name for tensor in plan.tensors() if tensor.origin == "base"}
    config = json.dumps(inputs.base.config, sort_keys=True).encode()
    return Origin(
        base_config=hashlib.sha256(config).hexdigest(),
        base=inputs.hub_digests() or {name: digests[name] for name in sorted(read)},
        adapter=plan.adapter_digest,
        side_files={
            name: hashlib.sha256(raw).hexdigest()
            for name, raw in read_side_files(plan.side_files, inputs.folder_of).items()
        },
        device=device,
        base_commit=inputs.base_commit,
        base_name=inputs.base_id or _id_of_base(inputs),
        adapter_commit=inputs.adapter_commit,
        adapter_name=inputs.adapter_id,
    )


def _id_of_base(inputs: Inputs) -> str | None:
    """What the adapter calls its base, unless that is a path: a place is no content, and nobody else's business."""
    name = inputs.adapter.base_name if inputs.adapter else None
    return name if name is not None and is_repo_id(name) else None


def already_made(
    destination: Destination, plan: Plan, inputs: Inputs, device: str, *, any_layout: bool = False
) -> str | None:
    """The fingerprint of OUT, if OUT is a finished conversion of these inputs by this plan; else None.

    Where everything else agrees and nothing is remembered of the base, the base is read to be sure. `any_layout`: its
    tensors may lie in other shards than planned.
    """
    receipt = destination.receipt
    if receipt is None or receipt.get("content") != plan.content:
        return None
    if receipt.get("plan") != plan.digest and not any_layout:
        return None
    digests = dict.fromkeys((tensor.name for tensor in plan.tensors()), "")
    sketch = asdict(origin_of(plan, inputs, device, digests))
    made_of = receipt.get("origin")
    if not isinstance(made_of, dict) or any(made_of.get(k) != v for k, v in sketch.items() if k != "base"):
        return None
    if not inputs.hub_digests():
        digests = digests_of(inputs.base, (tensor.source for tensor in plan.tensors() if tensor.origin == "base"))
    known = fingerprint_of(str(receipt.get("plan")), origin_of(plan, inputs, device, digests))
    return known if destination.holds(known) else None
