"""Many adapters, one pass over the base: each tensor is read once, and what no adapter changes is made once.

Every job is planned before the first byte is written. A job that is refused, or fails on the way, is dropped, and the
others go on. Shared tensors lie in shards of their own, made in a folder of the batch's and linked into each output
when it is sealed: no output depends on another's fate. Start reading here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from converter.batch.earlier import earlier_shards
from converter.batch.forecast import Forecast, forecast
from converter.batch.memory import fits, fitting_passes, split_into_passes
from converter.batch.observer import BatchObserver
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome, Outcomes, Status
from converter.batch.passes import Pass
from converter.batch.planned import JobGroup, PlannedJob, plan_groups
from converter.batch.run import Access, BatchRun
from converter.batch.shared_shards import SharedShards, folder_of_shared, remove_leftovers
from converter.errors import BadOutput, BadRecipe, ConverterError, GateFailed, Interrupted
from converter.job import Job
from converter.observer import Progress


def convert_batch(
    jobs: Sequence[Job],
    options: BatchOptions = BatchOptions(),
    *,
    dry_run: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
    stop: Callable[[], int | None] = lambda: None,
    tell: Callable[[Outcome], None] = lambda _: None,
    foretell: Callable[[Forecast], None] | None = None,
) -> list[Outcome]:
    """Make a checkpoint for each job. Returns an outcome for each job, in the order of the jobs.

    Jobs of one base and recipe are made in one pass over the base; in several, if what each of them needs would not fit
    the memory together. `tell` hears of each outcome as soon as it is known, `foretell`, in a dry run, what the jobs of
    each base and recipe would take. Raises `Interrupted` at a signal: the same batch resumes the work.
    """
    return convert_jobs(jobs, options, BatchObserver(progress, stop, ended=tell, foretold=foretell), dry_run=dry_run)


def convert_jobs(
    jobs: Sequence[Job],
    options: BatchOptions = BatchOptions(),
    observer: BatchObserver = BatchObserver(),
    *,
    dry_run: bool = False,
    access: Access = Access(),
) -> list[Outcome]:
    """`convert_batch`, from values."""
    if any(job.recipe.calibration is not None for job in jobs):
        raise BadRecipe("`calibrate` goes with one output: convert each adapter by itself")
    run = BatchRun(options, observer, Outcomes(jobs, observer.ended), access)
    groups = plan_groups(jobs, run)
    only_planned = dry_run or (options.strict and len(run.outcomes) > 0)
    for group in groups:
        with group:
            if only_planned:
                _end_as_planned(run, group)
            else:
                _convert_group(run, group)
            pending = [job for job in group.jobs.values() if job.known is None]
            if dry_run and pending and observer.foretold is not None:
                observer.foretold(_forecast(group, pending, options))
    return list(run.outcomes)


def _forecast(group: JobGroup, pending: Sequence[PlannedJob], options: BatchOptions) -> Forecast:
    costs, shared = [job.costs for job in pending], (group.shared or {}).values()
    return forecast(costs, shared, pending[0].plan, group.base.checkpoint, options.outputs_per_pass)


def _end_as_planned(run: BatchRun, group: JobGroup) -> None:
    for index, job in group.jobs.items():
        if job.known is not None:
            _end_as_made_already(run, index, job)
        else:
            run.outcomes.end(
                index, "planned", notes=job.notes, output_bytes=job.costs.nbytes, shared_bytes=group.shared_bytes
            )


def _end_as_made_already(run: BatchRun, index: int, job: PlannedJob) -> None:
    try:
        job.job.gates.hold(job.figures.get("fidelity", {}), str(job.job.out))
    except GateFailed as exc:
        run.outcomes.end(index, "failed", str(exc), is_below_gate=True)
        return
    status: Status = "nothing to do"
    run.outcomes.end(index, status, fingerprint=job.known, notes=job.notes, **job.figures)


def _convert_group(run: BatchRun, group: JobGroup) -> None:
    """Make what is not made yet of a group, in as few passes over the base as the memory allows."""
    pending: dict[int, PlannedJob] = {}
    for index, job in group.jobs.items():
        if job.known is None:
            pending[index] = job
        else:
            _end_as_made_already(run, index, job)
    try:
        if pending:
            next_to = _refuse_where_too_full(run, group, pending)
            if next_to is None:
                return
            group.base.bring(run.observer.tell, run.observer.stop)
            _convert_in_passes(run, group, pending, next_to)
        if not run.outcomes.unfinished & pending.keys():
            remove_leftovers(group.jobs.values())
    except Interrupted as exc:
        exc.args = (f"{exc}; what is done is kept; run the same command to resume",)
        raise
    except ConverterError as exc:
        for index in pending:
            if index not in run.outcomes:
                run.outcomes.fail(index, exc)


def _convert_in_passes(run: BatchRun, group: JobGroup, pending: dict[int, PlannedJob], next_to: PlannedJob) -> None:
    resources, earlier = run.options.resources, earlier_shards(run, group)
    indices = list(pending)
    with SharedShards(run, group, next_to, earlier) as shared:

        def fitting(numbers: Sequence[int]) -> Pass | None:
            some = {indices[number]: pending[indices[number]] for number in numbers}
            one = Pass(run, group, some, earlier, shared)
            return one if fits(one.memory, len(some), resources) else None

        passes = split_into_passes(
            [job.costs.reserve for job in pending.values()], resources, run.options.outputs_per_pass
        )
        for numbers, one in fitting_passes(passes, fitting):
            if isinstance(one, BadRecipe):  # the others have their turn
                run.outcomes.fail(indices[numbers[0]], one)
                continue
            one.convert()
            for number in numbers:
                pending[indices[number]].forget()
        if not run.outcomes.unfinished & pending.keys():
            shared.spend()


def _refuse_where_too_full(run: BatchRun, group: JobGroup, pending: dict[int, PlannedJob]) -> PlannedJob | None:
    """Refuse the outputs on disks that have no room for all of them; the job next to whose output the shared shards are
    made. None if no output is left."""
    number_of, full = run.access.disks.number_of, set[int]()
    while pending:
        # The first job, made already or not: the next run looks for the shared shards there.
        rooms = (job for job in group.jobs.values() if number_of(folder_of_shared(job)) not in full)
        next_to = next(rooms, None)
        if next_to is None:
            for index in list(pending):
                out = pending.pop(index).destination.out
                run.outcomes.refuse(index, BadOutput(f"{out}: no disk has room for the shards that the outputs share"))
        elif (disk := _refuse_on_first_full_disk(run, group, pending, next_to)) is None:
            return next_to
        else:
            full.add(disk)
    return None


def _refuse_on_first_full_disk(
    run: BatchRun, group: JobGroup, pending: dict[int, PlannedJob], next_to: PlannedJob
) -> int | None:
    """Refuse the outputs on the first disk without room for their own shards, and for the shared ones, once or as often
    as they must be copied. The disk's number; None if there is room everywhere."""
    disks, shared, beside = run.access.disks, group.shared_bytes, folder_of_shared(next_to)
    home = disks.number_of(beside)
    by_disk: dict[int, dict[int, PlannedJob]] = {home: {}}
    for index, job in pending.items():
        by_disk.setdefault(disks.number_of(job.destination.staging), {})[index] = job
    for disk, jobs in by_disk.items():
        copies = len(jobs) if disk != home or run.options.link == "copy" else 0
        own = sum(job.costs.nbytes - shared for job in jobs.values())
        needed = own + shared * (copies + (disk == home))
        folders = [job.destination.staging for job in jobs.values()]
        free = disks.room([beside, *folders] if disk == home else folders)
        if free < needed:
            what = f"{needed:,} bytes are needed, with all that is made on this disk, which has {free:,} free"
            for index in jobs:
                run.outcomes.refuse(index, BadOutput(f"{pending.pop(index).destination.out}: {what}"))
            return disk
    return None
