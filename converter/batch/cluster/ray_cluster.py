"""A Ray cluster: what its nodes have, and parts of a batch under way on them. The only module that imports ray."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

from converter.batch.cluster.parts import Ask, Node
from converter.batch.cluster.worker import convert_part
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcome
from converter.errors import ConversionFailed, ConversionRefused, Interrupted, printable
from converter.job import Job
from converter.observer import Progress
from converter.recipe import versions

Work = Callable[[list[Job], BatchOptions, dict[str, str], Callable[[Outcome | Progress], None]], list[Outcome]]
"""As `convert_part`; workers import it."""

_REACH_SECONDS = 10.0
_CANCEL_SECONDS = 15.0
_HEAR_SECONDS = 10.0
_OBJECTS = 100_000_000
"""Bytes of Ray's store of objects, the least that it takes well: outcomes are small."""


@dataclass(frozen=True)
class Lost:
    """A part whose worker or node was lost; it can be begun again."""

    why: str


class RayCluster:
    """Parts of a batch under way on the nodes of a cluster."""

    def __init__(self, ray: Any, work: Work = convert_part) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._ray, self._work = ray, work
        self._under_way: dict[Any, int] = {}
        # Beside this process, so that the loss of another node takes nothing of what has been told.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._ears = ray.remote(_Ears).options(num_cpus=0, scheduling_strategy=here).remote()

    def nodes(self) -> list[Node]:
        """Those that are alive."""
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return [Node(*(int(has.get(name, 0)) for name in ("CPU", "GPU", "memory"))) for has in alive]

    def start(self, number: int, ask: Ask, jobs: Sequence[Job], options: BatchOptions) -> None:
        """Give a part to whichever node has, or will have, what it asks for."""
        task = self._ray.remote(_convert_part).options(**task_options(ask))
        self._under_way[task.remote(self._work, list(jobs), options, versions(), number, self._ears)] = number

    def finished(self, seconds: float) -> list[tuple[int, list[Outcome] | Lost]]:
        """Parts that have ended by now, by their numbers; waits so many seconds for the first."""
        exceptions = self._ray.exceptions
        ended: list[tuple[int, list[Outcome] | Lost]] = []
        ready, _ = self._ray.wait(list(self._under_way), timeout=seconds)
        for reference in ready:
            number = self._under_way.pop(reference)
            try:
                ended.append((number, self._ray.get(reference)))
            except exceptions.RayTaskError as exc:  # the converter isn't there, or is another
                raise ConversionFailed(f"`address`: a node could not begin: {_last_line(exc)}") from exc
            except exceptions.RayError as exc:
                ended.append((number, Lost(f"{type(exc).__name__}: {_first_line(exc)}")))
        return ended

    def heard(self) -> list[tuple[int, Outcome | Progress]]:
        """What parts have told since the last time."""
        try:
            told: list[tuple[int, Outcome | Progress]] = self._ray.get(self._ears.take.remote(), timeout=_HEAR_SECONDS)
        except self._ray.exceptions.RayError:
            return []  # outcomes come with the parts' results as well
        return told

    def cancel(self, numbers: Sequence[int]) -> None:
        """End parts as a signal would end a batch; those that do not heed it, by force."""
        left = [reference for reference, number in self._under_way.items() if number in numbers]
        self._under_way = {reference: n for reference, n in self._under_way.items() if n not in numbers}
        for force in (False, True):
            for reference in left:
                with suppress(self._ray.exceptions.RayError):
                    self._ray.cancel(reference, force=force)
            if left:
                _, left = self._ray.wait(left, num_returns=len(left), timeout=_CANCEL_SECONDS)


def task_options(ask: Ask) -> dict[str, Any]:
    """How Ray is asked for what a part takes. What is lost is begun again here, where it can be told and counted."""
    return {"num_cpus": ask.cpus, "num_gpus": ask.gpus, "memory": ask.memory, "max_retries": 0}


class _Ears:
    """An actor: parts tell it what they have done, and it is asked what it has heard."""

    def __init__(self) -> None:
        self._told: list[tuple[int, Outcome | Progress]] = []

    def hear(self, number: int, item: Outcome | Progress) -> None:
        self._told.append((number, item))

    def take(self) -> list[tuple[int, Outcome | Progress]]:
        told, self._told = self._told, []
        return told


def _convert_part(
    work: Work, jobs: list[Job], options: BatchOptions, expected: dict[str, str], number: int, ears: Any
) -> list[Outcome]:
    """A task of Ray's. Its only way to be cancelled is to end early."""
    try:
        return work(jobs, options, expected, lambda item: ears.hear.remote(number, item))
    except Interrupted:
        return []


@contextmanager
def connected(address: str, work: Work = convert_part) -> Iterator[RayCluster]:
    """The cluster at `HOST:PORT`, of which this machine is a node; `local` starts one here, and ends it.

    `work` is what a worker does with a part. Raises `ConversionRefused` where Ray can't begin.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray will do, and warns of until it does
    import ray

    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
        if address == "local":
            settings |= {"include_dashboard": False, "object_store_memory": _OBJECTS, "_temp_dir": folder}
        # It would print what it notices, such as a lost node, to stdout, which is ours; outcomes tell of it.
        vars(ray._private.worker)["_worker_logs_enabled"] = False
        with _within_this_machine(ray) if address == "local" else nullcontext():
            try:
                with _own_signals():
                    _begin(ray, address, settings)
                yield RayCluster(ray, work)
            finally:
                ray.shutdown()


@contextmanager
def _within_this_machine(ray: Any) -> Iterator[None]:
    """Ray's ports at 127.0.0.1 only, as it has them where it does not support clusters: they run code."""
    constants = ray._private.ray_constants
    before, in_environment = constants.ENABLE_RAY_CLUSTER, os.environ.get(constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    constants.ENABLE_RAY_CLUSTER = False
    os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"  # for the processes that it starts
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before
        del os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR]
        if in_environment is not None:
            os.environ[constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = in_environment


def _begin(ray: Any, address: str, settings: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **settings)
    except (ConnectionError, RuntimeError, ValueError, OSError) as exc:
        raise ConversionRefused(f"`address` {address}: {exc}") from exc
    except SystemExit as exc:  # raised by Ray's handler
        raise Interrupted(signal.SIGTERM, "SIGTERM while Ray began; nothing was written to OUT") from exc


def refuse_if_unusable(address: str) -> None:
    """`ConversionRefused` unless Ray is installed and something answers at the address: Ray would try for minutes."""
    if find_spec("ray") is None:
        raise ConversionRefused("`address`: Ray is not installed: pip install nf4-converter[ray]")
    if address == "local":
        return
    found = re.fullmatch(r"\[?([^\[\]/]+)\]?:(\d{1,5})", address)
    if found is None:
        raise ConversionRefused(f"`address` {address}: neither local nor HOST:PORT")
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_REACH_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as exc:  # the last of a name that none can have
        raise ConversionRefused(f"`address` {address}: no cluster answers there: {exc}") from exc


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray sets its own handlers, which would end the process where ours let parts end in order."""
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _first_line(exc: BaseException) -> str:
    return printable(next(iter(str(exc).strip().splitlines()), ""))


def _last_line(exc: BaseException) -> str:
    return next(iter(reversed(str(exc).strip().splitlines())), "")
