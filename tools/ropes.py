"""`make loaders`: whether transformers 4.57 computes the positions from an output's config that version 5 does.

`make`: write configs of every model type with rope that both versions have, with several kinds of scaling, spelled for
both. `compute`: what the transformers that is here makes of them; imports nothing of this project. `compare`: print
where the two differ although nothing was said.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

THETA = 12_345.0
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {"factor": 8.0, **LLAMA3},
    "longrope": {"original_max_position_embeddings": 64},
}


def make(root: Path) -> None:
    from converter.model.version_4 import MODEL_TYPES, misread
    from converter.plan.rope import in_words_of_all_versions

    root.mkdir(parents=True, exist_ok=True)
    configs = {}
    for name in sorted(MODEL_TYPES & set(transformers.CONFIG_MAPPING)):
        for kind, config in _configs(name):
            spelled, _ = in_words_of_all_versions(config, known=True)
            configs[f"{name} {kind}"] = {"base": config, "spelled": spelled, "said": list(misread(spelled))}
    (root / "ropes.json").write_text(json.dumps(configs))


def _configs(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As version 5 saves them, with each kind of scaling that it takes for this model type."""
    config_class = transformers.CONFIG_MAPPING[name]
    try:
        usual = config_class()
    except Exception:  # a class that has no defaults
        return
    text = usual if getattr(usual, "rope_parameters", None) else getattr(usual, "text_config", usual)
    rope = getattr(text, "rope_parameters", None)
    if not rope:
        return
    for kind, scaling in {"as it comes": None, **KINDS}.items():
        try:
            changes = (
                {} if scaling is None else {"rope_parameters": _stated(name, text, {"rope_type": kind, **scaling})}
            )
            made = type(text)(**changes).to_dict()
        except Exception:  # a kind that this model type doesn't take
            continue
        whole = made if text is usual else {**usual.to_dict(), "text_config": made}
        yield kind, json.loads(json.dumps({**whole, "model_type": name}, default=str))


def _stated(name: str, text: Any, scaling: dict[str, Any]) -> dict[str, Any]:
    rope = text.rope_parameters
    kept = {key: value for key, value in rope.items() if key.startswith(("mrope", "partial"))}
    stated = {"rope_theta": THETA, **kept, **scaling}
    if scaling["rope_type"] == "longrope":
        stated |= _factors(name, text, rope)
    layered = any(isinstance(part, dict) for part in rope.values())
    return {key: dict(stated) for key in rope} if layered else stated


def _factors(name: str, text: Any, rope: dict[str, Any]) -> dict[str, Any]:
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    size = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    factors = {"short_factor": [1.0 + i / 9 for i in range(size)], "long_factor": [2.0 + i for i in range(size)]}
    return factors | ({"short_mscale": 1.25, "long_mscale": 1.5} if name == "phimoe" else {})


def compute(root: Path) -> None:
    found = {}
    for name, of in json.loads((root / "ropes.json").read_text()).items():
        for which in ("base", "spelled"):
            try:
                config = transformers.CONFIG_MAPPING[name.split()[0]].from_dict(of[which])
                if not any(hasattr(config, key) for key in ("rope_parameters", "rope_theta")):
                    config = config.text_config
                found[f"{name} {which}"] = _rotary(config)
            except Exception as exc:  # whatever it raises is what it makes of this config
                found[f"{name} {which}"] = f"{type(exc).__name__}: {' '.join(str(exc).split())[:160]}"
    (root / f"ropes-{transformers.__version__}.json").write_text(json.dumps(found))


def _rotary(config: Any) -> dict[str, list[float]]:
    """Frequencies and the scaling of attention, by class."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    found = {}
    for name, kind in inspect.getmembers(module, inspect.isclass):
        is_it = name.endswith("RotaryEmbedding") and kind.__module__ == module.__name__
        if is_it and list(inspect.signature(kind).parameters)[:1] == ["config"]:
            made = kind(config)
            for layers in ("", "full_attention_"):
                if hasattr(made, f"{layers}inv_freq"):
                    values = getattr(made, f"{layers}inv_freq").double().flatten().tolist()
                    found[name] = [*values, float(getattr(made, f"{layers}attention_scaling", 1.0))]
    return found


def compare(root: Path) -> int:
    """Print where version 4 computes other positions than version 5; how many of these nothing was said of."""
    configs = json.loads((root / "ropes.json").read_text())
    by_version = {file.stem[6]: json.loads(file.read_text()) for file in root.glob("ropes-*.json")}
    silent, same = 0, 0
    for name, of in configs.items():
        wanted, again = by_version["5"][f"{name} base"], by_version["5"][f"{name} spelled"]
        found = by_version["4"][f"{name} spelled"]
        if isinstance(wanted, str) or not wanted:  # version 5 can't run it either
            continue
        if again == wanted and _alike(wanted, found) and not of["said"]:
            same += 1
            continue
        silent += again != wanted or not of["said"]
        why = (
            found
            if isinstance(found, str)
            else "other frequencies"
            if again == wanted
            else "version 5 reads it otherwise"
        )
        print(f"{name}: {why}: {of['said'] or 'NOTHING IS SAID'}")
    print(f"{same} configs give both versions the same positions; of {silent} others nothing is said")
    return silent


def _alike(wanted: dict[str, list[float]], found: dict[str, list[float]] | str) -> bool:
    return not isinstance(found, str) and all(
        len(values) == len(wanted[name]) and all(map(_close, values, wanted[name]))
        for name, values in found.items()
        if name in wanted
    )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-9)


if __name__ == "__main__":
    what, root = sys.argv[1], Path(sys.argv[2])
    sys.exit(min({"make": make, "compute": compute, "compare": compare}[what](root) or 0, 1))
