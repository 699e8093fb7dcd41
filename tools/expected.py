"""What transformers itself makes of the questions of `asked.py`. Imports nothing of this project.

Run as `python tools/expected.py < questions.json`.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer


def scores(model: Any, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first, given those before it."""
    given = torch.tensor([tokens])
    logits = model(input_ids=given).logits[0, :-1].float()
    found: list[float] = logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0].tolist()
    return found


def answer(model: Any, tokenizer: Any, question: str, tokens: int) -> str:
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    asked, found = json.load(sys.stdin), {}
    for folder in asked["models"]:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.inference_mode():
            found[folder] = {
                "scores": [scores(model, tokens) for tokens in asked["prompts"]],
                "answer": answer(model, tokenizer, asked["question"], asked["new_tokens"]),
            }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
