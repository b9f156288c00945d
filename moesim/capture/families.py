"""Which MoE families of the installed transformers can be captured, each proved by capturing a tiny model of it."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import transformers

from moesim.capture.hooks import RoutingRecorder, UnsupportedFamilyError
from moesim.capture.passes import run_batch, stacks, writes
from moesim.capture.tiny_models import VOCABULARY, tiny_model

_MOE = re.compile(r'^class \w*Experts\b|"router_logits":', re.MULTILINE)


@dataclass(frozen=True)
class Family:
    """What became of the proof for one family.

    Attributes:
        family: name of the folder of transformers' models.
        model: class of the tiny model; empty where none could be built.
        captured: whether prefill and decode of the tiny model were captured.
        how: how its routers are read.
        stacks: the stacks that can be recorded, of an encoder-decoder.
        horizons: how far ahead its routers can be asked, at most 3.
        scores: whether its routers give full scores.
        because: why not, where something is lacking.
    """

    family: str
    model: str = ""
    captured: bool = False
    how: str = ""
    stacks: str = ""
    horizons: int = 0
    scores: bool = False
    because: str = ""


def moe_families() -> list[str]:
    """Families whose modeling code defines an experts class, or says that it records router logits."""
    folder = Path(transformers.__file__).parent / "models"
    return sorted({p.parent.name for p in folder.glob("*/modeling_*.py") if _MOE.search(p.read_text("utf-8"))})


def prove(family: str) -> Family:
    """Build a tiny model of `family`, capture a padded batch of it, and tell how that went; libraries are silenced."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _prove(family)


def _prove(family: str) -> Family:
    try:
        model = tiny_model(family)
    except Exception as error:  # whatever the family's own code raises is the reason
        return Family(family, because=f"no tiny model could be built: {_first_line(error)}")
    tokens = np.random.default_rng(0).integers(2, VOCABULARY - 2, 12)
    found = []
    for stack in stacks(model):
        try:
            recorder = RoutingRecorder(model, stack=stack, horizons=3, scores=True)
            with recorder:
                batch = run_batch(
                    model,
                    recorder,
                    [tokens[:5], tokens[5:]],
                    2 if writes(model, stack) else 0,
                    lambda logits: logits.argmax(-1, keepdim=True),
                    stack,
                )
        except Exception as error:
            return Family(family, type(model).__name__, because=_first_line(error))
        found.append((recorder, batch))
    recorder, batch = found[0]
    return Family(
        family,
        type(model).__name__,
        True,
        recorder.adapter.name,
        ", ".join(stack for stack in stacks(model) if stack),
        min(len(one.routing.predicted) for _, one in found),
        batch.routing.scores is not None,
        recorder.cannot_ask,
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, UnsupportedFamilyError):
        return error.because
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
