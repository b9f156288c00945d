"""What the user says about a source, because the source does not say it itself."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moesim.version import __version__

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Facts:
    """The options of an import; None where nothing was said.

    phase: of every token, "prefill" or "decode".
    select: column -> the value to keep, for tables that hold several routers or texts.
    """

    name: str | None = None
    model: str | None = None
    origin: str | None = None
    num_experts: int | None = None
    top_k: int | None = None
    phase: str | None = None
    select: Mapping[str, str] = field(default_factory=dict)

    def name_of(self, paths: Sequence[Path]) -> str:
        """The given name, else the file's, or its folder's where there are several files."""
        return self.name or (paths[0].stem if len(paths) == 1 else paths[0].absolute().parent.name)

    def model_name(self) -> str:
        """The given model, or that nobody knows."""
        return self.model or "unknown"

    def provenance(self, paths: Sequence[Path], **more: str) -> dict[str, str]:
        """Names and checksums of the source files, and what made the trace of them."""
        files = ", ".join(f"{path.name} (sha256 {_sha256(path)[:16]})" for path in paths)
        chosen = {"selected": ", ".join(f"{k}={v}" for k, v in self.select.items())} if self.select else {}
        return {"source": files, "imported_by": f"moesim {__version__}", **chosen, **more}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
