from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the Hub; those about it talk to a server of their own

import hypothesis
import pytest
import torch

from converter.silence import quietly

with quietly():
    import peft  # noqa: F401
    import transformers

from tests.bucket_proxy import Proxy, proxied
from tests.bucket_server import BucketServer, bucket_server

REPOSITORY = Path(__file__).parent.parent

# By the clock on the wall, which is no measure on a busy machine; see limits.py.
hypothesis.settings.register_profile("without deadlines", deadline=None)
hypothesis.settings.load_profile("without deadlines")


@pytest.fixture(autouse=True, scope="session")
def _one_process_of_several() -> None:
    """The reference is defined on one thread; and tests run side by side."""
    torch.set_num_threads(1)
    gc.freeze()  # the libraries' million objects stay: to look through them took a tenth of the tests' time
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True, scope="session")
def _sigint_is_heard() -> None:
    """Here and in the processes that tests start, also where a shell has the tests ignore it: in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _nothing_waits_for_the_disk() -> Iterator[None]:
    """No test cuts the power, and a conversion of a tiny model waits for the disk five times as long as it computes.
    `make chaos` cuts it; so do tests in processes of their own."""

    def of_an_open_file(file: Any) -> None:
        os.fstat(file if isinstance(file, int) else file.fileno())

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("fsync", "fdatasync"):
            monkeypatch.setattr(os, name, of_an_open_file)
        yield


@pytest.fixture(autouse=True, scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What transformers answered, for all tests that run together: to ask it takes seconds of the processor's time."""
    folder = tmp_path_factory.getbasetemp()
    answers = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "answers"
    answers.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:  # for what modules prepare for their tests
        monkeypatch.setenv("XDG_CACHE_HOME", str(new_cache(folder / "session.cache", answers)))
        yield answers


@pytest.fixture(autouse=True)
def _cache_of_its_own(answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(new_cache(tmp_path.with_name(f"{tmp_path.name}.cache"), answers)))


def new_cache(folder: Path, answers: Path) -> Path:
    (folder / "nf4-converter").mkdir(parents=True)
    (folder / "nf4-converter" / "architectures").symlink_to(answers)
    return folder


@pytest.fixture
def cold_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _cache_of_its_own: None) -> Path:
    """A cache without anything in it, not even a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def signal_handlers() -> Iterator[None]:
    """Those of signals are as before, whatever the command line does to them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base and an adapter for it; modules that need others have their own."""
    from tests.models import save_adapter, save_base

    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", "llama")
    return base, save_adapter(folder / "adapter", base, "llama")


@pytest.fixture
def base(inputs: tuple[Path, Path]) -> Path:
    """Of a module's `inputs`, which are a base and an adapter."""
    return inputs[0]


@pytest.fixture
def adapter(inputs: tuple[Path, Path]) -> Path:
    return inputs[1]


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    return REPOSITORY / "fixtures" / "tiny-base"


@pytest.fixture(scope="session")
def tiny_adapter() -> Path:
    return REPOSITORY / "fixtures" / "tiny-adapter"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BucketServer]:
    """A real S3 server with a bucket."""
    with bucket_server(tmp_path_factory.mktemp("bucket")) as found:
        yield found


@pytest.fixture
def proxy(server: BucketServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Stands before the server, sees each request, and can get in its way."""
    with proxied(server, monkeypatch) as found:
        yield found
