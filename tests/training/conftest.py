import random

import pytest
import torch

from linnet.training import load_config, train

WORDS = "alpha beta gamma delta return yield lambda class import from while value state gate key".split()
TINY = [
    "model.layers=retnet + attention",
    "model.d_model=16",
    "model.heads=2",
    "data.context=32",
    "data.tokens_per_batch=128",
    "data.validation_fraction=0.2",
    "training.logging_steps=1",
    "training.use_cpu=true",
    "evaluation.during_bytes=256",
    "evaluation.max_bytes=1024",
]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Twenty small text files with non-ASCII characters and Windows line ends among them."""
    root = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for i in range(20):
        (root / f"sub{i % 3}").mkdir(exist_ok=True)
        text = "\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(12)) + f"\n# é → {i}\r\n"
        (root / f"sub{i % 3}" / f"file{i}.txt").write_bytes(text.encode())
    return root


@pytest.fixture(scope="session")
def tiny(folder):
    """Makes the configuration of a run that takes a second."""

    def make(*overrides):
        return load_config(overrides=[*TINY, f"data.source={folder}", *overrides])

    return make


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A finished run of 8 steps: (configuration, folder, results)."""
    config, out = tiny("budget.steps=8"), tmp_path_factory.mktemp("runs") / "finished"
    return config, out, train(config, out, quiet=True)
