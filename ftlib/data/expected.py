"""What the answers of a dataset must look like for a task: rows that could not be learned or judged are found early.

Every function takes a row and says what is wrong with it; "" for nothing.
"""

from __future__ import annotations

from ftlib.data.examples import Example
from ftlib.data.loc_tokens import parse
from ftlib.data.official.segmentation import read_mask

VQA_PEOPLE = 4
"""With fewer answers than this not even the right one scores 1: three people besides oneself must have given it."""


def vqa_fault(row: Example) -> str:
    """VQA accuracy needs the answers of several people."""
    if len(row.references) >= VQA_PEOPLE:
        return ""
    return f"field references: {len(row.references)} answers, but VQA accuracy needs {VQA_PEOPLE} or more, usually ten"


def gqa_fault(row: Example) -> str:
    """GQA's metrics look at the fields of GQA's questions."""
    from ftlib.data.official.gqa import parse_question

    try:
        parse_question({"question": row.prefix, "answer": row.suffix, "imageId": row.image} | row.facts)
    except ValueError as error:
        return str(error)
    return ""


def boxes_fault(row: Example) -> str:
    """Objects, each four location tokens and a label."""
    parsed = parse(row.suffix)
    if parsed.unreadable or not all(one.label for one in parsed.objects):
        return f"field suffix: <locYYYY> four times and a label are needed for each object, got {row.suffix!r}"[:300]
    return ""


def box_fault(row: Example) -> str:
    """One object, its label may be missing."""
    parsed = parse(row.suffix)
    if parsed.unreadable or len(parsed.objects) != 1:
        return f"field suffix: one box (<locYYYY> four times) is needed, got {row.suffix!r}"[:300]
    return ""


def mask_fault(row: Example) -> str:
    """One object with mask codes, and the mask itself to compare answers with."""
    parsed = parse(row.suffix)
    if parsed.unreadable or [bool(one.mask) for one in parsed.objects] != [True]:
        return (
            "field suffix: <locYYYY> four and <segXXX> sixteen times are needed (with evaluation.mask_decoder they are "
            f"made from field mask), got {row.suffix!r}"
        )[:400]
    mask = row.facts.get("mask")
    if not isinstance(mask, dict):
        return 'field mask: {"size": [height, width], "polygons": …, or "counts": …} is needed'
    try:
        read_mask(mask)
    except ValueError as error:
        return str(error)
    return ""
