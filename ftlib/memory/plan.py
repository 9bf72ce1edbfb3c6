"""A config's need of GPU memory with and without gradient checkpointing, and the largest cuts that fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ftlib.config import Config
from ftlib.hub import find_model
from ftlib.memory.cuts import Cut, largest_cut, longest_rows
from ftlib.memory.need import Need, Rows, build_shapes, need
from ftlib.site import Site

_BOTH = (False, True)
"""Without and with gradient checkpointing."""


@dataclass(frozen=True)
class Plan:
    """What is known of a config and a GPU.

    Attributes:
        found: whether `rows` come from prepared data; else they are assumed.
        capacity: bytes of the GPU; None: unknown.
        needs: with the config's micro-batch, by checkpointing.
        largest: by checkpointing; None: nothing fits, or there is no capacity to fit into.
    """

    config: Config
    rows: Rows
    found: bool
    capacity: int | None
    needs: dict[bool, Need]
    largest: dict[bool, Cut | None]

    @property
    def need(self) -> Need:
        """What the config needs as it stands."""
        return self.needs[bool(self.config.training.get("gradient_checkpointing"))]

    @property
    def fits(self) -> bool | None:
        """Whether it fits; None: no GPU to fit."""
        return None if self.capacity is None else self.need.total <= self.capacity

    def facts(self) -> dict[str, Any]:
        """Everything as JSON; sizes in bytes."""
        return {
            "rows": {**asdict(self.rows), "assumed": not self.found},
            "effective_batch": self.config.effective_batch,
            "micro_batch": self.config.micro_batch,
            "gpu": self.capacity,
            "fits": self.fits,
            "need": {_key(one): {**asdict(self.needs[one]), "total": self.needs[one].total} for one in _BOTH},
            "largest": {_key(one): self._cut_facts(self.largest[one]) for one in _BOTH},
        }

    def _cut_facts(self, cut: Cut | None) -> dict[str, int] | None:
        if cut is None:
            return None
        accumulation = self.config.rows_per_gpu // cut.micro_batch
        return {"micro_batch": cut.micro_batch, "accumulation": accumulation, "total": cut.need.total}


def _key(checkpointing: bool) -> str:
    return "checkpointing" if checkpointing else "no_checkpointing"


def make_plan(config: Config, site: Site, capacity: int | None) -> Plan:
    """Count one step on the model's shapes for each question.

    Raises:
        UserError: the base model is not staged.
    """
    folder = find_model(config.model, site)
    model = build_shapes(folder, config)
    rows, found = longest_rows(config, site, folder, model)
    needs = {one: need(model, config, rows, config.micro_batch, one) for one in _BOTH}
    cuts = {one: largest_cut(model, config, rows, capacity, one) if capacity else None for one in _BOTH}
    return Plan(config, rows, found, capacity, needs, cuts)
