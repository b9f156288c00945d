"""Running a batch: prefill, then one token a step, whichever stacks the model has; and the routing of it all.

- A decoder-only model reads the prompts (padded on the left) and writes on.
- An encoder-decoder reads the prompts in its encoder. Its decoder begins with its start token, which counts as the
  prompt, and writes on. One of the two stacks is recorded, since no token passes both.
- An encoder, or a model without a head, reads the prompts (padded on the right) and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moesim.capture.hooks import Routing, RoutingRecorder, UnsupportedFamilyError, watchable_names
from moesim.capture.loading import takes


class Batch(NamedTuple):
    """Tokens of a batch and their routing, [B, S, ...] with pads where `real` is False."""

    tokens: Tensor
    real: Tensor
    positions: Tensor
    num_prompt_columns: int
    routing: Routing


def stacks(model: Any) -> tuple[str | None, ...]:
    """The stacks that can be recorded, the usual one first; None is the only stack of a model with one."""
    if model.config.is_encoder_decoder:
        return ("decoder", "encoder")
    names = [name.split(".") for name in watchable_names(model)]
    if all(any(stack in name for name in names) for stack in ("encoder", "decoder")):
        return ("encoder",)  # a diffusion model: its decoder routes one canvas of tokens again and again
    return (None,)


def check_stack(model: Any, stack: str | None) -> str | None:
    """The stack to record, the usual one of the model unless said.

    Raises:
        ValueError: the model has no such stack, or one in which tokens are not read one after the other.
    """
    known = stacks(model)
    if stack is None or stack in known:
        return stack or known[0]
    if known == (None,):
        raise UnsupportedFamilyError(
            model, f"it is no encoder-decoder, so there is no {stack} to choose; leave the stack out"
        )
    raise UnsupportedFamilyError(
        model, f"its {stack} routes the same places again at every step; only its encoder can be recorded"
    )


def writes(model: Any, stack: str | None) -> bool:
    """Whether the recorded stack generates tokens."""
    return stack != "encoder" and bool(model.can_generate())


@torch.no_grad()
def run_batch(
    model: Any,
    recorder: RoutingRecorder | None,
    prompts: list[NDArray[np.int64]],
    output_tokens: int,
    choose: Callable[[Tensor], Tensor],
    stack: str | None = None,
    phase_ends: Callable[[], None] = lambda: None,
) -> Batch:
    """Prefill and decode one batch.

    Args:
        model: the model, in evaluation mode.
        recorder: watches the model; None runs it bare, and the batch has no routing.
        prompts: token ids of each request.
        output_tokens: tokens that each request writes and reads again.
        choose: the next token of each request from its logits, [B, V] -> [B, 1].
        stack: as `check_stack` says.
        phase_ends: called after the prefill, and after the last step.
    """
    reader = _Reader.of(model, prompts, stack)
    parts = []
    fed = reader.tokens
    for step in range(output_tokens + 1):
        logits = reader.forward(fed)
        if recorder is not None:
            parts.append(_by_request(recorder.take(fed.numel()), len(prompts)))
        if step == 0:
            phase_ends()
        if step == output_tokens:
            break
        fed = choose(logits[:, -1].float().cpu())
        reader.extend(fed)
    phase_ends()
    routing = _join(parts) if parts else Routing(torch.empty(0), torch.empty(0))
    return Batch(reader.tokens, reader.mask.bool(), reader.positions, reader.num_prompt_columns, routing)


@dataclass
class _Reader:
    """What a model has read so far, and how it is given the next tokens."""

    model: Any
    tokens: Tensor
    mask: Tensor
    num_prompt_columns: int
    always: dict[str, Any]
    """What every forward pass is given."""
    own: bool
    """Whether `tokens` go in as input_ids with their mask, rather than as a decoder's."""
    caches: bool
    cache: Any = None

    @classmethod
    def of(cls, model: Any, prompts: list[NDArray[np.int64]], stack: str | None) -> _Reader:
        device = next(model.parameters()).device
        left = writes(model, stack) and stack is None
        tokens, mask = _pad(prompts, _pad_token(model), left=left)
        if stack is None:
            always: dict[str, Any] = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
            return cls(model, tokens, mask, tokens.shape[1], always, True, left)
        if stack == "encoder":
            return cls(model.get_encoder(), tokens, mask, tokens.shape[1], {}, True, False)
        encoded = model.get_encoder()(input_ids=tokens.to(device), attention_mask=mask.to(device))
        start = torch.full((len(prompts), 1), _start_token(model))
        always = {"encoder_outputs": encoded, "attention_mask": mask.to(device)}
        return cls(model, start, torch.ones_like(start), 1, always, False, True)

    @property
    def positions(self) -> Tensor:
        return (self.mask.cumsum(1) - 1).clamp(min=0)

    def extend(self, fed: Tensor) -> None:
        self.tokens = torch.cat([self.tokens, fed], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(fed)], dim=1)

    def forward(self, fed: Tensor) -> Any:
        """The logits after `fed`, the last of `tokens`; None of a model without a head."""
        device = next(self.model.parameters()).device
        given = dict(self.always)
        given["input_ids" if self.own else "decoder_input_ids"] = fed.to(device)
        if self.own:
            given["attention_mask"] = self.mask.to(device)
            if takes(self.model, "position_ids"):
                given["position_ids"] = self.positions[:, -fed.shape[1] :].to(device)
        keeps = "cache" if takes(self.model, "cache") else "past_key_values"
        if self.caches:
            given |= {keeps: self.cache, "use_cache": True}
        output = self.model(**given)
        if self.caches:
            self.cache = output[keeps]
        return output.get("logits")


def _pad(prompts: list[NDArray[np.int64]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Tokens and mask [B, S], 1 for what is real."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), longest), pad)
    mask = torch.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        real = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        tokens[row, real] = torch.from_numpy(prompt)
        mask[row, real] = 1
    return tokens, mask


def _pad_token(model: Any) -> int:
    """The model's own, or 0: what a pad is does not reach any real token."""
    config = model.config.get_text_config()
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < config.vocab_size else 0


def _start_token(model: Any) -> int:
    """What a decoder begins with."""
    for holder in (model.config, getattr(model, "generation_config", None)):
        start = getattr(holder, "decoder_start_token_id", None)
        if isinstance(start, int):
            return start
    raise ValueError(f"{type(model).__name__}: the config has no decoder_start_token_id; a decoder begins with it")


def _by_request(routing: Routing, num_requests: int) -> Routing:
    """[B x S, ...] -> [B, S, ...] on the CPU."""

    def split(part: Tensor) -> Tensor:
        return part.cpu().reshape(num_requests, -1, *part.shape[1:])

    return Routing(
        split(routing.expert_ids),
        split(routing.weights),
        tuple(map(split, routing.predicted)),
        None if routing.scores is None else split(routing.scores),
    )


def _join(parts: list[Routing]) -> Routing:
    """Steps of [B, S, ...] side by side."""
    ids, weights, predicted, scores = zip(*parts, strict=True)
    return Routing(
        torch.cat(ids, dim=1),
        torch.cat(weights, dim=1),
        tuple(torch.cat(steps, dim=1) for steps in zip(*predicted, strict=True)),
        None if scores[0] is None else torch.cat(scores, dim=1),
    )
