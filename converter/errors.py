"""Every error that this package raises on purpose.

    ConverterError
    ├── ConversionRefused        decided before a byte was written; exit code 2
    │   ├── BadCheckpoint        the base's files contradict the format, each other or the config
    │   ├── BadAdapter           the adapter's files do
    │   ├── AdapterMismatch      adapter and base do not belong together
    │   ├── Unsupported          valid, but not something this tool does, or does safely
    │   ├── BadRecipe            the choices contradict each other or the base
    │   ├── BadOutput            OUT is not a place that may be written
    │   │   └── OutputLocked     another process is writing it
    │   ├── StoreRefused         a store is not known, has no such thing, or does not let us
    │   └── HubRefused           the Hub has no such thing for us
    │       ├── HubNotFound
    │       ├── HubGated
    │       └── HubOffline
    └── ConversionFailed         it went wrong on the way; exit code 1
        ├── NotFinite            a NaN or an infinity where a weight should be
        ├── InputChanged         a file shrank, vanished or changed while it was being read
        ├── ReadFailed           the disk said no
        ├── WriteFailed          the disk said no
        ├── NoThread             the system starts no thread, or has no memory for one
        ├── VerificationFailed   what was written is not what a loader would build
        ├── HubFailed            the connection or the server failed
        ├── DeviceDisagrees      an accelerator computes something else than the CPU
        ├── StoreFailed          a store, or the connection to it, failed
        ├── NoEffect             the adapter's change is not zero, and alters no value of the output
        ├── GateFailed           a figure of the output does not reach its gate; exit code 4
        ├── Undecided            what a verification needs can't be had; exit code 3
        └── Interrupted          a signal asked for an end; exit code 130 or 143

A message is one line: the file or tensor, what was found, what was expected, what to do. It names parameters as Python
has them, in backticks: `base`, `overwrite`. The command line shows them as options: --base, --overwrite.
"""

from __future__ import annotations

MAX_MESSAGE = 1_600
"""Characters of a message; paths may be long."""


class ConverterError(Exception):
    """Anything this package raises on purpose."""

    exit_code = 1
    resumable = False
    """Whether another run can resume the work that this error ended. Where it can't, the work is thrown away."""
    resumed_by = "the same command resumes it"

    def __init__(self, message: str) -> None:
        super().__init__(shortened(printable(message)))


class ConversionRefused(ConverterError):
    """Refused before the first byte was written."""

    exit_code = 2


class BadCheckpoint(ConversionRefused):
    """The base's files contradict the format, each other or the config."""


class BadAdapter(ConversionRefused):
    """The adapter's files contradict the format or each other."""


class AdapterMismatch(ConversionRefused):
    """The adapter does not fit this base."""


class Unsupported(ConversionRefused):
    """Valid input that this tool does not convert."""


class BadRecipe(ConversionRefused):
    """Choices that contradict each other or the base."""


class BadOutput(ConversionRefused):
    """OUT is not a place that may be written."""


class OutputLocked(BadOutput):
    """Another process is writing OUT; later it may be free."""


class StoreRefused(ConversionRefused):
    """A store is not known, has no such thing, or does not let us."""


class HubRefused(ConversionRefused):
    """The Hub has no such thing for us."""


class HubNotFound(HubRefused):
    """No such repository, revision or file."""


class HubGated(HubRefused):
    """The repository asks for a login or for its terms to be accepted."""


class HubOffline(HubRefused):
    """Offline, and the file is not in the cache."""


class ConversionFailed(ConverterError):
    """It went wrong on the way."""


class NotFinite(ConversionFailed):
    """A NaN or an infinity where a weight should be."""


class InputChanged(ConversionFailed):
    """An input shrank, vanished or changed while it was being read."""


class ReadFailed(ConversionFailed):
    """The disk could not give an input's bytes."""

    resumable = True


class WriteFailed(ConversionFailed):
    """The disk said no."""

    resumable = True


class NoThread(ConversionFailed):
    """The system starts no thread, or has no memory for one."""

    resumable = True


class VerificationFailed(ConversionFailed):
    """What was written is not what a loader would build."""


class HubFailed(ConversionFailed):
    """The connection or the server failed."""

    resumable = True


class DeviceDisagrees(ConversionFailed):
    """An accelerator and the CPU made different codes or scales, and rounding does not explain the difference."""


class StoreFailed(ConversionFailed):
    """A store could not take OUT or give an input, or the connection failed."""

    resumable = True


class AnnouncementFailed(ConversionFailed):
    """OUT is published, and the program that was to hear of it failed."""

    resumable = True


class NoEffect(ConversionFailed):
    """The adapter's change is not zero, but no value of the output differs from the base's."""


class GateFailed(ConversionFailed):
    """A figure of the output does not reach its gate."""

    exit_code = 4
    resumable = True
    resumed_by = "the same command with a weaker gate takes it"
    staging: str | None = None
    """The folder in which what was made is kept; None where OUT was there already."""
    receipt: dict[str, object] | None = None
    """What the receipt of the output would say."""


class Undecided(ConversionFailed):
    """A verification needs something that can't be had: it found neither yes nor no."""

    exit_code = 3


class Interrupted(ConversionFailed):
    """A signal asked for an end, which came between two tiles."""

    resumable = True

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


def shortened(text: str) -> str:
    """`text` without its middle, if it is long: an input may have a megabyte where a name is expected."""
    return text if len(text) <= MAX_MESSAGE else f"{text[: MAX_MESSAGE // 2]} … {text[-MAX_MESSAGE // 2 :]}"


def printable(text: str) -> str:
    """`text` as one line without control or direction-changing characters, for messages about untrusted names."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
