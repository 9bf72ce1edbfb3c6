"""ftlib: fine-tune and evaluate PaliGemma and causal language models as Slurm jobs inside a container.

What the commands do can be called from Python, such as `ftlib.train("config.yaml")`. The module `ftlib.api` is imported
when one of its names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ftlib.api import (
        Run,
        TrainingDiverged,
        UserError,
        cancel,
        evaluate,
        export,
        load_config,
        merge,
        plan,
        predict,
        prepare,
        register_model,
        register_source,
        register_task,
        report,
        score,
        stage,
        status,
        submit,
        time_steps,
        train,
    )

__version__ = "0.1.0"

__all__ = [
    "Run",
    "TrainingDiverged",
    "UserError",
    "__version__",
    "cancel",
    "evaluate",
    "export",
    "load_config",
    "merge",
    "plan",
    "predict",
    "prepare",
    "register_model",
    "register_source",
    "register_task",
    "report",
    "score",
    "stage",
    "status",
    "submit",
    "time_steps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ftlib import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
