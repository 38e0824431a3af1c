"""`linnet bench gpu` without a GPU: what is planned, recorded, resumed, merged and reported; the rows at tiny sizes on the CPU."""

import json
import math

import pytest
import torch

from linnet.bench import _gpu_kernels, _gpu_measure, _gpu_report, gpu
from linnet.bench._gpu_rows import IMPLEMENTATION, IN_PLACE, ROWS, Operand, Peer, Row, parse_shape, plain, shape_sets, traffic

TINY, ONE = "B1T32H2K16V16", "B2T1H2K16V16"


def run(out, *more):
    gpu.main(["--device", "cpu", "--out", str(out), *more])
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def short_timing(monkeypatch):
    monkeypatch.setattr(_gpu_measure, "milliseconds", lambda f, **_: (f(), 1.0)[1])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.run is not None])
def test_every_row_measures_and_agrees_with_fp64(name):
    found = _gpu_measure.measure(ROWS[name], IMPLEMENTATION, parse_shape(TINY), "cpu")
    assert found["backend"] == "torch" and found["both_bytes"] > found["forward_bytes"] > 0
    assert all(len(times) > 1 and min(times.values()) > 0 for times in found["kernels"].values()) and len(found["kernels"]) == 2
    assert "backward_failed" not in found and "check_failed" not in found
    learned = {"d" + n for n in ROWS[name].operands if n not in ROWS[name].constants}
    assert set(found["errors"]) == {"o"} | learned
    assert all(e < 5e-3 for e in found["errors"].values()), found["errors"]


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if "decode" in row.sets])
def test_every_matrix_row_decodes(name):
    row = ROWS[name]
    for implementation in [IMPLEMENTATION] + [IN_PLACE] * (IN_PLACE in row.peers):
        found = _gpu_measure.measure(row, implementation, parse_shape(ONE), "cpu")
        state = 4 * sum(math.prod({"B": 2, "H": 2, "K": 16, "V": 16}[c] for c in letters) for letters in row.state.values())
        assert found["forward_bytes"] > 2 * state and "both_eager_ms" not in found


def test_a_wrong_gradient_is_seen(monkeypatch):
    """The check must be able to fail: a peer with dk doubled, and one that is not finite."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k):
            return k.clone()

        @staticmethod
        def backward(ctx, dk):
            return 2 * dk

    row = ROWS["linear-none"]
    wrong = Peer("torch", lambda: lambda x: row.run({**x, "k": Doubled.apply(x["k"])}, backend="torch")[0])
    infinite = Peer("torch", lambda: lambda x: row.run(x, backend="torch")[0] / 0)
    turned = lambda x: row.run({n: a.transpose(1, 2) for n, a in x.items()}, backend="torch")[0].transpose(1, 2)
    peers = {"wrong": wrong, "infinite": infinite, "turned": Peer("torch", lambda: turned, heads_first=True)}
    row = Row(row.name, "", row.operands, row.run, row.output, peers)
    errors = {p: _gpu_measure.measure(row, p, parse_shape("B2T32H4K16V8"), "cpu")["errors"] for p in peers}
    assert errors["wrong"]["dk"] == pytest.approx(1, rel=0.01) and max(errors["wrong"][n] for n in ("o", "dq", "dv")) < 5e-3
    assert all(math.isnan(e) for e in errors["infinite"].values()) and max(errors["turned"].values()) < 5e-3


def test_traffic_of_the_main_shape():
    """0.345 ms at 4.3 TB/s for a scalar decay, forward and backward; constants have no gradient to write."""
    row = Row("r", "", {"q": Operand("BTHK", plain), "c": Operand("H", plain, half=False)}, None, "BTHK", constants=("c",))
    x = row.make({"B": 2, "T": 3, "H": 4, "K": 5, "V": 5}, "cpu")
    q, c, o = 2 * 120, 4 * 4, 1000
    assert traffic(row, x, o) == (q + c + o, 2 * (q + c + o) + q)
    assert traffic(row, x, o, state=7)[0] == q + c + o + 14
    main = shape_sets()["main"][0]
    x = {n: torch.empty(s, dtype=d, device="meta") for n, s, d in [
        *((n, (8, 4096, 16, 128), torch.bfloat16) for n in "qkv"), ("log_decay", (8, 4096, 16), torch.float32),
    ]}  # fmt: skip
    _, both = traffic(ROWS["linear-scalar"], x, x["v"].nbytes)
    assert main == {"B": 8, "T": 4096, "H": 16, "K": 128, "V": 128} and both / 4.3e12 * 1e3 == pytest.approx(0.345, abs=5e-4)


def test_the_plan():
    names = lambda tasks: [(t.row.name, t.implementation) for t in tasks]
    rows = gpu.chosen_rows(["kda", "softmax", "l2-norm"])
    assert names(gpu.plan(rows, gpu.chosen_shapes(["main"]))) == [
        ("kda", "linnet"), ("kda", "fla"), ("softmax", "cudnn"), ("softmax", "flash"), ("l2-norm", "linnet"), ("l2-norm", "fla"),
    ]  # fmt: skip
    assert names(gpu.plan(rows, gpu.chosen_shapes(["main"]), peers=False)) == [("kda", "linnet"), ("l2-norm", "linnet")]
    assert {t.row.name for t in gpu.plan(rows, gpu.chosen_shapes(["decode"]))} == {"kda"}
    assert {t.implementation for t in gpu.plan(rows, gpu.chosen_shapes(["decode"]), peers=False)} == {"linnet", IN_PLACE}
    every = gpu.plan(gpu.chosen_rows([]), gpu.chosen_shapes(["all"]))
    assert len({_gpu_report.key(t.names) for t in every}) == len(every)
    assert every[0].shape == shape_sets()["main"][0] and {t.row.name for t in every} == set(ROWS)
    cold = gpu.plan(rows, gpu.chosen_shapes(["main", "decode"]), kind="cold")
    assert [t.implementation == IMPLEMENTATION for t in cold] == [True, True, False, False, False, False]
    assert all(s["B"] * s["T"] == 32768 for s in shape_sets()["length"] if s["T"] <= 32768)


def test_records_resume_retry_and_merge(tmp_path, capsys, monkeypatch):
    first = run(tmp_path / "a", "--rows", "l2-norm", "--shapes", TINY, "--no-peers")
    assert [r["row"] for r in first] == ["l2-norm"]
    with pytest.raises(ValueError, match="'out'"):
        run(tmp_path / "a", "--rows", "l2-norm")
    with open(tmp_path / "a" / "gpu.jsonl", "a") as file:
        file.write('{"kind": "time", "row"')  # a run that was killed while it wrote
    again = _gpu_report.Records(tmp_path / "a")
    assert len(again.found) == 1
    monkeypatch.setattr(_gpu_measure, "measure", lambda row, *_: (_ for _ in ()).throw(RuntimeError(f"no {row.name}")))
    more = ["--rows", "l2-norm", "linear-none", "--shapes", TINY, "--no-peers", "--resume"]
    with pytest.raises(json.JSONDecodeError):
        run(tmp_path / "a", *more)
    found = _gpu_report.Records(tmp_path / "a").found
    assert [r.get("failed") for r in found.values()] == [None, "RuntimeError: no linear-none"]
    monkeypatch.undo()
    gpu.main(["--device", "cpu", "--out", str(tmp_path / "a"), *more])
    assert "0 measurements" in capsys.readouterr().out
    gpu.main(["--device", "cpu", "--out", str(tmp_path / "a"), *more, "--retry"])
    found = _gpu_report.Records(tmp_path / "a").found
    assert len(found) == 2 and not any("failed" in r for r in found.values())
    run(tmp_path / "b", "--rows", "linear-none", "--shapes", "B2T64H2K16V16", ONE, "--no-peers")
    gpu.main(["--report", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "c")])
    text = (tmp_path / "c" / "gpu.md").read_text()
    assert all(word in text for word in (f"## {TINY}", "## B2T64H2K16V16", "## One token", "L2 norm", "backend torch"))
    assert len(json.loads((tmp_path / "c" / "gpu.json").read_text())) == 5


def test_the_budget_stops_before_the_next_row(tmp_path, capsys):
    gpu.main(["--device", "cpu", "--out", str(tmp_path), "--shapes", TINY, "--budget", "0"])
    assert "the budget is spent" in capsys.readouterr().out and not (tmp_path / "gpu.jsonl").exists()


def made(row, implementation, shape, **more):
    base = {"kind": "time", "row": row, "implementation": implementation, "shape": shape, "bandwidth": 4.8e12}
    times = {"forward_ms": 0.2, "both_ms": 0.8, "forward_eager_ms": 0.3, "both_eager_ms": 0.9, "peak_mib": 700.0}
    rest = {"backend": "triton", "forward_bytes": 6e8, "both_bytes": 1.5e9, "machine": {"device": "NVIDIA H200"}}
    return {**base, **times, **rest, **more}


def test_report_with_every_kind_of_record(tmp_path):
    records = _gpu_report.Records(tmp_path)
    main = gpu.shape_name(shape_sets()["main"][0])
    eager = {"graph_failed": "RuntimeError: not permitted", "note": "refuses"}
    kernels = {"forward": {"scalar_role": 0.18}, "both": {"scalar_role": 0.48, "gradients_hopper": 0.37, "rest": 0.02}}
    records.add(made("linear-scalar", "linnet", main, errors={"o": 2e-3, "dk": float("nan")}, kernels=kernels))
    record = made("linear-scalar", "fla", main, **eager)
    for name in ("forward_ms", "both_ms"):
        del record[name]
    records.add(record)
    records.add({**made("kda", "fla", main), "failed": "OutOfMemoryError: 80 GiB"})
    for shape in shape_sets()["length"]:
        records.add(made("linear-none", "linnet", gpu.shape_name(shape)))
    for shape in shape_sets()["decode"]:
        records.add(made("kda", "linnet", gpu.shape_name(shape)))
    cold = {"import_s": 1.0, "first_s": 7.5, "process_s": 20.0, "machine": {"device": "NVIDIA H200"}}
    records.add({"kind": "cold", "row": "kda", "implementation": "linnet", "shape": main, **cold})
    files = {path.name for path in _gpu_report.write(_gpu_report.Records(tmp_path), tmp_path)}
    assert files == {"gpu.json", "gpu.md", "gpu_bars.png", "gpu_length.png", "gpu_cold.png"}
    text = (tmp_path / "gpu.md").read_text()
    for part in ("0.200 (1.6x)", "dk nan", "eager only, not captured", "refuses", "failed: OutOfMemoryError", "batch 256", "7.5"):
        assert part in text
    assert "| linear attention, scalar decay | fla | 0.300 (2.4x)" in text
    assert "| forward + backward | 0.870 | scalar_role 0.480, gradients_hopper 0.370, rest 0.020 |" in text


def test_a_gradient_that_fails_keeps_the_forward_and_a_refusal_is_switched_off_and_told():
    import contextlib

    open_now = []

    @contextlib.contextmanager
    def unlock():
        open_now.append(True)
        yield
        open_now.clear()

    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k):
            return k.clone()

        @staticmethod
        def backward(ctx, dk):
            if not open_now:
                raise RuntimeError("refused here")
            return dk

    row = ROWS["linear-none"]
    load = lambda: lambda x: row.run({**x, "k": Refuses.apply(x["k"])}, backend="torch")[0]
    row = Row(row.name, "", row.operands, row.run, row.output, {"p": Peer("torch", load), "q": Peer("torch", load, unlock=unlock)})
    closed, opened = (_gpu_measure.measure(row, p, parse_shape(TINY), "cpu") for p in "pq")
    assert (
        closed["backward_failed"] == "RuntimeError: refused here" and "both_eager_ms" not in closed and closed["forward_eager_ms"]
    )
    assert opened["refused"] == "RuntimeError: refused here" and opened["both_eager_ms"] and "switched off" in opened["note"]
    assert not open_now and max(opened["errors"].values()) < 5e-3


@pytest.mark.parametrize(
    "argv, name",
    [
        (["--rows", "nothing"], "rows"), (["--shapes", "huge", "--out", "x"], "shapes"),
        (["--shapes", "B0T1H1K1V1", "--out", "x"], "shapes"),
        ([], "out"), (["--retry"], "retry"), (["--report", "/nowhere"], "report"),
    ],
)  # fmt: skip
def test_refusals_name_the_argument(argv, name):
    with pytest.raises(ValueError, match=f"'{name}'"):
        gpu.main([*argv, "--device", "cpu"])


def test_check_covers_small_shapes_and_can_fail(capsys, monkeypatch):
    shape, row = parse_shape("B2T64H4K16V16"), ROWS["linear-scalar"]
    monkeypatch.setattr(_gpu_kernels, "LIMITS", {torch.bfloat16: 5e-3, torch.float32: 2e-5})
    monkeypatch.setattr(_gpu_kernels, "SIZES", ((17, 32, 16),))
    assert _gpu_kernels.check([row, ROWS["l2-norm"]], "cpu", shape)
    text = capsys.readouterr().out
    assert all(part in text for part in ("strong", "reset", "packed", "deterministic True, causal True", "dstate0"))
    monkeypatch.setattr(_gpu_kernels, "LIMITS", {torch.bfloat16: 1e-6})
    assert not _gpu_kernels.check([row], "cpu", shape) and "MISS" in capsys.readouterr().out


@pytest.mark.slow
def test_warm_and_cold_processes(tmp_path, capsys):
    found = run(tmp_path, "--rows", "l2-norm", "--shapes", TINY, "--no-peers", "--warm", "1", "--warm-seconds", "120")
    assert "warm: 1 of 1" in capsys.readouterr().out and len(found) == 1
    found = run(tmp_path, "--rows", "l2-norm", "--shapes", TINY, "--no-peers", "--resume", "--cold")
    assert found[-1]["kind"] == "cold" and 0 < found[-1]["import_s"] <= found[-1]["first_s"] < found[-1]["process_s"]
