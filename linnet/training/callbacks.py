"""What a run does between the steps of `transformers.Trainer`: time, milestones, checkpoints, progress."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

from linnet.training.checkpoints import prune, write_manifest, write_text

PROGRESS_FILE = "progress.json"


class Clock(TrainerCallback):
    """How much of the budget is used. Time counts inside training steps only: not evaluation, not saving.

    The first process's time counts for all, so that their learning rates and their last step are the same.

    minutes: the budget in minutes, or None if it is counted in steps.
    """

    def __init__(self, minutes: float | None):
        self.budget_s = None if minutes is None else 60 * minutes
        self.elapsed_s = 0.0
        self._step_began = 0.0
        self._step_s = 0.0

    def fraction(self, step: int, max_steps: int) -> float:
        """Share of the budget that is used, in [0, 1]; 1 after the last step."""
        if self.budget_s is None:
            return min(step / max_steps, 1.0)
        return 1.0 if self._is_last() else min(self.elapsed_s / self.budget_s, 1.0)

    def _is_last(self) -> bool:
        """Whether stopping now is nearer to the budget than after one more step."""
        return self.budget_s is not None and self.elapsed_s + self._step_s / 2 >= self.budget_s

    def on_step_begin(self, args, state, control, **kwargs):
        self._step_began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs):
        """The learning rate of the next step is read right after this."""
        step_s = torch.tensor(time.perf_counter() - self._step_began, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(step_s, 0)
        self._step_s = float(step_s)
        self.elapsed_s += self._step_s

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self._is_last()


class Milestones(TrainerCallback):
    """Evaluates and saves at evenly spaced shares of the budget, and logs whenever it saves.

    The log at a save makes the averaged training loss of a resumed run start where the interrupted one's did.
    """

    def __init__(self, clock: Clock, evaluations: int, checkpoints: int):
        self.clock, self.evaluations, self.checkpoints = clock, evaluations, checkpoints
        self._before = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._before = self.clock.fraction(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        after = self.clock.fraction(state.global_step, state.max_steps)
        crossed = lambda points: math.floor(after * points + 1e-9) > math.floor(self._before * points + 1e-9)
        last = control.should_training_stop or after >= 1
        control.should_evaluate |= bool(self.evaluations) and (last or crossed(self.evaluations))
        control.should_save |= last or crossed(self.checkpoints)
        control.should_log |= control.should_save or control.should_evaluate


class CompleteCheckpoints(TrainerCallback):
    """Adds the tokenizer and the used time to a checkpoint, declares it complete, and deletes old ones."""

    def __init__(self, run: Path, tokenizer, clock: Clock, keep: int):
        self.run, self.tokenizer, self.clock, self.keep = run, tokenizer, clock, keep

    def on_save(self, args, state, control, **kwargs):
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        if state.is_world_process_zero:
            checkpoint = self.run / f"checkpoint-{state.global_step}"
            self.tokenizer.save_pretrained(checkpoint)
            write_text(checkpoint / PROGRESS_FILE, json.dumps({"elapsed_s": self.clock.elapsed_s}))
            write_manifest(checkpoint)
            prune(self.run, self.keep)


class FiniteLoss(TrainerCallback):
    """Ends the run with an error when the logged loss is not a number: nothing after that step is worth keeping."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"the training loss must be finite; got {loss} at step {state.global_step} (try a smaller training.learning_rate)"
            )


class Progress(TrainerCallback):
    """A live bar: share of the budget, step, loss, held-out bits per byte, tokens per second."""

    def __init__(self, clock: Clock, tokens_per_step: int, console):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.clock, self.tokens_per_step = clock, tokens_per_step
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
        )
        self.bar = Progress(*columns, console=console)
        self.task = self.bar.add_task("", total=1.0)
        self.loss = self.held_out = ""
        self._began: tuple[int, float] | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar.start()

    def on_step_end(self, args, state, control, **kwargs):
        now = self.clock.elapsed_s
        if self._began is None:  # the first step compiles and warms up: the speed is counted from its end
            self._began = (state.global_step, now)
        steps, seconds = state.global_step - self._began[0], now - self._began[1]
        speed = f" {steps * self.tokens_per_step / seconds:,.0f} tokens/s" if seconds > 0 else ""
        text = f"step {state.global_step}{self.loss}{self.held_out}{speed}"
        self.bar.update(self.task, completed=self.clock.fraction(state.global_step, state.max_steps), description=text)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            self.loss = f" loss {logs['loss']:.3f}"
        if logs and "eval_bits_per_byte" in logs:
            self.held_out = f" held-out {logs['eval_bits_per_byte']:.2f} b/B"

    def on_train_end(self, args, state, control, **kwargs):
        self.stop()

    def stop(self):
        """Leave the terminal as it was, also after an error."""
        self.bar.stop()
