"""What a server answers: log-probabilities of prompts, and the beginning of an answer.

`make serve-check` runs it in the server's own environment, which has the openai client; it imports nothing of this
project. Run as `python tools/asked.py URL < questions.json`.
"""

from __future__ import annotations

import json
import sys

import openai


def scores(client: openai.OpenAI, model: str, tokens: list[int]) -> list[float]:
    """The log-probability of each token but the first, given those before it."""
    reply = client.completions.create(model=model, prompt=tokens, max_tokens=1, temperature=0, echo=True, logprobs=1)
    found = reply.choices[0].logprobs.token_logprobs[: len(tokens)]
    return [float(value) for value in found[1:]]


def answer(client: openai.OpenAI, model: str, question: str, tokens: int) -> str:
    messages = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, max_tokens=tokens, temperature=0)
    return str(reply.choices[0].message.content)


def main(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=1200, max_retries=0)
    asked, found = json.load(sys.stdin), {}
    for model in asked["models"]:
        try:
            found[model] = {
                "scores": [scores(client, model, tokens) for tokens in asked["prompts"]],
                "answer": answer(client, model, asked["question"], asked["new_tokens"]),
            }
        except openai.APIError as exc:
            found[model] = f"{type(exc).__name__}: {exc}"[:300]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
