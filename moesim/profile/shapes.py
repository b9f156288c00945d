"""Shapes of models whose parts are timed, and the grids of cells that cover them; plain numbers, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

AXES: dict[str, tuple[str, ...]] = {
    "gemm": ("m", "n", "k"),
    "copy": ("bytes",),
    "moe_block": ("active", "rows"),
    "attention_prefill": ("batch", "tokens"),
    "attention_decode": ("batch", "context"),
    "frame_prefill": ("batch", "tokens"),
    "frame_decode": ("batch",),
    "launch": (),
    "moe": ("num_tokens", "hidden_size", "inter_size", "top_k", "num_experts", "tp", "ep"),
    "context_attention": ("batch_size", "seq_len", "num_heads", "num_kv_heads", "head_dim"),
    "generation_attention": ("batch_size", "kv_len", "num_heads", "num_kv_heads", "head_dim"),
    "context_mla": ("batch_size", "seq_len", "num_heads"),
    "generation_mla": ("batch_size", "kv_len", "num_heads"),
    "router": ("tokens", "experts", "top_k"),
    "expert_gather": ("tokens", "hidden_size", "top_k", "experts"),
    "expert_combine": ("tokens", "hidden_size", "top_k", "experts"),
    **{
        f"copy_{way}_{memory}{load}": ("bytes",)
        for way in ("to_device", "to_host")
        for memory in ("pinned", "pageable")
        for load in ("", "_loaded")
    },
}
"""Operators and what their shapes are counted in.

`moe_block` is one layer's router and experts with `rows` rows in each of `active` experts; `attention_...` one layer's
attention module with its projections and cache; `frame_...` the whole model without these two: embedding, norms,
residuals, the head for the last token of each request, and what the framework costs. The rest is of CUDA devices;
copies `_loaded` are made while another stream copies pinned memory the other way.
"""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only MoE model.

    Attributes:
        family: the transformers family that runs it, `mixtral` or `qwen3_moe`.
        width: intermediate size of one expert.
    """

    name: str
    family: str
    layers: int
    hidden: int
    width: int
    experts: int
    top_k: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int = 8192

    @property
    def expert_params(self) -> int:
        """Parameters of one expert: gate, up and down."""
        return 3 * self.hidden * self.width

    @property
    def attention_params(self) -> int:
        """Parameters of one layer's projections."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    @property
    def num_params(self) -> int:
        """Parameters of the model, norms left out."""
        layer = self.attention_params + self.experts * (self.expert_params + self.hidden)
        return self.layers * layer + 2 * self.vocabulary * self.hidden


MIXTRAL = ModelShape("mixtral-8x8-h1024", "mixtral", 8, 1024, 1024, 8, 2, 16, 4, 64)
QWEN3 = ModelShape("qwen3-moe-6x32-h768", "qwen3_moe", 6, 768, 256, 32, 4, 12, 4, 64)
SHAPES = {shape.name: shape for shape in (MIXTRAL, QWEN3)}
"""By name: a few wide experts, and many narrow ones."""


@dataclass(frozen=True, order=True)
class Cell:
    """One shape of one operator.

    Attributes:
        rank: how soon it is dropped when time is short; 0 last.
        shape: numbers in the order of `AXES[op]`.
        model: name of the model shape; "" where the operator has none.
        dtype: format of the weights, or of what is copied.
        facts: more to tell its table from others of the operator: (name, word), such as ("kernel", "triton").
    """

    rank: int
    op: str
    shape: tuple[int, ...]
    model: str = ""
    dtype: str = "fp32"
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def table_facts(self) -> dict[str, str]:
        """The facts of its measured table: the model, if any, and its own."""
        return ({"model": self.model} if self.model else {}) | dict(self.facts)

    @property
    def key(self) -> str:
        """The cell in words, unique in a profile."""
        said = "/".join((self.op, self.dtype, *self.table_facts.values()))
        return f"{said}/{'x'.join(map(str, self.shape))}"


def machine_cells() -> list[Cell]:
    """Matrix products and copies, for the peaks of the machine, and one small operator."""
    sizes = [(m, n, k) for m in (1, 4, 16, 64, 256) for n, k in ((1024, 1024), (4096, 1024), (1024, 4096))]
    cells = [Cell(0, "launch", ()), *(Cell(1, "gemm", size) for size in sizes)]
    return cells + [Cell(1, "copy", (mebibytes << 20,)) for mebibytes in (1, 8, 64)]


def model_cells(shape: ModelShape, batch: int, context: int, tokens: int, first_rank: int = 1) -> list[Cell]:
    """The grid for runs of up to `batch` requests, `context` tokens of cache and `tokens` tokens of prompts in all.

    Every count of rows from 1 to 16 is in it, since small matrix products are quick or slow in ways that no
    neighbour tells; above, steps of about a third. Every second step has rank `first_rank` + 1, to be dropped first
    when time is short, and the others `first_rank`.
    """
    K, E = shape.top_k, shape.experts
    cells = [
        Cell(rank, "moe_block", (active, rows), shape.name)
        for active in sorted({K, E})
        for rank, rows in _steps(tokens if active == K else min(tokens, 64), dense=16)
    ]
    for rank, rows in _steps(batch, dense=8):
        cells.append(Cell(rank, "frame_decode", (rows,), shape.name))
        cells += [Cell(rank, "attention_decode", (rows, length), shape.name) for length in _lengths(context)]
    for requests in (1, 2, 4, 8):
        steps = _steps(tokens // requests, dense=0, start=8)
        cells += [Cell(1, "attention_prefill", (requests, n), shape.name) for rank, n in steps if rank == 1]
        cells += [Cell(1, "frame_prefill", (requests, n), shape.name) for _, n in (*steps[:-1:3], steps[-1])]
    return [replace(cell, rank=cell.rank + first_rank - 1) for cell in cells]


def _steps(largest: int, dense: int, start: int = 1) -> list[tuple[int, int]]:
    """(rank, value): every value to `dense`, then 1, 1 1/3 and 1 2/3 times powers of two, to the first >= `largest`."""
    values = list(range(start, dense + 1)) or [start]
    power = start
    while values[-1] < largest:
        values += [value for value in (power, power * 4 // 3, power * 5 // 3) if value > values[-1]]
        power *= 2
    end = next(i for i, value in enumerate(values) if value >= largest)
    return [(2 if i % 2 and i != end else 1, value) for i, value in enumerate(values[: end + 1])]


def _lengths(context: int) -> Sequence[int]:
    return tuple(dict.fromkeys((max(1, context // 16), max(1, context // 3), context)))


def work(shape: ModelShape, op: str, at: tuple[int, ...]) -> tuple[float, float]:
    """FLOP and bytes (fp32) of one cell, for rooflines and for how long it will take.

    A layer's work for `moe_block` and `attention_...`, the whole head's for `frame_...`.
    """
    h = shape.hidden
    if op == "moe_block":
        active, rows = at
        return 2.0 * active * rows * shape.expert_params, 4.0 * active * (shape.expert_params + 2 * rows * h)
    if op.startswith("attention"):
        batch, tokens, context = (at[0], 1, at[1]) if op.endswith("decode") else (at[0], at[1], 0)
        return attention_work(shape, batch, tokens, context)
    rows, tokens = at[0], at[0] * (at[1] if len(at) > 1 else 1)
    head = shape.vocabulary * h
    return 2.0 * rows * head, 4.0 * (head + tokens * h * (2 + 6 * shape.layers))


def attention_work(shape: ModelShape, batch: int, tokens: int, context: int) -> tuple[float, float]:
    """FLOP and bytes of one layer's attention over `tokens` new tokens a request after `context` cached ones."""
    pairs = batch * tokens * (context + (tokens + 1) / 2)
    flops = 2.0 * shape.attention_params * batch * tokens + 4.0 * pairs * shape.heads * shape.head_dim
    cache = 2.0 * batch * (context + tokens) * shape.kv_heads * shape.head_dim
    return flops, 4.0 * (shape.attention_params + cache + 2 * batch * tokens * shape.hidden)
