"""Answer a single question, or all questions of a file, with a trained run.

PaliGemma needs an image and the whole prompt. Causal models answer without and with the context. A file of questions
has one `{"prompt": …, "image": …, "context": …}` per line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib.cli import arguments
from ftlib.config.schema import Data
from ftlib.core import files, log
from ftlib.core.paths import find_site
from ftlib.errors import UserError

if TYPE_CHECKING:
    from ftlib.evaluation.predict import Query


def main(argv: list[str]) -> int:
    """`ftlib predict RUN --prompt P [--image F] [--context F|TEXT] [--draw F] | --file F [--json]`"""
    parsed = _parser().parse_args(argv)
    if bool(parsed.file) == (parsed.prompt is not None) or (parsed.file and (parsed.image or parsed.context)):
        raise UserError("predict: no input", "Pass either --prompt (with --image or --context) or --file.")
    if parsed.draw and not parsed.image:
        raise UserError("predict: --draw needs --image")
    from ftlib.evaluation import predict as evaluation_predict

    model, settings = evaluation_predict.open_finetuned(parsed.run, parsed.max_new_tokens, find_site())
    if parsed.file:
        asked = evaluation_predict.read_queries(parsed.file)
    else:
        asked = [evaluation_predict.Query(parsed.prompt, parsed.image, evaluation_predict.text_or_file(parsed.context))]
    both = evaluation_predict.with_and_without_context(asked)
    found = iter(evaluation_predict.answer_queries(model, settings, both))
    records = [_answer_record(query, [next(found) for _ in range(2 if query.context else 1)]) for query in asked]
    log.print_json(records) if parsed.json else log.print_result(_format_answers(records))
    if parsed.draw:
        _draw(parsed.draw, parsed.image, model.config.data, records[0]["answer"], settings.mask_decoder)
    return 0


def _draw(target: Path, image: Path, data: Data, answer: str, mask_decoder: str | None) -> None:
    """Write the image with the answer's boxes, and with its masks if the config has a mask decoder."""
    from ftlib.data.images import open_query_image
    from ftlib.data.visualize import draw_boxes_and_masks
    from ftlib.models.mask_codec import MaskCodec

    masks = MaskCodec.load(Path(mask_decoder)).masks if mask_decoder else None
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draw_boxes_and_masks(open_query_image(image, data), answer, masks).save(target, format="PNG")
    log.info(f"drawn: {target}")


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("predict", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name, or the folder of a model")
    command.add_argument("--prompt", metavar="P", help="the question; for PaliGemma the whole prompt, as in training")
    command.add_argument("--image", metavar="F", type=Path, help="image file, for PaliGemma")
    command.add_argument("--context", metavar="F|TEXT", default="", help="text, or a text file, for causal models")
    command.add_argument("--file", metavar="F", type=Path, help="JSONL file of questions")
    arguments.add_max_new_tokens_argument(command)
    command.add_argument("--draw", metavar="F", type=Path, help="write a PNG with the answer's boxes and masks")
    command.add_argument("--json", action="store_true", help="print questions and answers as JSON")
    return command


def _answer_record(query: Query, answers: list[str]) -> dict[str, str]:
    record = {"prompt": query.prompt, "answer": answers[0]}
    return record | ({"answer with context": answers[1]} if query.context else {})


def _format_answers(records: list[dict[str, str]]) -> str:
    """Return the answers as text; a single answer without labels."""
    if len(records) == 1 and len(records[0]) == 2:
        return records[0]["answer"]
    return "\n\n".join(_format_block(record) for record in records)


def _format_block(record: dict[str, str]) -> str:
    lines = [f"question:        {record['prompt']}"]
    if "answer with context" not in record:
        return "\n".join([*lines, f"answer:          {record['answer']}"])
    lines += [f"without context: {record['answer']}", f"with context:    {record['answer with context']}"]
    return "\n".join(lines)
