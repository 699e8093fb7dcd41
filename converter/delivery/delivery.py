"""Deliver the outputs of a file of jobs: fetch, convert, verify, hold the gates, publish, announce. Start reading here.

Each output is made in a folder of its own. Only `publish` puts it at OUT, so nobody sees an output that failed
before. Each step is noted when it has ended. A later run skips a step that is done, unless its inputs have changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from converter.batch.batch import convert_jobs
from converter.batch.job_file import Asked
from converter.batch.jobs import clashing
from converter.batch.observer import BatchObserver
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome
from converter.delivery.output import Figures, Output, for_people
from converter.delivery.state import Name, State, Step
from converter.errors import (
    ConversionFailed,
    ConversionRefused,
    ConverterError,
    GateFailed,
    Interrupted,
    OutputLocked,
)
from converter.job import RunOptions
from converter.lock import Lock
from converter.observer import Observer
from converter.pipeline import convert_job
from converter.seal.destination import Place
from converter.write.durable import LOCAL_DISK, writing

Ended = Literal["began", "done", "skipped", "failed"]


@dataclass(frozen=True)
class Event:
    """A step of an output began, or ended."""

    out: str
    step: Name
    state: Ended
    result: dict[str, Any] = field(default_factory=dict)
    """Of a step that is done, its figures; of `announce`, what is announced."""
    reason: str = ""
    """Why it failed."""


@dataclass(frozen=True)
class DeliveryObserver(Observer):
    """Hears also of each step."""

    event: Callable[[Event], None] = lambda _: None


def deliver(
    asked: Sequence[Asked],
    work: Path,
    options: RunOptions = RunOptions(),
    observer: DeliveryObserver = DeliveryObserver(),
) -> tuple[list[Output], State]:
    """Deliver each output of a file of jobs. An output that fails stops no other.

    Outputs are made in `work`, which also has the state file. Raises `OutputLocked` while another process works there,
    `Interrupted` at a signal: the same call resumes the work.
    """
    with writing(work):
        LOCAL_DISK.make_folder(work)
        try:
            lock = Lock(work)
        except BlockingIOError:
            raise OutputLocked(
                f"{work}: another pipeline is running there; wait for it, or choose another `work`"
            ) from None
    try:
        return _Run(asked, work, options, observer).run()
    except Interrupted as exc:
        exc.args = (f"{exc}; what is done is kept; run the same command to resume",)
        raise
    finally:
        lock.release()


class _Run:
    def __init__(self, asked: Sequence[Asked], work: Path, options: RunOptions, observer: DeliveryObserver) -> None:
        self._options, self._observer = options, observer
        self._outputs = [Output(one, work, options, observer) for one in asked]
        self._state = State(work)

    def run(self) -> tuple[list[Output], State]:
        pending = self._unpublished()
        pending = [(output, place) for output, place in pending if self._step(output, "fetch", output.fetch)]
        self._convert([output for output, _ in pending])
        for output, place in pending:
            self._finish(output, place)
        for output in self._outputs:
            if output.error is None:
                self._step(output, "announce", partial(output.announce, self._state))
        return self._outputs, self._state

    def _unpublished(self) -> list[tuple[Output, Place]]:
        """The outputs that are not published yet, and where they will be. Those that are refused are dropped."""
        found: list[tuple[Output, Place]] = []
        clashes = clashing([output.job for output in self._outputs])
        for index, output in enumerate(self._outputs):
            self._observer.stop_if_asked(f"{output.label} was under way")
            try:
                if index in clashes:
                    raise clashes[index]
                place = output.look()
                if output.is_published(place, self._state):
                    output.tidy()  # a run may have died before it came to that
                    continue
                if not output.is_there:
                    place.refuse_if_taken()
                found.append((output, place))
            except ConverterError as exc:
                if isinstance(exc, Interrupted):
                    raise
                # Not noted: a Hub that is down for an hour makes nothing undone.
                output.error = exc
                self._tell(output, "fetch", "failed", reason=str(exc))
        return found

    def _convert(self, outputs: Sequence[Output]) -> None:
        """Make the outputs in their own folders: several in one pass over each base."""
        for output in outputs:
            self._begin(output, "convert")
        if len(self._outputs) == 1:
            for output in outputs:
                self._convert_alone(output)
        elif outputs:
            self._convert_together(outputs)

    def _convert_alone(self, output: Output) -> None:
        began = time.monotonic()
        try:
            report = convert_job(output.local_job(), output.local_options(), self._observer)
            self._converted(output, began, nothing_to_do=report.nothing_to_do)
        except ConverterError as exc:
            self._fail(output, "convert", exc, began)

    def _convert_together(self, outputs: Sequence[Output]) -> None:
        began = time.monotonic()
        by_folder = {output.folder: output for output in outputs}

        def ended(outcome: Outcome) -> None:
            output = by_folder[outcome.job.out]
            if outcome.is_good:
                self._converted(output, began, nothing_to_do=outcome.status == "nothing to do")
            else:
                kind = ConversionRefused if outcome.status == "refused" else ConversionFailed
                self._fail(output, "convert", kind(outcome.message), began)

        options = BatchOptions(**vars(outputs[0].local_options()))
        watching = BatchObserver(self._observer.progress, self._observer.stop, ended=ended)
        convert_jobs([output.local_job() for output in outputs], options, watching)

    def _converted(self, output: Output, began: float, *, nothing_to_do: bool) -> None:
        """Note a conversion, unless an earlier run did."""
        output.error = None  # of a batch, a good outcome replaces a bad one
        figures: Figures = {}
        output.note_conversion(figures)
        noted = self._state.step(output.noted_as, "convert")
        key = output.key("convert", self._state)
        is_noted = noted is not None and noted.key == key and noted.figures.get("fingerprint") == figures["fingerprint"]
        if nothing_to_do and is_noted:
            self._tell(output, "convert", "skipped")
        else:
            self._done(output, "convert", figures, began)

    def _finish(self, output: Output, place: Place) -> None:
        """Verify, hold the gates, publish; each only if what comes before it is good."""
        if output.error is not None:
            return
        verified = output.is_as_verified(self._state)
        if not self._step(output, "verify", output.verify, again=not verified):
            return
        if not self._step(output, "gates", output.hold_gates):
            return
        if self._step(output, "publish", partial(output.publish, place, self._state), again=True):
            output.tidy()

    def _step(self, output: Output, name: Name, action: Callable[[Figures], None], *, again: bool = False) -> bool:
        """Do a step, unless an earlier run did and `again` is false; whether it is done now."""
        self._observer.stop_if_asked(f"{output.label} was under way")
        if not again and self._state.is_done(output.noted_as, name, output.key(name, self._state)):
            self._tell(output, name, "skipped")
            return True
        self._begin(output, name)
        began, figures = time.monotonic(), Figures()
        try:
            action(figures)
        except ConverterError as exc:
            self._fail(output, name, exc, began, figures)
            return False
        self._done(output, name, figures, began)
        return True

    def _begin(self, output: Output, name: Name) -> None:
        self._tell(output, name, "began")

    def _done(self, output: Output, name: Name, figures: Figures, began: float) -> None:
        key = output.key(name, self._state)
        self._state.put(output.noted_as, name, Step("done", key, _since(began), figures))
        told = output.result(self._state) if name == "announce" else for_people(figures)
        self._tell(output, name, "done", told)

    def _fail(
        self, output: Output, name: Name, exc: ConverterError, began: float, figures: Figures | None = None
    ) -> None:
        if isinstance(exc, Interrupted):
            raise exc
        output.error = exc
        key = output.key(name, self._state)
        step = Step("failed", key, _since(began), figures or {}, str(exc), exc.exit_code)
        self._state.put(output.noted_as, name, step)
        self._tell(output, name, "failed", figures or {}, str(exc))

    def _tell(self, output: Output, name: Name, state: Ended, result: Figures | None = None, reason: str = "") -> None:
        output.did[name] = state
        self._observer.event(Event(output.label, name, state, result or {}, reason))


def exit_code_of(outputs: Sequence[Output]) -> int:
    """0 if every output is published; the code of those that aren't, if they have one; else 1."""
    codes = {output.error.exit_code for output in outputs if output.error is not None}
    some = any(output.error is None for output in outputs)
    if codes <= {GateFailed.exit_code}:
        return max(codes, default=0)
    return codes.pop() if len(codes) == 1 and not some else 1


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
