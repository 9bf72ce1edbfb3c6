"""Ask a trained run one question, or every question of a file.

PaliGemma takes an image and the whole prompt. A causal model's question is asked without and with its context, the
answers side by side. A file of questions has one `{"prompt": …, "image": …, "context": …}` a line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ftlib import command_line, console, files
from ftlib.errors import UserError
from ftlib.site import find_site

if TYPE_CHECKING:
    from ftlib.evaluation.questions import Question


def main(argv: list[str]) -> int:
    """`ftlib predict RUN --prompt P [--image F] [--context F|TEXT] [--draw F] | --file F [--json]`"""
    parsed = _parser().parse_args(argv)
    if bool(parsed.file) == (parsed.prompt is not None) or (parsed.file and (parsed.image or parsed.context)):
        raise UserError("predict: what is asked?", "Give either --prompt (with --image or --context) or --file.")
    if parsed.draw and not parsed.image:
        raise UserError("predict: --draw needs --image")
    from ftlib.evaluation import questions

    subject, settings = questions.open_trained(parsed.run, parsed.max_new_tokens, find_site())
    if parsed.file:
        asked = questions.read_questions(parsed.file)
    else:
        asked = [questions.Question(parsed.prompt, parsed.image, questions.text_or_file(parsed.context))]
    both = questions.with_and_without_context(asked)
    found = iter(questions.answers(subject, settings, both))
    records = [_record(question, [next(found) for _ in range(2 if question.context else 1)]) for question in asked]
    print(json.dumps(records, ensure_ascii=False, indent=1) if parsed.json else _text(records))
    if parsed.draw:
        _draw(parsed.draw, parsed.image, records[0]["answer"], settings.mask_decoder)
    return 0


def _draw(target: Path, image: Path, answer: str, mask_decoder: str | None) -> None:
    """The image with the boxes that the answer names, and with its masks if the config has what decodes them."""
    from ftlib.data.drawing import draw
    from ftlib.data.images import open_image
    from ftlib.models.mask_decoder import MaskCodec

    masks = MaskCodec.load(Path(mask_decoder)).masks if mask_decoder else None
    with files.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        draw(open_image(image), answer, masks).save(target, format="PNG")
    console.say(f"drawn: {target}")


def _parser() -> argparse.ArgumentParser:
    command = command_line.parser("predict", __doc__)
    command.add_argument("run", metavar="RUN", help="run folder or its name")
    command.add_argument("--prompt", metavar="P", help="the question; for PaliGemma the whole prompt, as in training")
    command.add_argument("--image", metavar="F", type=Path, help="image file, for PaliGemma")
    command.add_argument("--context", metavar="F|TEXT", default="", help="text, or a text file, for causal models")
    command.add_argument("--file", metavar="F", type=Path, help="JSONL file of questions")
    command_line.add_max_new_tokens(command)
    command.add_argument("--draw", metavar="F", type=Path, help="write a PNG with the answer's boxes and masks")
    command.add_argument("--json", action="store_true", help="print questions and answers as JSON")
    return command


def _record(question: Question, answers: list[str]) -> dict[str, str]:
    record = {"prompt": question.prompt, "answer": answers[0]}
    return record | ({"answer with context": answers[1]} if question.context else {})


def _text(records: list[dict[str, str]]) -> str:
    """An answer alone needs no words around it."""
    if len(records) == 1 and len(records[0]) == 2:
        return records[0]["answer"]
    return "\n\n".join(_block(record) for record in records)


def _block(record: dict[str, str]) -> str:
    lines = [f"question:        {record['prompt']}"]
    if "answer with context" not in record:
        return "\n".join([*lines, f"answer:          {record['answer']}"])
    lines += [f"without context: {record['answer']}", f"with context:    {record['answer with context']}"]
    return "\n".join(lines)
