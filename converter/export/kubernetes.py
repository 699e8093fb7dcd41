"""Manifests for Kubernetes: a job that converts, and a vLLM deployment that keeps answering during an update."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from converter.errors import BadRecipe
from converter.export.served import Served, Serving
from converter.recipe import Recipe

PORT = 8000
USER = 1000
_MODELS = "/models"
_CLAIM = "models"
_SECRET = {"secretRef": {"name": "stores", "optional": True}}
"""Of which the values are environment variables: HF_TOKEN, AWS_ACCESS_KEY_ID …"""
_GATE, _REFUSED = 4, 2
"""Exit codes."""


def manifests(
    served: Served, serving: Serving, arguments: Sequence[str], environment: Mapping[str, str], image: str
) -> dict[str, str]:
    """File → text. `arguments` of `vllm serve`; `image` is the server's, unless `serving` names another."""
    name = re.sub(r"[^a-z0-9-]+", "-", served.name).strip("-")
    name = name if name[:1].isalpha() else f"model-{name}"  # a service's name begins with a letter
    found = {
        "kubernetes/serve.yaml": _yaml(
            _deployment(name, served, serving, arguments, environment, image), _service(name)
        )
    }
    if (job := job_file(served)) is not None:
        found["kubernetes/convert.yaml"] = _yaml(_claim(), _config_map(name, job), _job(name, serving))
    return found


def job_file(served: Served) -> dict[str, Any] | None:
    """The file of jobs that makes the output again, from its receipt; None where that can't say all of it."""
    try:
        stated = served.receipt or {}
        recipe, origin = Recipe.from_json(stated["recipe"]).as_json(), stated["origin"]
        inputs = {what: (origin[f"{what}_name"], origin[f"{what}_commit"]) for what in ("base", "adapter")}
        has_adapter = origin["adapter"] is not None
    except (KeyError, TypeError, BadRecipe):
        return None
    if recipe.get("combine") is not None or recipe.get("calibration") is not None:
        return None  # it names no adapter of several, and has no text
    usual = Recipe().as_json()
    job: dict[str, Any] = {"out": f"{_MODELS}/{served.name}"}
    for what, (name, commit) in inputs.items():
        if what == "base" or has_adapter:
            job[what] = name or f"{_MODELS}/inputs/{what}"
            job |= {f"{what}_revision": commit} if commit is not None else {}
    return job | {key: value for key, value in recipe.items() if key != "combine" and value != usual.get(key)}


def _deployment(
    name: str, served: Served, serving: Serving, arguments: Sequence[str], environment: Mapping[str, str], image: str
) -> dict[str, Any]:
    """A new version is started beside the old one, which goes when the new one answers."""
    fingerprint = "unknown" if served.receipt is None else str(served.receipt["fingerprint"])
    health = {"httpGet": {"path": "/health", "port": PORT}}
    gpus = {"nvidia.com/gpu": str(serving.gpus)}
    mounts = [{"name": "memory", "mountPath": "/dev/shm"}, {"name": "scratch", "mountPath": "/tmp"}]
    volumes: list[dict[str, Any]] = [
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    if serving.is_path:
        mounts.append({"name": "models", "mountPath": _MODELS, "readOnly": True})  # type: ignore[dict-item]
        volumes.append({"name": "models", "persistentVolumeClaim": {"claimName": _CLAIM, "readOnly": True}})
    container = {
        "name": "vllm",
        "image": serving.image or image,
        "command": ["vllm", "serve"],
        "args": [*arguments, "--host", "0.0.0.0", "--port", str(PORT)],
        "env": [{"name": key, "value": value} for key, value in {**environment, "HOME": "/tmp"}.items()],
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": {"limits": gpus},
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": 180},
        "readinessProbe": {**health, "periodSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 20, "failureThreshold": 6},
        "securityContext": _locked_down(),
        "volumeMounts": mounts,
    }
    if not serving.is_path:
        container["envFrom"] = [_SECRET]
    pod = {
        "securityContext": _nobody(),
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": volumes,
    }
    labels = {"app.kubernetes.io/name": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            # Another fingerprint is another pod: to apply this file for a new version updates the deployment.
            "template": {"metadata": {"labels": labels, "annotations": {"fingerprint": fingerprint}}, "spec": pod},
        },
    }


def _service(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "selector": {"app.kubernetes.io/name": name},
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _claim() -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": _CLAIM},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "500Gi"}}},
    }


def _config_map(name: str, job: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"{name}-convert"},
        "data": {"job.json": _Block(json.dumps(job, indent=2) + "\n")},
    }


def _job(name: str, serving: Serving) -> dict[str, Any]:
    """A pod that dies is replaced, and the new one resumes. What a gate or a refusal ended is not tried again."""
    container = {
        "name": "convert",
        "image": serving.converter_image,
        "args": ["pipeline", "/job/job.json", "--work", f"{_MODELS}/.work/{name}", "--overwrite", "--events", "-"],
        "env": [{"name": "HOME", "value": "/scratch"}, {"name": "XDG_CACHE_HOME", "value": "/scratch/cache"}],
        "envFrom": [_SECRET],
        "resources": {"requests": {"cpu": "2", "memory": "4Gi"}, "limits": {"memory": "8Gi"}},
        "securityContext": _locked_down(),
        "volumeMounts": [
            {"name": "job", "mountPath": "/job", "readOnly": True},
            {"name": "models", "mountPath": _MODELS},
            {"name": "scratch", "mountPath": "/scratch"},
        ],
    }
    ends = [
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "convert", "operator": "In", "values": [_REFUSED, _GATE]},
        }
    ]
    pod = {
        "restartPolicy": "Never",
        "securityContext": {**_nobody(), "fsGroup": USER},
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [
            {"name": "job", "configMap": {"name": f"{name}-convert"}},
            {"name": "models", "persistentVolumeClaim": {"claimName": _CLAIM}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{name}-convert"},
        "spec": {"backoffLimit": 3, "podFailurePolicy": {"rules": ends}, "template": {"spec": pod}},
    }


def _nobody() -> dict[str, Any]:
    return {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}}


def _locked_down() -> dict[str, Any]:
    return {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}


class _Block(str):
    """A text of several lines, written as it is."""

    __slots__ = ()


def _yaml(*documents: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def block(dumper: Any, text: _Block) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", str(text), style="|")

    Dumper.add_representer(_Block, block)
    return "---\n".join(yaml.dump(one, Dumper=Dumper, sort_keys=False, allow_unicode=True) for one in documents)
