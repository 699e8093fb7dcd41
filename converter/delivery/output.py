"""One output on its way: what it will be, whether that is done already, and each of its steps."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from converter.batch.job_file import Asked
from converter.compare import Sources
from converter.delivery.announce import announce
from converter.delivery.state import STEPS, Name, State, key_of
from converter.errors import BadCheckpoint, BadRecipe, ConverterError, GateFailed, VerificationFailed
from converter.evaluation import evaluate_output
from converter.gates import Gates
from converter.job import Job, RunOptions
from converter.observer import Observer
from converter.plan.decide import make_plan
from converter.plan.inputs import Inputs
from converter.seal.destination import Place, already_made, sizes_in
from converter.seal.link import identity_of
from converter.seal.published import Published, place_of
from converter.seal.receipt import fidelity_of, read_receipt
from converter.telling import telling
from converter.tensors import torch_device
from converter.verification import Checks, verify_output
from converter.write.durable import writing
from converter.write.journal import job_of
from converter.write.sha256 import sha256_of

Figures = dict[str, Any]
_FILES = "identity_of_files"
"""In the figures of `verify`."""


class Output:
    """One output of a file of jobs. It is made in a folder of `work`, and published from there."""

    def __init__(self, asked: Asked, work: Path, options: RunOptions, observer: Observer) -> None:
        self.job, self._afterwards = asked.job, asked.afterwards
        self.noted_as = self.job.store or os.path.relpath(self.job.out, self._afterwards.folder)
        """In the state file, wherever the file of jobs lies and from wherever it is named."""
        if self.job.store is None:  # whoever hears of it may be in another folder
            self.job = replace(self.job, out=self.job.out.absolute())
        self._options, self._observer = options, observer
        self.label = self.job.label
        name = re.sub(r"[^\w.-]+", "-", self.label.rstrip("/").rpartition("/")[2])[-60:]
        self.folder = work / "outputs" / f"{name}-{hashlib.sha256(self.noted_as.encode()).hexdigest()[:12]}"
        self._identity = ""
        """sha256 of what it is made of: contents, recipe, device, versions."""
        self._text: str | None = None
        """sha256 of the text on which it is measured."""
        self.is_there = False
        """Whether OUT is a conversion of just this, whoever put it there."""
        self.error: ConverterError | None = None
        """Why it stopped."""
        self.did: dict[Name, str] = {}
        """Step → began, done, skipped or failed, in this run."""

    @property
    def had_nothing_to_do(self) -> bool:
        """Whether earlier runs had published and announced it."""
        return self.error is None and self.did == {"announce": "skipped"}

    def look(self) -> Place:
        """Find out what it will be, and where OUT is. Whatever can be refused before a byte is written is refused."""
        job, options = self.job, self._options
        if (measuring := self._afterwards.measuring) is not None:
            try:
                self._text = sha256_of(measuring.text.path)
            except OSError as exc:
                raise BadRecipe(f"evaluate: text {measuring.text.path}: {exc.strerror}") from exc
        with Inputs.of(job, options) as inputs:
            if inputs.adapter is None:
                job.gates.refuse_without_adapter()
            plan = make_plan(inputs.base, inputs.adapter, job.recipe, **options.of_plan())
            identity = job_of(plan, inputs)
            del identity["layout"]  # a batch has another one when other jobs are in it
            self._identity = key_of(identity)
            place = place_of(job, options, inputs.folders, self._observer.stop, telling(job))
            device = torch_device(plan.device).type
            self.is_there = already_made(place, plan, inputs, device, any_layout=True) is not None
            return place

    def local_job(self) -> Job:
        """What makes it in its own folder. The gates are held later, as a step of their own."""
        return replace(self.job, out=self.folder, store=None, gates=Gates())

    def local_options(self) -> RunOptions:
        """What is in its own folder is replaced by what is newer."""
        return replace(self._options, overwrite=True, create_pr=False)

    # What is done already

    def key(self, name: Name, state: State) -> str:
        """What a step depends on."""
        if name in ("fetch", "convert"):
            return self._identity
        convert = state.step(self.noted_as, "convert")
        made = [self._identity, (convert.figures if convert else {}).get("fingerprint")]
        after = self._afterwards
        if name == "verify":
            return key_of(made, after.compare, after.sample)
        measuring = None if after.measuring is None else asdict(after.measuring)
        gates = key_of(made, asdict(self.job.gates), measuring, self._text)
        if name == "gates":
            return gates
        return key_of(gates, self.noted_as, self._options.create_pr, after.command if name == "announce" else None)

    def is_published(self, place: Place, state: State) -> bool:
        """Whether what passed these checks and gates is at OUT."""
        if not all(state.is_done(self.noted_as, name, self.key(name, state)) for name in STEPS[:-1]):
            return False
        convert = state.step(self.noted_as, "convert")
        assert convert is not None  # noqa: S101  (it is done)
        # Only the Hub knows whether a pull request was merged, so an opened one counts as published.
        return self._options.create_pr or place.holds(str(convert.figures["fingerprint"]))

    def is_as_verified(self, state: State) -> bool:
        """Whether the files in its own folder are those that were verified."""
        step = state.step(self.noted_as, "verify")
        return step is not None and step.figures.get(_FILES) == self._files()

    def _files(self) -> str:
        """Changes when a file of its own folder does."""
        try:
            return key_of({name: identity_of(self.folder / name) for name in sorted(sizes_in(self.folder))})
        except OSError:
            return ""

    # The steps. Each fills in its figures, and raises what is wrong

    def fetch(self, figures: Figures) -> None:
        """Download what is missing of the base, and check its sha256."""
        with Inputs.of(self.job, self._options) as inputs:
            if inputs.opened.is_kept:  # else its files come while it is converted
                inputs.bring(self._observer.tell, self._observer.stop)
            named = {
                "base": inputs.base_name,
                "base_commit": inputs.base_commit,
                "adapter": inputs.adapter_id,
                "adapter_commit": inputs.adapter_commit,
            }
            figures |= {name: value for name, value in named.items() if value is not None}
            figures["base_bytes"] = inputs.base.nbytes
            figures["sha256_checked"] = sum(map(len, inputs.checked.values()))

    def note_conversion(self, figures: Figures) -> None:
        """What its receipt says of the conversion."""
        receipt = self._receipt()
        figures |= {"fingerprint": receipt["fingerprint"], **receipt["summary"]}

    def verify(self, figures: Figures) -> None:
        """Digests, structure, values; if asked for, the comparison with base and adapter."""
        after = self._afterwards
        checks = Checks(self._sources() if after.compare else None, after.sample, require_receipt=True)
        found = verify_output(self.folder, checks, self._options, self._observer)
        figures |= {"files": found.files, "tensors": found.tensors, "made_again": found.recomputed}
        if found.problems:
            figures["problems"] = found.problems[:10]
            more = f" ({len(found.problems)} problems in all)" if len(found.problems) > 1 else ""
            raise VerificationFailed(f"{self.label}: {found.problems[0]}{more}; delete {self.folder} to make it anew")
        figures[_FILES] = self._files()

    def hold_gates(self, figures: Figures) -> None:
        """Survival and error of every tensor; what the output makes of a text."""
        receipt = self._receipt()
        figures |= {key: receipt["summary"][key] for key in ("relative_error", "survival")}
        figures["gates"] = {name: gate for name, gate in asdict(self.job.gates).items() if gate is not None}
        try:
            self.job.gates.hold(fidelity_of(receipt), self.label)
        except ValueError as exc:
            raise BadCheckpoint(f"{self.folder}: {exc}") from exc
        if (measuring := self._afterwards.measuring) is None:
            return
        figures["gates"] |= {name: gate for name, gate in asdict(measuring.gates).items() if gate is not None}
        found = evaluate_output(self.folder, measuring, self._sources(), self._options, self._observer)
        figures["evaluation"] = asdict(found)
        if found.missed:
            raise GateFailed(f"{self.label}: {'; '.join(found.missed)}")

    def publish(self, place: Place, state: State, figures: Figures) -> None:
        """Put the output, which has passed, at OUT, unless it is there already."""
        receipt = self._receipt()
        if not place.holds(receipt["fingerprint"]):
            place.refuse_if_taken()
            gates = state.step(self.noted_as, "gates")
            named = ("gates", "evaluation")
            measured = {} if gates is None else {name: gates.figures[name] for name in named if name in gates.figures}
            place.publish(self.folder, measured)
        figures["bytes"] = receipt["summary"]["bytes"]["output"]
        figures["seen_at"] = place.seen_at if isinstance(place, Published) else self.label

    def tidy(self) -> None:
        """Remove its own folder: OUT is published."""
        if self.folder.exists():
            with writing(self.folder):
                shutil.rmtree(self.folder)

    def announce(self, state: State, figures: Figures) -> None:
        """Have others hear of it."""
        if self._afterwards.command:
            announce(self._afterwards, self.result(state))

    def result(self, state: State) -> Figures:
        """What is announced: where the output is, what it is, and the figures of each step."""
        done = {name: step for name in STEPS[:-1] if (step := state.step(self.noted_as, name)) is not None}
        steps = {name: for_people(step.figures) for name, step in done.items()}
        return {
            "out": self.label,
            "seen_at": steps.get("publish", {}).get("seen_at"),
            "fingerprint": steps.get("convert", {}).get("fingerprint"),
            "steps": steps,
        }

    def _sources(self) -> Sources:
        job = self.job
        base = None if job.base is None else os.fspath(job.base)
        return Sources(base, job.adapter, job.base_revision, job.adapter_revision)

    def _receipt(self) -> dict[str, Any]:
        receipt = read_receipt(self.folder)
        if receipt is None:
            raise BadCheckpoint(
                f"{self.folder}: its receipt is gone or can't be understood; run the same command again"
            )
        return receipt


def for_people(figures: Mapping[str, Any]) -> Figures:
    """The figures of a step, without what only a later run wants to know."""
    return {name: figure for name, figure in figures.items() if name != _FILES}
