"""`make serve-check`: real servers load each format, and say what transformers says of the same folder.

The real model of `make real` is converted with its adapter to each format. vLLM on the CPU and `transformers serve`
serve it; the openai client asks for an answer, and vLLM for the log-probabilities of prompts. They are held against
those of transformers on the same folder. Prints a table, writes `result.json` to the work folder, which keeps the rows
of formats that were not asked for, and exits with 1 where a server fails that should serve, or differs by more than the
format's bound.

    python tools/serve_check.py build/serve [--only nf4 fp8]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from servers import NotServed, running, surroundings

from converter import Recipe, convert

TOOLS = Path(__file__).resolve().parent
REAL = TOOLS.parent / "fixtures" / "real"
sys.path.append(str(REAL))
from corpus import manual_text  # noqa: E402
from make_base import make_base  # noqa: E402

QUESTION = "What does the with statement do in Python?"
NEW_TOKENS, PROMPTS, PROMPT_TOKENS = 12, 1, 509


class Checked(NamedTuple):
    """How a format is made, and what is expected of its servers."""

    recipe: Recipe
    bound: float
    """How far vLLM's log-probabilities may be from transformers', in the mean of |Δ|."""
    vllm: bool = True
    """Whether vLLM has a kernel for it on a CPU."""
    tokens: int = PROMPT_TOKENS
    """How much of the prompt vLLM is asked about."""


FEW = 64
"""torch multiplies FP8 on a CPU by a plain loop, 34 million products a second: a whole prompt takes half an hour."""
NEAR, ACTIVATIONS = 0.1, 0.3
"""Bounds: of formats whose activations stay in 16 bits, and of those that quantize them while they run."""
FORMATS = {
    "bf16": Checked(Recipe("none"), NEAR),
    "nf4": Checked(Recipe("nf4"), NEAR),
    "fp4": Checked(Recipe("fp4"), NEAR),
    "int8": Checked(Recipe("int8"), ACTIVATIONS),
    "w4a16, groups of 32": Checked(Recipe("w4a16", group_size=32), NEAR),
    "w4a16, groups of 64": Checked(Recipe("w4a16", group_size=64), NEAR),
    "w8a16, groups of 64": Checked(Recipe("w8a16", group_size=64), NEAR, vllm=False),
    "fp8": Checked(Recipe("fp8"), ACTIVATIONS, tokens=FEW),
    "nvfp4a16": Checked(Recipe("nvfp4a16"), NEAR, vllm=False),
    "mxfp4a16": Checked(Recipe("mxfp4a16"), NEAR, vllm=False),
}


@dataclass
class Row:
    """What was found of a format."""

    name: str
    vllm: float | str | None
    """The mean of |Δ log-probability|; or why it doesn't serve it; None: not tried."""
    tokens: int
    """Over how many tokens."""
    transformers_serve: bool | str
    """Whether its answer is transformers' own; or why it doesn't serve it."""
    from_base: float
    """How far transformers on this folder is from the base without the adapter: what a wrong model would show."""
    answer: str
    problem: str | None


def asked(program: str, python: Path, arguments: Sequence[str], questions: Any, environment: Path) -> Any:
    """What `asked.py` or `expected.py` finds: model → its answers, or why there are none. `NotServed` if it fails."""
    ran = subprocess.run(
        [str(python), str(TOOLS / program), *arguments],
        input=json.dumps(questions),
        env=surroundings(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise NotServed(ran.stderr.strip().splitlines()[-1][:300])
    return json.loads(ran.stdout)


def served(server: str, work: Path, questions: Any) -> Any:
    """What a server on the CPU says of the models; vLLM serves a single one."""
    environment, models = work / server, questions["models"]
    try:
        with running(server, environment, models if server == "vllm" else [], work / f"{server}.log") as address:
            return asked("asked.py", environment / "bin" / "python", [address], questions, environment)
    except NotServed as exc:
        return dict.fromkeys(models, str(exc))


def distance(one: list[list[float]], other: list[list[float]]) -> float:
    """The mean of |Δ log-probability| over all tokens of all prompts."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a, b, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)


def prompts(base: Path) -> list[list[int]]:
    """Pieces of text that the adapter was not trained on, as tokens."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(base)(manual_text(held_out=True), verbose=False)["input_ids"]
    return [tokens[n * PROMPT_TOKENS : (n + 1) * PROMPT_TOKENS] for n in range(PROMPTS)]


def row_of(name: str, expected: Any, of_base: Any, by_transformers: Any, by_vllm: Any) -> Row:
    """What servers' answers are worth: each is a reason, as text, or scores and an answer; None: not asked."""
    checked, vllm, problem = FORMATS[name], by_vllm, None
    if isinstance(by_vllm, dict):
        vllm = distance(by_vllm["scores"], [scores[: checked.tokens - 1] for scores in expected["scores"]])
        if not vllm <= checked.bound:
            problem = f"vLLM's log-probabilities differ by {vllm:.3f}, more than {checked.bound}"
    elif by_vllm is not None:
        problem = f"vLLM: {by_vllm}"
    same: bool | str = by_transformers
    if isinstance(by_transformers, dict):
        same = by_transformers["answer"] == expected["answer"]
    else:
        problem = f"transformers serve: {by_transformers}"
    from_base = distance(expected["scores"], of_base["scores"])
    return Row(name, vllm, PROMPTS * (checked.tokens - 1), same, from_base, expected["answer"], problem)


def shown(row: Row) -> str:
    vllm = "not tried" if row.vllm is None else row.vllm if isinstance(row.vllm, str) else f"{row.vllm:.3f}"
    answer = {True: "the same answer", False: "another answer"}.get(row.transformers_serve, row.transformers_serve)  # type: ignore[arg-type]
    return f"| {row.name} | {vllm} | {answer} | {row.from_base:.3f} |"


def record(file: Path, row: Row) -> None:
    """Write a row in the place of an earlier one of the same format; others stay."""
    found = json.loads(file.read_text())["rows"] if file.exists() else []
    by_name = {one["name"]: one for one in found} | {row.name: vars(row)}
    rows = [by_name[name] for name in FORMATS if name in by_name]
    result = {"tokens": PROMPTS * (PROMPT_TOKENS - 1), "rows": rows}
    file.write_text(json.dumps(result, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="the work folder, which has the environments")
    parser.add_argument("--only", nargs="*", default=list(FORMATS), help="some of the formats, by name")
    args = parser.parse_args()
    work = args.work.resolve()
    base = make_base(TOOLS.parent / "build" / "real")
    outs = {}
    for name in args.only:
        outs[name] = str(work / name.replace(", groups of ", "-"))
        convert(base, REAL / "smollm2-adapter", outs[name], FORMATS[name].recipe, overwrite=True)
    asked_of = prompts(base)
    questions = {"prompts": asked_of, "question": QUESTION, "new_tokens": NEW_TOKENS}
    everything = {**questions, "models": [str(base), *outs.values()]}
    expected = asked("expected.py", Path(sys.executable), [], everything, work)
    by_transformers = served("transformers", work, {**questions, "prompts": [], "models": list(outs.values())})

    print("| format | vLLM: mean of abs. Δ | transformers serve | from the base |\n| --- | --- | --- | --- |")
    rows = []
    for name, out in outs.items():
        of_vllm = {**questions, "prompts": [one[: FORMATS[name].tokens] for one in asked_of], "models": [out]}
        if FORMATS[name].tokens == FEW:
            of_vllm["new_tokens"] = 1  # each is padded to 17 rows
        by_vllm = served("vllm", work, of_vllm)[out] if FORMATS[name].vllm else None
        rows.append(row_of(name, expected[out], expected[str(base)], by_transformers[out], by_vllm))
        print(shown(rows[-1]), flush=True)
        record(work / "result.json", rows[-1])
    for row in rows:
        if row.problem is not None:
            print(f"serve-check: {row.name}: {row.problem}", file=sys.stderr)
    return int(any(row.problem is not None for row in rows))


if __name__ == "__main__":
    sys.exit(main())
