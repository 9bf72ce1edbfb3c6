"""Load tasks by name; a plugin is only imported if its task is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ftlib.config.schema import Config
from ftlib.core import registry
from ftlib.core.plugins import Plugin
from ftlib.tasks.base import Task


def load_task(name: str, plugins: Sequence[Plugin] = ()) -> Task:
    """Return a task by its name.

    Raises:
        UserError: there is no such task, its plugin cannot be used, or the plugin does not return a Task.
    """
    entry, function = registry.load("task", name, plugins)
    return replace(registry.made(function, Task, f"task {name}"), entry=entry)


def task_of(config: Config) -> Task:
    """Return the task of a config; see `load_task`."""
    return load_task(config.task, config.plugins)
