"""A real MLflow server on 127.0.0.1, with its database and artifacts in a folder, for the tests of `make mlflow`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tests.bucket_server import free_ports

TOKEN = "token-of-the-tests-only"


class MlflowServer:
    """How it is reached, and how the tests look into it."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.url, registry_uri=self.url)

    def register(self, name: str, folder: Path, inside: str = "model") -> str:
        """The files of a folder as a new version of a model, logged as MLflow's own users do it; its number."""
        client = self.client
        run = client.create_run("0")
        client.log_artifacts(run.info.run_id, str(folder), inside)
        client.update_run(run.info.run_id, "FINISHED")
        if not client.search_registered_models(f"name='{name}'"):
            client.create_registered_model(name)
        source = f"{run.info.artifact_uri}/{inside}".rstrip("/")
        return str(client.create_model_version(name, source, run.info.run_id).version)

    def versions(self, name: str) -> list[Any]:
        """The versions of a model, the oldest first."""
        found = self.client.search_model_versions(f"name='{name}'")
        return sorted(found, key=lambda version: int(version.version))


@contextmanager
def mlflow_server(folder: Path) -> Iterator[MlflowServer]:
    """Start it with its data in a folder; stop it in the end."""
    program, (port,) = Path(sys.executable).with_name("mlflow"), free_ports(1)
    assert program.exists(), "mlflow is not installed here: run `make mlflow`"
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(program), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "kept")),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with ExitStack() as stack, (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            cwd=folder,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | quiet,
            start_new_session=True,
        )
        stack.callback(server.wait)
        stack.callback(lambda: os.killpg(server.pid, signal.SIGKILL))
        found = MlflowServer(port)
        for _ in range(3_000):
            try:
                urlopen(f"{found.url}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.1)
        yield found
