"""What the sections of a config have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Split = Literal["train", "valid", "test"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
Name = Annotated[str, Field(min_length=1)]
PathKind = Literal["path", "model", "dataset", "run"]
"""A path, or where none is meant a name of the hub (model; dataset, before a colon) or of a run."""
LOSS = "loss"
"""The metric that every task has: the loss, computed as in training."""


class Section(BaseModel):
    """A part of the config: no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    def paths(self) -> dict[str, PathKind]:
        """The keys that hold a path, or a name that stands for one."""
        return {}
