"""The command line, from training to comparing, on a text that takes seconds."""

import json
import random
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

import linnet
from linnet.cli import app

RUNNER = CliRunner()
SMALL = [
    "model.layers=retnet + attention",
    "model.d_model=16",
    "model.heads=2",
    "data.context=32",
    "data.tokens_per_batch=128",
    "data.validation_fraction=0.2",
    "training.use_cpu=true",
    "evaluation.max_bytes=512",
    "evaluation.points=0",
    "checkpoints.points=1",
]


def run(*arguments, code=0):
    result = RUNNER.invoke(app, [*map(str, arguments)], env={"COLUMNS": "120"})
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    root, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for i in range(12):
        (root / f"{i}.txt").write_text(" ".join(draw.choices("one two three four five".split(), k=150)))
    return root


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    result = run("train", *SMALL, "--data", text, "--steps", 4, "--tokenizer", "bytes", "--threads", 1, "--out", out)
    return out, result.output


def test_help_is_fast_and_loads_no_torch():
    code = "import sys, linnet.cli; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    for command in ("train", "generate", "eval", "compare", "bench", "info"):
        assert command in run("--help").output
        assert "Usage" in run(command, "--help").output


def test_train_prints_the_table(trained):
    out, output = trained
    results = json.loads((out / "results.json").read_text())
    for expected in ("held-out bits per byte", f"{results['bits_per_byte']:.3f}", "xz -9", "unigram", "sha256", "parameters"):
        assert expected in output
    assert results["steps"] == 4


def test_an_existing_folder_is_refused_in_one_line(trained, text):
    result = run("train", *SMALL, "--data", text, "--steps", 4, "--out", trained[0], code=2)
    assert result.stderr.startswith("error: out folder") and result.stderr.count("\n") == 1 and "Traceback" not in result.output


def test_debug_shows_the_traceback(trained):
    result = RUNNER.invoke(app, ["train", "--out", str(trained[0]), "--steps", "1", "--debug"])
    assert isinstance(result.exception, ValueError) and "holds a run" in str(result.exception)


def test_resume_of_a_finished_run_needs_only_its_folder(trained):
    run("train", "--resume", "--out", trained[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.layer=gla"], "did you mean 'layers'?"),
        (["--layers", "3*retnett"], "retnet"),
        (["--minutes", "1", "--steps", "2"], "give one of --minutes, --steps, --tokens"),
        (["--recipe", "nothing"], "unknown recipe 'nothing'"),
        (["--config", "nowhere.yaml"], "'nowhere.yaml' must be readable YAML"),
        (["--data", "/no/such/place", "--steps", "1"], "data.source must be"),
        (["--threads", "0"], "--threads must be at least 1; got 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, text, tmp_path):
    data = [] if "--data" in arguments else ["--data", text, "--tokenizer", "bytes"]
    result = run("train", *arguments, *data, "--out", tmp_path / "run", code=2)
    assert message in result.stderr and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_generate_continues_the_prompt_and_repeats_itself_for_a_seed(trained):
    arguments = ("generate", trained[0], "-p", "one two", "-n", 12, "--threads", 1)
    first, again, other = (run(*arguments, "--seed", seed).output for seed in (1, 1, 2))
    assert first.startswith("one two") and len(first) > len("one two\n") and first == again != other
    assert run(*arguments, "--temperature", 0).output == run(*arguments, "--temperature", 0, "--seed", 3).output
    assert run("generate", trained[0], "-n", 3).exit_code == 0  # no prompt: from the beginning of a document


def test_generate_refuses(trained, tmp_path):
    assert "top_p must be in (0, 1]; got 2.0" in run("generate", trained[0], "--top-p", 2, code=2).stderr
    assert "must be the folder of a run" in run("generate", tmp_path / "none", code=2).stderr


def test_eval_agrees_with_the_run_and_with_its_last_checkpoint(trained):
    out, _ = trained
    expected = json.loads((out / "results.json").read_text())
    for checkpoint in (out, out / "checkpoint-4"):
        result = json.loads(run("eval", checkpoint, "--max-bytes", 512, "--json", "--threads", 1).output)
        assert result["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)
        assert result["bytes"] == expected["held_out_bytes"] and result["xz_bits_per_byte"] == expected["xz_bits_per_byte"]
    assert "bits per byte" in run("eval", out, "--max-bytes", 512).output


def test_eval_on_other_text_takes_all_of_it(trained, tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(f"one two {name}")
    result = json.loads(run("eval", trained[0], "--data", tmp_path, "--json").output)
    assert (result["documents"], result["bytes"]) == (2, 18)
    assert "split must be" in run("eval", trained[0], "--split", "test", code=2).stderr


def test_compare_matches_parameters_and_resumes(text, tmp_path):
    out = tmp_path / "compare"
    arms = ("--mixers", "retnet,gla", "--layers", "gated_deltanet + attention(window=16)")
    common = ("compare", *SMALL[1:], *arms, "--data", text, "--steps", 2, "--tokenizer", "bytes", "--threads", 1, "--out", out)
    output = run(*common, "model.layers=retnet + attention", "model.d_model=32").output
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [row["arm"] for row in rows] == ["gated_deltanet_attention_window=16", "retnet", "gla"]
    counts = [row["parameters"] for row in rows]
    assert all(abs(count / counts[0] - 1) <= 0.02 for count in counts)
    assert len({row["data"]["sha256"] for row in rows}) == 1 and len({row["tokens"] for row in rows}) == 1
    assert (out / "comparison.png").stat().st_size > 1000
    for row in rows:
        assert f"{row['bits_per_byte']:.3f}" in output and row["arm"] in output

    assert "is not empty; give another folder" in run(*common, "model.layers=retnet + attention", "model.d_model=32", code=2).stderr
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/model.safetensors")}
    (out / "gla-seed0" / "results.json").unlink()
    run(*common, "model.layers=retnet + attention", "model.d_model=32", "--resume")
    after = {p: p.stat().st_mtime_ns for p in out.glob("*/model.safetensors")}
    assert {p.parent.name for p in before if before[p] != after[p]} == {"gla-seed0"}
    assert [json.loads(line)["bits_per_byte"] for line in (out / "results.jsonl").read_text().splitlines()] == [
        row["bits_per_byte"] for row in rows
    ]


def test_compare_refuses(tmp_path):
    assert "needs at least one of layers" in run("compare", "--out", tmp_path / "c", code=2).stderr
    assert "did you mean 'retnet'" in run("compare", "--mixers", "retnt", "--out", tmp_path / "c", code=2).stderr


def test_bench_dispatches(monkeypatch):
    import linnet.bench

    received = []
    module = types.ModuleType("linnet.bench.cpu")
    module.main = received.extend
    module.__spec__ = types.SimpleNamespace(name="linnet.bench.cpu")
    monkeypatch.setitem(sys.modules, "linnet.bench.cpu", module)
    monkeypatch.setattr(linnet.bench, "cpu", module, raising=False)
    run("bench", "cpu", "--length", 4)
    assert received == ["--length", "4"]
    assert "benchmark must be one of" in run("bench", "nothing", code=2).stderr


def test_info_prints_the_table_of_mixers():
    lines = run("info", "--mixers").output.splitlines()
    assert lines[0].startswith("| name | paper |") and len(lines) == 2 + len(linnet.mixers.list_mixers())


def test_info_says_what_runs():
    facts = linnet.info()
    assert facts["versions"]["linnet"] == linnet.__version__ and facts["versions"]["torch"]
    assert facts["devices"][0]["device"] == "cpu"
    assert set(facts["mixers"]) == set(linnet.mixers.list_mixers())
    for op, entry in facts["operators"].items():
        assert op in linnet.ops.operators() and entry["runs"]["cpu"] in ("torch", "reference")
        assert entry["backends"]["reference"]["cpu"] is None
    from linnet._info import _typical_arguments

    assert set(_typical_arguments("cpu")) == set(linnet.ops.operators())
    assert json.loads(run("info", "--json").output)["operators"] == facts["operators"]
    output = run("info").output
    assert all(name in output for name in ("delta_rule", "gated_deltanet", "transformers"))


def test_eval_knows_tasks_besides_checkpoints(tmp_path):
    assert "mqar" in run("eval", "list").output
    assert "pass" in run("eval", "tier0", "shift").output
    assert "task must be one of" in run("eval", "run", "nothing", "--mixers", "gla", "--out", tmp_path, code=2).stderr


def test_lm_eval_says_what_it_needs(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest))
    assert "pip install 'linnet[eval]'" in run("lm-eval", "runs/none", "--tasks", "piqa", code=2).stderr
