"""`moesim validate vllm-runs`: real vLLM runs with times of every request, simulated request by request."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("vllm-runs")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--fit-on", help="The run (DEVICE/MODEL) that the host's seconds are fitted to.")
@click.option(
    "--trace", default="olmoe-shape-16x64", show_default=True, help="Routing, of any shape: a name or a file."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def vllm_runs_command(folder: Path, fit_on: str | None, trace: str, as_json: bool) -> None:
    """Simulate the runs of LLMServingSim's folder DIR at the prices of its measured layers of vLLM.

    One constant, the host's seconds in an iteration, is fitted to one run; all others are judged. Without DIR the
    validation is skipped.
    """
    from moesim.cli.validate.printing import print_against_baseline, print_skipped

    if not folder.exists():
        print_skipped("vllm-runs", folder, "LLMServingSim's folder, with bench, profiler and workloads", as_json)
        return
    from moesim.files.scenarios import load_trace
    from moesim.validate.vllm_runs import FIT_ON, validate_vllm_runs, verdict

    found = validate_vllm_runs(folder, fit_on or FIT_ON, load_trace(trace), lambda line: click.echo(line, err=True))
    print_against_baseline(found, as_json, verdict)
