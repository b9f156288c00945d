"""Training a small OLMoE-shaped language model on one core, so that its router has something to say.

The experts run as one loop over slices of the sorted tokens (no padding, no one-hot), and the load is
balanced *per layer*: the library's own auxiliary loss concatenates the layers and balances only their sum,
which leaves single layers badly skewed.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_LOOP = "moesim_loop"


@dataclass(frozen=True)
class Recipe:
    """How long and how the model is trained.

    Attributes:
        minutes: CPU minutes of this process; the learning rate follows them, so a busy machine trains as
            well.
        seed: of the weights and of the order of the text.
        batch_size, sequence_tokens: sequences in a step, tokens in a sequence.
        learning_rate: peak of AdamW's; warm-up over 3 % of the time, then a cosine down to 5 % of the peak.
        balance: factor of each layer's own load-balancing loss; 0 leaves the router alone.
        z_loss: factor of each layer's squared log-sum-exp of router logits.
    """

    minutes: float
    seed: int
    batch_size: int = 8
    sequence_tokens: int = 256
    learning_rate: float = 3e-3
    balance: float = 0.01
    z_loss: float = 0.001


@dataclass(frozen=True)
class Outcome:
    """What a training came to.

    Attributes:
        steps, tokens: steps made and tokens seen.
        cpu_minutes: CPU time of the training.
        loss: mean next-token loss of the last twentieth of the steps, nats.
        held_out_loss: next-token loss on the held-out text, nats.
        balance_L: [L] balancing loss of each layer over the same steps; 1 is perfectly even.
    """

    steps: int
    tokens: int
    cpu_minutes: float
    loss: float
    held_out_loss: float
    balance_L: tuple[float, ...]


def olmoe_shape(vocabulary: int, *, hidden: int = 128, expert_width: int = 32, heads: int = 4) -> OlmoeConfig:
    """OLMoE-1B-7B's routing shape, 16 layers of 64 experts with 8 chosen, at a tiny width."""
    return OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=expert_width,
        num_hidden_layers=16,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=1024,
        norm_topk_prob=False,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )


def experts_loop(module: Any, hidden_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Gated experts over tokens sorted by expert; [T, H] -> [T, H], as the library's own implementations."""
    num_tokens, top_k = expert_ids_TK.shape
    order = expert_ids_TK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(expert_ids_TK.reshape(-1), minlength=module.num_experts).tolist()
    rows = hidden_TH[order // top_k]
    out = [
        torch.nn.functional.linear(_gated(module, torch.nn.functional.linear(part, up)), down)
        for part, up, down in zip(
            torch.split(rows, counts), module.gate_up_proj.unbind(0), module.down_proj.unbind(0), strict=True
        )
    ]
    weighted = torch.cat(out) * weights_TK.reshape(-1)[order, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return weighted[back].view(num_tokens, top_k, -1).sum(1)


def _gated(module: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    activated: Tensor = module.act_fn(gate)
    return activated * up


def random_model(config: OlmoeConfig, seed: int) -> Any:
    """The model as it is before any training."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_LOOP, experts_loop)
    torch.manual_seed(seed)
    return OlmoeForCausalLM(config)


def train(model: Any, tokens: NDArray[np.int64], held_out: NDArray[np.int64], recipe: Recipe, log: Path) -> Outcome:
    """Train `model` in place for `recipe.minutes` of CPU time; a line of progress every 20 steps goes to
    `log`.
    """
    model.train()
    model.set_experts_implementation(EXPERTS_LOOP)
    routers: list[Tensor] = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda _module, _args, output: routers.append(output[0]))
        for layer in model.model.layers
    ]
    optimizer = _adamw(model, recipe)
    history: list[tuple[float, list[float]]] = []
    start_s = time.process_time()
    batches = _batches(tokens, recipe)
    while (done := (time.process_time() - start_s) / (60 * recipe.minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * min(done / 0.03 + 0.01, 0.525 + 0.475 * math.cos(math.pi * done))
        routers.clear()
        batch = next(batches)
        loss = _next_token_loss(model, batch)
        balance_L, z_L = _router_losses(routers, model.config.num_experts_per_tok)
        (loss + recipe.balance * balance_L.sum() + recipe.z_loss * z_L.sum()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append((loss.item(), balance_L.tolist()))
        if len(history) % 20 == 0:
            _tell(log, recipe, history, done)
    for hook in hooks:
        hook.remove()
    last = history[-max(1, len(history) // 20) :]
    return Outcome(
        steps=len(history),
        tokens=len(history) * recipe.batch_size * recipe.sequence_tokens,
        cpu_minutes=(time.process_time() - start_s) / 60,
        loss=float(np.mean([step[0] for step in last])),
        held_out_loss=_held_out_loss(model, held_out, recipe.sequence_tokens),
        balance_L=tuple(np.mean([step[1] for step in last], axis=0).round(3).tolist()),
    )


def _adamw(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)


def _batches(tokens: NDArray[np.int64], recipe: Recipe) -> Iterator[Tensor]:
    """Sequences of the text in a random order, every one once per pass, [batch, sequence_tokens + 1]."""
    generator = np.random.default_rng(recipe.seed)
    starts = np.arange(0, len(tokens) - recipe.sequence_tokens - 1, recipe.sequence_tokens)
    within = np.arange(recipe.sequence_tokens + 1)
    while True:
        order = generator.permutation(starts)
        for first in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
            yield torch.from_numpy(tokens[order[first : first + recipe.batch_size, None] + within])


def _next_token_loss(model: Any, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def _router_losses(logits: list[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """Per layer: E x sum over experts of (share of assignments x mean probability), and mean squared
    log-sum-exp.
    """
    logits_LTE = torch.stack(logits)
    probability_LTE = logits_LTE.softmax(-1)
    num_layers, num_tokens, num_experts = logits_LTE.shape
    chosen = probability_LTE.detach().topk(top_k, dim=-1, sorted=False).indices.flatten(1)
    counts_LE = torch.zeros(num_layers, num_experts).scatter_add_(1, chosen, torch.ones(chosen.shape))
    balance_L = num_experts * (counts_LE / (num_tokens * top_k) * probability_LTE.mean(1)).sum(-1)
    return balance_L, logits_LTE.logsumexp(-1).square().mean(1)


@torch.no_grad()
def _held_out_loss(model: Any, tokens: NDArray[np.int64], sequence_tokens: int) -> float:
    model.eval()
    num = min(64, (len(tokens) - 1) // sequence_tokens)
    losses = [
        _next_token_loss(model, torch.from_numpy(tokens[None, s * sequence_tokens : (s + 1) * sequence_tokens + 1]))
        for s in range(num)
    ]
    return float(torch.stack(losses).mean())


def _tell(log: Path, recipe: Recipe, history: list[tuple[float, list[float]]], done: float) -> None:
    loss = np.mean([step[0] for step in history[-20:]])
    balance_L = np.mean([step[1] for step in history[-20:]], axis=0)
    line = (
        f"step {len(history):5d}  tokens {len(history) * recipe.batch_size * recipe.sequence_tokens:9d}  "
        f"{100 * done:5.1f} %  loss {loss:.3f}  balance mean {balance_L.mean():.3f} max {balance_L.max():.3f}"
    )
    print(line, file=sys.stderr)
    with log.open("a") as out:
        out.write(line + "\n")
