"""Check and prepare the dataset of a config: what `ftlib prepare` does, with and without `--check`.

torch is imported where masks are turned into codes, transformers where tokens are counted; both only when called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.config.loader import Experiment
from ftlib.config.schema import Config
from ftlib.core import files, permissions
from ftlib.core.paths import Site
from ftlib.data import dataset
from ftlib.data import prepare as data_prepare
from ftlib.data.dataset import PreparedDataset
from ftlib.data.json_boxes import box_writer
from ftlib.data.overview import describe_dataset
from ftlib.errors import UserError
from ftlib.hub.cache import find_model
from ftlib.runs import events
from ftlib.runs.run import Run, run_for
from ftlib.tasks.registry import task_of

if TYPE_CHECKING:
    from ftlib.data.scan import RowTransform


@dataclass(frozen=True)
class Preparation:
    """A prepared dataset.

    Attributes:
        dataset: its rows and metadata.
        existed: whether it had been prepared before.
        unshown: rows with an input that the prompt does not show.
    """

    dataset: PreparedDataset
    existed: bool
    unshown: int


def prepare(experiment: Experiment, site: Site, again: bool, use_code_of: Callable[[Run], None]) -> Preparation:
    """The prepared dataset of a config, which is prepared unless it exists.

    Args:
        again: prepare it once more; runs that exist keep the rows that they were made from.
        use_code_of: called before data are prepared for a run that has started: its own code has to do that.

    Raises:
        UserError: faulty rows or images, impossible splits, prompts that do not fit the rows, no space.
    """
    config, run = experiment.config, run_for(experiment, site)
    with permissions.group_writable(site), events.record_pretraining_failure(run, "prepare"):
        found = None if again else dataset.find_prepared(config, site, run)
        existed = found is not None
        if found is None:
            if not again and files.is_complete(run.code) and not run.done_marker.exists():
                use_code_of(run)
            found = data_prepare.prepare(config, site, task_of(config), _row_transform(config), again)
    return Preparation(found, existed, dataset.check_prompts(found, config))


def check(config: Config, site: Site) -> str:
    """Read every row and image of a dataset and describe it; nothing is written. See `overview.describe_dataset`."""
    return describe_dataset(config.data, task_of(config), *_length_function(config, site), _row_transform(config))


def _row_transform(config: Config) -> RowTransform | None:
    """Return the transform that encodes masks, if the config has a mask encoder, or writes boxes in another form."""
    if config.data.box_format != "location_tokens":
        return box_writer(config.data.box_format)
    if config.task != "segment" or config.evaluation.mask_decoder is None:
        return None
    from ftlib.evaluation.masks import mask_encoder
    from ftlib.models.mask_codec import MaskCodec

    return mask_encoder(MaskCodec.load(Path(config.evaluation.mask_decoder)))


def _length_function(config: Config, site: Site) -> tuple[Callable[[str], int], str]:
    """Return a function for the length of a text, and its unit: tokens if the model is staged, else characters.

    Raises:
        UserError: the model's tokenizer cannot be read.
    """
    try:
        folder = find_model(config.model, site)
    except UserError:
        return len, "characters (the model is not staged)"
    from transformers import AutoTokenizer

    from ftlib.models.custom_code import load_error_message
    from ftlib.models.libraries import quiet_libraries

    quiet_libraries()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{folder}: no tokenizer can be read from it: {load_error_message(error, folder)}") from None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]), "tokens"
