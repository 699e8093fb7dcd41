"""One run of a batch: what its parts know of it in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from converter.batch.disks import Disks
from converter.batch.observer import BatchObserver
from converter.batch.options import BatchOptions
from converter.batch.outcomes import Outcomes
from converter.plan.inputs import Base
from converter.seal.staging import Staging


@dataclass(frozen=True)
class Access:
    """How a batch gets at what lies outside of it. Tests put others in their place."""

    base: Callable[..., Base] = Base
    staging: Callable[..., Staging] = Staging
    disks: Disks = field(default_factory=Disks)


@dataclass(frozen=True)
class BatchRun:
    """Options, observer and outcomes of a run that is under way."""

    options: BatchOptions
    observer: BatchObserver
    outcomes: Outcomes
    access: Access = field(default_factory=Access)
