"""Signatures and provenance: what was signed is what is there, and who checks it needs only the public key."""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import json_format
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement

from converter import convert, verify
from converter.errors import BadRecipe, Undecided, VerificationFailed
from converter.provenance import statement_of
from converter.signing import sign
from tests.cli.conftest import Run, run
from tests.folders import change_json, copy

__all__ = ["run"]


class Keys:
    """A pair, as openssl makes it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        new = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", self.private]
        subprocess.run(new, check=True, capture_output=True)
        subprocess.run(
            ["openssl", "ec", "-in", self.private, "-pubout", "-out", self.public], check=True, capture_output=True
        )


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"), "key")


@pytest.fixture(scope="module")
def made(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(*inputs, tmp_path_factory.mktemp("made") / "out").out


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return copy(made, tmp_path / "out")


def test_a_signed_output_verifies_with_the_public_key_and_is_not_changed(out: Path, keys: Keys, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    sign(out, keys.private, tmp_path / "out.sig")

    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert verify(out, signature=tmp_path / "out.sig", public_key=keys.public).is_good
    bundle = json.loads((tmp_path / "out.sig").read_text())
    signed = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    assert {one["name"] for one in signed["predicate"]["resources"]} == {*before} - {"README.md"}
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".unfinished"] == []


def test_the_library_s_own_program_takes_the_signature(out: Path, keys: Keys, tmp_path: Path) -> None:
    import model_signing

    sign(out, keys.private, tmp_path / "out.sig")

    checked = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    checked.verify(out, tmp_path / "out.sig")


def test_the_card_may_be_edited_after_it_was_signed(out: Path, keys: Keys, tmp_path: Path) -> None:
    sign(out, keys.private, tmp_path / "out.sig")
    (out / "README.md").write_text("mine")

    assert verify(out, signature=tmp_path / "out.sig", public_key=keys.public).is_good


def one_bit(out: Path) -> str:
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    return "model.safetensors"


def one_file_more(out: Path) -> str:
    (out / "modeling.py").write_text("")
    return "modeling.py"


def one_file_less(out: Path) -> str:
    (out / "generation_config.json").unlink()
    return "generation_config.json"


@pytest.mark.parametrize("spoil", [one_bit, one_file_more, one_file_less])
def test_a_change_after_it_was_signed_is_found(
    spoil: Callable[[Path], str], out: Path, keys: Keys, tmp_path: Path
) -> None:
    sign(out, keys.private, tmp_path / "out.sig")
    name = spoil(out)

    found = verify(out, signature=tmp_path / "out.sig", public_key=keys.public)

    (problem,) = (one for one in found.problems if one.startswith("out.sig: "))
    assert "not a signature of these files with this key" in problem
    assert name in problem


def test_a_signature_of_somebody_else_is_found(out: Path, keys: Keys, tmp_path: Path) -> None:
    sign(out, Keys(tmp_path, "other").private, tmp_path / "out.sig")

    found = verify(out, signature=tmp_path / "out.sig", public_key=keys.public)

    assert [problem.partition(": ")[0] for problem in found.problems] == ["out.sig"]


def test_what_is_not_as_its_receipt_says_is_not_signed(out: Path, keys: Keys, tmp_path: Path) -> None:
    one_bit(out)

    with pytest.raises(VerificationFailed, match=r"not signed: model\.safetensors: sha256"):
        sign(out, keys.private, tmp_path / "out.sig")

    assert not (tmp_path / "out.sig").exists()


def test_a_signature_inside_the_output_is_refused(out: Path, keys: Keys) -> None:
    with pytest.raises(BadRecipe, match="write the signature beside it"):
        sign(out, keys.private, out / "model.sig")


def test_what_is_no_key_is_refused_by_name(out: Path, keys: Keys, tmp_path: Path) -> None:
    with pytest.raises(BadRecipe, match=r"key.pub: no private key of an elliptic curve in PEM"):
        sign(out, keys.public, tmp_path / "out.sig")
    sign(out, keys.private, tmp_path / "out.sig")

    with pytest.raises(Undecided, match=r"key.pem: no public key of an elliptic curve in PEM"):
        verify(out, signature=tmp_path / "out.sig", public_key=keys.private)
    with pytest.raises(Undecided, match=r"none.pub: no such file"):
        verify(out, signature=tmp_path / "out.sig", public_key=tmp_path / "none.pub")
    with pytest.raises(BadRecipe, match="`signature` and `public_key` go together: give both"):
        verify(out, signature=tmp_path / "out.sig")


def test_the_statement_is_one_of_in_toto_and_has_every_file(out: Path) -> None:
    stated = statement_of(out, "https://example.com/workflow")

    message = statement_pb2.Statement()
    json_format.ParseDict(stated, message)
    Statement.copy_from_pb(message).validate()
    assert stated["predicateType"] == "https://slsa.dev/provenance/v1"
    assert {one["name"] for one in stated["subject"]} == {path.name for path in out.iterdir()} - {"README.md"}
    for one in stated["subject"]:
        ran = subprocess.run(["sha256sum", out / one["name"]], capture_output=True, text=True, check=True)
        assert one["digest"] == {"sha256": ran.stdout.split()[0]}
    details = stated["predicate"]["runDetails"]
    assert details["builder"]["id"] == "https://example.com/workflow"
    assert details["metadata"] == {"invocationId": json.loads((out / "conversion.json").read_text())["fingerprint"]}


def test_who_makes_it_again_gets_the_same_statement(inputs: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    assert statement_of(convert(*inputs, tmp_path / "again").out) == statement_of(out)


def test_base_and_adapter_are_named_by_commit_if_they_are_on_the_hub(out: Path) -> None:
    receipt = json.loads((out / "conversion.json").read_text())
    named = {"base_name": "org/base", "base_commit": "b" * 40, "adapter_name": "org/lora", "adapter_commit": "a" * 40}
    change_json(out / "conversion.json", origin=receipt["origin"] | named)

    definition = statement_of(out)["predicate"]["buildDefinition"]

    assert [one["uri"] for one in definition["resolvedDependencies"]] == [
        f"pkg:huggingface/org/base@{'b' * 40}",
        f"pkg:huggingface/org/lora@{'a' * 40}",
    ]
    assert definition["externalParameters"]["base"] == "org/base"


def test_a_statement_is_written_and_verified_by_commands(run: Run, out: Path, keys: Keys) -> None:
    statement, signature = out.with_name("out.provenance.json"), out.with_name("out.sig")
    assert run("provenance", out, "--builder", "https://example.com/workflow").code == 0
    assert run("sign", out, "--key", keys.private).code == 0

    checks = ["--provenance", statement, "--signature", signature, "--public-key", keys.public]
    assert run("verify", out, *checks).code == 0

    stated = json.loads(statement.read_text())
    stated["subject"][0]["digest"]["sha256"] = "0" * 64
    statement.write_text(json.dumps(stated))
    ran = run("verify", out, *checks)
    assert ran.code == 1
    name = stated["subject"][0]["name"]
    assert f"out.provenance.json: says otherwise than conversion.json in subject, of {name}" in ran.out


@pytest.mark.parametrize("raw", ["", "[]", "{}", '{"predicate": {"runDetails": 1}}'])
def test_what_is_no_statement_leaves_it_undecided(raw: str, out: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(raw)

    with pytest.raises(Undecided, match=r"p.json: no statement of provenance"):
        verify(out, provenance=tmp_path / "p.json")
