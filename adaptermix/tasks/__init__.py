"""Tasks: rows to prompts and answers, and answers to scores. Training and evaluation use the same."""

from .base import TASKS, Counts, Task, get_task
from .templates import TEMPLATES, Template, get_template

__all__ = ["TASKS", "TEMPLATES", "Counts", "Task", "Template", "get_task", "get_template"]
