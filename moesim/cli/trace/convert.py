"""`moesim trace convert`: routing recorded by another tool, as a trace file."""

from __future__ import annotations

from pathlib import Path

import click


class Selection(click.ParamType):  # type: ignore[type-arg]
    """A column and the value to keep, `domain=c4`."""

    name = "COLUMN=VALUE"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Column and value."""
        column, equals, kept = str(value).partition("=")
        if not equals or not column:
            self.fail(f"{value!r} selects nothing; write COLUMN=VALUE, as in domain=c4", param, ctx)
        return column, kept


@click.command("convert")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), required=True, help="To write: .parquet; .arrow but for counts."
)
@click.option("--format", "format_name", metavar="NAME", help="Of the sources; told from the files where not given.")
@click.option("--name", help="Of the trace; the file's, or the folder's, where not given.")
@click.option("--model", help="Whose router it is.")
@click.option("--origin", type=click.Choice(["trained", "random"]), help="Of the router; trained where not given.")
@click.option("--num-experts", type=click.IntRange(1), help="Experts of a layer, where the source does not say.")
@click.option("--top-k", type=click.IntRange(1), help="Experts of a token, for counts.")
@click.option(
    "--phase",
    type=click.Choice(["prefill", "decode"]),
    help="Of every token, where the source does not say. Where not given, requests that start at position 0 are "
    "prefill, others decode.",
)
@click.option("--select", type=Selection(), multiple=True, help="Keep such lines of a table of counts; repeatable.")
def convert_command(
    sources: tuple[Path, ...], out: Path, format_name: str | None, name: str | None, model: str | None,
    origin: str | None, num_experts: int | None, top_k: int | None, phase: str | None,
    select: tuple[tuple[str, str], ...],
) -> None:  # fmt: skip
    """Convert SOURCES, files of one format, to a trace; expert counts to a count trace.

    Formats: moesim, npz, sglang, vllm, rows (csv, jsonl), eplb, smartmoe, counts; traces/README.md says their
    layouts.
    """
    from moesim.files.counts import write_counts
    from moesim.files.imports import import_routing
    from moesim.files.traces import write_trace
    from moesim.routing.counts import CountTrace

    trace = import_routing(
        sources, name=name, model=model, origin=origin, num_experts=num_experts, top_k=top_k, phase=phase,
        select=dict(select), format=format_name,
    )  # fmt: skip
    if isinstance(trace, CountTrace):
        write_counts(trace, out)
        W, L, E = trace.counts_WLE.shape
        said = f"counts of {W} windows, {L} layers x {E} experts, top {trace.top_k}"
    else:
        write_trace(trace, out)
        said = f"{trace.num_tokens} tokens, {trace.num_layers} layers x {trace.num_experts} experts, top {trace.top_k}"
    click.echo(f"trace: {out} ({said})", err=True)
