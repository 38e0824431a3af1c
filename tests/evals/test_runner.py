"""The trainer: rows that come back, sweeps that resume, verdicts, reports, and one experiment from end to end."""

import json

import pytest

from linnet.evals import Run, grid, runner, sweep
from linnet.evals.__main__ import main, options_of
from linnet.evals.expectations import CannotSolve, Order, Solves, best_runs, judge
from linnet.evals.report import experiments, summary, write_report
from linnet.evals.tiers import TIER1, get_experiments, run_tier1
from linnet.models import LinnetConfig

BASE = Run("word_problem_z2", "gla", task_options={"length": 8}, d_model=16, heads=1, steps=3, batch_size=8)


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    monkeypatch.setattr(runner, "TEST_ROWS", 16)


def quiet_sweep(runs, out, **options):
    return sweep(runs, out, progress=None, **options)


def test_a_run_is_reproduced_by_its_seed(tmp_path):
    (first,), (second,), (other,) = (
        quiet_sweep([run], tmp_path / name) for name, run in (("a", BASE), ("b", BASE), ("c", runner.replace(BASE, seed=1)))
    )
    assert first["key"] == second["key"] != other["key"] and first["history"] == second["history"]
    assert first["metrics"] == second["metrics"] and first["status"] == "done" and first["state_bytes"] > 0


def test_an_interrupted_sweep_resumes(tmp_path, monkeypatch):
    runs = grid(BASE, {"a": "gla", "b": "deltanet(conv_size=none)"}, [1e-3, 1e-2], [0])
    quiet_sweep(runs[:2], tmp_path)
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text() + '{"key": "torn')
    trained = []
    monkeypatch.setattr(runner, "train", lambda run, device, train=runner.train: trained.append(run.key) or train(run, device))
    rows = quiet_sweep(runs, tmp_path)
    assert trained == [run.key for run in runs[2:]] and len(rows) == 4 == len({row["key"] for row in rows})
    assert len(path.read_text().splitlines()) == 5  # the torn line stays, on its own
    quiet_sweep(runs, tmp_path)
    assert len(trained) == 2


def test_divergence_is_a_row_and_a_broken_run_is_tried_again(tmp_path, monkeypatch):
    (row,) = quiet_sweep([runner.replace(BASE, learning_rate=1e30, steps=20, clip=1e30)], tmp_path)
    assert row["status"] == "diverged" and row["metrics"] == {} and row["validation"] is None
    broken = runner.replace(BASE, layers="nothing")
    (row,) = quiet_sweep([broken], tmp_path)
    assert row["status"] == "failed" and "nothing" in row["error"]
    monkeypatch.setattr(runner, "train", lambda run, device: {"key": run.key, "label": "x", "status": "done"} | vars(run))
    assert quiet_sweep([broken], tmp_path)[0]["status"] == "done"


@pytest.mark.parametrize(
    "task,options",
    [
        ("mad_compression", {"length": 8}),
        ("selectivbench_noise", {"ambiguous": 3, "depth": 3, "length": 6, "max_gap": 2}),
        ("in_context_regression", {}),
        ("in_context_uncertainty", {}),
        ("shift", {"length": 32}),
        ("forecasting", {"length": 24, "horizon": 6}),
    ],
)
def test_every_kind_of_task_trains(task, options, tmp_path):
    (row,) = quiet_sweep([runner.replace(BASE, task=task, task_options=options, steps=20, learning_rate=1e-2)], tmp_path)
    assert row["status"] == "done", row.get("error")
    assert row["metrics"]["train"] and row["parameters"] > 0
    json.dumps(row)


def test_the_loss_goes_down_and_training_stops_at_the_target():
    run = runner.replace(BASE, task="copy", task_options={"length": 4, "vocabulary": 3}, steps=300, learning_rate=1e-2, target=0.9)
    row = runner.train(runner.replace(run, layers="gla(conv_size=4)"))
    assert row["validation"] >= 0.9 and row["steps_taken"] < 300


def fake(label, seed, score, *, rate=1e-3, history=((1, 0.5), (2, 0.5)), steps=2, **metrics):
    settings = {"label": label, "seed": seed, "learning_rate": rate, "status": "done", "validation": score, "steps": steps}
    return settings | {"metrics": {"train": {"accuracy": score} | metrics}, "history": list(history), "steps_taken": steps}


def test_verdicts():
    rows = [fake("good", s, x) for s, x in enumerate((1.0, 0.9, 1.0))] + [fake("bad", s, 0.5 + 0.1 * s) for s in range(3)]
    rows += [fake("good", 0, 0.2, rate=1e-2), fake("late", 0, 0.7, history=[(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.7)])]
    rows.append({"label": "gone", "seed": 0, "status": "diverged", "validation": None, "metrics": {}})
    assert best_runs(rows)["good"][0]["validation"] == 1.0
    results = lambda *expectations: [v.result for v in judge(expectations, rows)]
    assert results(Solves(("good", "bad", "late", "gone"), 0.99)) == ["pass", "fail", "inconclusive", "inconclusive"]
    assert results(CannotSolve(("bad", "good"), 0.75), CannotSolve(("bad",), 0.65)) == ["pass", "fail", "inconclusive"]
    assert results(Order(("good", "bad"), 0.2), Order(("bad", "good")), Order(("good", "gone"))) == ["pass", "fail", "inconclusive"]
    errors = [fake("x", 0, 1.0, curve=[1.0, 0.05])]
    assert [v.result for v in judge([Solves(("x",), at_most=0.1, metric="curve@1")], errors)] == ["pass"]
    assert "1 of 3 seeds" in judge([Solves(("x",), 0.9)], errors)[0].evidence


def test_every_experiment_can_be_built():
    for experiment in TIER1:
        for layers in experiment.models.values():
            run = runner.replace(experiment.base, layers=layers)
            task = runner.get_task(run.task, **run.task_options)
            for options in run.tests.values():
                task.at(**options)
            config = LinnetConfig(vocab_size=8, layers=layers, num_layers=run.num_layers, d_model=run.d_model, heads=run.heads)
            assert config.num_layers >= 1 and task.output_size > 1 - (task.targets == "values")
        labels = set(experiment.models)
        named = {model for expectation in experiment.expectations for model in expectation.models}
        tests = {expectation.test for expectation in experiment.expectations}
        assert experiment.special or (named <= labels and tests <= {"train", *experiment.base.tests}), experiment.name
    assert [x.name for x in get_experiments(["E13"])] == ["E13-1", "E13-2"]
    with pytest.raises(ValueError, match="experiment must be one of E1, "):
        get_experiments(["E99"])


def test_a_report_has_tables_plots_and_every_number(tmp_path):
    tests = {"16": {"length": 16}}
    runs = grid(
        runner.replace(BASE, tests=tests), {"gla": "gla", "x 1:1": "gla + attention", "attention": "attention"}, [1e-3], [0]
    )
    quiet_sweep(runs, tmp_path / "first")
    curve = runner.replace(BASE, task="in_context_regression", task_options={"noise": 0.3})
    quiet_sweep(grid(curve, {"gla": "gla"}, [1e-3], [0, 1]), tmp_path / "second")
    text = write_report(tmp_path, quiet=True).read_text()
    found = experiments(tmp_path)
    assert set(found) == {"first", "second"} and summary(found["first"])[1][0][0] in text
    images = {path.name for path in tmp_path.glob("*.png")}
    assert images == {f"first_by_{x}.png" for x in ("length", "state", "ratio")} | {"second_by_examples.png"}
    assert all(f"({name})" in text for name in images) and "error_by_examples" in (tmp_path / "results.csv").read_text()
    with pytest.raises(ValueError, match="must hold a results.jsonl"):
        write_report(tmp_path / "nothing")


def test_the_commands(tmp_path, capsys):
    assert main(["list"]) == 0 and "selectivbench_gaps" in capsys.readouterr().out
    assert main(["tier0", "shift", "counting"]) == 0 and "pass" in capsys.readouterr().out
    arguments = ["run", "parity", "--mixers", "gla", "--steps", "2", "--seeds", "1", "--learning-rates", "1e-3", "--lengths", "64"]
    assert main([*arguments, "--option", "length=20", "--out", str(tmp_path)]) == 0
    assert "accuracy, 64" in (tmp_path / "parity" / "report.md").read_text()
    assert options_of(["pairs=[4, 8]", "filler=zero"]) == {"pairs": [4, 8], "filler": "zero"}
    with pytest.raises(ValueError, match="name=value"):
        options_of(["pairs"])


def test_smoke_a_reflection_solves_parity_and_a_decay_does_not(tmp_path):
    verdicts = run_tier1(tmp_path, ["smoke"], seeds=[0], progress=None)["smoke"]
    assert [v.result for v in verdicts] == ["pass", "pass"], verdicts


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_rows(tmp_path):
    runs = grid(BASE, {"gla": "gla"}, [1e-3], [0, 1])
    alone, together = quiet_sweep(runs, tmp_path / "a"), quiet_sweep(runs, tmp_path / "b", jobs=2)
    assert {row["key"]: row["metrics"] for row in alone} == {row["key"]: row["metrics"] for row in together}
