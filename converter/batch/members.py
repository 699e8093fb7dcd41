"""The jobs of a batch once they are planned: on what terms, which belong together, what came of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from converter.batch.sharing import in_common, untouched
from converter.job import Job, RunOptions
from converter.plan import budget
from converter.plan.decide import make_plan
from converter.plan.estimate import computed
from converter.plan.inputs import Base, Inputs
from converter.plan.plan import Plan, TensorPlan
from converter.quantize.measure import Fidelity
from converter.seal.destination import Destination
from converter.seal.link import How
from converter.seal.origin import already_made
from converter.tensors import torch_device

Status = Literal["made", "nothing to do", "planned", "refused", "failed"]

MOST_PLANS = 64
"""Plans that are kept from the planning to the making; those of more jobs are made anew, for they take memory."""


@dataclass(frozen=True)
class Outcome:
    """What came of one job."""

    job: Job
    status: Status
    message: str = ""
    """Why it was refused or failed."""
    fingerprint: str = ""
    output_bytes: int = 0
    shared_bytes: int = 0
    """Of these, in shards that other outputs have, too, or may have."""
    link: str = ""
    """How it has them: hard, reflink, copy."""
    fidelity: Mapping[str, Fidelity] = field(default_factory=dict)
    """Of the tensors that the adapter changed."""
    notes: tuple[str, ...] = ()
    checked: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """As in `Report.checked`."""
    is_locked: bool = False
    """Refused because another process is writing it."""

    @property
    def is_good(self) -> bool:
        return self.status in ("made", "nothing to do", "planned")


@dataclass(frozen=True)
class BatchOptions(RunOptions):
    """How a batch is run. Nothing here but `device` and `link` changes a byte of an output."""

    strict: bool = False
    """Convert nothing if any job is refused."""
    link: How = "auto"
    against: Path | None = None
    """A finished output whose shards may be linked to."""


class Member:
    """A job that is planned. Its plan may be forgotten, and is then made anew when it is wanted."""

    def __init__(self, job: Job, inputs: Inputs, terms: BatchOptions) -> None:
        self.job, self.inputs, self._terms = job, inputs, terms
        self._plan: Plan | None = None
        self.before = inputs.identities()
        """Of the weights files, when it was planned: its turn may come much later."""
        plan = self.plan
        self.destination = Destination(job.out, inputs=inputs.folders, overwrite=terms.overwrite)
        device = torch_device(plan.device).type
        self.known = already_made(self.destination, plan, inputs, device, any_layout=True)
        """Its fingerprint, if it is made already."""
        if self.known is None:
            self.destination.refuse_if_taken()
        self.output_bytes, self.notes = plan.output_bytes, plan.notes
        tensors = list(plan.tensors())
        self.need = budget.need_of(tensors, plan.recipe, plan.resources)
        self.values = computed(tensors)

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            self._plan = make_plan(self.inputs.base, self.inputs.adapter, self.job.recipe, **self._terms.of_plan())
        return self._plan

    def refuse_if_changed(self) -> None:
        """`InputChanged` if base or adapter is not what was planned for."""
        self.inputs.refuse_if_changed(self.before)

    def forget(self) -> None:
        self._plan = None
        if self.inputs.adapter is not None:
            self.inputs.adapter.folder.close()  # opens again when it is read


@dataclass
class Group:
    """Jobs of one base and recipe."""

    base: Base
    members: dict[int, Member] = field(default_factory=dict)
    common: dict[str, TensorPlan] | None = None
    """What becomes of the tensors that no adapter touches."""
    notes: list[str] = field(default_factory=list)
    """What everybody should know whose output is made."""

    def add(self, index: int, member: Member) -> None:
        own = untouched(member.plan)
        self.common = own if self.common is None else in_common(self.common, own)
        self.members[index] = member
        if len(self.members) > MOST_PLANS:
            member.forget()

    @property
    def common_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.common or {}).values())

    def close(self) -> None:
        for member in self.members.values():
            member.inputs.close()
        self.base.checkpoint.close()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
