"""Traffic from files: what each kind says, and what bad workloads are told."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from serving_cases import service_file

from moesim.cli import main
from moesim.files.requests.write import write_requests
from moesim.files.services import load_services
from moesim.requests import Requests

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
OWN = "arrival_s,prompt_tokens,output_tokens\n"
MOONCAKE = "".join(
    json.dumps({"timestamp": ms, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"
    for ms, prompt, output, ids in [(500, 1100, 52, [46, 47, 9]), (2250, 1024, 3, [46, 50]), (3000, 100, 7, [46])]
)
VLLM = {"input_lens": [5, 6, 7], "output_lens": [1, 0, 3], "errors": ["", "boom", ""], "request_rate": 4.0}
JSON_LINES = '{"input_tokens": 12, "output_tokens": 34}\n'


def read(folder, name, content, table='arrivals = "replayed"', changes=()):
    """The requests of a service whose traffic is that file."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return load_services(service_file(folder, f'file = "{name}"\n{table}'), changes)[0].requests


def blocks(requests):
    return [requests.block_ids[a:b].tolist() for a, b in pairwise(requests.block_start_Q.tolist())]


REPLAYED, AT_ONCE = 'arrivals = "replayed"', 'arrivals = "at_once"'
FILES = {
    "moesim's own": ("r.csv", OWN + "0.5,10,20\n2,30,40\n", REPLAYED, [0.5, 2], [10, 30], [20, 40]),
    "out of order": ("r.csv", OWN + "2,1,1\n0,2,1\n2,3,1\n1,4,1\n", REPLAYED, [0, 1, 2, 2], [2, 4, 1, 3], [1] * 4),
    "a JSON array": ("r", '[{"arrival_s": 1, "prompt_tokens": 2, "output_tokens": 3}]', REPLAYED, [1], [2], [3]),
    "Azure": ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
              "2023-11-16 18:18:04.4799600,3180,8\n", REPLAYED, [0, 60.5], [4808, 3180], [10, 8]),
    "Azure 2024, compressed": ("a.csv.gz", gzip.compress(
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.25+00:00,1,2\n2024-05-10 00:00:01+00:00,3,4\n"),
        REPLAYED, [0, 0.75], [1, 3], [2, 4]),
    "Mooncake": ("m.jsonl", MOONCAKE, REPLAYED, [0.5, 2.25, 3], [1100, 1024, 100], [52, 3, 7]),
    "LLMServingSim": ("l.csv", "input_toks,output_toks,arrival_time_ns\n7,8,2500000000\n", REPLAYED, [2.5], [7], [8]),
    "its vLLM runs": ("l.jsonl", '{"input_toks": 1, "output_toks": 2, "arrival_time": 900.5}\n'
                      '{"input_toks": 3, "output_toks": 4, "arrival_time": 901.75}\n', REPLAYED, [0, 1.25], [1, 3],
                      [2, 4]),
    "arXiv lengths": ("x.csv", "num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n2015,156,12.9\n", AT_ONCE,
                      [0, 0], [3772, 2015], [54, 156]),
    "lengths that somebody counted": ("s.jsonl", JSON_LINES * 2, AT_ONCE, [0, 0], [12, 12], [34, 34]),
    "vLLM benchmark": ("v.json", json.dumps(VLLM | {"start_times": [70.5, 71, 72]}), REPLAYED, [0, 1.5], [5, 7],
                       [1, 3]),
    "vLLM benchmark without times": ("v.json", json.dumps(VLLM, indent=1), AT_ONCE, [0, 0], [5, 7], [1, 3]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_file_says_what_was_written(tmp_path, kind):
    *given, arrival_s, prompt, output = FILES[kind]
    found = read(tmp_path, *given)
    np.testing.assert_allclose(found.arrival_s_Q, arrival_s, rtol=0, atol=1e-9)
    assert (found.prompt_Q.tolist(), found.output_Q.tolist()) == (prompt, output)
    assert blocks(found) == ([[0, 1], [0, 2], []] if kind == "Mooncake" else [[]] * len(prompt))
    assert found.block_tokens == (512 if kind == "Mooncake" else 0)
    notes = {"out of order": "2 requests came before", "vLLM": "1 requests failed in"}
    assert [note[:20] for note in found.notes] == [note[:20] for key, note in notes.items() if kind.startswith(key)]


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet"])
def test_what_moesim_writes_it_reads(tmp_path, name):
    ints = [np.array(row) for row in ([64, 70, 9], [1, 2, 3], [0, 5, -1], [3, -1, 3], [0, 2, 4, 4], [0, 1, 0, 2])]
    given = Requests(np.array([0.0, 0.1, 1 / 3]), *ints, block_tokens=32)
    write_requests(given, tmp_path / name)
    found = read(tmp_path, name, (tmp_path / name).read_bytes())
    for key in ("arrival_s_Q", "prompt_Q", "output_Q", "priority_Q", "topic_Q", "block_start_Q", "block_ids"):
        np.testing.assert_array_equal(getattr(found, key), getattr(given, key), key)
    assert found.block_tokens == 32


REPLAYS = {
    'arrivals = "replayed"\nstart_s = 2\nrate_scale = 0.5': ([0.5, 2], [1024, 100], [[0, 1], []]),
    'arrivals = "replayed"\nduration_s = 3': ([0.5, 2.25], [1100, 1024], [[0, 1], [0, 2]]),
    'arrivals = "replayed"\nnum_requests = 1': ([0.5], [1100], [[0, 1]]),
    'arrivals = "constant"\nrate_per_s = 4\nnum_requests = 4': (
        [0, 0.25, 0.5, 0.75], [1100, 1024, 100, 1100], [[0, 1], [0, 2], [], [0, 1]]),
    'arrivals = "closed"\nconcurrency = 2\nnum_requests = 2': ([0, 0], [1100, 1024], [[0, 1], [0, 2]]),
}  # fmt: skip


@pytest.mark.parametrize("table", REPLAYS)
def test_a_file_may_be_cut_stretched_or_come_at_other_times(tmp_path, table):
    found = read(tmp_path, "m.jsonl", MOONCAKE, table)
    assert (found.arrival_s_Q.tolist(), found.prompt_Q.tolist(), blocks(found)) == REPLAYS[table]
    assert found.concurrency == (2 if "closed" in table else None)
    assert bool(found.notes) == ("num_requests = 4" in table)


def profiles(folder, ending="", **changed):
    """Two clients in two windows: 150 requests, then 75 and 30."""
    columns = {"client": [1, 0, 0], "t_s": [600, 0, 600], "rate": [0.05, 0.25, 0.125]}
    columns |= {"dist": ["Weibull", "Gamma", "Gamma"], "p1": [0.5, 2.0, 1.0]} | changed
    pq.write_table(pa.table(columns), folder / "p_rates.parquet")
    pmf = {"0": {"input_tokens": "{7: 0.25, 9: 0.75}", "output_tokens": "{1: 1.0}"}}
    later = {"0": {"input_tokens": "{100: 1.0}", "output_tokens": "{5: 1.0}"},
             "600": {"input_tokens": "{200: 1.0}", "output_tokens": "{6: 1.0}"}}  # fmt: skip
    lines = [json.dumps({"client": 1, "windows": pmf}), json.dumps({"client": 0, "windows": later})]
    data = "\n".join(lines).encode()
    (folder / f"p_datasets.jsonl{ending}").write_bytes(gzip.compress(data) if ending else data)
    return (folder / "p_rates.parquet").read_bytes()


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_client_profiles_are_sampled(tmp_path, ending):
    found = read(tmp_path, "p_rates.parquet", profiles(tmp_path, ending))
    assert (np.diff(found.arrival_s_Q) >= 0).all()
    first, is_one = found.arrival_s_Q < 600, found.topic_Q == 1
    assert [int(x.sum()) for x in (first & ~is_one, first & is_one, ~first & ~is_one, ~first & is_one)] == [
        150, 0, 75, 30]  # fmt: skip
    np.testing.assert_array_equal(found.prompt_Q[~is_one], np.where(first, 100, 200)[~is_one])
    np.testing.assert_array_equal(found.output_Q[~is_one], np.where(first, 5, 6)[~is_one])
    assert abs((found.prompt_Q[is_one] == 9).mean() - 0.75) < 4 * np.sqrt(0.75 * 0.25 / 30)
    twice = read(
        tmp_path, "p_rates.parquet", profiles(tmp_path), 'arrivals = "replayed"\nrate_scale = 2\nstart_s = 600'
    )
    assert np.bincount(twice.topic_Q).tolist() == [150, 60]


# Rows, seconds, and mean and greatest tokens of prompts and answers, as the provenance note beside each file has them.
REAL = {
    "requests_azure_2023/AzureLLMInferenceTrace_code.csv.gz": (8819, 3436, (2048, 7437), (28, 1899), None),
    "requests_azure_2023/AzureLLMInferenceTrace_conv.csv.gz": (19366, 3502, (1155, 14050), (211, 1000), None),
    "requests_mooncake/conversation_trace.jsonl.gz": (12031, 3537, (12035, 126195), (343, 2000), 0.366),
    "requests_mooncake/synthetic_trace.jsonl.gz": (3993, 1022, (15325, 191378), (149, 893), 0.640),
    "requests_vidur_arxiv/arxiv_summarization_stats.csv.gz": (28257, 0, None, None, None),
}


@pytest.mark.parametrize("name", REAL)
def test_published_traffic_has_its_published_totals(tmp_path, name):
    if not (DATA / name).is_file():
        pytest.skip(f"{name} is not there")
    num, seconds, *lengths, hits = REAL[name]
    table = f'file = "{(DATA / name).resolve()}"\narrivals = "{"replayed" if seconds else "at_once"}"'
    found = load_services(service_file(tmp_path, table))[0].requests
    assert len(found) == num
    assert found.arrival_s_Q[-1] - found.arrival_s_Q[0] == pytest.approx(seconds, abs=1)
    for tokens_Q, published in zip((found.prompt_Q, found.output_Q), lengths, strict=True):
        if published:
            assert (tokens_Q.mean(), tokens_Q.max()) == (pytest.approx(published[0], abs=0.51), published[1])
    if hits:
        again = 1 - len(np.unique(found.block_ids)) / len(found.block_ids)
        assert again == pytest.approx(hits, abs=0.02), "blocks that prompts do not fill are not shared here"


def test_published_clients_have_their_rates(tmp_path):
    path = DATA / "requests_servegen" / "reason_deepseek-r1_rates.parquet"
    if not path.is_file():
        pytest.skip(f"{path.name} is not there")
    table = pq.read_table(path).to_pydict()
    rates = {(c, t): r for c, t, r in zip(table["client"], table["t_s"], table["rate"], strict=True) if t < 7200 and r}
    requests_toml = f'file = "{path.resolve()}"\narrivals = "replayed"\nduration_s = 7200'
    found = load_services(service_file(tmp_path, requests_toml))[0].requests
    assert abs(len(found) - 600 * sum(rates.values())) < len(rates)  # each window is rounded
    assert set(found.topic_Q.tolist()) <= {client for client, _ in rates}
    assert 0 < found.arrival_s_Q[-1] < 7200


@pytest.fixture
def moesim(monkeypatch, capsys):
    """The real command: exit code, stdout and stderr."""

    def run(*args):
        monkeypatch.setattr("sys.argv", ["moesim", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return run


def row(text):
    return OWN + f"0,10,5\n{text}\n"


BAD_FILES = {
    "negative arrival": (row("-1,10,5"), ["arrival_s, row 2: must not be negative, given -1; mend or leave out the"]),
    "unknown column": (OWN.strip() + ",prio\n0,1,1,1\n", ["column prio: unknown; nearest: 'priority'"]),
    "a column twice": ("arrival_s," + OWN + "0,0,1,1\n", ["column arrival_s: must be there once, given twice; leave"]),
    "missing column": ("arrival_s,prompt_tokens\n0,1\n", ["column output_tokens lacks", "file has arrival_s, prompt_to",
                                                          "Known kinds and their columns: moesim: arrival_s, prompt"]),
    "empty": ("", ["is empty; give one row for each request"]),
    "header alone": (OWN, ["no requests; give one row for each"]),
    "NaN time": (row("nan,10,5"), ["column arrival_s, row 2: must be a number, given nan; mend"]),
    "infinite time": (row("inf,10,5"), ["column arrival_s, row 2: must be a number, given inf; mend"]),
    "Unix time": (row("1700000000.5,10,5"), ["arrival_s, row 2: must be at most 1e+09 s from the start, not a clo"]),
    "NaN tokens": (row("1,NaN,5"), ["column prompt_tokens, row 2: must be a number, given nan; mend"]),
    "nothing": (row("1,,5"), ["column prompt_tokens, row 2: must be a number, given nothing; mend"]),
    "text": (row("1,many,5"), ["column prompt_tokens, row 2: must be a number, given 'many'; mend"]),
    "no answer": (row("1,10,0"), ["column output_tokens, row 2: must be a whole number, at least 1, given 0; mend"]),
    "negative answers": (row("1,10,-5\n2,10,-6"), ["output_tokens, row 2: must be", "given -5 (and 1 more rows)"]),
    "two mistakes": (row("-1,0,5"), ["2 mistakes", "arrival_s, row 2", "prompt_tokens, row 2: must be a whole number"]),
    "half a token": (row("1,10.5,5"), ["column prompt_tokens, row 2: must be a whole number, at least 1, given 10.5"]),
    "short row": (row("1,10"), ["line 3: Expected 3 columns, got 2: 1,10", "mend that row"]),
    "no date": ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,3,4\nsoon,3,4\n",
                ["column TIMESTAMP, row 2: must be a date and time, such as 2023", "given 'soon'; mend"]),
    "broken JSON line": (JSON_LINES * 2 + '{"input_tokens": 3, \n' + JSON_LINES,
                         ["line 3: must be a whole JSON object, given '{\"input_tokens\": 3, '", "mend or leave out"]),
    "cut JSON lines": (JSON_LINES + '{"input_to', ["line 2: must be a whole JSON object"]),
    "another kind of line": (JSON_LINES + "[1, 2]", ["row 2: must be an object", "given [1, 2]; mend or leave"]),
    "text in JSON": (JSON_LINES + '{"input_tokens": "x", "output_tokens": 4}',
                     ["column input_tokens, row 2: must be a number, given 'x'; mend"]),
    "null in JSON": (JSON_LINES + '{"input_tokens": 1}', ["column output_tokens, row 2: must be a number, given noth"]),
    "half a block": (MOONCAKE + '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [1, 2.5]}',
                     ["column hash_ids, row 4: must hold whole numbers, given [1.0, 2.5]; mend"]),
    "blocks of no size": ('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1, "prefix_blocks": [1]}',
                          ["column block_tokens lacks; give the tokens of a block"]),
    "conversations": ('[{"conversations": [{"value": "hi"}]}]', ["no tokenizer", "write JSON lines with input_tokens"]),
    "lists that differ": (json.dumps(VLLM | {"errors": [""]}), ["must be lists of one length, given {'input_lens': 3"]),
    "lengths without times": (json.dumps(VLLM), ["no times to replay", 'arrivals = "poisson" with rate_per_s = 4.0']),
    "missing file": (None, ["no such file; give a file of requests: CSV, JSON, JSON lines or Parquet"]),
}  # fmt: skip


def refused(moesim, path, words):
    """`moesim check` and `moesim run` stop with one error that has the words."""
    for command in ("check", "run"):
        code, out, err = moesim(command, path)
        assert (code, out, err[:7], err.count("\nerror:"), err.count("Traceback")) == (2, "", "error: ", 0, 0), err
        for word in (path.name, *words):
            assert word in err, err


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused_by_row(tmp_path, moesim, what):
    content, words = BAD_FILES[what]
    if content is not None:
        (tmp_path / "traffic").write_text(content)
    is_timed = content is None or "input_tokens" not in content
    path = service_file(tmp_path, f'{REPLAYED if is_timed else AT_ONCE}\nfile = "traffic"')
    refused(moesim, path, ["requests.file: ", "traffic", *words])


BAD_PROFILES = {
    "rate": ([0.1, -0.25, 0.125], "column rate, row 2: must not be negative, given -0.25; mend"),
    "dist": (
        ["Weibull", "Gamma", "Pareto"],
        "column dist, row 3: must be Gamma or Weibull where rate is above 0, given",
    ),
    "p1": ([0.5, 0.0, 1.0], "column p1, row 2: must be above 0, as a shape, where rate is, given 0.0; mend"),
    "t_s": (["soon", "0", "600"], "column t_s, row 1: must be a number, given 'soon'; mend"),
    "client": ([7, 0, 0], "clients [7] have rates, but no lengths in p_datasets.jsonl; give both"),
}


@pytest.mark.parametrize("column", BAD_PROFILES)
def test_bad_profiles_are_refused_by_row(tmp_path, moesim, column):
    values, words = BAD_PROFILES[column]
    profiles(tmp_path, **{column: values})
    refused(moesim, service_file(tmp_path, f'{REPLAYED}\nfile = "p_rates.parquet"'), ["p_rates.parquet", words])


LENGTH = "prompt_tokens = 10\noutput_tokens = 10"
POISSON = 'arrivals = "poisson"\n'
BAD_TABLES = {
    "unknown arrivals": (f'arrivals = "poison"\n{LENGTH}', ["arrivals: unknown 'poison'; nearest: 'poisson'"]),
    "no rate": (f"{POISSON}num_requests = 9\n{LENGTH}", ["rate_per_s: is missing; arrivals = 'poisson' needs it"]),
    "a rate of NaN": (f"{POISSON}num_requests = 9\nrate_per_s = nan\n{LENGTH}", [
        "rate_per_s: must be from 1e-9 to 1e9, given nan"]),
    "a cv without a law": (f'arrivals = "gamma"\nnum_requests = 9\nrate_per_s = 1\ncv = 1e200\n{LENGTH}', [
        "cv: must be from 0.001 to 1000, given 1e+200"]),
    "too many in that time": (f"{POISSON}rate_per_s = 1e9\nduration_s = 1e9\n{LENGTH}", [
        "duration_s: must bring at most 100000000 requests, given"]),
    "too many": (f"{AT_ONCE}\nnum_requests = 1000000000000\n{LENGTH}", ["num_requests: must be from 1 to 100000000"]),
    "too few": (f"{POISSON}rate_per_s = 1e-3\nduration_s = 1e-3\n{LENGTH}", ["no request comes in 0.001 s at 0.001"]),
    "lengths": (AT_ONCE + "\nnum_requests = 9\nprompt_tokens = 0\noutput_tokens = {"
                'distribution = "uniform", low = 9, high = 2}', [
        "requests.prompt_tokens: must be from 1 to 1000000000, given 0", "requests.output_tokens.high: must be at le"]),
    "bursts without end": ('arrivals = "bursty"\nrate_per_s = 1\nburst_ratio = 2\nburst_fraction = 0.5\nburst_s = 1e-9'
                           f"\nnum_requests = 999\n{LENGTH}", ["burst_s = 1e-09 makes more than 100000000 bursts"]),
    "an order of a replay": (f'{REPLAYED}\nfile = "x"\norder = "random"', [
        "order: has no meaning with arrivals = 'replayed', which keeps the file's; leave it out"]),
    "prompts of a million tokens alone": (f"{AT_ONCE}\nnum_requests = 3\nprompt_tokens = 1000000\noutput_tokens = 10", [
        "none fits: the shortest has 1000010 tokens, engine holds ", "; use shorter ones, a longer max_model_len, or"]),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_TABLES)
def test_a_bad_table_is_refused_by_key(tmp_path, moesim, what):
    table, words = BAD_TABLES[what]
    refused(moesim, service_file(tmp_path, table), ["  - requests", *words])


def test_what_never_fits_is_counted_and_the_rest_answered_in_order(tmp_path, moesim):
    """64 blocks of 16 tokens hold 1024: a million tokens and 1025 do not fit, 1024 do."""
    (tmp_path / "r.csv").write_text(OWN + "0.2,1000000,5\n0.1,1020,5\n0,1019,5\n0.3,10,5\n")
    path = service_file(tmp_path, f'{REPLAYED}\nfile = "r.csv"', "[engine]\nnum_gpu_blocks_override = 64")
    code, out, err = moesim("run", path, "--json")
    assert code == 0, err
    found = json.loads(out)
    metrics = {key: found["metrics"][key] for key in ("num_requests", "num_finished", "num_dropped", "num_unfinished")}
    assert metrics == {"num_requests": 4, "num_finished": 2, "num_dropped": 2, "num_unfinished": 0}
    assert any("2 requests came before the one above them in the file" in warning for warning in found["warnings"])
