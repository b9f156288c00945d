"""`python -m moesim.capture.tiny`: train a tiny model with OLMoE-1B-7B's routing shape, and capture its
routing.

The shape (16 layers, 64 experts, 8 chosen) is the published model's; the router is our own, trained for
minutes on text from this machine. Nothing here says what the published model's router does.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from moesim.capture.capture import capture
from moesim.capture.corpus import Document, documents
from moesim.capture.training import Recipe, olmoe_shape, random_model, train
from moesim.files.traces import read_trace
from moesim.routing.statistics import statistics
from moesim.routing.trace import RoutingTrace

VOCABULARY = 4096
NAME = "olmoe-shape-16x64"


def prepare(folder: Path, recipe: Recipe) -> None:
    """Train tokenizer and model from nothing; writes `trained/`, `random/` and `training.json`.

    Raises:
        ValueError: no text was found on this machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = documents()
    learned = [document for document in corpus if not document.held_out]
    held_out = [document for document in corpus if document.held_out]
    tokenizer = train_tokenizer(learned)
    tokens = encode(tokenizer, learned, recipe.seed)
    model = random_model(olmoe_shape(VOCABULARY), recipe.seed)
    _save(folder / "random", model, tokenizer)
    outcome = train(model, tokens, encode(tokenizer, held_out, recipe.seed), recipe, folder / "training.log")
    _save(folder / "trained", model, tokenizer)
    facts = {
        "recipe": asdict(recipe),
        "outcome": asdict(outcome),
        "characters": {
            kind: sum(len(d.text) for d in learned if d.kind == kind) for kind in sorted({d.kind for d in learned})
        },
        "tokens_of_corpus": len(tokens),
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=1))


def train_tokenizer(corpus: list[Document]) -> Tokenizer:
    """A byte-level BPE of `VOCABULARY` entries; 0 pads, 1 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in corpus), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, corpus: list[Document], seed: int) -> NDArray[np.int64]:
    """The corpus as one row of token ids, documents shuffled, each ended by <eos>."""
    order = np.random.default_rng(seed).permutation(len(corpus))
    pieces = [[*tokenizer.encode(corpus[index].text).ids, 1] for index in order]
    return np.concatenate([np.asarray(piece, dtype=np.int64) for piece in pieces])


def held_out_texts() -> list[str]:
    """The held-out documents, kinds taken in turn, so that any few requests have many topics.

    The first third of each is left out: half of all files begin with the same licence.
    """
    of_kind: dict[str, list[str]] = {}
    for document in documents():
        if document.held_out:
            body = document.text[document.text.find("\n", len(document.text) // 3) + 1 :]
            of_kind.setdefault(document.kind, []).append(body)
    longest = max(map(len, of_kind.values()))
    return [texts[turn] for turn in range(longest) for texts in of_kind.values() if turn < len(texts)]


def capture_both(folder: Path, seed: int, num_requests: int) -> None:
    """Traces of the trained and of the untrained router on the same prompts, and a table of both."""
    facts = json.loads((folder / "training.json").read_text())
    outcome = facts["outcome"]
    shape = "16 layers x 64 experts, top-8 (the routing shape of OLMoE-1B-7B), hidden 128, expert width 32"
    trained = (
        f"{outcome['cpu_minutes']:.1f} CPU minutes, {outcome['tokens']} tokens, loss "
        f"{outcome['loss']:.2f} nats, "
        f"held out {outcome['held_out_loss']:.2f} nats"
    )
    traces = {}
    for origin in ("trained", "random"):
        path = folder / f"{NAME}{'' if origin == 'trained' else '-random'}.parquet"
        capture(
            folder / origin,
            held_out_texts(),
            path,
            num_requests=num_requests,
            prompt_tokens=(96, 128),
            output_tokens=64,
            batch_size=16,
            seed=seed,
            name=path.stem,
            model_name=f"tiny OLMoE-shaped model ({origin} router, not the published one)",
            origin=origin,
            provenance={
                "script": f"python -m moesim.capture.tiny --minutes {facts['recipe']['minutes']:g} --seed {seed}",
                "date": date.today().isoformat(),
                "model": shape,
                "training": trained if origin == "trained" else "none",
                "text": "held-out files of Debian: Python, C headers, manual pages (en, de, fr), Perl, documentation",
                "licence": "routing data: Apache-2.0; the texts keep the licences of their Debian packages",
            },
        )
        traces[origin] = read_trace(path)
    table = comparison(traces["trained"], traces["random"])
    (folder / "statistics.md").write_text(table)
    click.echo(table)


def comparison(trained: RoutingTrace, random: RoutingTrace) -> str:
    """A Markdown table of the statistics of both traces: mean over layers, and the range."""
    both = statistics(trained), statistics(random)
    lines = ["| mean over layers (least to most) | trained | random init |", "|---|---|---|"]
    for name in both[0]:
        cells = [
            f"{np.mean(values[name]):.3g} ({np.min(values[name]):.3g} to {np.max(values[name]):.3g})" for values in both
        ]
        lines.append(f"| `{name}` | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def _save(folder: Path, model: Any, tokenizer: Tokenizer) -> None:
    model.save_pretrained(folder)
    fast: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )
    fast.save_pretrained(folder)


@click.command()
@click.option("--minutes", type=float, default=20.0, show_default=True, help="CPU minutes of training.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--requests", type=int, default=64, show_default=True, help="Requests of the captured traces.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/tiny"), show_default=True)
def main(minutes: float, seed: int, requests: int, out: Path) -> None:
    """Train the tiny model into OUT, unless OUT holds a trained one, and capture its routing there."""
    torch.set_num_threads(1)
    if not (out / "training.json").exists():
        prepare(out, Recipe(minutes=minutes, seed=seed))
    capture_both(out, seed, requests)


if __name__ == "__main__":
    main()
