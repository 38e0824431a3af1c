"""A run is whole, never overwritten, and goes on after SIGKILL as if nothing had happened."""

import json
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from linnet.training import load_config, train
from linnet.training.checkpoints import checkpoints, defect, newest_complete, prune, set_aside, write_manifest
from linnet.training.loading import load_model

STEPS = 8


def losses(out):
    """step -> (training loss, gradient norm, learning rate)."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {e["step"]: (e["loss"], e["grad_norm"], e["learning_rate"]) for e in entries if "loss" in e}


def test_a_run_leaves_what_it_says(finished):
    config, out, results = finished
    names = {p.name for p in out.iterdir()}
    assert {
        "run.yaml",
        "data.json",
        "model.safetensors",
        "config.json",
        "log.jsonl",
        "loss.png",
        "results.json",
        "tensorboard",
    } <= names
    assert results == json.loads((out / "results.json").read_text())
    assert results["steps"] == STEPS and results["tokens"] == STEPS * 128
    assert sorted(losses(out)) == list(range(1, STEPS + 1))
    assert losses(out)[STEPS][0] < losses(out)[1][0]
    assert 0 < results["bits_per_byte"] < 8.1 and results["held_out_bytes"] <= 1024
    assert 0 < results["xz_bits_per_byte"] and 3 < results["unigram_bits_per_byte"] < 6
    assert load_config(out / "run.yaml") == config
    data = json.loads((out / "data.json").read_text())
    assert len(data["sha256"]) == 64 and data["train_documents"] + data["validation_documents"] == 20


def test_the_saved_model_is_the_trained_one(finished):
    _, out, _ = finished
    final = AutoModelForCausalLM.from_pretrained(out)
    last = AutoModelForCausalLM.from_pretrained(out / f"checkpoint-{STEPS}")
    ids = torch.arange(20)[None]
    assert torch.equal(final(ids).logits, last(ids).logits)
    assert final.config.bos_token_id == final.config.eos_token_id == 1


def test_the_newest_two_checkpoints_are_kept_and_complete(finished):
    _, out, _ = finished
    assert [p.name for p in checkpoints(out)] == ["checkpoint-8", "checkpoint-6"]
    assert all(defect(p) is None for p in checkpoints(out))


def test_an_existing_run_is_not_overwritten(finished, tmp_path):
    config, out, results = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ValueError, match="holds a run; give another folder, or resume it"):
        train(config, out, quiet=True)
    assert train(config, out, resume=True, quiet=True) == results  # a finished run has nothing left to do
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    (tmp_path / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            train(config, tmp_path, resume=resume, quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_resuming_with_another_configuration_is_refused(finished, tiny):
    _, out, _ = finished
    with pytest.raises(ValueError, match="training.learning_rate must be None as in the run .* got 0.5"):
        train(tiny("budget.steps=8", "training.learning_rate=0.5"), out, resume=True, quiet=True)


def test_decay_and_gate_parameters_are_not_decayed(tiny, tmp_path):
    from linnet.models import LinnetForCausalLM, parameter_groups
    from linnet.training.callbacks import Clock
    from linnet.training.tokenization import build_tokenizer
    from linnet.training.trainer import LinnetTrainer, _training_arguments, model_config

    config = tiny("budget.steps=1", "model.layers=gated_deltanet + mamba2", "training.weight_decay=0.3")
    model = LinnetForCausalLM(model_config(config, build_tokenizer("bytes")))
    trainer = LinnetTrainer(model=model, args=_training_arguments(config, tmp_path), clock=Clock(None), evaluator=dict)
    optimizer = trainer.create_optimizer()
    expected = {g["weight_decay"]: {id(p) for p in g["params"]} for g in parameter_groups(model, 0.3)}
    assert {g["weight_decay"]: {id(p) for p in g["params"]} for g in optimizer.param_groups} == expected
    decayed = {name for name, p in model.named_parameters() if id(p) in expected[0.3]}
    assert decayed and not any("A_log" in name or "dt_bias" in name or "norm" in name for name in decayed)


KILLED_RUN = """
import os, signal, sys, torch
torch.set_num_threads(1)
from linnet.training import callbacks, load_config, train

config, out, place = sys.argv[1:]
write_manifest, on_step_end = callbacks.write_manifest, callbacks.Clock.on_step_end

def manifest(checkpoint):
    if place == "saving" and checkpoint.name == "checkpoint-5":
        os.kill(os.getpid(), signal.SIGKILL)
    write_manifest(checkpoint)

def step_end(self, args, state, control, **kwargs):
    if place == "training" and state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    on_step_end(self, args, state, control, **kwargs)

callbacks.write_manifest, callbacks.Clock.on_step_end = manifest, step_end
train(load_config(config), out, quiet=True)
"""


@pytest.mark.parametrize(
    ("place", "tokenizer", "resumes_from"), [("saving", "bytes", "checkpoint-4"), ("training", "bpe:300", "checkpoint-5")]
)
def test_sigkill_and_resume_gives_the_losses_of_an_uninterrupted_run(tiny, tmp_path, recwarn, place, tokenizer, resumes_from):
    overrides = [f"data.tokenizer={tokenizer}", "training.gradient_accumulation_steps=2", "training.logging_steps=3"]
    config = tiny(f"budget.steps={STEPS}", f"checkpoints.points={STEPS}", "evaluation.points=4", *overrides)
    train(config, tmp_path / "whole", quiet=True)

    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    out = tmp_path / "killed"
    child = subprocess.run([sys.executable, "-c", KILLED_RUN, str(tmp_path / "run.yaml"), str(out), place], capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert newest_complete(out)[0].name == resumes_from and not (out / "results.json").exists()

    results = train(config, out, resume=True, quiet=True)
    assert any("checkpoint-5' is skipped" in str(w.message) for w in recwarn) == (place == "saving")
    assert losses(out) == losses(tmp_path / "whole")  # bit for bit, the steps before and after the kill
    assert results["bits_per_byte"] == json.loads((tmp_path / "whole" / "results.json").read_text())["bits_per_byte"]


@pytest.mark.slow
def test_two_processes_train_like_two_accumulated_batches(tiny, tmp_path):
    config = tiny("budget.steps=3", "model.layers=retnet")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.to_dict()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "linnet.cli"]
    command = [*launch, "train", "--config", tmp_path / "run.yaml", "--threads", "1", "--out", tmp_path / "two"]
    child = subprocess.run([*map(str, command)], capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
    config.training["gradient_accumulation_steps"] = 2
    train(config, tmp_path / "one", quiet=True)
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert two == {step: pytest.approx(values, rel=1e-5) for step, values in one.items()}
    assert defect(tmp_path / "two" / "checkpoint-3") is None


@pytest.fixture
def interrupted(tiny, tmp_path):
    """A run that lost its end: checkpoints 6 and 8 on disk, no results."""
    config = tiny(f"budget.steps={STEPS}", "evaluation.points=0")
    train(config, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "results.json").unlink()
    return config, tmp_path / "run"


def test_a_torn_checkpoint_is_skipped_named_and_kept(interrupted):
    config, out = interrupted
    before, torn = losses(out), out / "checkpoint-8"
    with open(torn / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.warns(UserWarning, match=r"checkpoint-8' is skipped: model.safetensors has 1000 bytes.*torn-checkpoint-8"):
        train(config, out, resume=True, quiet=True)
    assert losses(out) == before
    assert (out / "torn-checkpoint-8" / "model.safetensors").stat().st_size == 1000
    assert defect(out / "checkpoint-8") is None


def test_without_a_complete_checkpoint_a_run_starts_over(interrupted):
    config, out = interrupted
    before = losses(out)
    for checkpoint in checkpoints(out):
        (checkpoint / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="it has no manifest.json"):
        train(config, out, resume=True, quiet=True)
    assert losses(out) == before and {"torn-checkpoint-6", "torn-checkpoint-8"} <= {p.name for p in out.iterdir()}


def test_resuming_on_other_text_is_refused(interrupted, folder):
    config, out = interrupted
    added = folder / "added.txt"
    added.write_text("one more document")
    try:
        with pytest.raises(ValueError, match="must hold the text that the run .* began with; its SHA-256 differs"):
            train(config, out, resume=True, quiet=True)
    finally:
        added.unlink()


def fake_checkpoint(path, content=b"weights"):
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    return path


def test_defects_are_found(tmp_path):
    checkpoint = fake_checkpoint(tmp_path / "checkpoint-1")
    assert "no manifest.json" in defect(checkpoint)
    write_manifest(checkpoint)
    assert defect(checkpoint) is None
    (checkpoint / "model.safetensors").write_bytes(b"weighty")
    assert "does not match its SHA-256" in defect(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    assert "model.safetensors is missing" in defect(checkpoint)
    (checkpoint / "manifest.json").write_text('{"files": ')
    assert "cannot be read" in defect(checkpoint)


def test_pruning_spares_torn_checkpoints_and_the_newest_complete_ones(tmp_path):
    for step in (2, 10, 9, 4):
        fake_checkpoint(tmp_path / f"checkpoint-{step}")
        if step != 9:
            write_manifest(tmp_path / f"checkpoint-{step}")
    prune(tmp_path, 2)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-9", "checkpoint-4"]
    assert newest_complete(tmp_path) == (tmp_path / "checkpoint-10", [])
    assert set_aside(tmp_path / "checkpoint-9").name == "torn-checkpoint-9"
    fake_checkpoint(tmp_path / "checkpoint-9")
    assert set_aside(tmp_path / "checkpoint-9").name == "torn-checkpoint-9.2"


@pytest.mark.parametrize("schedule", ["cosine", "warmup_stable_decay"])
def test_a_budget_in_minutes_ends_in_time_with_the_schedule_at_its_end(tiny, tmp_path, schedule):
    overrides = [] if schedule == "cosine" else ["training.lr_scheduler_kwargs={num_decay_steps: 0.2}"]
    config = tiny("budget.minutes=0.03", f"training.lr_scheduler_type={schedule}", "training.learning_rate=1e-2", *overrides)
    results = train(config, tmp_path / "run", quiet=True)
    assert 1.5 < results["train_seconds"] < 2.4 and results["steps"] > 3
    rates = [rate for _, _, rate in losses(tmp_path / "run").values()]
    assert max(rates) > 8e-3 and rates[-1] < 3e-3
    if schedule == "warmup_stable_decay":
        assert sum(rate == pytest.approx(1e-2) for rate in rates) > len(rates) / 3


def test_a_budget_in_minutes_continues_its_clock(tiny, tmp_path):
    config, out = tiny("budget.minutes=0.02", "evaluation.points=0", "checkpoints.points=3", "checkpoints.keep=9"), tmp_path / "run"
    train(config, out, quiet=True)
    (out / "results.json").unlink()
    for checkpoint in checkpoints(out)[:-1]:  # as if killed after the first of three
        set_aside(checkpoint)
    used = json.loads((checkpoints(out)[0] / "progress.json").read_text())["elapsed_s"]
    assert 0.3 < used < 0.7
    results = train(config, out, resume=True, quiet=True)
    assert 1.0 < results["train_seconds"] < 1.5


def test_a_budget_in_tokens_is_rounded_up_to_steps(tiny, tmp_path):
    results = train(tiny("budget.tokens=300", "evaluation.points=0"), tmp_path / "run", quiet=True)
    assert results["steps"] == 3 and results["tokens"] == 384


def test_a_diverged_loss_ends_the_run(tiny, tmp_path):
    config = tiny("budget.steps=30", "training.learning_rate=1e30", "training.max_grad_norm=0", "evaluation.points=0")
    with pytest.raises(ValueError, match="loss must be finite"):
        train(config, tmp_path / "run", quiet=True)


def test_wrong_training_arguments_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match="training: .*lr_scheduler_type|training: .*nonsense"):
        train(tiny("budget.steps=1", "training.lr_scheduler_type=nonsense"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_loading_names_what_is_wrong(finished, tmp_path):
    with pytest.raises(ValueError, match="must be the folder of a run"):
        load_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match="must hold config.json or a complete checkpoint-N"):
        load_model(tmp_path)
    _, out, _ = finished
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((out / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:999])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_model(tmp_path)
