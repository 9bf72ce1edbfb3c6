"""Single queries to a model: from the command line, a file, or a chat session.

For causal models, the query is the instruction in the run's prompt (`data.prompt`), and a context its input. PaliGemma
gets the prompt unchanged.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ftlib.config.loader import load_experiment
from ftlib.config.schema import CHAT, Config, Data, Evaluation
from ftlib.core import files
from ftlib.core.paths import Site
from ftlib.data.example import Example, raise_all
from ftlib.data.images import image_size, open_query_image
from ftlib.data.json_boxes import BOX_FORMAT
from ftlib.data.prompts import BUILTIN_TEMPLATES, render_prompt, template_fields
from ftlib.data.sources.json_stream import parse_json
from ftlib.data.visualize import draw_boxes_and_masks
from ftlib.errors import UserError
from ftlib.evaluation.inference import describe_confidence
from ftlib.evaluation.model import EvalModel, base_model, finetuned_model
from ftlib.hub.cache import find_adapter_base, image_resampling, is_adapter, is_model_folder, require_model
from ftlib.models.encoding import EncodedExample
from ftlib.models.generation import GeneratedAnswer
from ftlib.models.mask_codec import MaskCodec
from ftlib.runs import run as runs
from ftlib.tasks.registry import task_of


@dataclass(frozen=True)
class Query:
    """A query.

    Attributes:
        prompt: the question.
        image: image file, for PaliGemma and vision-language models.
        context: input for causal models; may be empty.
        history: earlier turns `{"role", "content"}`, only for chat templates.
        other_images: the image files after the first.
        without_image: whether the question is meant to have no image.
    """

    prompt: str
    image: Path | None = None
    context: str = ""
    history: tuple[dict[str, str], ...] = ()
    other_images: tuple[Path, ...] = ()
    without_image: bool = False

    @property
    def images(self) -> list[Path]:
        """Return all image files."""
        return [self.image, *self.other_images] if self.image else []


def open_finetuned(name: str, max_new_tokens: int | None, site: Site) -> tuple[EvalModel, Evaluation]:
    """Open the model of a finished run, or of a folder such as a merge's result; return it with its settings.

    Args:
        name: run folder or its name, or the folder of a model or adapter.
        max_new_tokens: overrides the config.

    Raises:
        UserError: no such run, or it is not trained yet.
    """
    if is_model_folder(Path(name)):
        return _open_folder(Path(name).absolute(), max_new_tokens, site)
    run = runs.find_trained_run(name, site)
    config = load_experiment(run.config_file, [], site).config
    limit = max_new_tokens or config.evaluation.max_new_tokens
    return finetuned_model(config, run, site), config.evaluation.model_copy(update={"max_new_tokens": limit})


def _open_folder(folder: Path, max_new_tokens: int | None, site: Site) -> tuple[EvalModel, Evaluation]:
    """Open a model without a run: the prompt is its chat template, or the question alone if it has none."""
    base = find_adapter_base(folder, site) if is_adapter(folder) else folder
    require_model(base)
    settings = files.read_json_object(base / "config.json")
    family = "vlm" if "vision_config" in settings else "causal"
    if settings.get("model_type") == "paligemma":
        family = "paligemma"
    tokenizer = base / "tokenizer_config.json"
    templates = [
        (base / "chat_template.jinja").is_file(),
        tokenizer.is_file() and "chat_template" in files.read_json_object(tokenizer),
    ]
    bilinear = is_adapter(folder) and image_resampling(folder) == Image.Resampling.BILINEAR  # model.resize of its run
    resize = "bilinear" if bilinear and family == "paligemma" else "processor"
    config = Config.model_validate(
        {
            "name": folder.name,
            "task": "instruct" if family == "causal" else "vqa",
            "model": {"family": family, "base": str(folder), "dtype": _dtype(settings), "resize": resize},
            "adapter": {"method": "lora"},
            "data": {
                "source": "jsonl",
                "root": str(folder),
                "prompt": CHAT if family == "vlm" or (family == "causal" and any(templates)) else "{prefix}",
            },
        }
    )
    limit = max_new_tokens or config.evaluation.max_new_tokens
    return base_model(config, site), config.evaluation.model_copy(update={"max_new_tokens": limit})


def _dtype(settings: dict[str, Any]) -> str:
    found = settings.get("dtype") or settings.get("torch_dtype")
    return found if found in ("float32", "bfloat16", "float16") else "float32"


def with_and_without_context(queries: Sequence[Query]) -> list[Query]:
    """Return every query without its context, followed by the query with its context if it has one."""
    bare = [replace(query, context="") for query in queries]
    return [
        each
        for plain, full in zip(bare, queries, strict=True)
        for each in ((plain, full) if full.context else (plain,))
    ]


def answer_queries(model: EvalModel, settings: Evaluation, queries: Sequence[Query]) -> list[GeneratedAnswer]:
    """Answer queries; whitespace around the texts is kept.

    Raises:
        UserError: an image or a context is missing, not readable, or not supported by this model.
    """
    return model.generate([_encode(model, query) for query in queries], settings)


def predict(model: EvalModel, settings: Evaluation, queries: Sequence[Query]) -> list[dict[str, Any]]:
    """Answer questions; one with a context is answered without it, too.

    Returns:
        For each question its prompt, answer and how sure the answer is, see `describe_confidence`; if it
        has a context, also "answer with context" and the same fields of that answer, "… with context".

    Raises:
        UserError: see `answer_queries`.
    """
    found = iter(answer_queries(model, settings, with_and_without_context(queries)))
    return [
        {"prompt": query.prompt, **_describe(model, next(found))}
        | (
            {f"{name} with context": value for name, value in _describe(model, next(found)).items()}
            if query.context
            else {}
        )
        for query in queries
    ]


def _describe(model: EvalModel, answer: GeneratedAnswer) -> dict[str, Any]:
    task = task_of(model.config)
    return {"answer": answer.text.strip(), **describe_confidence(model, answer, task.answer_fields)}


def draw_answer(target: Path, image: Path, data: Data, answer: str, mask_decoder: str | None) -> None:
    """Write a PNG of the image with the boxes of an answer, and with its masks if the config has a mask decoder.

    Raises:
        UserError: the image cannot be read, or the target cannot be written.
    """
    masks = MaskCodec.load(Path(mask_decoder)).masks if mask_decoder else None
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {}
        if data.box_format != "location_tokens":
            facts = {BOX_FORMAT: data.box_format, **dict(zip(("width", "height"), image_size(image), strict=True))}
        drawn = draw_boxes_and_masks(open_query_image(image, data), answer, masks, facts=facts)
        drawn.save(target, format="PNG")


def is_multi_turn(model: EvalModel) -> bool:
    """Whether queries can have earlier turns, that is, whether the prompt is the model's chat template."""
    return model.config.data.prompt == CHAT


def append_turn(model: EvalModel, query: Query, answer: str) -> Query:
    """Return the start of the next query: the history with this question and its answer."""
    said = json.loads(_render_prompt(model.config, query))
    return replace(query, prompt="", history=(*said, {"role": "assistant", "content": answer}))


def truncate_history(model: EvalModel, settings: Evaluation, query: Query) -> Query:
    """Drop the oldest turns until prompt and answer fit into the model's context."""
    limit = model.processor.max_length
    while limit and query.history and len(_encode(model, query).input_ids) + settings.max_new_tokens > limit:
        query = replace(query, history=query.history[2:])
    return query


def read_queries(path: Path) -> list[Query]:
    """Read `{"prompt": …, "image": …, "context": …}` lines, or a list of them; images are relative to the file.

    Several images are a list `images`; an empty one is a question without an image.

    Raises:
        UserError: missing file, or invalid lines (lists the first 20).
    """
    queries: list[Query] = []
    faults: list[str] = []
    for place, record in _records(path):
        try:
            queries.append(_parse_query(parse_json(record) if isinstance(record, str) else record, path.parent))
        except ValueError as error:
            faults.append(f"{place}: {error}")
    raise_all(faults, 'Each line must be {"prompt": …}, with optional "image" (or "images") and "context".')
    if not queries:
        raise UserError(f"{path}: contains no questions")
    return queries


def as_queries(questions: Sequence[str | Mapping[str, Any]]) -> list[Query]:
    """Questions from Python: each a prompt, or a mapping like a line of a file; an image's path is relative to the
    current folder.

    Raises:
        UserError: every faulty question.
    """
    queries: list[Query] = []
    faults: list[str] = []
    for number, question in enumerate(questions):
        record = {"prompt": question} if isinstance(question, str) else question
        if isinstance(record, Mapping):
            record = {name: _plain_paths(value) for name, value in record.items()}
        try:
            queries.append(_parse_query(record, Path()))
        except ValueError as error:
            faults.append(f"questions[{number}]: {error}")
    raise_all(faults, 'A question is a text, or a mapping with "prompt" and, where needed, "image" or "context".')
    return queries


def _plain_paths(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain_paths(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def text_or_file(value: str) -> str:
    """Return a text, or the content of the file with that name, stripped.

    Raises:
        UserError: a file that is not text.
    """
    try:
        return Path(value).read_text(encoding="utf-8").strip() if Path(value).is_file() else value
    except UnicodeDecodeError as error:
        raise UserError(f"{value}: not UTF-8: {error}") from None
    except OSError:  # not a valid file name: too long, or with a null character
        return value


def _records(path: Path) -> Iterator[tuple[str, str | Any]]:
    """Yield (place, line) of JSONL, or (place, record) of a JSON list, whatever the file's name."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if content.lstrip().startswith("["):
        with contextlib.suppress(ValueError):  # else each line is reported
            yield from ((f"{path}: record {number}", each) for number, each in enumerate(parse_json(content), 1))
            return
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", line


def _parse_query(record: Any, folder: Path) -> Query:
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if unknown := sorted(set(record) - {"prompt", "image", "images", "context"}):
        raise ValueError(f"field {unknown[0]}: unknown")
    several = record.get("images")
    if "images" in record:
        if not isinstance(several, list) or not all(isinstance(one, str) and one for one in several):
            raise ValueError(f"field images: must be a list of paths, got {several!r}"[:200])
        if "image" in record:
            raise ValueError("fields image and images: only one of them is allowed")
        record = {name: value for name, value in record.items() if name != "images"}
    if wrong := next((name for name, value in record.items() if not isinstance(value, str)), ""):
        raise ValueError(f"field {wrong}: must be text, got {record[wrong]!r}")
    if "prompt" not in record:
        raise ValueError("field prompt: is missing")
    names = several if several is not None else [name for name in (record.get("image", ""),) if name]
    if any(name.partition(":")[0].lower() in ("data", "http", "https") for name in names):
        raise ValueError("images of questions are paths of files, not URLs or data: URIs")
    first, *others = [folder / name for name in names] or [None]
    context = record.get("context", "")
    return Query(record["prompt"], first, context, other_images=tuple(others), without_image=several == [])


def _encode(model: EvalModel, query: Query) -> EncodedExample:
    config = model.config
    if config.model.entry.images:
        return _encode_with_image(model, query)
    if query.image:
        raise UserError(f"image {query.image}: this run's model is text-only")
    (row,) = model.processor.encode_prompts([_render_prompt(config, query)], None)
    return row


def _encode_with_image(model: EvalModel, query: Query) -> EncodedExample:
    if query.context:
        raise UserError("only causal models support a context; this run's model takes an image and a prompt")
    if query.image is None and not query.without_image:
        raise UserError("this run's model needs an image", 'In a file, a question without one has "images": [].')
    prompt = _render_prompt(model.config, query) if is_multi_turn(model) else query.prompt
    images = [open_query_image(path, model.config.data) for path in query.images]
    (row,) = model.processor.encode_prompts([prompt], images if len(images) > 1 else next(iter(images), None))
    return row


def _render_prompt(config: Config, query: Query) -> str:
    template = config.data.prompt
    if query.context and template not in BUILTIN_TEMPLATES and "input" not in template_fields(template):
        raise UserError(f"data.prompt of this run, {template!r}, does not show a context ({{input}})")
    facts: dict[str, Any] = {"instruction": query.prompt, "question": query.prompt, "input": query.context}
    if query.history:
        turns = json.loads(render_prompt(Example("question", "", query.prompt, "", facts=facts), template))
        facts = {"messages": [*query.history, *turns]}
    return render_prompt(Example("question", "", query.prompt, "", facts=facts), template)
