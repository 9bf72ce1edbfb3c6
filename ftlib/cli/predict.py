"""Answer a single question, or all questions of a file, with a trained run.

PaliGemma needs an image and the whole prompt. Causal models answer without and with the context. A file of questions
has one `{"prompt": …, "image": …, "context": …}` per line.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ftlib.cli import arguments
from ftlib.core import imports, log
from ftlib.core.paths import find_site
from ftlib.errors import UserError
from ftlib.models.libraries import hide_unused_packages_of


def main(argv: list[str]) -> int:
    """`ftlib predict RUN --prompt P [--image F] [--context F|TEXT] [--draw F] | --file F [--json]`"""
    parsed = _parser().parse_args(argv)
    if bool(parsed.file) == (parsed.prompt is not None) or (parsed.file and (parsed.image or parsed.context)):
        raise UserError("predict: no input", "Pass either --prompt (with --image or --context) or --file.")
    if parsed.draw and len(parsed.image or ()) != 1:
        raise UserError("predict: --draw needs --image" + (", and a single one" if parsed.image else ""))
    site = find_site()
    name = arguments.find_model_or_run(parsed.run, site)
    hide_unused_packages_of(name, site)
    with imports.quick_imports():
        from ftlib.evaluation.predict import Query, draw_answer, open_finetuned, predict, read_queries, text_or_file

    model, settings = open_finetuned(name, parsed.max_new_tokens, site)
    if parsed.file:
        asked = read_queries(parsed.file)
    else:
        first, *others = parsed.image or [None]
        asked = [Query(parsed.prompt, first, text_or_file(parsed.context), other_images=tuple(others))]
    records = predict(model, settings, asked)
    log.print_json(records) if parsed.json else log.print_result(_format_answers(records))
    if parsed.draw:
        draw_answer(parsed.draw, parsed.image[0], model.config.data, records[0]["answer"], settings.mask_decoder)
        log.info(f"drawn: {parsed.draw}")
    return 0


def _parser() -> argparse.ArgumentParser:
    command = arguments.make_parser("predict", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name, or the folder of a model")
    command.add_argument("--prompt", metavar="P", help="the question; for PaliGemma the whole prompt, as in training")
    command.add_argument("--image", metavar="F", type=Path, action="append", help="image file, for PaliGemma")
    command.add_argument("--context", metavar="F|TEXT", default="", help="text, or a text file, for causal models")
    command.add_argument("--file", metavar="F", type=Path, help="JSONL file of questions")
    arguments.add_max_new_tokens_argument(command)
    command.add_argument("--draw", metavar="F", type=Path, help="write a PNG with the answer's boxes and masks")
    command.add_argument("--json", action="store_true", help="print JSON, with log-probabilities")
    return command


def _format_answers(records: list[dict[str, Any]]) -> str:
    """Return the answers as text; a single answer without labels."""
    if len(records) == 1 and "answer with context" not in records[0]:
        return str(records[0]["answer"])
    return "\n\n".join(_format_block(record) for record in records)


def _format_block(record: dict[str, Any]) -> str:
    lines = [f"question:        {record['prompt']}"]
    if "answer with context" not in record:
        return "\n".join([*lines, f"answer:          {record['answer']}"])
    lines += [f"without context: {record['answer']}", f"with context:    {record['answer with context']}"]
    return "\n".join(lines)
