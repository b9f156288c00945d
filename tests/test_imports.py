"""Routing from elsewhere: what a source says is in the trace; what is wrong with a source is said in one message."""

from __future__ import annotations

import csv
import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli import cli
from moesim.files.imports import FORMATS, import_routing
from moesim.files.scenarios import load_trace
from moesim.files.trace_rules import trace_mistakes
from moesim.files.traces import write_trace
from moesim.routing.counts import CountTrace
from moesim.routing.trace import RoutingTrace

DATA = Path(__file__).parents[1].parent / "shared" / "data"


def made(lengths=((3, 2), (4, 0), (1, 3)), layers=(1, 2, 4), experts=12, top_k=3, seed=0) -> RoutingTrace:
    """A trace of requests with (prompt, generated) tokens, weights falling in every row."""
    rng = np.random.default_rng(seed)
    sizes = [p + d for p, d in lengths]
    T = sum(sizes)
    return RoutingTrace(
        name="made",
        model="made up",
        origin="trained",
        num_experts=experts,
        expert_ids_TLK=rng.random((T, len(layers), experts)).argsort(axis=2)[..., :top_k].astype(np.uint8),
        request_T=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        position_T=np.concatenate([np.arange(n) for n in sizes]).astype(np.int32),
        is_decode_T=np.concatenate([np.arange(p + d) >= p for p, d in lengths]),
        token_id_T=rng.integers(0, 999, T).astype(np.int32),
        layers=layers,
        weights_TLK=-np.sort(-rng.random((T, len(layers), top_k)), axis=2).astype(np.float16),
    )


def assert_routed_alike(got, wanted, *, weights=True, tokens=True):
    assert isinstance(got, RoutingTrace) and trace_mistakes(got) == []
    assert (got.num_experts, got.layers) == (wanted.num_experts, wanted.layers)
    names = ["expert_ids_TLK", "request_T", "position_T", "is_decode_T"]
    names += ["weights_TLK"] * weights + ["token_id_T"] * tokens
    for name in names:
        np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)
    assert weights or got.weights_TLK is None
    assert tokens or got.token_id_T is None


def converted(tmp_path, *arguments):
    """What `moesim trace convert` writes."""
    out = tmp_path / "out.parquet"
    result = CliRunner().invoke(cli, ["trace", "convert", *map(str, arguments), "-o", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return load_trace(str(out))


# --- arrays


def write_npz(path, trace, order=None, **more):
    """The trace as arrays, a token's experts in the order of their ids, as some sources have them."""
    by_id = np.argsort(trace.expert_ids_TLK, axis=2)
    order = np.arange(trace.num_tokens) if order is None else order
    arrays = {
        "expert_ids": np.take_along_axis(trace.expert_ids_TLK, by_id, axis=2)[order],
        "gate_weight": np.take_along_axis(trace.weights_TLK, by_id, axis=2)[order],
        "sample": trace.request_T[order],
        "position": trace.position_T[order],
        "layer": np.array(trace.layers, np.int16),
        "num_experts": np.array(trace.num_experts),
    } | more
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_arrays_are_sorted_by_weight_and_by_token(tmp_path):
    source = made(((4, 0), (3, 0)))
    write_npz(tmp_path / "a.npz", source, np.random.default_rng(1).permutation(7))
    got = converted(tmp_path, tmp_path / "a.npz", "--model", "m")
    assert_routed_alike(got, source, tokens=False)
    assert (got.name, got.model, got.origin) == ("a", "m", "trained")
    assert "a.npz (sha256 " in got.provenance["source"]


def test_phase_is_told_by_position_or_by_the_user(tmp_path):
    source = made(((2, 0), (3, 0)))
    moved = replace(source, position_T=source.position_T + 7 * (source.request_T == 1).astype(np.int32))
    write_npz(tmp_path / "a.npz", moved)
    assert import_routing([tmp_path / "a.npz"]).is_decode_T.tolist() == [False, False, True, True, True]
    assert import_routing([tmp_path / "a.npz"], phase="prefill").is_decode_T.sum() == 0
    assert converted(tmp_path, tmp_path / "a.npz", "--phase", "decode").is_decode_T.all()


def test_several_files_are_one_trace(tmp_path):
    parts = [made(((2, 0), (3, 0)), seed=1), made(((1, 0),), seed=2)]
    for name, part in zip("ab", parts, strict=True):
        write_npz(tmp_path / f"{name}.npz", part)
    got = import_routing(sorted(tmp_path.glob("*.npz")))
    assert got.request_T.tolist() == [0, 0, 1, 1, 1, 2] and got.name == tmp_path.name
    np.testing.assert_array_equal(got.expert_ids_TLK, np.concatenate([part.expert_ids_TLK for part in parts]))
    write_npz(tmp_path / "c.npz", made(((1, 0),), layers=(1, 2)))
    with pytest.raises(ValueError, match=r"c\.npz: layers must be as in a\.npz, \(1, 2, 4\); given \(1, 2\)"):
        import_routing(sorted(tmp_path.glob("*.npz")))


def test_eighths_of_weights(tmp_path):
    source = made(((3, 0),))
    write_npz(tmp_path / "a.npz", source, gate_weight=None, prob_u8=np.full((3, 3, 3), 51, np.uint8))
    got = import_routing([tmp_path / "a.npz"])
    assert (got.weights_TLK == np.float16(0.2)).all()
    assert (np.diff(got.expert_ids_TLK.astype(int), axis=2) > 0).all()  # ties keep the source's order


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"sample": None, "position": np.zeros(3)}, "(?s)2 mistakes.*array sample .*there is none.*array position"),
        ({"expert_ids": np.zeros((3, 3))}, r"expert_ids \[token, layer, K\]; it has"),
        ({"expert_ids": np.full((3, 3, 3), -1)}, r"expert ids must be from 0 to 11; given -1 \(token 0"),
        ({"expert_ids": np.zeros((3, 3, 3), int)}, "a token's experts must be distinct"),
        ({"num_experts": None}, "give --num-experts E; its highest id is"),
        ({"position": np.array([0, 1, 1])}, "each pair once"),
        ({"sample": np.array([0, 0, 2**40])}, "request must be from 0 to"),
        ({"gate_weight": np.full((3, 3, 3), np.nan)}, "weights must be finite"),
        ({"layer": np.array([2, 1, 4])}, "increasing"),
    ],
)
def test_wrong_arrays(tmp_path, more, said):
    write_npz(tmp_path / "a.npz", made(((3, 0),)), **more)
    with pytest.raises(ValueError, match=said) as error:
        import_routing([tmp_path / "a.npz"], format="npz")
    assert "a.npz" in str(error.value)


# --- rows of text


def row_dicts(trace):
    for t in range(trace.num_tokens):
        for i, layer in enumerate(trace.layers):
            yield {
                "request": int(trace.request_T[t]),
                "position": int(trace.position_T[t]),
                "layer": layer,
                "experts": trace.expert_ids_TLK[t, i].tolist(),
                "weights": [float(w) for w in trace.weights_TLK[t, i]],
                "phase": "decode" if trace.is_decode_T[t] else "prefill",
                "token_id": int(trace.token_id_T[t]),
            }


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: " ".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()})


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_rows_in_any_order_of_rows_and_columns(tmp_path, suffix):
    source = made()
    rng = np.random.default_rng(3)
    rows = list(row_dicts(source))
    columns = rng.permutation(list(rows[0]))
    write_rows(tmp_path / f"r{suffix}", [{str(c): rows[i][c] for c in columns} for i in rng.permutation(len(rows))])
    assert_routed_alike(converted(tmp_path, tmp_path / f"r{suffix}", "--num-experts", 12), source)
    plain = [{k: row[k] for k in ("request", "position", "layer", "experts")} for row in rows]
    write_rows(tmp_path / f"r{suffix}", plain)
    got = import_routing([tmp_path / f"r{suffix}"], num_experts=12)
    assert_routed_alike(got, replace(source, is_decode_T=np.zeros(13, bool)), weights=False, tokens=False)


@pytest.mark.parametrize(
    ("row", "change", "said"),
    [
        (3, {"experts": [1, 1, 2]}, "line {}: column experts must not repeat one; given"),
        (3, {"experts": [1, 2]}, "line {}: .*weights must be 2 numbers"),
        (3, {"experts": [1, 2, 99]}, "line {}: column experts must be below --num-experts 12"),
        (3, {"experts": [1, "x", 2]}, "line {}: column experts must be whole numbers"),
        (3, {"weights": [1, 2, -3]}, "line {}: column weights must be 3 numbers of 0 or more"),
        (3, {"phase": "train"}, "line {}: column phase must be prefill or decode; given 'train'"),
        (4, {"phase": "decode"}, "line {}: column phase must be the same in all rows of a token"),
        (4, {"token_id": 1000}, "line {}: column token_id must be the same"),
        (3, {"request": -1}, "line {}: column request must be a whole number from 0"),
        (3, {"position": 1.5}, "line {}: column position must be a whole number"),
        (3, {"layer": "one"}, "line {}: column layer must be a whole number"),
        (5, {"layer": 2}, "request 0 position 1 lacks layer 4; every token needs each of the 3 layers"),
        (5, {"layer": 9}, "request 0 position 0 lacks layer 9"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_wrong_rows_are_named_by_line(tmp_path, suffix, row, change, said):
    rows = list(row_dicts(made()))
    rows[row] |= change
    write_rows(tmp_path / f"r{suffix}", rows)
    with pytest.raises(ValueError, match=said.format(row + (2 if suffix == ".csv" else 1))):
        import_routing([tmp_path / f"r{suffix}"], num_experts=12)


def test_all_wrong_rows_are_named_up_to_a_limit(tmp_path):
    rows = list(row_dicts(made()))
    for row in rows[:5]:
        row["phase"] = "?"
    write_rows(tmp_path / "r.csv", rows)
    with pytest.raises(ValueError, match="5 mistakes"):
        import_routing([tmp_path / "r.csv"], num_experts=12)
    for row in rows:
        row["phase"] = "?"
    write_rows(tmp_path / "r.csv", rows)
    with pytest.raises(ValueError, match=r"(?s)line 2: .*line 21: .*and 19 more") as error:
        import_routing([tmp_path / "r.csv"], num_experts=12)
    assert "line 22" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.csv", "request,position,experts,wieght\n0,0,1,2\n", "(?s)column layer lacks.*'wieght' is unknown; nearest"),
        ("r.csv", "request,position,layer,experts\n0,0,1\n", "line 2: must have 4 cells"),
        ("r.csv", "request,position,layer,experts\n", "has no rows"),
        (
            "r.jsonl",
            '{"experts": [1]}\n[1]\n{"a\n',
            "(?s)line 1: column request lacks.*line 2: must be an object.*line 3",
        ),
        (
            "r.jsonl",
            '{"request":0,"position":0,"layer":0,"experts":[1]}\n'
            '{"request":0,"position":1,"layer":0,"experts":[1],"token_id":3}\n',
            "line 2: must have the columns of the first row",
        ),
    ],
)
def test_wrong_tables(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        import_routing([tmp_path / name], num_experts=12)


# --- vLLM


def vllm_requests(trace, lengths, dense=(0, 3)):
    """Requests as vLLM returns them: dense layers all 0, no row for a last token that was generated."""
    layers = sorted({*trace.layers, *dense})
    for request, (prompt, _) in enumerate(lengths):
        rows = trace.request_T == request
        routed = np.zeros((rows.sum(), len(layers), trace.top_k), int)
        routed[:, [layers.index(layer) for layer in trace.layers]] = trace.expert_ids_TLK[rows]
        ids = trace.token_id_T[rows].tolist()
        yield {
            "prompt_token_ids": ids[:prompt],
            "token_ids": [*ids[prompt:], 5],
            "routed_experts": routed.tolist(),
        }


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_vllm(tmp_path, suffix):
    lengths = ((3, 2), (4, 0), (1, 3))
    source = made(lengths)
    requests = list(vllm_requests(source, lengths))
    path = tmp_path / f"v{suffix}"
    lines = "\n".join(json.dumps(request) for request in requests)
    path.write_text(lines if suffix == ".jsonl" else json.dumps(requests))
    assert_routed_alike(converted(tmp_path, path, "--num-experts", 12), source, weights=False)
    nested = [{"prompt_token_ids": r.pop("prompt_token_ids"), "outputs": [r]} for r in requests]
    path.write_text("\n".join(map(json.dumps, nested)) if suffix == ".jsonl" else json.dumps(nested))
    assert_routed_alike(import_routing([path], num_experts=12), source, weights=False)


def test_wrong_vllm(tmp_path):
    lengths = ((3, 2), (4, 0), (1, 3))
    requests = list(vllm_requests(made(lengths), lengths))
    requests[0]["token_ids"] += [1, 2]
    requests[1]["routed_experts"][0].pop()
    del requests[2]["routed_experts"]
    (tmp_path / "v.json").write_text(json.dumps(requests))
    with pytest.raises(ValueError, match="3 mistakes") as error:
        import_routing([tmp_path / "v.json"], num_experts=12)
    for said in (
        r"request 0: 3 prompt and 5 generated tokens need 7 rows of routed_experts (the last token is not routed); "
        "given 5",
        "request 1: routed_experts must be whole numbers [token, layer, K], rows of one length",
        "request 2: needs routed_experts",
    ):
        assert said in str(error.value)
    (tmp_path / "v.jsonl").write_text('{"outputs": []}\n')
    with pytest.raises(ValueError, match="enable_return_routed_experts"):
        import_routing([tmp_path / "v.jsonl"], num_experts=12)
    with pytest.raises(ValueError, match="take no --phase"):
        import_routing([tmp_path / "v.jsonl"], num_experts=12, phase="decode")


# --- SGLang


def sglang_passes(trace, groups, num_model_layers=5, redundant=True):
    """A per_token recording of passes, each a mode and a list of (request, first row, rows); ids are physical."""
    E = trace.num_experts
    logical = np.tile(np.arange(E), (num_model_layers, 1))
    if redundant:  # every layer permuted its own way, with two experts twice
        rng = np.random.default_rng(5)
        logical = np.stack([np.append(rng.permutation(E), [0, 1]) for _ in range(num_model_layers)])
    start = np.searchsorted(trace.request_T, np.arange(trace.request_T.max() + 2))
    records = []
    for number, (mode, pieces) in enumerate(groups):
        rows = np.concatenate([start[r] + first + np.arange(n) for r, first, n in pieces])
        ids = np.full((num_model_layers, len(rows), 8), -1)
        for i, layer in enumerate(trace.layers):
            where = np.argsort(logical[layer][:E])
            ids[layer, :, : trace.top_k] = where[trace.expert_ids_TLK[rows, i]]
        counts = np.stack([np.bincount(row[row >= 0], minlength=logical.shape[1]) for row in ids])
        records.append(
            {
                "forward_pass_id": number + 10,
                "rank": 0,
                "gatherer_key": "primary",
                "input_ids": trace.token_id_T[rows].tolist(),
                "positions": trace.position_T[rows].tolist(),
                "extend_seq_lens": [n for _, _, n in pieces] if mode != 2 else None,
                "forward_mode": mode,
                "topk_ids_of_layer": ids,
                "misc_objects": [],
                "global_physical_count": counts,
            }
        )
    return {"records": records, "last_physical_to_logical_map": logical}


LENGTHS = ((3, 2), (4, 1), (5, 3))
GROUPS = [
    (1, [(0, 0, 3), (1, 0, 4)]),  # two prompts
    (1, [(2, 0, 2)]),  # a prompt in pieces
    (2, [(0, 3, 1), (1, 4, 1)]),
    (3, [(2, 2, 3), (0, 4, 1)]),  # its last piece, beside a decode token
    (2, [(2, 5, 1)]),
    (2, [(2, 6, 1)]),
    (2, [(2, 7, 1)]),
]


def as_json(value):
    return json.dumps(value, default=lambda array: array.tolist())


def test_sglang_per_token_follows_requests_through_passes(tmp_path):
    source = made(LENGTHS)
    (tmp_path / "s.json").write_text(as_json(sglang_passes(source, GROUPS)))
    assert_routed_alike(converted(tmp_path, tmp_path / "s.json"), source, weights=False)
    with pytest.raises(ValueError, match=r"t\.json: holds the same tokens as s\.json"):
        (tmp_path / "t.json").write_text((tmp_path / "s.json").read_text())
        import_routing([tmp_path / "s.json", tmp_path / "t.json"])


def test_sglang_decode_of_equal_lengths_goes_by_batch_order(tmp_path):
    """Requests of one length decode together; the first ends, and one that ended earlier is not gone on with."""
    source = made(((2, 1), (2, 3), (2, 3)))
    groups = [
        (1, [(0, 0, 2), (1, 0, 2), (2, 0, 2)]),
        (2, [(0, 2, 1), (1, 2, 1), (2, 2, 1)]),
        (2, [(1, 3, 1), (2, 3, 1)]),
        (2, [(1, 4, 1), (2, 4, 1)]),
    ]
    (tmp_path / "s.json").write_text(as_json(sglang_passes(source, groups)))
    got = import_routing([tmp_path / "s.json"])
    # Request 0 ended at the length of 1 and 2, so nobody can tell: the first two go on. No token is lost or doubled.
    assert np.bincount(got.request_T).tolist() == [5, 5, 3]
    assert sorted(map(tuple, got.expert_ids_TLK[:, 0].tolist())) == sorted(
        map(tuple, source.expert_ids_TLK[:, 0].tolist())
    )
    shorter = made(((1, 1), (2, 3), (2, 3)))
    groups[0] = (1, [(0, 0, 1), (1, 0, 2), (2, 0, 2)])
    groups[1] = (2, [(0, 1, 1), (1, 2, 1), (2, 2, 1)])
    (tmp_path / "s.json").write_text(as_json(sglang_passes(shorter, groups)))
    assert_routed_alike(import_routing([tmp_path / "s.json"]), shorter, weights=False)


def test_sglang_per_pass_sums_replicas_and_ranks(tmp_path):
    rng = np.random.default_rng(0)
    logical = np.stack([rng.permutation([0, 1, 2, 3, 4, 5, 0, 3]) for _ in range(2)])
    physical = rng.integers(20, 29, (2, 3, 2, 8))  # rank, pass, layer, physical expert
    for rank in range(2):
        records = [
            {"forward_pass_id": step, "rank": rank, "global_physical_count": physical[rank, step]} for step in (2, 0, 1)
        ]
        (tmp_path / f"{rank}.json").write_text(as_json({"records": records, "last_physical_to_logical_map": logical}))
    paths = [tmp_path / "0.json", tmp_path / "1.json"]
    with pytest.raises(ValueError, match="give --top-k K"):
        import_routing(paths)
    got = import_routing(paths, top_k=2)
    wanted = np.zeros((3, 2, 6), int)
    for rank, step, layer, expert in np.ndindex(physical.shape):
        wanted[step, layer, logical[layer, expert]] += physical[rank, step, layer, expert]
    np.testing.assert_array_equal(got.counts_WLE, wanted)


def test_sglang_counts_by_logical_expert(tmp_path):
    source = made(LENGTHS, experts=6, top_k=2)
    dump = sglang_passes(source, GROUPS, redundant=False)
    for record in dump["records"]:
        del record["topk_ids_of_layer"]
    (tmp_path / "a.json").write_text(as_json(dump))
    got = import_routing([tmp_path / "a.json"], top_k=2)
    assert isinstance(got, CountTrace) and got.layers == source.layers and len(got.counts_WLE) == len(GROUPS)
    for i in range(3):
        wanted = np.bincount(source.expert_ids_TLK[:, i].ravel(), minlength=6)
        np.testing.assert_array_equal(got.counts_WLE.sum(axis=0)[i], wanted)
    twice = import_routing([tmp_path / "a.json", tmp_path / "a.json"], top_k=2)
    np.testing.assert_array_equal(twice.counts_WLE, 2 * got.counts_WLE)


def stat_counts():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 9, (4, 3, 8))
    counts[:, 0] = 0  # a dense layer
    counts[3] = 0  # a step that the buffer had room for
    return counts


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_sglang_stat_leaves_out_dense_layers_and_empty_steps(tmp_path, suffix):
    counts, path = stat_counts(), tmp_path / f"s{suffix}"
    if suffix == ".npz":
        np.savez(path, logical_count=counts)
    else:
        path.write_text(as_json({"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}))
    got = import_routing([path], top_k=2, origin="random")
    np.testing.assert_array_equal(got.counts_WLE, counts[:3, 1:])
    assert got.layers == (1, 2) and got.provenance["router"] == "random"


def test_files_of_torch_are_read_without_torch(tmp_path):
    torch = pytest.importorskip("torch", reason="torch writes the files that this reads")
    source = made(LENGTHS)
    dump = sglang_passes(source, GROUPS)
    for record in dump["records"]:
        record["topk_ids_of_layer"] = torch.tensor(record["topk_ids_of_layer"], dtype=torch.int32)[:, :, :]
        record["global_physical_count"] = torch.tensor(record["global_physical_count"])
    dump["last_physical_to_logical_map"] = torch.tensor(dump["last_physical_to_logical_map"]).T.contiguous().T
    torch.save(dump, tmp_path / "expert_distribution_recorder_1.5_0.pt")
    assert_routed_alike(converted(tmp_path, tmp_path / "expert_distribution_recorder_1.5_0.pt"), source, weights=False)
    torch.save({"rank": 0, "logical_count": torch.tensor(stat_counts())[1:]}, tmp_path / "stat.pt")
    got = import_routing([tmp_path / "stat.pt"], top_k=2)
    np.testing.assert_array_equal(got.counts_WLE, stat_counts()[1:3, 1:])


def test_files_of_torch_run_no_code(tmp_path):
    import pickle

    class Sly:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    with zipfile.ZipFile(tmp_path / "s.pt", "w") as archive:
        archive.writestr("s/data.pkl", pickle.dumps({"logical_count": Sly()}))
    with pytest.raises(ValueError, match=r"s\.pt: not a file of plain data and tensors .*names "):
        import_routing([tmp_path / "s.pt"])
    assert not (tmp_path / "ran").exists()
    (tmp_path / "s.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ValueError, match="not a file of plain data"):
        import_routing([tmp_path / "s.pt"])


def sglang_change(dump, change):
    record = dump["records"][0]
    if change == "mode":
        record["forward_mode"] = 5
    elif change == "lengths":
        record["extend_seq_lens"] = [1]
    elif change == "positions":
        record["positions"].pop()
    elif change == "fewer":
        record["topk_ids_of_layer"][1, 2, 2] = -1
    elif change == "map":
        dump["last_physical_to_logical_map"] = dump["last_physical_to_logical_map"][:3]
    elif change == "empty":
        dump["records"] = []
    elif change == "neither":
        del record["topk_ids_of_layer"], record["global_physical_count"]
    return dump


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("mode", r"records\[0\]\.forward_mode must be 1 .*given 5; record without speculative decoding"),
        ("lengths", r"extend_seq_lens must sum to its 7 tokens; given \[1\]"),
        ("positions", "positions and input_ids, of one length"),
        ("fewer", "every token must have 3 experts in every MoE layer; token 2 has .* in layer 1"),
        ("map", r"last_physical_to_logical_map is \[3, 14\], too small for layer 4"),
        ("empty", "needs logical_count, or a list records"),
        ("neither", "every record needs topk_ids_of_layer"),
    ],
)
def test_wrong_sglang(tmp_path, change, said):
    (tmp_path / "s.json").write_text(as_json(sglang_change(sglang_passes(made(LENGTHS), GROUPS), change)))
    with pytest.raises(ValueError, match=said) as error:
        import_routing([tmp_path / "s.json"], format="sglang")
    assert "s.json" in str(error.value)


# --- counts


@pytest.mark.parametrize("suffix", [".npz", ".npy", ".csv", ".json"])
def test_eplb_tables(tmp_path, suffix):
    counts, path = np.random.default_rng(0).integers(5, 9, (3, 8)), tmp_path / f"t{suffix}"
    if suffix == ".npz":
        np.savez(path, weight=counts)
    elif suffix == ".npy":
        np.save(path, counts[None].astype(float))
    elif suffix == ".csv":
        path.write_text("\n".join(",".join(map(str, row)) for row in counts))
    else:
        path.write_text(as_json(counts))
    got = import_routing([path], top_k=2, model="m")
    np.testing.assert_array_equal(got.counts_WLE, counts[None])
    routing = converted(tmp_path, path, "--top-k", 2)
    assert routing.origin == "counts" and routing.num_experts == 8 and routing.layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2\n3\n", "rows of numbers of one length"),
        ("1.5,2\n3,4\n", r"whole numbers; given 1.5 at \[0, 0\]"),
        ("0,0\n3,4\n", "at least one count in every window"),
        ("1,-2\n3,4\n", "must not be negative"),
        ("nan,2\n3,4\n", "whole numbers; given nan"),
    ],
)
def test_wrong_eplb_tables(tmp_path, text, said):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=said):
        import_routing([tmp_path / "t.csv"], top_k=1)


def test_smartmoe_loads(tmp_path):
    load = np.random.default_rng(0).integers(5, 9, (3, 2, 4, 2, 8)).astype(np.uint16)
    np.savez(tmp_path / "l.npz", load=load, iteration=np.array([1, 51, 101]))
    got = import_routing([tmp_path / "l.npz"], top_k=2)
    np.testing.assert_array_equal(got.counts_WLE, load.astype(int).sum(axis=3).sum(axis=1))
    assert got.provenance["windows"] == "training iterations 1, 51, 101"


COUNTS = "which,layer,expert,count\n" + "".join(
    f"{which},{layer},{e},{e + layer + add}\n"
    for which, add in (("a", 5), ("b", 9))
    for layer in (0, 7)
    for e in range(4)
)


def test_lines_of_counts_are_selected(tmp_path):
    path = tmp_path / "c.csv"
    path.write_text(COUNTS)
    got = import_routing([path], top_k=2, select={"which": "b"})
    assert got.layers == (0, 7) and got.counts_WLE.tolist() == [[[9, 10, 11, 12], [16, 17, 18, 19]]]
    assert got.provenance["selected"] == "which=b"
    assert import_routing([path], top_k=2, select={"which": "b"}, num_experts=6).num_experts == 6
    assert converted(tmp_path, path, "--top-k", 1, "--select", "which=a").top_k == 1


@pytest.mark.parametrize(
    ("change", "select", "said"),
    [
        (("", ""), {}, "column which has 2 values, a, b; choose one with --select which=VALUE"),
        (("", ""), {"which": "c"}, "no line is left with which=c; column which has a, b"),
        (("", ""), {"whihc": "a"}, "--select whihc=a: no such column to select by; one of which"),
        (("a,7,2,14", "a,7,1,14"), {"which": "a"}, r"line 8: \(window, layer, expert\) \(0, 7, 1\) is given a second"),
        (("a,7,2,14", "a,7,2,-4"), {"which": "a"}, "line 8: must hold whole numbers.*given count '-4'"),
        (("a,7,2,14", "a,7,70000,14"), {"which": "a"}, "line 8: layer must be at most 32767, expert at most 65535"),
        (("a,7,2,14", "a,7,2"), {"which": "a"}, "line 8: .*given count None"),
    ],
)
def test_wrong_lines_of_counts(tmp_path, change, select, said):
    (tmp_path / "c.csv").write_text(COUNTS.replace(*change) if change[0] else COUNTS)
    with pytest.raises(ValueError, match=said):
        import_routing([tmp_path / "c.csv"], top_k=1, select=select)


# --- whichever format


def test_a_trace_of_our_own_is_a_source_too(tmp_path):
    source = replace(made(), origin="random", provenance={"date": "today"})
    write_trace(source, tmp_path / "a.parquet")
    got = converted(tmp_path, tmp_path / "a.parquet", "--name", "new")
    assert_routed_alike(got, source)
    assert (got.name, got.model, got.origin, got.provenance) == ("new", "made up", "random", {"date": "today"})
    twice = import_routing([tmp_path / "a.parquet"] * 2)
    assert twice.num_tokens == 26 and twice.request_T.max() == 5
    np.save(tmp_path / "t.npy", np.full((2, 4), 9))
    converted(tmp_path, tmp_path / "t.npy", "--top-k", 2)
    again = import_routing([tmp_path / "out.parquet"], name="again")
    assert isinstance(again, CountTrace) and again.name == "again"


def test_what_no_reader_knows(tmp_path):
    (tmp_path / "a.csv").write_text("colour,shape\nred,round\n")
    with pytest.raises(ValueError, match=r"no known format .*colour, shape.*say which with --format") as error:
        import_routing([tmp_path / "a.csv"])
    for name, reader in FORMATS.items():
        assert f"{name}: {reader.summary}" in str(error.value) and len(reader.summary) > 20
    with pytest.raises(ValueError, match="nearest: 'vllm'"):
        import_routing([tmp_path / "a.csv"], format="vlm")
    np.save(tmp_path / "t.npy", np.full((2, 4), 9))
    with pytest.raises(ValueError, match=r"different formats: .*t\.npy of eplb"):
        write_npz(tmp_path / "a.npz", made(((1, 0),)))
        import_routing([tmp_path / "t.npy", tmp_path / "a.npz"])
    with pytest.raises(ValueError, match="format npz take no --top-k"):
        import_routing([tmp_path / "a.npz"], top_k=2)
    with pytest.raises(ValueError, match="has 12 experts a layer, --num-experts says 8"):
        import_routing([tmp_path / "a.npz"], num_experts=8)
    for path, said in ((tmp_path, "a folder"), (tmp_path / "none.npz", "no such file")):
        with pytest.raises(ValueError, match=said):
            import_routing([path])


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "a.json", "a.jsonl", "a.pt", "a.parquet", "a.txt"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00junk", b"[[1, 2], [3]]", b"{}", b"PK\x03\x04"])
def test_junk_is_one_clear_error_in_every_format(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    for format in (None, *FORMATS):
        with pytest.raises(ValueError) as error:
            import_routing([path], format=format, num_experts=4 if format in ("npz", "rows", "vllm") else None)
        assert name in str(error.value)


def test_the_command_line_says_what_is_wrong(tmp_path):
    (tmp_path / "a.csv").write_text("colour\n")
    result = CliRunner().invoke(cli, ["trace", "convert", str(tmp_path / "a.csv"), "-o", "x.parquet", "--select", "c4"])
    assert result.exit_code == 2 and "COLUMN=VALUE" in result.output
    result = CliRunner().invoke(cli, ["trace", "convert", "--help"])
    assert all(name in result.output for name in FORMATS)


# --- real recordings


def real(folder, pattern):
    paths = sorted((DATA / folder).glob(pattern))
    if not paths:
        pytest.skip(f"{DATA / folder} is not here")
    return paths


def assert_same_choices(trace, arrays, weights):
    """Ids and weights are the source's, sorted by falling weight, ties in the source's order."""
    best = np.argsort(-weights.astype(np.float32), axis=2, kind="stable")
    np.testing.assert_array_equal(trace.expert_ids_TLK, np.take_along_axis(arrays["expert_ids"], best, axis=2))
    assert (np.diff(trace.weights_TLK.astype(np.float32), axis=2) <= 0).all()
    np.testing.assert_array_equal(trace.position_T, arrays["position"])


def test_real_deepseek_prefill(tmp_path):
    paths = real("routing_esft_deepseek_v2_lite", "*.npz")
    trace = import_routing(paths, name="esft", model="deepseek-v2-lite")
    arrays = [dict(np.load(path)) for path in paths]
    whole = {name: np.concatenate([a[name] for a in arrays]) for name in ("expert_ids", "gate_weight", "position")}
    assert_same_choices(trace, whole, whole["gate_weight"])
    assert trace.num_experts == 64 and trace.top_k == 6 and trace.layers == tuple(range(1, 27))
    assert not trace.is_decode_T.any()
    lengths = [length for a in arrays for length in np.unique(a["sample"], return_counts=True)[1]]
    assert np.unique(trace.request_T, return_counts=True)[1].tolist() == lengths


def test_real_gpt_oss_decode():
    (path,) = real("routing_gpt_oss_20b", "routes.npz")
    trace, arrays = import_routing([path]), dict(np.load(path))
    assert_same_choices(trace, arrays, arrays["prob_u8"])
    assert trace.is_decode_T.all() and trace.num_experts == 32 and trace.layers == tuple(range(24))
    np.testing.assert_array_equal(trace.request_T, arrays["sample"])


def test_real_training_loads():
    (path,) = real("routing_smartmoe_training", "expert_load.npz")
    counts = import_routing([path], top_k=2)
    assert counts.counts_WLE.sum() == 101 * 24 * 16 * 4 * 4096
    with pytest.raises(ValueError, match=r"more than 1/3.*top_k of at most 2"):
        import_routing([path], top_k=3)
    trace = counts.to_routing(64)
    assert trace.num_tokens == 101 * 64 and trace_mistakes(trace) == []
    first = np.bincount(trace.expert_ids_TLK[:64, 0].ravel(), minlength=32)
    assert np.abs(first - counts.counts_WLE[0, 0] * 128 / counts.counts_WLE[0, 0].sum()).max() < 1


def test_real_counts_of_texts():
    (path,) = real("routing_olmoe_mixtral_counts", "expert_counts.csv")
    for model, domain, top_k, experts in (("olmoe-1b-7b-0924", "c4", 8, 64), ("mixtral-8x7b", "github", 2, 8)):
        got = import_routing([path], top_k=top_k, select={"model": model, "domain": domain, "which": "topk"})
        assert got.layers == (0, 7, 15) and got.num_experts == experts
        with path.open() as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if (row["model"], row["domain"], row["which"]) == (model, domain, "topk")
            ]
        assert got.counts_WLE.sum() == sum(int(row["count"]) for row in rows)
    # First choices alone break the rule of top k: one expert has more than 1/8 of them.
    with pytest.raises(ValueError, match="or counts of all of a token's experts"):
        import_routing([path], top_k=8, select={"model": "olmoe-1b-7b-0924", "domain": "github", "which": "top1"})
