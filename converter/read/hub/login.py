"""Which user of the Hub is logged in; nothing here shows or keeps a token."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from converter.errors import ConverterError
from converter.read.hub.errors import Subject, brief, endpoint, retrying
from converter.read.hub.folder import prepare_library


class Login(NamedTuple):
    """Whether there is a token, and whose it is."""

    endpoint: str
    cache: Path
    """The folder of huggingface_hub's downloads."""
    has_token: bool
    user: str | None = None
    problem: str = ""
    """Why it is not known whose the token is."""


def login(*, offline: bool = False) -> Login:
    """Ask the Hub whose token this is, if there is one. `offline`: only check whether there is one."""
    from huggingface_hub import HfApi, constants, get_token

    prepare_library()
    cache, has_token = Path(constants.HF_HUB_CACHE), get_token() is not None
    if offline or constants.is_offline_mode() or not has_token:
        return Login(endpoint(), cache, has_token)
    try:
        said = retrying(lambda: HfApi().whoami(), Subject("whoami", ""))
        return Login(endpoint(), cache, has_token, brief(said["name"]))
    except ConverterError as exc:
        return Login(endpoint(), cache, has_token, problem=str(exc))
    except (KeyError, TypeError, ValueError):
        return Login(endpoint(), cache, has_token, problem="it does not answer as a Hub does")
