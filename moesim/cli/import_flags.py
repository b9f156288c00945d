"""`moesim import-flags`: the flags of a real server as the top of a service file."""

from __future__ import annotations

import sys

import click


@click.command("import-flags", context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED)
def import_flags_command(words: tuple[str, ...]) -> None:
    """Print `model` and `[engine]` for a command line of `vllm serve` or `python -m sglang.launch_server`.

    WORDS: the command line, in quotes or not; - reads it from standard input.
    """
    from moesim.files.flags import import_flags

    found = import_flags([sys.stdin.read()] if words == ("-",) else words)
    click.echo(found.as_toml(), nl=False)
    if found.model and not found.preset:
        click.echo(f"{found.model}: none of `moesim list models`; give a folder with its config.json", err=True)
    for said, flags in (("not modelled", found.ignored), ("unknown", found.unknown)):
        if flags:
            click.echo(f"{said}, left out: {', '.join(flags)}", err=True)
