"""Results go to stdout and errors to stderr; nobody may be there to read them."""

from __future__ import annotations

import json
import re
import sys
from contextlib import suppress

_PARAMETERS = (
    "base adapter out device check_tiles overwrite offline trust_remote_code memory threads keep dtype quant_type "
    "block_size double_quant group_size merge_precision max_shard_size allow_pickle scale rounding merge_onto "
    "target card link against strict resume resume=False min_survival max_error format part address combine weight "
    "work disk create_pr density majority_sign svd_rank seed window max_tokens scale_search "
    "metrics field calibrate calibrate_field calibrate_tokens calibrate_window calibrate_seed damping "
    "max_perplexity_ratio max_kl min_top1 model image converter_image gpus "
    "signature public_key provenance prompt_tokens new_tokens rounds requests vllm vllm_arguments scratch"
)
_PARAMETER = re.compile(rf"`({'|'.join(re.escape(name) for name in _PARAMETERS.split())})`")
_OTHER_NAMES = {"quant_type": "--format", "resume=False": "--no-resume", "part": "--slice", "address": "--ray"}


def as_options(message: str) -> str:
    """A message of the library, with parameters as the command line has them: `overwrite` → --overwrite."""
    return _PARAMETER.sub(lambda found: _OTHER_NAMES.get(found[1], f"--{found[1].replace('_', '-')}"), message)


def print_text(text: str) -> None:
    """Print what was asked for. `WriteFailed` if that is impossible."""
    from converter.errors import WriteFailed

    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # click ends with 1, quietly: the reader has seen enough
    except OSError as exc:
        raise WriteFailed(f"standard output: {exc.strerror or exc}") from exc


def complain(message: str) -> None:
    """Print an error for people. If stderr is closed or full, go on: that must not stop the work."""
    message = as_options(message)
    with suppress(OSError):
        sys.stderr.write(f"error: {message}\n")
        sys.stderr.flush()


def note(message: str) -> None:
    """Say on stderr what a user should know, though nothing is wrong."""
    with suppress(OSError):
        sys.stderr.write(f"note: {as_options(message)}\n")
        sys.stderr.flush()


def report_error(message: str, code: int, *, as_json: bool) -> int:
    """Print an error for people and, with `as_json`, for programs; its exit code."""
    message = as_options(message)
    complain(message)
    if as_json:
        with suppress(OSError):  # the exit code says it too
            sys.stdout.write(json.dumps({"error": message, "exit_code": code}) + "\n")
            sys.stdout.flush()
    return code
