"""Base model plus LoRA adapter → ready-to-serve 4-bit checkpoint, streamed.

The public names are those of `converter.public`, imported when one of them is used: so the command line starts at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from converter.public import *  # noqa: F403  (its `__all__` is the list)
    from converter.public import __all__ as __all__

    __version__: str


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("nf4-converter")
    from importlib.util import find_spec

    if find_spec(f"{__name__}.{name}"):  # `from converter import errors` looks here first
        raise AttributeError(name)
    import converter.public as public

    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    import converter.public as public

    return [*globals(), "__version__", *public.__all__]
