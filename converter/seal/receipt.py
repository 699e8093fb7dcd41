"""The receipt: what an output was made of, by contents, and what identifies it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converter.errors import ConverterError
from converter.read.folder import LocalFolder
from converter.read.hub.folder import is_repo_id
from converter.read.side_files import read_side_files
from converter.read.strict_json import parse_json_object, read_json
from converter.recipe import versions

if TYPE_CHECKING:
    from converter.plan.inputs import Inputs
    from converter.plan.plan import Plan, ShardPlan
    from converter.quantize.agreement import Agreement
    from converter.quantize.measure import Fidelity
    from converter.recipe import Recipe

RECEIPT = "conversion.json"
GATES = "gates.json"
"""In a staging folder: the gates that a finished output did not reach."""
CARD = "README.md"
"""The model card: the one file of an output that no receipt and no checksum covers, because people edit it."""
FORMAT = 2


@dataclass(frozen=True)
class Origin:
    """What went in, by contents: places and times are no part of it."""

    base_config: str
    """sha256 of config.json."""
    base: Mapping[str, str]
    """xxh3-128 of the bytes of the base that were read for each tensor; of a base on the Hub, its shards' digests."""
    adapter: str | None
    """sha256 of the adapter's config and tensors."""
    side_files: Mapping[str, str]
    """sha256 of what is copied."""
    device: str
    """The kind of device: cpu, cuda, …"""
    base_commit: str | None = None
    """Of a base on the Hub."""
    base_name: str | None = None
    """Its id on the Hub; of a folder, the id that the adapter has for it, if it is called so."""
    adapter_commit: str | None = None
    adapter_name: str | None = None
    """Its id on the Hub."""


def origin_of(plan: Plan, inputs: Inputs, device: str, digests: Mapping[str, str]) -> Origin:
    """What goes in. `digests` are the xxh3-128 of the base's tensors; for a base on the Hub, its files' are taken."""
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
        base_name=_id_of_base(inputs),
        adapter_commit=inputs.adapter_commit,
        adapter_name=inputs.adapter_id,
    )


def _id_of_base(inputs: Inputs) -> str | None:
    """The name of the base that was used, unless that is a path: a place is no content, and it is private."""
    name = inputs.base_name
    return name if name is not None and is_repo_id(name) else None


def fingerprint(plan: Plan, origin: Origin) -> str:
    """sha256 of contents, recipe, layout, device and versions: equal fingerprints, equal bytes."""
    return fingerprint_of(plan.digest, origin)


def fingerprint_of(plan: str, origin: Origin) -> str:
    """The same, from the digest of a plan."""
    whole = {"plan": plan, "origin": asdict(origin), "versions": versions(), "format": FORMAT}
    return _sha256_of(whole)


def identity(shard: ShardPlan, recipe: Recipe, base: Mapping[str, str], device: str) -> str:
    """sha256 of all that shapes the bytes of a shard that has nothing of an adapter: equal identities, equal files.

    `base` is what `Origin.base` is.
    """
    whole = shard.essence()
    del whole["file"]
    # Of a base on the Hub its files' digests are known, not those of its tensors.
    names = [tensor.name for tensor in shard.tensors]
    read = {name: base[name] for name in names} if all(name in base for name in names) else dict(base)
    of_others = ("keep", "max_shard_size", "scale", "combine")
    choices = {key: value for key, value in recipe.as_json().items() if key not in of_others}
    return _sha256_of({"shard": whole, "base": read, "recipe": choices, "device": device, **versions()})


def _sha256_of(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_receipt(
    plan: Plan,
    origin: Origin,
    files: Mapping[str, tuple[int, str]],
    fidelity: Mapping[str, Fidelity],
    links: Mapping[str, str],
    agreement: Agreement | None = None,
) -> bytes:
    """The receipt's bytes. `files`: name → (bytes, sha256) of every file but the receipt itself; `links`: shard → how
    it came from elsewhere: hard, reflink or copy; `agreement`: of the tiles that were made again on the CPU."""
    tensors: dict[str, dict[str, Any]] = {}
    for tensor in plan.tensors():
        entry: dict[str, Any] = {"action": tensor.action, "origin": tensor.origin}
        if tensor.change is not None:
            for kind, stated in tensor.change.as_json().items():
                entry[kind] = {key: value for key, value in stated.items() if key != "module"}
        if tensor.name in fidelity:
            entry["error"] = fidelity[tensor.name].error
            if tensor.is_merged:
                entry["survival"] = fidelity[tensor.name].survival
            if fidelity[tensor.name].output_error is not None:
                entry["output_error"] = fidelity[tensor.name].output_error
        tensors[tensor.name] = entry
    receipt = {
        "format": FORMAT,
        "fingerprint": fingerprint(plan, origin),
        "versions": versions(),
        "architecture": plan.class_name,
        "recipe": plan.recipe.as_json(),
        "plan": plan.digest,
        "content": plan.content,
        "of_the_base_alone": {
            shard.file: {"identity": identity(shard, plan.recipe, origin.base, origin.device)}
            | ({"link": links[shard.file]} if shard.file in links else {})
            for shard in plan.shards
            if shard.is_of_the_base_alone
        },
        "origin": asdict(origin),
        "files": {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())},
        "tensors": tensors,
    }
    if agreement is not None:
        receipt["made_again_on_the_cpu"] = asdict(agreement)
    whole = summary_of(plan, fidelity)
    whole["bytes"] = {"base": plan.base_bytes, "output": sum(files[shard.file][0] for shard in plan.shards)}
    # Sorted, so that equal contents have equal bytes; but what people look for first comes first.
    text = json.dumps(_without_infinity(receipt), sort_keys=True, allow_nan=False)
    head = {"summary": _without_infinity(whole)}
    return (json.dumps(head | json.loads(text), indent=2, allow_nan=False) + "\n").encode()


def summary_of(plan: Plan, fidelity: Mapping[str, Fidelity]) -> dict[str, Any]:
    """An output in a few figures: how many tensors of each kind; mean and worst relative error of those that are
    quantized, and survival of those that the adapter changes."""
    from converter.quantize.measure import calibrated_in, figures_of

    counts = plan.counts()
    quantized = {tensor.name for tensor in plan.tensors() if tensor.action == "quantize"}
    errors = {name: of.error for name, of in fidelity.items() if name in quantized}
    survivals = {name: of.survival for name, of in fidelity.items() if of.survival is not None}
    of_outputs = calibrated_in(fidelity)
    kinds = {"merged": "merged", "quantized": "quantize", "kept": "keep", "replaced": "replaced"}
    kinds |= {"copied": "copy"} if "copy" in counts else {}
    return {
        "tensors": {said: counts.get(key, 0) for said, key in kinds.items()},
        "relative_error": figures_of(errors, max),
        "survival": figures_of(survivals, min),
    } | ({"output_error": figures_of(of_outputs, max)} if of_outputs else {})


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _without_infinity(value: Any) -> Any:
    """With texts for what JSON has not, but for Python."""
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    return "Infinity" if isinstance(value, float) and not math.isfinite(value) else value


def fidelity_of(receipt: Mapping[str, Any]) -> dict[str, Fidelity]:
    """The figures of the tensors that have some. `ValueError` where they can't be understood: somebody edited them."""
    from converter.quantize.measure import Fidelity

    try:
        return {
            name: Fidelity(float(tensor["error"]), *(_float(tensor.get(key)) for key in ("survival", "output_error")))
            for name, tensor in sorted(receipt["tensors"].items())
            if "error" in tensor
        }
    except (KeyError, TypeError, AttributeError, OverflowError) as exc:
        raise ValueError(f"{RECEIPT}: its figures can't be understood") from exc


def read_receipt(folder: Path) -> dict[str, Any] | None:
    """The receipt of a finished conversion; None where there is none, or none that can be understood."""
    local = LocalFolder(folder)
    try:
        return _understood(read_json(local, RECEIPT))
    except ConverterError:
        return None
    finally:
        local.close()


def parse_receipt(raw: bytes) -> dict[str, Any] | None:
    """The receipt whose bytes these are; None if they can't be understood."""
    try:
        return _understood(parse_json_object(raw, RECEIPT))
    except ConverterError:
        return None


def _understood(receipt: dict[str, Any]) -> dict[str, Any] | None:
    files = receipt.get("files")
    if not isinstance(files, dict) or not all(isinstance(file, dict) for file in files.values()):
        return None
    files.pop(CARD, None)  # receipts of earlier versions cover it
    understood = receipt.get("format") == FORMAT and isinstance(receipt.get("fingerprint"), str)
    return receipt if understood else None
