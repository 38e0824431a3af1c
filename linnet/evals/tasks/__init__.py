"""Deterministic generators of the field's tasks, one module per family. NumPy only: nothing here knows a model."""

from linnet.evals.tasks._base import Batch, Task, get_task, list_tasks, register_task

__all__ = ["Batch", "Task", "get_task", "list_tasks", "register_task"]
