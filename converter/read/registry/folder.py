"""A version of a registered model as a folder: models:/NAME/VERSION, models:/NAME@ALIAS.

The registry says where the files lie. What lies in a bucket or on this machine is read there, as if its address had
been given. What the server itself keeps is listed once, and its files come one by one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from concurrent.futures import wait
from typing import NamedTuple

from converter.errors import HubOffline, InputChanged, StoreFailed, StoreRefused
from converter.read.addresses import is_address, is_bucket, parts_of, path_of
from converter.read.bucket.connection import Entry
from converter.read.bucket.folder import BucketFolder, ObjectsFolder
from converter.read.folder import DEPTH, LocalFolder, is_folder
from converter.read.registry.server import SERVED, Server, Version
from converter.threads import pool

INNER = ("", "model/", "peft/")
"""Where in a version's files a checkpoint or an adapter may lie: MLflow's own flavors put them into folders."""
CONFIGS = frozenset({"config.json", "adapter_config.json"})
TRIES = 5
"""How many times the download of a file is begun, or continued after the connection broke."""

_NAME = re.compile(r"(?P<name>[^/@:\"'`]+)(?:/(?P<number>[0-9]+)|@(?P<alias>[\w-]+))?")
_TICK = 0.1


class Named(NamedTuple):
    """What an address names."""

    name: str
    number: int | None
    alias: str | None


def named(address: str) -> Named:
    """The parts of an address; `StoreRefused` if it is none."""
    _, rest = parts_of(address)
    found = _NAME.fullmatch(rest.rstrip("/"))
    if found is None:
        raise StoreRefused(f"{address[:120]}: give models:/NAME/VERSION or models:/NAME@ALIAS, or models:/NAME as OUT")
    return Named(found["name"], int(found["number"]) if found["number"] else None, found["alias"])


def open_version(address: str, *, offline: bool = False) -> LocalFolder | ObjectsFolder:
    """The folder of a version. An alias is asked once: what it names later makes no difference.

    `HubOffline` if nothing may be reached, `StoreRefused` if there is no such version, or its files can't be read.
    """
    name, number, alias = named(address)
    if offline:
        raise HubOffline(f"{address}: `offline` asks no registry; give a folder")
    if number is None and alias is None:
        raise StoreRefused(f"{address}: which version? give models:/{name}/VERSION or models:/{name}@ALIAS")
    server = Server(address)
    version = server.version(name, number) if number is not None else server.version_of_alias(name, str(alias))
    place = server.place_of(version)
    if place.startswith(f"{SERVED}:"):
        return ObjectsFolder(Artifacts(server, version, place))
    if is_bucket(place):
        return BucketFolder(place)
    path = path_of(place)
    if path is None or (is_address(place) and not place.lower().startswith("file://")):
        raise StoreRefused(
            f"{address}: its files lie at {place.partition(':')[0]}:…, which this tool can't read; copy them here, and "
            "give that folder"
        )
    if not is_folder(path):
        raise StoreRefused(
            f"{address}: its files lie in {path}, a folder of the server's machine; let the server give them out, as "
            "it does by default, or copy them here"
        )
    return LocalFolder(path)


class Artifacts:
    """The files of a version that the server keeps.

    The server states no digest, and an ETag that may be another at each request. So what is checked is a file's size;
    SHA256SUMS beside it tells more.
    """

    def __init__(self, server: Server, version: Version, place: str) -> None:
        self._server, self._version, self._place = server, version, place.rstrip("/")
        self.label = f"models:/{version.name}/{version.number}"
        self.last_name = version.name
        server.label = self.label

    def entries(self) -> dict[str, Entry]:
        found: dict[str, int] = {}
        folders = [""]
        while folders:
            for name, size in self._server.names_at(self._place, folders.pop()):
                if size is not None:
                    found[name] = size
                elif name.count("/") <= DEPTH:
                    folders.append(name)
        inner = next((inner for inner in INNER if any(inner + name in found for name in CONFIGS)), "")
        self._place = f"{self._place}/{inner}".rstrip("/")
        etag = f"{self.label} {self._version.created}"
        return {
            name.removeprefix(inner): Entry(size, self._version.created, f"{etag} {size}")
            for name, size in found.items()
            if name.startswith(inner)
        }

    def read_part(self, name: str, start: int, end: int, etag: str) -> memoryview:
        with self._server.reading(self._place, name, start, end) as pieces:
            raw = b"".join(pieces)
        if len(raw) != end - start:
            raise InputChanged(f"{self.label}: {name}: {len(raw):,} bytes came, expected {end - start:,}")
        return memoryview(raw)

    def bring(self, name: str, entry: Entry, descriptor: int, progress: Callable[[int], None]) -> None:
        done, ended = 0, False

        def stream() -> None:
            nonlocal done
            with self._server.reading(self._place, name, done, entry.size) as pieces:
                for piece in pieces:
                    written = 0
                    while written < len(piece):
                        written += os.pwrite(descriptor, piece[written:], done + written)
                    done += len(piece)
                    if ended:
                        return

        crew = pool(1, "artifact")
        try:
            for tries_left in reversed(range(TRIES)):
                future = crew.submit(stream) if done < entry.size else None
                while future is not None and not wait([future], _TICK).done:
                    progress(done)
                try:
                    if future is not None:
                        future.result()
                except StoreFailed:
                    if not tries_left:
                        raise
                if done == entry.size:
                    progress(done)
                    return
            raise StoreFailed(
                f"{self.label}: {name}: only {done:,} of {entry.size:,} bytes came; run the same command again"
            )
        finally:
            ended = True
            crew.shutdown(wait=False, cancel_futures=True)
