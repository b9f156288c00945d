"""Hooks that read the routing of any Hugging Face MoE model from what its experts are given.

The true routing is what reaches the experts module: `(hidden, top_k_index, top_k_weights)`. It is never
computed again from router logits, since many families bend the choice afterwards (groups, correction biases,
hashes). The prediction for the next layer is made by the next layer's own router, applied to what enters this
layer's router.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ROUTER_NAME = re.compile(r"(Router|Gate|Gating|MoEV1Gate)$")
_LAYER_NAME = re.compile(r"(?:^|\.)(?:layers|h|blocks|decoder_layers)\.(\d+)\.")


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: its index in the whole model, the experts module, and the router where it is a
    module.
    """

    index: int
    experts: nn.Module
    router: nn.Module | None


class Routing(NamedTuple):
    """The routing of one forward pass over N tokens, best expert first.

    Attributes:
        expert_ids: int64 [N, L, K].
        weights: float32 [N, L, K].
        predicted: int64 [N, L - 1, K], or None where the routers cannot be asked.
    """

    expert_ids: Tensor
    weights: Tensor
    predicted: Tensor | None


def moe_layers(model: Any) -> tuple[MoeLayer, ...]:
    """The MoE layers of `model` in order; layers beyond the model's depth (multi-token prediction) do not
    count.

    Raises:
        ValueError: the family has no experts module that can be watched.
    """
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    targets = _router_classes(model)
    experts: dict[int, tuple[str, nn.Module]] = {}
    routers: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        where = _LAYER_NAME.search(name)
        if where is None or (depth is not None and int(where[1]) >= depth):
            continue
        if type(module).__name__.endswith("Experts"):
            experts.setdefault(int(where[1]), (name, module))
        elif isinstance(module, targets) or _ROUTER_NAME.search(type(module).__name__):
            routers.setdefault(int(where[1]), module)
    if not experts:
        raise ValueError(_unsupported(model, "no module whose class name ends in 'Experts' in its layers"))
    return tuple(MoeLayer(index, experts[index][1], routers.get(index)) for index in sorted(experts))


class RoutingRecorder:
    """Watches `model` while its `with` block lasts; `take` hands over the routing of the last forward
    pass.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers = moe_layers(model)
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}
        self._predicted: dict[int, Tensor | None] = {}
        self._handles: list[Any] = []
        self._asking = False

    def __enter__(self) -> RoutingRecorder:
        for place, layer in enumerate(self.layers):
            self._handles.append(
                layer.experts.register_forward_pre_hook(
                    lambda _module, args, kwargs, place=place: self._on_experts(place, args, kwargs),
                    with_kwargs=True,
                )
            )
            following = self.layers[place + 1].router if place + 1 < len(self.layers) else None
            if layer.router is not None and following is not None:
                self._handles.append(
                    layer.router.register_forward_pre_hook(
                        lambda _module, args, kwargs, place=place, following=following: self._on_router(
                            place, following, args, kwargs
                        ),
                        with_kwargs=True,
                    )
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self, num_tokens: int) -> Routing:
        """The routing of the forward pass since the last `take`, over its `num_tokens` tokens, pads included.

        Raises:
            ValueError: the experts were not called in every layer with every token once.
        """
        chosen, predicted = self._chosen, self._predicted
        self._chosen, self._predicted = {}, {}
        lacking = [layer.index for place, layer in enumerate(self.layers) if place not in chosen]
        if lacking:
            raise ValueError(_unsupported(self._model, f"its experts of layers {lacking} were not called"))
        shapes = {tuple(ids.shape) for ids, _ in chosen.values()}
        if len(shapes) != 1 or next(iter(shapes))[0] != num_tokens:
            raise ValueError(
                _unsupported(self._model, f"experts were given {sorted(shapes)} (tokens, k) for {num_tokens} tokens")
            )
        places = range(len(self.layers))
        wanted = [predicted.get(place) for place in places[:-1]]
        known = [ids for ids in wanted if ids is not None and tuple(ids.shape) in shapes]
        return Routing(
            torch.stack([chosen[place][0] for place in places], dim=1),
            torch.stack([chosen[place][1] for place in places], dim=1),
            torch.stack(known, dim=1) if known and len(known) == len(wanted) else None,
        )

    def _on_experts(self, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if place in self._chosen:
            raise ValueError(_unsupported(self._model, "its experts are called more than once in a forward pass"))
        ids, weights = _ids_and_weights([*args[1:], *kwargs.values()])
        if ids is None or weights is None:
            raise ValueError(
                _unsupported(self._model, "its experts are not given (hidden, ids [T, K], weights [T, K])")
            )
        self._chosen[place] = _best_first(ids, weights)

    def _on_router(self, place: int, following: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._asking:
            return
        self._asking = True
        try:
            with torch.no_grad():
                output = following(*args, **kwargs)
        finally:
            self._asking = False
        ids, weights = _ids_and_weights(list(output) if isinstance(output, tuple) else [output])
        if ids is not None:
            self._predicted[place] = ids.detach() if weights is None else _best_first(ids, weights)[0]


def _ids_and_weights(values: list[Any]) -> tuple[Tensor | None, Tensor | None]:
    """The integer [T, K] tensor and the float one of its shape; told by type and shape, never by position."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.ndim == 2]
    ids = next((t for t in tensors if not t.is_floating_point() and t.dtype != torch.bool), None)
    if ids is None:
        return None, None
    return ids, next((t for t in tensors if t.is_floating_point() and t.shape == ids.shape), None)


def _best_first(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both ordered by falling weight; some routers return their choice unsorted."""
    weights = weights.detach().float()
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.detach().gather(-1, order), weights.gather(-1, order)


def _router_classes(model: Any) -> tuple[type, ...]:
    """Router classes that the model itself names for its `router_logits` output."""
    found: list[type] = []
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in recorder if isinstance(recorder, list | tuple) else [recorder]:
            target = one if isinstance(one, type) else getattr(one, "target_class", None)
            if isinstance(target, type):
                found.append(target)
    return tuple(dict.fromkeys(found))


def _unsupported(model: Any, because: str) -> str:
    return (
        f"cannot capture the routing of model family {model.config.model_type!r} "
        f"({type(model).__name__}): {because}; "
        "use a family whose MoE block hands (hidden, top_k_index, top_k_weights) to an experts module, "
        "such as "
        "mixtral, olmoe, qwen3_moe or deepseek_v3, or write the trace yourself with "
        "moesim.files.traces.TraceWriter"
    )
