"""Greedy text generation through a runner."""

from __future__ import annotations

from typing import Any

import numpy as np

from pifa_deploy.runners import Runner, Step


def generate(runner: Runner, tokenizer: Any, prompt: str, *, max_new_tokens: int = 48, chat: bool = True) -> str:
    """Returns the continuation of a prompt, the likeliest token each time, ended by the end-of-text token.

    Args:
        runner: answers decoder steps.
        tokenizer: of the same model.
        prompt: plain text.
        max_new_tokens: at most this many tokens.
        chat: send the prompt as one user message where the tokenizer has a chat template; else continue it.

    Raises:
        ValueError: the prompt holds no token, or `max_new_tokens` is below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = np.array(tokenizer(prompt, add_special_tokens=False).input_ids, np.int64)
    if not len(ids):
        raise ValueError(f"the prompt {prompt!r} holds no token; give some text")
    cache, past, produced = None, 0, list[int]()
    while len(produced) < max_new_tokens:
        logits, cache = runner.step(Step.after(past, ids), cache)
        past += len(ids)
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        produced.append(token)
        ids = np.array([token], np.int64)
    text: str = tokenizer.decode(produced, skip_special_tokens=True)
    return text.strip()
