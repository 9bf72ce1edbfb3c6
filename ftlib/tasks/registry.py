"""Tasks by name; a plugin's is run when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftlib.config.schema import Config
from ftlib.core import registry
from ftlib.core.plugins import Plugin
from ftlib.tasks.base import Task


def load_task(name: str, plugins: Sequence[Plugin] = ()) -> Task:
    """A task by its name.

    Raises:
        UserError: there is none, its plugin cannot be used, or what it registers is no task.
    """
    entry, function = registry.load("task", name, plugins)
    return replace(registry.made(function, Task, f"task {name}"), entry=entry)


def task_of(config: Config) -> Task:
    """The task of a config; see `load_task`."""
    return load_task(config.task, config.plugins)
