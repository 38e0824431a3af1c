"""The trainer: rows that come back, sweeps that resume, verdicts, reports, and one experiment from end to end."""

import json
import time

import pytest
import torch

from linnet.evals import Run, grid, runner, sweep
from linnet.evals.__main__ import main, options_of
from linnet.evals.answers import answer, generator, text_task
from linnet.evals.expectations import CannotSolve, Order, Solves, best_runs, everywhere, judge
from linnet.evals.hybrid import SIZES, hybrid, hybrid_tables, pattern
from linnet.evals.report import experiments, summary, write_report
from linnet.evals.tasks.text import corpus
from linnet.evals.tier2 import minimal_tables
from linnet.evals.tiers import all_experiments, get_experiments, run_experiments
from linnet.models import LinnetConfig, LinnetForCausalLM
from linnet.training.tokenization import build_tokenizer

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
    monkeypatch.setattr(runner, "train", lambda run, *where, train=runner.train: trained.append(run.key) or train(run, *where))
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
    monkeypatch.setattr(runner, "train", lambda run, *_: {"key": run.key, "label": "x", "status": "done"} | vars(run))
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
    for experiment in all_experiments().values():
        for run in (job.run for job in experiment.jobs("", [0]) if job.trainer is None):
            task = runner.get_task(run.task, **run.task_options)
            for options in run.tests.values():
                task.at(**options)
            config = LinnetConfig(vocab_size=8, layers=run.layers, num_layers=run.num_layers, d_model=run.d_model, heads=run.heads)
            assert config.num_layers >= 1 and task.output_size > 1 - (task.targets == "values")
        labels = set(experiment.models)
        named = {model for expectation in experiment.expectations for model in expectation.models}
        tests = {expectation.test for expectation in experiment.expectations}
        assert named <= labels and tests <= {"train", *experiment.base.tests}, experiment.name
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
    verdicts = run_experiments(tmp_path, ["smoke"], seeds=[0], progress=None)["smoke"]
    assert [v.result for v in verdicts] == ["pass", "pass"], verdicts


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.undo()  # other processes know nothing of fewer rows
    runs = grid(BASE, {"gla": "gla"}, [1e-3], [0, 1])
    alone, together = quiet_sweep(runs, tmp_path / "a"), quiet_sweep(runs, tmp_path / "b", jobs=2)
    assert {row["key"]: row["metrics"] for row in alone} == {row["key"]: row["metrics"] for row in together}


def test_nothing_is_begun_after_the_time_is_over_and_the_next_call_goes_on(tmp_path):
    runs = grid(BASE, {"gla": "gla"}, [1e-3], [0, 1])
    assert quiet_sweep(runs, tmp_path, until=time.time() - 1) == []
    (row,) = quiet_sweep(runs[:1], tmp_path, until=time.time() + 60)
    long = runner.replace(BASE, steps=10**6)
    assert quiet_sweep([long], tmp_path, until=time.time() + 0.3) == []
    assert [x["key"] for x in quiet_sweep(runs, tmp_path)] == [run.key for run in runs] and row["status"] == "done"


def test_the_loss_of_a_batch_in_parts_is_their_mean():
    task = runner.get_task("text_recall", length=32, pairs=4, symbols=16)
    model = runner.TaskModel(task, BASE)
    run = runner.replace(BASE, task="text_recall", task_options={"length": 32, "pairs": 4, "symbols": 16}, batch_size=6, steps=1)
    ((inputs, targets, *parts),) = runner._training_batches(task, run, "cpu")
    assert [len(part) for part in parts] == [3 * 32, 3 * 4]
    logits = model(inputs).flatten(0, 1)
    each = [
        torch.nn.functional.cross_entropy(logits[part], y)
        for part, y in zip(parts, targets.split([len(part) for part in parts]), strict=True)
    ]
    torch.testing.assert_close(model.loss(inputs, targets, *parts), sum(each) / 2)


def test_other_trainers_write_rows_of_the_same_kind(tmp_path):
    names = ["E8", "E11"]
    for experiment in get_experiments(names):
        jobs = experiment.jobs(tmp_path, [0], steps=2)
        assert all(job.trainer and job.out == tmp_path / experiment.name for job in jobs)
    verdicts = run_experiments(tmp_path, ["E8"], seeds=[0], steps=2, progress=None)["E8"]
    rows = experiments(tmp_path)["E8"]
    assert [row["label"] for row in rows] == ["isotropic", "anisotropic", "isotropic, 4 layers"] and len(verdicts) == 6
    assert all(row["status"] == "done" and row["metrics"]["train"]["risk_ratio"] > 0.9 for row in rows)


def test_lorenz_is_a_row(monkeypatch):
    from linnet.evals import dynamics

    series = dynamics.standardize(dynamics.lorenz63(600, transient=100))
    monkeypatch.setattr(dynamics, "lorenz_series", lambda: (series[:300], series[300:]))
    monkeypatch.setattr(dynamics, "BUDGET", dynamics.BUDGET | {"window": 20, "batch": 2, "run": 200})
    run = get_experiments(["E11"])[0].jobs("", [3], steps=50)[1].run
    row = dynamics.train_run(run)
    assert row["label"] == "M = 20, P = 2" and set(row["metrics"]["train"]) >= {"D_stsp", "D_H", "lyapunov", "regions", "loss"}
    with pytest.raises(TimeoutError):
        dynamics.train_run(run, until=0)


def hybrid_row(label, seed, recall, loss, status="done"):
    metrics = {"train": {"accuracy": recall, "bits_per_byte": loss}, "8 pairs": {"accuracy": recall}}
    shared = {"label": label, "seed": seed, "status": status, "validation": recall, "tests": {"8 pairs": {}}, "layers": "gla"}
    return shared | {"metrics": metrics if status == "done" else {}}


def test_the_recommended_ratio_is_the_cheapest_of_the_good_ones():
    rows = [hybrid_row("attention", seed, 0.99, 2.0) for seed in (0, 1)]
    for of, recall in (("pure", 0.5), ("3:1", 0.93), ("1:1", 0.985)):
        rows += [hybrid_row(f"gla {of}", seed, recall + 0.001 * seed, 2.02) for seed in (0, 1)]
        rows += [hybrid_row(f"retnet {of}", seed, 0.99 + 0.01 * seed if of == "1:1" else recall - 0.1, 2.0) for seed in (0, 1)]
        rows += [hybrid_row(f"noisy {of}", seed, recall + 0.1 * seed, 2.0) for seed in (0, 1)]
    rows.append(hybrid_row("gla 3:1", 2, None, None, "diverged"))
    (_, header, lines), (_, _, advice) = hybrid_tables({"G7": rows})
    assert [line[1] for line in lines[:4]] == ["pure", "3:1", "1:1", "0:1"] and header[2] == "bits per byte"
    assert lines[1][-1] == "diverged, seed 2" and lines[0][2] == "2.020 ± 0.000"
    assert {line[0]: line[1] for line in advice} == {"gla": "1:1", "retnet": "1:1", "noisy": "3:1"}
    assert {line[0]: line[-1] for line in advice}["gla"] == "1.0 %"
    unlearned = [hybrid_row(f"gla {of}", 0, 0.1, 2.0) for of in ("pure", "1:1")]
    assert hybrid_tables({"G7": unlearned})[1][2][0][1] == "-"


def test_the_loss_on_text_is_that_of_all_tests():
    row = {"metrics": {"train": {"bits_per_byte": 2.0, "accuracy": 0.5}, "8 pairs": {"bits_per_byte": 1.0}, "other": {}}}
    assert everywhere(row, "bits_per_byte") == 1.5 and everywhere(row, "mse") is None


def test_hybrid_ratios_are_those_of_the_layers():
    assert pattern("gla", 12, 3) == "3*(3*gla + attention)" and pattern("gla", 12, 0) == "12*gla"
    with pytest.raises(ValueError, match="divisors of the 4 layers; got 3"):
        hybrid(**SIZES["tiny"] | {"attention": (3,)})


def test_the_hybrid_sweep_from_the_command(tmp_path, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(3000)))
    monkeypatch.setitem(SIZES, "tiny", SIZES["tiny"] | {"d_model": 16, "batch_size": 4})
    arguments = ["hybrid-sweep", "--mixers", "gla", "--attention", "0,1,2", "--num-layers", "2", "--steps", "2", "--seeds", "2"]
    arguments += ["--data", str(text), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    report = (tmp_path / "out" / "report.md").read_text()
    assert "recommended ratio" in report and "| gla | pure |" in report and "6 of 6 runs to do" in capsys.readouterr().out
    assert {x.name for x in (tmp_path / "out").glob("*ratio*.png")} == {f"hybrid-tiny_by_{x}.png" for x in ("ratio", "ratio_loss")}
    assert main(arguments) == 0 and "0 of 6 runs to do" in capsys.readouterr().out
    text.write_text("".join(f"line {i} of another text\n" for i in range(3000)))
    corpus.cache_clear()
    assert main(arguments) == 0 and "6 of 6 runs to do" in capsys.readouterr().out


def test_plans_and_the_table_of_reflections(tmp_path, capsys):
    assert main(["tier2", "--only", "G4,G7", "--plan", "--seeds", "1"]) == 0
    assert "G4-a5" in (out := capsys.readouterr().out) and "G7" in out and "G1" not in out
    labels = {"n_h 1 [-1,1]": 0.4, "n_h 2 [-1,1]": 0.97, "n_h 3 [-1,1]": 0.99, "n_h 4 [-1,1]": 0.99, "n_h 4 [0,1]": 0.3}
    metrics = lambda x: {"metrics": {"train": {"accuracy": x}, "128": {"accuracy": x - 0.03}}}
    rows = [fake(label, 0, x) | metrics(x) for label, x in labels.items()]
    ((_, _, lines),) = minimal_tables({"G4-s3": rows})
    assert lines == [["S3", "2", "3", "2", "0.300"]]


def test_answers_are_scored_by_match_and_resumed(tmp_path, capsys):
    from linnet.evals import answers

    task = text_task("niah_single_1", 600)
    assert task.name == "ruler_single_1" and task.length == 600
    count = lambda text: len(text.encode())
    digits = lambda prompts: [" ".join(word for word in prompt.split() if word.strip(".").isdigit()) for prompt in prompts]
    assert answers.score(task, digits, count, 3)["accuracy"] == 1
    assert answers.score(task, lambda prompts: ["no"] * len(prompts), count, 3)["accuracy"] == 0
    with pytest.raises(ValueError, match="tasks must be text tasks"):
        text_task("mqar", 600)

    torch.manual_seed(0)
    model = LinnetForCausalLM(LinnetConfig(vocab_size=259, d_model=16, heads=1, layers="gated_deltanet + attention")).eval()
    tokenizer = build_tokenizer("bytes")
    prompts = ["a", "a longer prompt", "two words"]
    together = generator(model, tokenizer, max_tokens=8)(prompts)
    assert together == [generator(model, tokenizer, max_tokens=8)([prompt])[0] for prompt in prompts]  # padding does not matter
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["run", str(tmp_path / "model"), "--tasks", "niah_single_1,passkey", "--lengths", "512,640", "--samples", "2"]
    assert main([*arguments, "--max-tokens", "4", "--out", str(tmp_path), "--device", "cpu"]) == 0
    assert "640 tokens" in capsys.readouterr().out
    stamp = (tmp_path / "answers" / "results.jsonl").read_text()
    options = {"samples": 2, "max_tokens": 4, "device": "cpu", "quiet": True}
    rows = answer(str(tmp_path / "model"), ["passkey"], [512], tmp_path, **options)
    assert (tmp_path / "answers" / "results.jsonl").read_text() == stamp and rows[0]["metrics"]["512"]["accuracy"] == 0
