"""Where an output comes from, as an in-toto statement with a SLSA provenance, from its receipt.

https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1. It has no times: who makes the output again gets the
same statement.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from converter.errors import BadCheckpoint, ConversionRefused, ConverterError, Undecided
from converter.read.checksums import SUMS
from converter.read.folder import LocalFolder
from converter.read.strict_json import read_json
from converter.seal.receipt import RECEIPT, read_receipt
from converter.write.sha256 import sha256_of

STATEMENT, PROVENANCE = "https://in-toto.io/Statement/v1", "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:nf4-converter:conversion:v1"
BUILDER = "urn:nf4-converter:unnamed-builder"


def statement_of(out: Path, builder: str = BUILDER) -> dict[str, Any]:
    """The statement. `builder` is the URI of who runs conversions, such as that of a workflow.

    Its subjects are the files that the receipt lists, the receipt and SHA256SUMS. `ConversionRefused` if there is no
    receipt.
    """
    folder = LocalFolder(out.expanduser()).path
    receipt = read_receipt(folder)
    if receipt is None:
        raise ConversionRefused(f"{out}: no {RECEIPT} of this tool, so nothing is known of it; convert it anew")
    try:
        digests = {name: file["sha256"] for name, file in receipt["files"].items()}
        digests |= {name: sha256_of(folder / name) for name in (RECEIPT, SUMS)}
        origin, recipe, versions = receipt["origin"], receipt["recipe"], receipt["versions"]
        named = {what: origin[f"{what}_name"] for what in ("base", "adapter") if origin[f"{what}_name"] is not None}
        return {
            "_type": STATEMENT,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(digests.items())],
            "predicateType": PROVENANCE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {"recipe": recipe, **named},
                    "internalParameters": {"device": origin["device"], "versions": versions},
                    "resolvedDependencies": _dependencies(origin),
                },
                "runDetails": {
                    "builder": {"id": builder, "version": {"nf4-converter": versions["nf4-converter"]}},
                    "metadata": {"invocationId": receipt["fingerprint"]},
                },
            },
        }
    except OSError as exc:
        raise BadCheckpoint(f"{exc.filename}: {exc.strerror}") from exc
    except (KeyError, TypeError, AttributeError) as exc:
        raise BadCheckpoint(f"{out}: {RECEIPT}: can't be understood: {type(exc).__name__}: {exc}") from exc


def text_of(statement: dict[str, Any]) -> str:
    return json.dumps(statement, indent=2, sort_keys=True) + "\n"


def provenance_problems(out: Path, file: Path) -> list[str]:
    """What a statement says otherwise than the output's receipt; the receipt is held against the files elsewhere.
    `Undecided` if the statement can't be read."""
    try:
        stated = read_json(LocalFolder(file.parent), file.name)
        builder = stated["predicate"]["runDetails"]["builder"]["id"]
    except (ConverterError, KeyError, TypeError) as exc:
        raise Undecided(f"{file}: no statement of provenance: {exc}") from exc
    expected = statement_of(out, str(builder))
    if stated == expected:
        return []
    wrong = [key for key in ("subject", "predicate") if stated.get(key) != expected[key]] or ["its type"]
    said = {one.get("name"): one.get("digest") for one in _objects(stated.get("subject"))}
    files = [one["name"] for one in expected["subject"] if said.get(one["name"]) != one["digest"]]
    more = f", of {', '.join(files[:3])}" if files else ""
    return [f"{file.name}: says otherwise than {RECEIPT} in {' and '.join(wrong)}{more}"]


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _dependencies(origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Base and adapter: on the Hub by name and commit; and what of their contents went in, by the receipt's digests."""
    contents = {"base": hashlib.sha256(json.dumps(origin["base"], sort_keys=True).encode()).hexdigest()}
    if origin["adapter"] is not None:
        contents["adapter"] = origin["adapter"]
    found = []
    for what, digest in contents.items():
        name, commit = origin[f"{what}_name"], origin[f"{what}_commit"]
        one: dict[str, Any] = {"name": what, "digest": {"contents": digest}}
        if commit is not None:
            one["digest"]["gitCommit"] = commit
            one["uri"] = f"pkg:huggingface/{name}@{commit}"
        found.append(one)
    return found
