"""Measures of trained models, and tasks with their trainer: `linnet eval`, `python -m linnet.evals`. Loaded on first use."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "Batch": "tasks",
    "Run": "runner",
    "Task": "tasks",
    "get_task": "tasks",
    "grid": "runner",
    "list_tasks": "tasks",
    "register_task": "tasks",
    "run_experiments": "tiers",
    "run_tier0": "exact",
    "sweep": "runner",
    "write_report": "report",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'linnet.evals' has no attribute {name!r}")
    return getattr(importlib.import_module(f"linnet.evals.{_EXPORTS[name]}"), name)
