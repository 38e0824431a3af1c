"""A step recorded as a CUDA graph trains as one that Python launches."""

import pytest
import torch

from linnet.evals.runner import Run, TaskModel, _training_batches
from linnet.evals.steps import Step, stream
from linnet.evals.tasks._base import get_task
from linnet.models import parameter_groups

TASKS = {
    "mqar": {"options": {"length": 64, "pairs": (4, 8), "vocabulary": 64}, "layers": "gated_deltanet + attention"},
    "in_context_regression": {"options": {}, "layers": "attention + gla"},
    "text_recall": {"options": {}, "layers": "mamba2 + deltanet"},
}


def losses(name: str, device: str, steps: int, **options) -> tuple[list[float], int]:
    case = TASKS[name]
    run = Run(name, case["layers"], task_options=case["options"], steps=steps, batch_size=8, d_model=32)
    task = get_task(name, **case["options"])
    with stream(device):
        torch.manual_seed(0)
        model = TaskModel(task, run).to(device)
        groups = parameter_groups(model, run.weight_decay)
        step = Step(model.loss, groups, device, learning_rate=3e-3, betas=(0.9, 0.95), clip=1.0, **options)
        return [float(step(batch)) for batch in _training_batches(task, run, device)], step.replays


@pytest.mark.parametrize("name", TASKS)
def test_steps_learn(name):
    values, replays = losses(name, "cpu", 30)
    assert replays == 0 and sum(values[-5:]) < sum(values[:5])


@pytest.mark.gpu
@pytest.mark.parametrize("name", TASKS)
def test_recorded_steps_are_those_launched_by_python(name):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    recorded, replays = losses(name, "cuda", 24)
    launched, none = losses(name, "cuda", 24, graphs=False)
    assert replays >= 8 and none == 0
    torch.testing.assert_close(torch.tensor(recorded), torch.tensor(launched), rtol=2e-3, atol=2e-3)
