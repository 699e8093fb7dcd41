"""The jobs of a batch once they are planned, and which of them are made together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from converter.batch.finished import figures_of
from converter.batch.forecast import costs_of
from converter.batch.jobs import grouped
from converter.batch.options import BatchOptions
from converter.batch.run import BatchRun
from converter.batch.sharing import same_in_both, untouched
from converter.errors import BadOutput, ConverterError
from converter.job import Job
from converter.plan.decide import make_plan
from converter.plan.inputs import Base, Inputs
from converter.plan.plan import Plan, TensorPlan
from converter.seal.destination import Destination, already_made
from converter.tensors import torch_device
from converter.write.stores.addresses import NO_STORE


class PlannedJob:
    """A job that is planned. Its plan may be forgotten, and is made again when it is asked for."""

    def __init__(self, job: Job, inputs: Inputs, options: BatchOptions) -> None:
        self.job, self.inputs, self._options = job, inputs, options
        if job.store is not None:
            raise BadOutput(f"{job.store}: {NO_STORE}")
        self._plan: Plan | None = None
        if inputs.adapter is None:
            job.gates.refuse_without_adapter()
        self._before = inputs.identities()
        """Of the weights files, when it was planned; it may be converted much later."""
        plan = self.plan
        self.destination = Destination(job.out, inputs=inputs.folders, overwrite=options.overwrite)
        device = torch_device(plan.device).type
        self.known = already_made(self.destination, plan, inputs, device, any_layout=True)
        """Its fingerprint, if it is made already."""
        if self.known is None:
            self.destination.refuse_if_taken()
        self.figures = {} if self.known is None else figures_of(self.destination.receipt or {})
        """Of the `Outcome` of an output that is made already."""
        self.notes = plan.notes
        self.costs = costs_of(plan)

    @property
    def plan(self) -> Plan:
        if self._plan is None:
            self._plan = make_plan(self.inputs.base, self.inputs.adapter, self.job.recipe, **self._options.of_plan())
        return self._plan

    def refuse_if_changed(self) -> None:
        """`InputChanged` if base or adapter is not what was planned for."""
        self.inputs.refuse_if_changed(self._before)

    def forget(self) -> None:
        """Free the plan, and close the adapter, which opens again when it is read."""
        self._plan = None
        if self.inputs.adapter is not None:
            self.inputs.adapter.folder.close()


@dataclass
class JobGroup:
    """Jobs of one base and recipe, by their indices in the batch."""

    base: Base
    jobs: dict[int, PlannedJob] = field(default_factory=dict)
    shared: dict[str, TensorPlan] | None = None
    """What becomes of the tensors that no adapter touches."""
    notes: list[str] = field(default_factory=list)
    """Notes for everyone whose output is made."""

    @property
    def shared_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.shared or {}).values())

    def add(self, index: int, job: PlannedJob) -> None:
        own = untouched(job.plan)
        self.shared = own if self.shared is None else same_in_both(self.shared, own)
        self.jobs[index] = job

    def close(self) -> None:
        for job in self.jobs.values():
            job.inputs.close()
        self.base.close()

    def __enter__(self) -> JobGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def plan_groups(jobs: Sequence[Job], run: BatchRun) -> list[JobGroup]:
    """Plan every job. Those that are refused have their outcome then, the others are in groups."""
    outcomes, options = run.outcomes, run.options
    groups = []
    done = len(outcomes)
    for some in grouped(jobs, outcomes.refuse, options):
        try:
            group = _open_group(next(iter(some.values())), run)
        except ConverterError as exc:
            for index in some:
                outcomes.refuse(index, exc)
            continue
        for index, job in some.items():
            try:
                group.add(index, _planned(job, group.base, options))
            except ConverterError as exc:
                outcomes.refuse(index, exc)
            else:
                if len(group.jobs) > options.plans_kept:
                    group.jobs[index].forget()
            done += 1
            run.observer.planned(done, len(jobs))
        groups.append(group)
    return groups


def _open_group(job: Job, run: BatchRun) -> JobGroup:
    assert job.base is not None  # noqa: S101  (`with_base` saw to it)
    return JobGroup(run.access.base(job.base, job.base_revision, **run.options.of_inputs()))


def _planned(job: Job, base: Base, options: BatchOptions) -> PlannedJob:
    inputs = Inputs.of(job, options, base)
    try:
        return PlannedJob(job, inputs, options)
    except BaseException:
        inputs.close()
        raise
