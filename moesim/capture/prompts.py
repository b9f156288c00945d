"""From texts to prompts: pieces of the asked lengths, spread evenly over the texts, none used twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_texts(path: Path) -> list[str]:
    """The texts of a file: of a `.jsonl`, the member `text` of each line; of any other, the whole file as
    one.

    Raises:
        ValueError: the file is missing, not UTF-8, or a line is no JSON object with a string `text`.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the text: {error}; give a UTF-8 text file or a .jsonl") from error
    if path.suffix != ".jsonl":
        return [content]
    texts, mistakes = [], []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            texts.append(value["text"])
        elif line.strip():
            mistakes.append(str(number))
    if mistakes:
        raise ValueError(
            f'{path}: lines {", ".join(mistakes)}: each line must be a JSON object such as {{"text": "..."}}'
        )
    return texts


def cut_prompts(
    tokenizer: Any, texts: Sequence[str], num_requests: int, prompt_tokens: tuple[int, int], seed: int
) -> list[NDArray[np.int64]]:
    """`num_requests` prompts of token ids, lengths drawn evenly from `prompt_tokens`, the bounds included.

    Requests are dealt to the texts in turn; the j-th prompt of a text starts where its j-th equal part
    starts. Texts shorter than the longest prompt are left out.

    Raises:
        ValueError: a length or count is not positive, or the texts are too short for so many prompts.
    """
    shortest, longest = prompt_tokens
    if num_requests < 1 or not 1 <= shortest <= longest:
        raise ValueError(
            f"num_requests must be at least 1 and prompt_tokens a range of at least 1, shortest first; "
            f"given {num_requests} and {shortest}-{longest}"
        )
    encoded = [np.asarray(tokenizer.encode(text, verbose=False), dtype=np.int64) for text in texts]
    usable = [ids for ids in encoded if len(ids) >= longest]
    room = sum(len(ids) // longest for ids in usable)
    if room < num_requests:
        raise ValueError(
            f"the {len(texts)} texts hold {room} prompts of {longest} tokens; {num_requests} are asked; "
            "give more text, fewer requests or shorter prompts"
        )
    shares = _deal(num_requests, [len(ids) // longest for ids in usable])
    pieces = [
        [ids[start * len(ids) // share :] for start in range(share)] for ids, share in zip(usable, shares, strict=True)
    ]
    in_turn = [text[turn] for turn in range(max(shares)) for text in pieces if turn < len(text)]
    lengths = np.random.default_rng(seed).integers(shortest, longest + 1, num_requests)
    return [ids[:length] for ids, length in zip(in_turn, lengths, strict=True)]


def _deal(num_requests: int, rooms: list[int]) -> list[int]:
    """How many prompts each text gives, dealt one a round to the texts that have room left."""
    shares = [0] * len(rooms)
    while num_requests:
        for text, room in enumerate(rooms):
            if num_requests and shares[text] < room:
                shares[text] += 1
                num_requests -= 1
    return shares
