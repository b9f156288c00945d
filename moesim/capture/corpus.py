"""Real text that any Debian machine carries: the corpus of the tiny model, gathered the same way every time.

Seven kinds of text, so that requests have topics: Python, C headers, manual pages in English, German and
French, Perl, and package documentation. Files are taken in the order of a hash of their path, which mixes
packages and does not depend on the file system; every twelfth hash is held out and never trained on.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_ONE_IN = 12
_LONGEST_FILE_BYTES = 400_000
_SHORTEST_FILE_BYTES = 600


@dataclass(frozen=True)
class Kind:
    """One kind of text: where it lies, which names count, and how much of it is taken."""

    name: str
    roots: tuple[str, ...]
    patterns: tuple[str, ...]
    max_bytes: int
    leave_out: tuple[str, ...] = ()


KINDS = (
    Kind("python", ("/usr/lib/python3.*",), ("*.py",), 3_000_000, ("dist-packages", "/test/")),
    Kind("c", ("/usr/include",), ("*.h",), 3_000_000, ("/c++/", "/llvm", "/node/")),
    Kind("man", ("/usr/share/man/man[1-8]",), ("*.gz",), 3_000_000, ("gcloud",)),
    Kind("man-de", ("/usr/share/man/de",), ("*.gz",), 1_500_000),
    Kind("man-fr", ("/usr/share/man/fr",), ("*.gz",), 1_500_000),
    Kind("perl", ("/usr/share/perl",), ("*.pm", "*.pod", "*.pl"), 1_500_000, ("unicore", "Unicode")),
    Kind(
        "docs",
        ("/usr/share/doc",),
        ("*.md", "*.rst", "*.txt", "*.txt.gz", "README*"),
        2_500_000,
        ("symbols",),
    ),
)


@dataclass(frozen=True)
class Document:
    """One file: its kind, its path, its text, and whether it is held out of the training."""

    kind: str
    path: str
    text: str
    held_out: bool


def documents(kinds: tuple[Kind, ...] = KINDS) -> list[Document]:
    """Every document of the corpus, kinds one after another, in the same order on the same files.

    Raises:
        ValueError: not one file was found.
    """
    found = [document for kind in kinds for document in _of_kind(kind)]
    if not found:
        looked = ", ".join(root for kind in kinds for root in kind.roots)
        raise ValueError(f"no text found under {looked}; run on a Debian system that has manual pages and Python")
    return found


def _of_kind(kind: Kind) -> Iterator[Document]:
    """Documents of one kind, in hash order, until `max_bytes` of text are taken."""
    taken_bytes = 0
    seen: set[bytes] = set()
    for key, path in sorted((_hash(str(path).encode()), path) for path in _paths(kind)):
        text = _read(path)
        content = _hash(text.encode())
        if len(text) < _SHORTEST_FILE_BYTES or content in seen:
            continue
        seen.add(content)
        taken_bytes += len(text)
        yield Document(kind.name, str(path), text, held_out=int.from_bytes(key[:4], "big") % HELD_OUT_ONE_IN == 0)
        if taken_bytes >= kind.max_bytes:
            return


def _paths(kind: Kind) -> Iterator[Path]:
    top = Path("/")
    for root in kind.roots:
        for folder in top.glob(root.lstrip("/")):
            for pattern in kind.patterns:
                for path in folder.rglob(pattern):
                    if not any(part in str(path) for part in kind.leave_out) and path.is_file():
                        yield path.resolve()


def _read(path: Path) -> str:
    """The text of a plain or gzipped file, or nothing where it is too long or not UTF-8."""
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode() if len(data) <= _LONGEST_FILE_BYTES else ""
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
