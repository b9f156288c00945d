"""`moesim capture`: the routing of a Hugging Face MoE model on real text, into a trace file."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.list import print_rows

if TYPE_CHECKING:
    from moesim.capture.capture import Watch


class TokenRange(click.ParamType):  # type: ignore[type-arg]
    """A length, `128`, or a range of lengths, `96-128`."""

    name = "N or N-M"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The shortest and the longest length."""
        shortest, dash, longest = str(value).partition("-")
        if not shortest.isdecimal() or (dash and not longest.isdecimal()):
            self.fail(
                f"{value!r} is no number of tokens; write 128, or 96-128 for lengths drawn between",
                param,
                ctx,
            )
        return int(shortest), int(longest if dash else shortest)


@click.command("capture")
@click.argument("model_dir", type=click.Path(path_type=Path), required=False)
@click.option(
    "--text",
    "text",
    type=click.Path(path_type=Path),
    help='Text file to cut prompts from, or a .jsonl of {"text": "..."} lines.',
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Trace file to write (.parquet, .arrow).")
@click.option("--requests", default=64, show_default=True, help="Prompts to run.")
@click.option("--prompt-tokens", type=TokenRange(), default="128", show_default=True, help="Prompt length, or range.")
@click.option("--output-tokens", default=64, show_default=True, help="Tokens that each request generates.")
@click.option("--batch", default=16, show_default=True, help="Requests run together.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the sampling; 0 is greedy.")
@click.option("--seed", default=0, show_default=True, help="Of prompt lengths and sampling.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option(
    "--horizons", type=int, help="Layers ahead that routers are asked for; 3, or as many as there are, by default."
)
@click.option("--predict-width", type=int, help="Experts in each prediction; as many as are chosen by default.")
@click.option("--scores", is_flag=True, help="Keep the full router scores too.")
@click.option("--stack", type=click.Choice(["decoder", "encoder"]), help="Of an encoder-decoder; decoder by default.")
@click.option(
    "--origin",
    type=click.Choice(["trained", "random"]),
    default="trained",
    show_default=True,
    help="Whether the model's router was trained.",
)
@click.option("--measure-overhead", type=int, metavar="PAIRS", help="Write no trace; time one batch bare and watched.")
@click.option("--families", is_flag=True, help="List the MoE families of transformers and capture a tiny one of each.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with --families or --measure-overhead.")
def capture_command(
    model_dir: Path | None,
    text: Path | None,
    out: Path | None,
    families: bool,
    measure_overhead: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Capture the routing of the model in MODEL_DIR on real text.

    MODEL_DIR is a local folder with config, weights and tokenizer; nothing is downloaded. Interrupted, the trace
    file holds the batches that were done; a killed process leaves none.
    """
    try:
        import moesim.capture.capture  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"capture needs {error.name}, which is not installed; run: pip install 'moesim[capture]'"
        ) from error
    if families:
        _list_families(as_json)
        return
    needed = {"MODEL_DIR": model_dir, "--text": text} | ({"--out": out} if measure_overhead is None else {})
    lacking = [name for name, value in needed.items() if value is None]
    if lacking:
        raise click.UsageError(f"{', '.join(lacking)} missing; give them, or --families to list what can be captured")
    assert model_dir is not None and text is not None
    if measure_overhead is not None:
        _measure(model_dir, text, measure_overhead, as_json, settings)
        return
    assert out is not None
    with _ends_with_exit_codes():
        _capture(model_dir, text, out, settings)


def _capture(model_dir: Path, text: Path, out: Path, settings: dict[str, Any]) -> None:
    from moesim.capture.capture import capture

    capture(
        model_dir,
        text,
        out,
        num_requests=settings["requests"],
        prompt_tokens=settings["prompt_tokens"],
        output_tokens=settings["output_tokens"],
        batch_size=settings["batch"],
        temperature=settings["temperature"],
        seed=settings["seed"],
        device=settings["device"],
        watch=_watch(settings),
        origin=settings["origin"],
        provenance={"text": text.name},
    )


def _measure(model_dir: Path, text: Path, num_pairs: int, as_json: bool, settings: dict[str, Any]) -> None:
    """One batch, bare and watched in turn."""
    from moesim.capture.capture import check_numbers, check_room
    from moesim.capture.loading import load
    from moesim.capture.overhead import measure_overhead
    from moesim.capture.passes import check_stack
    from moesim.capture.prompts import cut_prompts, read_texts

    watch = _watch(settings)
    if num_pairs < 1:
        raise ValueError(f"--measure-overhead must be at least 1 pair of runs; given {num_pairs}")
    check_numbers(settings["batch"], settings["output_tokens"], settings["temperature"], watch)
    model, tokenizer = load(model_dir, settings["device"])
    stack = check_stack(model, watch.stack)
    check_room(model, settings["prompt_tokens"][1], settings["output_tokens"], stack)
    prompts = cut_prompts(tokenizer, read_texts(text), settings["batch"], settings["prompt_tokens"], settings["seed"])
    measured = measure_overhead(model, prompts, settings["output_tokens"], watch, num_pairs)
    print_rows(
        [
            {
                "recorded": row.watched,
                "phase": row.phase,
                "bare (CPU ms)": row.bare_s * 1e3,
                "watched (CPU ms)": row.watched_s * 1e3,
                "overhead (%)": row.overhead_ratio * 100,
            }
            for row in measured
        ],
        as_json,
    )


def _watch(settings: dict[str, Any]) -> Watch:
    from moesim.capture.capture import Watch

    return Watch(settings["horizons"], settings["predict_width"], settings["scores"], settings["stack"])


def _list_families(as_json: bool) -> None:
    """A tiny model of every family, built and captured."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import track

    from moesim.capture.families import moe_families, prove

    proved = [prove(name) for name in track(moe_families(), "families", console=Console(stderr=True))]
    print_rows([asdict(family) for family in proved], as_json)
    if not as_json:
        click.echo(f"\n{sum(family.captured for family in proved)} of {len(proved)} families can be captured")


@contextmanager
def _ends_with_exit_codes() -> Iterator[None]:
    """Ctrl-C and SIGTERM unwind what runs, so that it can save its work, and exit with 130 and 143."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        signal.signal(signal.SIGTERM, before)
