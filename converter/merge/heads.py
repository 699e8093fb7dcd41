"""Heads that an adapter was trained with and the base lacks: which class has them, and how to get such a base."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converter.read.header import TensorHeader

_TASKS = {
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
"""PEFT's task_type → how transformers calls classes with such a head."""
_HEADS = frozenset(["score", "classifier", "qa_outputs", "classification_head", "pre_classifier"])
_VALUE_HEADS = frozenset(["v_head", "value_head", "summary"])
_A_HEAD = re.compile(r"(LMHead|For[A-Z]\w*)?(Model)?$")


def advice_on(name: str, config: Mapping[str, Any], tensor: TensorHeader | None, class_name: str) -> str | None:
    """What to do about a module or tensor of the adapter that the base lacks; None if it is no head that is known.

    `tensor` is that of the head, (labels, …), where the adapter has it whole; `class_name` the base's class.
    """
    words = set(name.split("."))
    if words & _VALUE_HEADS:
        return "it is a value head of reinforcement learning, which no merged model has: remove it from the adapter"
    if not words & _HEADS:
        return None
    labels = f"num_labels={tensor.shape[0]}" if tensor is not None and tensor.shape else "num_labels=…"
    return f"it is the head of {_class_with_head(config, class_name)}: {_how(config, labels)}"


def advice_on_lost_head(config: Mapping[str, Any], class_name: str) -> str:
    """The end of a message about a head that neither base nor adapter has."""
    if config.get("task_type") not in _TASKS:
        return ""
    return (
        f": the head of {_class_with_head(config, class_name)} (task_type {config['task_type']}) was lost when the "
        "adapter was saved; save it again from the model that was trained"
    )


def _class_with_head(config: Mapping[str, Any], class_name: str) -> str:
    trained = config.get("auto_mapping")
    if isinstance(trained, Mapping) and isinstance(named := trained.get("base_model_class"), str):
        return named[:100]
    return f"{_A_HEAD.sub('', class_name)}For{_task(config)}"


def _task(config: Mapping[str, Any]) -> str:
    return _TASKS.get(str(config.get("task_type")), "SequenceClassification")


def _how(config: Mapping[str, Any], labels: str) -> str:
    loaded = f"AutoModelFor{_task(config)}.from_pretrained(BASE, {labels})"
    return f"save {loaded} with save_pretrained(FOLDER), and give FOLDER as `base`"
