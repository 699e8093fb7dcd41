"""Sign an output with a key, as OpenSSF model signing does, and check such a signature. The only import of
model_signing.

The signature is over the sha256 of every file but the model card, which people edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converter.errors import BadRecipe, ConversionRefused, Undecided, VerificationFailed
from converter.read.folder import LocalFolder
from converter.seal.receipt import CARD
from converter.verification import Checks, verify_output
from converter.write.durable import LOCAL_DISK

EXTRA = "pip install 'nf4-converter[signing]'"


def sign(out: Path, key: Path, file: Path) -> None:
    """Write the signature of an output into a file, outside of the output. `key` is a private key of an elliptic curve,
    in PEM, without a password.

    `VerificationFailed` if the output isn't what its receipt says: that is not signed.
    """
    folder = LocalFolder(out.expanduser()).path
    if file.expanduser().resolve().is_relative_to(folder.resolve()):
        raise BadRecipe(f"{file}: lies in the output, whose receipt lists every file; write the signature beside it")
    library = _library()
    found = verify_output(folder, Checks(require_receipt=True))
    if found.problems:
        raise VerificationFailed(f"{out}: not signed: {found.problems[0]} ({len(found.problems)} problems in all)")
    temporary = file.with_name(f"{file.name}.unfinished")
    with _refused(f"{key}: no private key of an elliptic curve in PEM, without a password"):
        signing = library.signing.Config().use_elliptic_key_signer(private_key=key.expanduser())
    with _refused(f"{out}: can't be signed"):
        signing.set_hashing_config(_hashing(library, folder)).sign(folder, temporary)
    raw = temporary.read_bytes()
    temporary.unlink()
    LOCAL_DISK.put(file, raw)


def signature_problems(out: Path, signature: Path, public_key: Path) -> list[str]:
    """What is wrong with the signature of an output; empty: it was made with that key, for these files.

    `Undecided` if signature or key can't be read.
    """
    library = _library()
    for path in (signature, public_key):
        if not path.is_file():
            raise Undecided(f"{path}: no such file")
    try:
        verifying = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as exc:  # the library raises what its own libraries raise
        raise Undecided(f"{public_key}: no public key of an elliptic curve in PEM: {exc}") from exc
    try:
        # Not as the signature says: it could leave files out.
        verifying.set_hashing_config(_hashing(library, out)).verify(out, signature)
    except Exception as exc:  # the library raises what its own libraries raise
        said = " ".join(str(exc).split()) or type(exc).__name__
        return [f"{signature.name}: not a signature of these files with this key: {said[:300]}"]
    return []


def _hashing(library: Any, out: Path) -> Any:
    return library.hashing.Config().set_ignored_paths(paths=[out / CARD], ignore_git_paths=True)


def _library() -> Any:
    try:
        import model_signing
    except ImportError as exc:
        raise ConversionRefused(f"signatures need one more package: {EXTRA}") from exc
    return model_signing


@contextmanager
def _refused(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:  # the library raises what its own libraries raise
        raise BadRecipe(f"{what}: {' '.join(str(exc).split())[:200]}") from exc
