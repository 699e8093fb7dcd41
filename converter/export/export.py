"""Write what a server needs to serve an output. Start reading here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from converter.errors import BadOutput
from converter.export import sglang, tgi, triton, vllm
from converter.export.served import Served, Serving
from converter.write.durable import LOCAL_DISK, writing

SERVERS: dict[str, Callable[[Served, Serving], dict[str, str]]] = {
    "vllm": vllm.files,
    "sglang": sglang.files,
    "tgi": tgi.files,
    "triton": triton.files,
}


def export(out: Path, server: str, folder: Path, serving: Serving = Serving()) -> list[str]:
    """Write the files that a server needs into a new folder; their names.

    `Unsupported` says why a server can't serve it, `BadOutput` if the folder holds something.
    """
    served = Served.of(out)
    texts = SERVERS[server](served, serving if serving.model else replace(serving, model=f"/models/{served.name}"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadOutput(f"{folder}: exists and is not empty; choose another folder, or remove it")
    for name, text in texts.items():
        path = folder / name
        with writing(path):
            LOCAL_DISK.make_folder(path.parent)
            LOCAL_DISK.put(path, text.encode())
            if name.endswith(".sh"):
                path.chmod(path.stat().st_mode | 0o111)
    return sorted(texts)
