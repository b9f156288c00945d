"""`moesim capture`: the routing of a Hugging Face MoE model on real text, into a trace file."""

from __future__ import annotations

from pathlib import Path

import click


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
@click.argument("model_dir", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "text",
    type=click.Path(path_type=Path),
    required=True,
    help='Text file to cut prompts from, or a .jsonl of {"text": "..."} lines.',
)
@click.option("-o", "--out", type=click.Path(path_type=Path), required=True, help="Trace file to write (.parquet).")
@click.option("--requests", default=64, show_default=True, help="Prompts to run.")
@click.option("--prompt-tokens", type=TokenRange(), default="128", show_default=True, help="Prompt length, or range.")
@click.option("--output-tokens", default=64, show_default=True, help="Tokens that each request generates.")
@click.option("--batch", default=16, show_default=True, help="Requests run together.")
@click.option("--temperature", default=1.0, show_default=True, help="Of the sampling; 0 is greedy.")
@click.option("--seed", default=0, show_default=True, help="Of prompt lengths and sampling.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option(
    "--origin",
    type=click.Choice(["trained", "random"]),
    default="trained",
    show_default=True,
    help="Whether the model's router was trained.",
)
def capture_command(
    model_dir: Path,
    text: Path,
    out: Path,
    requests: int,
    prompt_tokens: tuple[int, int],
    output_tokens: int,
    batch: int,
    temperature: float,
    seed: int,
    device: str,
    origin: str,
) -> None:
    """Capture the routing of the model in MODEL_DIR on real text.

    MODEL_DIR is a local folder with config, weights and tokenizer; nothing is downloaded.
    """
    try:
        from moesim.capture.capture import capture
    except ModuleNotFoundError as error:
        raise ValueError(
            f"capture needs {error.name}, which is not installed; run: pip install 'moesim[capture]'"
        ) from error
    capture(
        model_dir,
        text,
        out,
        num_requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch_size=batch,
        temperature=temperature,
        seed=seed,
        device=device,
        origin=origin,
        provenance={"text": text.name},
    )
