"""Hooks that read the routing of a Hugging Face MoE model while it runs, and ask later routers ahead of time.

The prediction for a later layer is made by that layer's own router, applied to what entered this layer's router. It
is asked when the later router is reached, so that the layers need not be known beforehand.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moesim.capture.adapters import (
    ATTENTION,
    EXPERTS,
    PLAIN,
    Adapter,
    Choice,
    adapter_of,
    given_to_experts,
    ranking,
)

_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


class Routing(NamedTuple):
    """The routing of one forward pass over N tokens, best expert first.

    Attributes:
        expert_ids: int64 [N, L, K].
        weights: float32 [N, L, K].
        predicted: for each horizon h = 1, 2, ... int64 [N, L - h, W]; none where the routers cannot be asked.
        scores: float32 [N, L, E], or None.
    """

    expert_ids: Tensor
    weights: Tensor
    predicted: tuple[Tensor, ...] = ()
    scores: Tensor | None = None


@dataclass
class _Call:
    """One layer's routing in one forward pass."""

    layer: str
    choice: Choice | None = None
    scores: Tensor | None = None
    ahead: list[Tensor] = field(default_factory=list)
    """What the routers 1, 2, ... layers before would have predicted for this one."""


class RoutingRecorder:
    """Watches `model` while its `with` block lasts; `take` hands over the routing of the last forward pass.

    Args:
        model: the model.
        stack: `encoder` or `decoder`, to watch only that one of an encoder-decoder.
        horizons: how many layers ahead routers are asked.
        predict_width: experts in each prediction; as many as are chosen if None.
        scores: whether to keep the full router scores.

    Raises:
        ValueError: the model has no MoE layer that can be watched.
    """

    def __init__(
        self,
        model: Any,
        *,
        stack: str | None = None,
        horizons: int = 0,
        predict_width: int | None = None,
        scores: bool = False,
    ) -> None:
        self._model = model
        self._horizons = horizons
        self._predict_width = predict_width
        self._keep_scores = scores
        self._routers = _watchable(model, stack, router=True)
        self._experts = _watchable(model, stack, router=False)
        special = [adapter_of(router) for _, router in self._routers]
        self.adapter: Adapter = next((a for a in special if a is not None and not a.at_experts), PLAIN)
        if self.adapter is not PLAIN:
            self._experts = []
        elif not self._experts:
            raise UnsupportedFamilyError(model, _lacks(model))
        self._places = _score_places(model)
        self._calls: list[_Call] = []
        self._entered: deque[tuple[tuple[Any, ...], dict[str, Any]]] = deque(maxlen=horizons)
        self._handles: list[Any] = []
        self._asking = False
        self._layers: tuple[str, ...] = ()
        self._widths: set[int] = set()
        self._counts: set[int] = set()
        self.cannot_ask = "" if self._routers else "its routers are no modules"
        """Why there are no predictions; empty while there are."""

    def __enter__(self) -> RoutingRecorder:
        for name, router in self._routers:
            before = self._before_router(name)
            self._handles.append(router.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(router.register_forward_hook(self._after_router))
        for name, experts in self._experts:
            self._handles.append(experts.register_forward_pre_hook(self._before_experts(name), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def layers(self) -> tuple[int, ...]:
        """Index of each recorded layer in its stack, or its turn where layers run more than once."""
        indices = tuple(_index(name) for name in self._layers)
        rising = all(a < b for a, b in zip((-1, *indices), indices, strict=False))
        return indices if rising else tuple(range(len(indices)))

    @property
    def layers_repeat(self) -> bool:
        """Whether layers are numbered by turn, as some run more than once in a forward pass."""
        return self.layers != tuple(_index(name) for name in self._layers)

    @property
    def num_experts(self) -> int:
        """E, counting experts that compute nothing, as the router does."""
        return max(self._widths | self._counts)

    @property
    def num_real_experts(self) -> int:
        """The experts that have weights; ids from here on compute nothing."""
        return max(self._counts or self._widths)

    def clear(self) -> None:
        """Forget what was seen since the last `take`."""
        self._calls.clear()
        self._entered.clear()

    def take(self, num_tokens: int) -> Routing:
        """The routing of the forward pass since the last `take`, over its `num_tokens` tokens, pads included.

        Raises:
            ValueError: the layers did not all choose the same number of experts, once for every token.
        """
        calls = [call for call in self._calls if call.choice is not None]
        if len(calls) < len(self._calls):
            self.cannot_ask = self.cannot_ask or "a router has no experts"
        self.clear()
        if not calls:
            raise UnsupportedFamilyError(self._model, "no experts module was given (hidden, ids, weights)")
        names = tuple(call.layer for call in calls)
        if self._layers and names != self._layers:
            raise UnsupportedFamilyError(self._model, f"its layers differ between passes: {self._layers}, {names}")
        self._layers = names
        ids, weights = zip(*((c.choice.ids, c.choice.weights) for c in calls if c.choice), strict=True)
        shapes = sorted({tuple(one.shape) for one in ids})
        if len(shapes) != 1 or shapes[0][0] != num_tokens:
            raise UnsupportedFamilyError(
                self._model, f"its layers chose for (tokens, k) = {shapes} when given {num_tokens} tokens"
            )
        if len(self._counts) > 1 or len(self._widths) > 1 or not self._widths | self._counts:
            said = sorted(self._counts) + sorted(self._widths)
            raise UnsupportedFamilyError(self._model, f"its layers say {said or 'nothing'} as their number of experts")
        return Routing(torch.stack(ids, 1), torch.stack(weights, 1), self._predicted(calls), self._scores(calls))

    def _predicted(self, calls: list[_Call]) -> tuple[Tensor, ...]:
        if self.cannot_ask:
            return ()
        return tuple(
            torch.stack([call.ahead[horizon - 1] for call in calls[horizon:]], dim=1)
            for horizon in range(1, min(self._horizons, len(calls) - 1) + 1)
        )

    def _scores(self, calls: list[_Call]) -> Tensor | None:
        if not self._keep_scores:
            return None
        widths = {None if call.scores is None else call.scores.shape[1] for call in calls}
        if None in widths or len(widths) != 1:
            raise UnsupportedFamilyError(self._model, "not every router gives scores; leave the scores out")
        return torch.stack([call.scores.float() for call in calls if call.scores is not None], dim=1)

    def _before_router(self, name: str) -> Any:
        def hook(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._asking:
                return
            self._calls.append(_Call(name))
            if not self.cannot_ask:
                self._calls[-1].ahead = self._ask(router, name)
                self._entered.appendleft((args, kwargs))

        return hook

    def _after_router(self, router: nn.Module, _args: Any, output: Any) -> None:
        if self._asking:
            return
        choice, call = self._read(router, output), self._calls[-1]
        if choice.scores is not None:
            self._widths.add(choice.scores.shape[1])
            call.scores = choice.scores if self._keep_scores else None
        if not self.adapter.at_experts:
            self._counts |= _count(router)
            call.choice = choice

    def _before_experts(self, name: str) -> Any:
        def hook(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            choice = given_to_experts([*args[1:], *kwargs.values()])
            if choice.ids is None or choice.weights is None:
                return  # shared experts, which every token goes through
            if self._asking:
                raise _Reached(choice)
            last = self._calls[-1] if self._calls else None
            if last is None or last.choice is not None or _index(last.layer) != _index(name):
                last = _Call(name)
                self._calls.append(last)
                self.cannot_ask = self.cannot_ask or "a layer has no router module"
            self._counts |= _count(experts)
            last.choice = choice

        return hook

    def _read(self, router: nn.Module, output: Any) -> Choice:
        adapter = self.adapter if self.adapter.routers.search(type(router).__name__) else PLAIN
        return adapter.read(router, output, self._places.get(type(router)))

    @torch.no_grad()
    def _ask(self, router: nn.Module, name: str) -> list[Tensor]:
        """What this router would choose from what entered the routers before it, nearest first."""
        self._asking = True
        found: list[Tensor] = []
        try:
            for args, kwargs in self._entered:
                choice = self._answer(router, name, args, kwargs)
                width = self._predict_width or (0 if choice.ids is None else choice.ids.shape[1])
                ids = ranking(choice, width)
                if ids is None:
                    self.cannot_ask = f"{type(router).__name__} does not tell a ranking of {width} experts"
                    return []
                found.append(ids)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError) as error:
            self.cannot_ask = f"{type(router).__name__} cannot be asked: {error}"
            return []
        finally:
            self._asking = False
        return found

    def _answer(self, router: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Choice:
        """The router's choice, from itself, else from its block, run as far as the experts."""
        choice = self._read(router, router(*_accepted(router, args), **_accepted_names(router, kwargs)))
        if choice.ids is not None:
            return choice
        try:
            self._model.get_submodule(name.rpartition(".")[0])(*args, **kwargs)
        except _Reached as reached:
            return reached.choice._replace(scores=choice.scores)
        return choice


class _Reached(Exception):  # noqa: N818 - no error: the block of an asked router has reached its experts
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class UnsupportedFamilyError(ValueError):
    """A family cannot be captured, or not in this way; `because` says why without naming it."""

    def __init__(self, model: Any, because: str) -> None:
        super().__init__(
            f"cannot capture the routing of model family {model.config.model_type!r} ({type(model).__name__}): "
            f"{because}; `moesim capture --families` lists what can be captured; or write the trace yourself with "
            "moesim.files.traces.TraceWriter"
        )
        self.because = because


def _watchable(model: Any, stack: str | None, *, router: bool) -> list[tuple[str, nn.Module]]:
    """Routers, or experts modules, in the numbered layers of the model, attention left out."""
    found = []
    for name, module in model.named_modules():
        if not _FIRST_NUMBER.search(name) or ATTENTION.search(name):
            continue
        if stack is not None and stack not in name.split("."):
            continue
        kind = type(module).__name__
        if adapter_of(module) is not None if router else EXPERTS.search(kind):
            found.append((name, module))
    return found


def watchable_names(model: Any) -> list[str]:
    """Names of the routers and experts modules in the layers of a model."""
    return [name for router in (True, False) for name, _ in _watchable(model, None, router=router)]


def _lacks(model: Any) -> str:
    """Why there is nothing to watch in it."""
    alike = sorted({type(m).__name__ for m in model.modules() if re.search("MoE|Moe|Sparse", type(m).__name__)})
    alike = [name for name in alike if name.endswith(("MoE", "Moe", "Block", "MLP"))]
    if alike:
        return f"{', '.join(alike)} chooses and computes in one module, with no router or experts module to watch"
    return "it has no module whose class name ends in Experts in its layers, so no MoE layer"


def _score_places(model: Any) -> dict[type, int]:
    """Where the model itself says that a router class returns its scores."""
    found: dict[type, int] = {}
    for module in model.modules():
        recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
        for one in recorder if isinstance(recorder, list | tuple) else [recorder]:
            if isinstance(target := getattr(one, "target_class", None), type):
                found[target] = int(getattr(one, "index", 0))
    return found


def _index(name: str) -> int:
    """Number of the layer in which a module lies."""
    found = _FIRST_NUMBER.search(name)
    assert found is not None
    return int(found[1])


def _count(module: nn.Module) -> set[int]:
    """The experts that a router or experts module says it has, where it says so."""
    values = (getattr(module, name, None) for name in ("num_routed_experts", "num_experts"))
    return set([value for value in values if isinstance(value, int)][:1])


def _accepted(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As many of the arguments as the module's forward takes."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return args
    return args[: sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)]


def _accepted_names(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return kwargs
    return {name: value for name, value in kwargs.items() if name in parameters}
