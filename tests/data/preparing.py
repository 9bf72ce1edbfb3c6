"""Preparing for the task that a config names, as `ftlib prepare` does."""

from __future__ import annotations

from ftlib.config.schema import Config
from ftlib.core.paths import Site
from ftlib.data import prepare as data_prepare
from ftlib.data.dataset import PreparedDataset
from ftlib.tasks.registry import load_task


def prepare(config: Config, site: Site, again: bool = False) -> PreparedDataset:
    return data_prepare.prepare(config, site, load_task(config.task), again=again)
