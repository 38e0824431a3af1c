"""Trained models from disk: a run's folder, one of its checkpoints, or any Hugging Face causal language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linnet.training.checkpoints import MANIFEST, defect, newest_complete
from linnet.training.config import RunConfig, load_config
from linnet.training.tokenization import load_tokenizer


def resolve(path: str | Path) -> Path:
    """The folder to load the model from: `path` if it holds a model, else the newest complete checkpoint of the run in it."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"checkpoint must be the folder of a run or of a checkpoint; got {str(path)!r}, which is no folder")
    if (folder / "config.json").exists():
        reason = defect(folder) if folder.name.startswith("checkpoint-") or (folder / MANIFEST).exists() else None
        if reason is not None:
            raise ValueError(f"checkpoint {str(folder)!r} must be complete, but {reason}")
        return folder
    checkpoint, torn = newest_complete(folder)
    if checkpoint is None:
        detail = f"; {torn[0][0].name} is torn: {torn[0][1]}" if torn else ""
        raise ValueError(f"checkpoint folder {str(path)!r} must hold config.json or a complete checkpoint-N; got neither{detail}")
    return checkpoint


def load_model(path: str | Path, device: Any = None) -> tuple[Any, Any]:
    """(model in evaluation mode, tokenizer) of a run, a checkpoint, or `hf:NAME`, a model of the Hugging Face hub.

    `device`: None means the GPU if there is one. ValueError with the path if the files are missing or corrupt.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    import linnet.models  # noqa: F401  registers the model type

    transformers_logging.disable_progress_bar()
    name = str(path)
    source = name.removeprefix("hf:") if name.startswith("hf:") else str(resolve(Path(path).expanduser()))
    try:
        model = AutoModelForCausalLM.from_pretrained(source)
    except Exception as error:  # transformers, safetensors and JSON have no common error for a corrupt file
        raise ValueError(
            f"checkpoint {source!r} must hold a readable causal language model; got {type(error).__name__}: {error}"
        ) from error
    tokenizer = load_tokenizer(source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer


def run_config(path: str | Path) -> RunConfig | None:
    """The configuration of the run that a model's folder belongs to, or None."""
    folder = Path(path)
    for candidate in (folder, folder.parent):
        if (candidate / "run.yaml").exists():
            return load_config(candidate / "run.yaml")
    return None
