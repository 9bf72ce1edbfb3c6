"""Generation and label scoring, used by all commands: evaluation, `predict` and every other command answer through it.

Greedy answers come from a loop of our own, in which a row that has said `<eos>` leaves the batch; beam search, sampling
and whatever else GenerationConfig offers are transformers'. A closed set of labels is scored by likelihood instead,
behind prompts that are read once. How prompts are read: prompt_cache.py.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ftlib.errors import UserError
from ftlib.models.attention import as_attention_mask
from ftlib.models.encoding import EncodedExample, truncate_left
from ftlib.models.prompt_cache import KeyValues, ReadPrompts, feed, read_prompts
from ftlib.models.registry import InputProcessor

MAX_LABEL_TOKENS = 512
"""How many label tokens of a row go into one forward pass."""

MAX_HEAD_TOKENS = 2048
"""How many label tokens of all rows do: with 257,152 words their logits are 1 GiB in bfloat16."""

STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 4}
"""By device, how many tokens are generated before the CPU waits for them to see which rows have ended. On the CPU
itself an ended row leaves the batch at once."""


@dataclass(frozen=True)
class GeneratedAnswer:
    """An answer with the probabilities of its tokens.

    Attributes:
        text: without special tokens.
        ended: whether the model ended it itself; else it was cut off at the maximum length.
        token_ids: its tokens; the last one is the end token, if the model ended it.
        logprobs: natural logarithm of the probability that the model gives to each of them, among all tokens of the
            vocabulary: without temperature, penalties, top-k or top-p.
    """

    text: str
    ended: bool
    token_ids: list[int]
    logprobs: list[float]


def generate_answers(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    max_new_tokens: int,
    num_beams: int = 1,
    generation: Mapping[str, Any] | None = None,
) -> list[str]:
    """Answer one batch of rows, see `generate_with_logprobs`.

    Returns:
        One text per row.
    """
    return [one.text for one in generate_with_logprobs(model, processor, rows, max_new_tokens, num_beams, generation)]


def generate_with_logprobs(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    max_new_tokens: int,
    num_beams: int = 1,
    generation: Mapping[str, Any] | None = None,
) -> list[GeneratedAnswer]:
    """Answer one batch of rows; each row stops at its own `<eos>`, or where the model's positions end.

    Greedy decoding knows the probabilities of its tokens. What transformers generates is read once more, token by
    token, which costs as much as greedy decoding.

    Args:
        rows: prompts of any lengths; they are padded on the left. One that leaves no room for an answer
            is truncated at its start.
        num_beams: 1 is greedy decoding.
        generation: other fields of GenerationConfig, and `seed` for sampling: the same rows give the same answers.
    """
    model.eval()
    rows = truncate_prompts(processor, rows, max_new_tokens=1)
    rooms = _max_new_tokens_per_row(processor, rows, max_new_tokens)
    with torch.inference_mode():
        if num_beams == 1 and not generation:
            answers, logprobs = _decode(model, processor, rows, rooms)
        else:
            settings = {"do_sample": False, "num_beams": num_beams, **(generation or {})}
            answers = _generate_by_transformers(model, processor, rows, settings, max_new_tokens)
            logprobs = _logprobs_of(model, processor, rows, answers)
    texts = [_strip_end(answer, processor.stop_token_ids) for answer in answers]
    return [
        GeneratedAnswer(processor.decode(text), len(text) < room, answer, numbers)
        for text, room, answer, numbers in zip(texts, rooms, answers, logprobs, strict=True)
    ]


def token_ends(processor: InputProcessor, answer: GeneratedAnswer) -> list[int]:
    """Where every token of an answer ends in its text, in characters; ascending. Special tokens have no text."""
    ends, last = [], 0
    for count in range(1, len(answer.token_ids) + 1):
        so_far = processor.decode(answer.token_ids[:count])  # a token's text can depend on those before it
        while last < min(len(so_far), len(answer.text)) and so_far[last] == answer.text[last]:
            last += 1
        ends.append(last)
    return ends


def truncate_prompts(
    processor: InputProcessor, rows: Sequence[EncodedExample], max_new_tokens: int
) -> list[EncodedExample]:
    """Rows that leave so many of the model's positions for an answer.

    Raises:
        UserError: one does not, and its beginning may hold image tokens, which cannot be cut.
    """
    longest = max((len(row.input_ids) for row in rows), default=0)
    if processor.length_depends_on_image and processor.max_length and longest + max_new_tokens > processor.max_length:
        problem = f"a prompt with its image has {longest:,} tokens, and the maximum is {processor.max_length:,}"
        raise UserError(
            f"{problem}: no room for an answer",
            "Bound the images (model.image_arguments, data.max_pixels), or shorten the prompt.",
        )
    return [truncate_left(row, processor.max_length, max_new_tokens, processor.prefix_length) for row in rows]


def label_loglikelihoods(
    model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample], labels: Sequence[str]
) -> Tensor:
    """Log-likelihood of every label, `<eos>` included, as the answer to every row.

    The prompts are read once. Behind them labels are scored in chunks, in a model with layers that take no mask of
    ours one by one.

    Returns:
        Shape (rows, labels), float32, on the CPU.
    """
    model.eval()
    answers = [processor.encode_answer(label) for label in labels]
    with torch.inference_mode():
        rows = truncate_prompts(processor, rows, max(map(len, answers)))
        order = _by_length(rows)
        chunks = list(_label_chunks(answers))
        longest = max(sum(map(len, chunk)) for chunk in chunks)
        read = read_prompts(model, processor, [rows[index] for index in order], longest)
        if read.states is None:
            found = torch.cat([_score_alone(model, read, answer) for answer in answers], dim=1)
        else:
            size = max(1, MAX_HEAD_TOKENS // longest)
            parts = [slice(start, start + size) for start in range(0, len(rows), size)]
            scored = [
                torch.cat([_score_chunk(model, read, read.states, part, chunk) for chunk in chunks], dim=1)
                for part in parts
            ]
            found = torch.cat(scored)
    scores = torch.empty(found.shape)
    scores[order] = found.cpu()
    return scores


def _decode(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    rooms: Sequence[int],
    forced: Sequence[list[int]] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy decoding.

    Args:
        rooms: how many tokens the answer to every row may have.
        forced: answers to read instead, to know the probabilities of their tokens; not empty.

    Returns:
        The tokens of every answer, its end token included, and their log-probabilities.
    """
    open_rows = _by_length(rows)
    read = read_prompts(model, processor, [rows[index] for index in open_rows], max(rooms))
    states, position, length = read.states, read.next_position, read.mask.shape[1]
    cache: Any = read.cache if states is None else states.cache(length)
    mask = torch.cat([read.mask, read.mask.new_ones((len(rows), max(rooms)))], dim=1)
    checked_every = STEPS_BETWEEN_CHECKS.get(mask.device.type, 1)
    answers: list[list[int]] = [[] for _ in rows]
    numbers: list[list[float]] = [[] for _ in rows]
    logits = read.logits
    while True:
        # Tokens stay on the device until rows are checked; no row gets more than it has room for.
        room = min(rooms[row] - len(answers[row]) for row in open_rows)
        steps: list[tuple[Tensor, Tensor]] = []
        for step in range(min(checked_every, room)):
            if step:
                logits = feed(model, read, cache, steps[-1][0][:, None], mask[:, : length + 1], position)[:, -1]
                position, length = position + 1, length + 1
            if forced is None:
                tokens = logits.argmax(dim=-1)
            else:
                due = [(forced[row], len(answers[row]) + step) for row in open_rows]
                tokens = torch.tensor([ids[min(place, len(ids) - 1)] for ids, place in due], device=logits.device)
            found = logits.float()
            steps.append((tokens, found.gather(1, tokens[:, None])[:, 0] - found.logsumexp(dim=-1)))
        kept = []
        columns = [torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True)]
        for index, (row, ids, logprobs) in enumerate(zip(open_rows, *columns, strict=True)):
            end = next((place for place, token in enumerate(ids, 1) if token in processor.stop_token_ids), None)
            answers[row] += ids[:end]
            numbers[row] += logprobs[:end]
            if end is None and len(answers[row]) < rooms[row]:
                kept.append(index)
        if not kept:
            return answers, numbers
        tokens = steps[-1][0]
        if len(kept) < len(open_rows):
            going = torch.tensor(kept, device=mask.device)
            mask, position, tokens = mask[going], position[going], tokens[going]
            open_rows = [open_rows[index] for index in kept]
            if states is None:
                cache.reorder_cache(going)  # which layers with states other than keys and values have, too
            else:
                states = states.select(going)
                cache = states.cache(length)
        logits = feed(model, read, cache, tokens[:, None], mask[:, : length + 1], position)[:, -1]
        position, length = position + 1, length + 1


def _by_length(rows: Sequence[EncodedExample]) -> list[int]:
    """The indices of rows, so that the shortest comes first."""
    return sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))


def _logprobs_of(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    answers: Sequence[list[int]],
) -> list[list[float]]:
    """Log-probabilities of the tokens of given answers."""
    found: list[list[float]] = [[] for _ in rows]
    some = [index for index, answer in enumerate(answers) if answer]
    if some:
        forced = [answers[index] for index in some]
        _, numbers = _decode(model, processor, [rows[index] for index in some], [*map(len, forced)], forced)
        for index, own in zip(some, numbers, strict=True):
            found[index] = own
    return found


def _max_new_tokens_per_row(
    processor: InputProcessor, rows: Sequence[EncodedExample], max_new_tokens: int
) -> list[int]:
    """How many tokens the answer to every row may have."""
    if processor.max_length is None:
        return [max_new_tokens] * len(rows)
    return [min(max_new_tokens, processor.max_length - len(row.input_ids)) for row in rows]


def _generate_by_transformers(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    settings: Mapping[str, Any],
    max_new_tokens: int,
) -> list[list[int]]:
    """transformers' own generation; rows with less room than the others are asked after them, one by one.

    It takes no embedded prompts for PaliGemma, so there every row looks at its image itself.
    """
    rooms = _max_new_tokens_per_row(processor, rows, max_new_tokens)
    together = [index for index, room in enumerate(rooms) if room == max_new_tokens]
    groups = [together] if together else []
    groups += [[index] for index, room in enumerate(rooms) if room < max_new_tokens]
    answers: list[list[int]] = [[] for _ in rows]
    for group in groups:
        found = _generate(model, processor, [rows[index] for index in group], settings, rooms[group[0]])
        for index, ids in zip(group, found, strict=True):
            answers[index] = ids
    return answers


def _generate(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    settings: Mapping[str, Any],
    max_new_tokens: int,
) -> list[list[int]]:
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in processor.collate_generate(rows).items()}
    fields = {name: value for name, value in settings.items() if name != "seed"}
    if int(batch["input_ids"].max()) >= model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
        _refuse_score_lookups(fields)
    seed = zlib.crc32(repr([row.input_ids for row in rows]).encode(), settings.get("seed", 0))
    try:
        config = GenerationConfig(
            **fields,
            max_new_tokens=max_new_tokens,
            pad_token_id=processor.pad_token_id,
            eos_token_id=sorted(processor.stop_token_ids),
        )
        with _ignore_generation_config(model), torch.random.fork_rng():
            torch.manual_seed(seed)
            # every process has all weights and answers its own rows, of a sharded model too (`sharding.whole`)
            ids: Tensor = model.generate(**batch, generation_config=config, synced_gpus=False)  # type: ignore[operator]
    except (ValueError, TypeError) as error:
        raise UserError(f"evaluation.generation: transformers refuses: {str(error).splitlines()[0]}") from None
    ends = processor.stop_token_ids
    found: list[list[int]] = ids[:, batch["input_ids"].shape[1] :].tolist()
    return [answer[: len(_strip_end(answer, ends)) + 1] for answer in found]


def _refuse_score_lookups(fields: Mapping[str, Any]) -> None:
    """What looks up the scores of all tokens of a prompt cannot be used where `<image>` is none of the tokens scored.

    Raises:
        UserError: such a field is set.
    """
    for name, value in fields.items():
        if name.endswith("repetition_penalty") or (name.endswith("no_repeat_ngram_size") and value == 1):
            problem = f"evaluation.generation: {name} counts the image's tokens, for which this model has no scores"
            raise UserError(problem, "Leave it out: the model's table of embeddings ends before <image>.")


def _strip_end(ids: list[int], ends: set[int]) -> list[int]:
    """An answer without its end and the padding behind it."""
    return next((ids[:index] for index, token in enumerate(ids) if token in ends), ids)


@contextmanager
def _ignore_generation_config(model: torch.nn.Module) -> Iterator[None]:
    """transformers fills what is not asked for from the checkpoint's generation_config.json; here it does not."""
    from peft import PeftModel

    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def _label_chunks(answers: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """Labels in groups that go into one forward pass together."""
    chunk: list[list[int]] = []
    for answer in answers:
        if chunk and sum(map(len, chunk)) + len(answer) > MAX_LABEL_TOKENS:
            yield chunk
            chunk = []
        chunk.append(answer)
    yield chunk


def _score_chunk(
    model: torch.nn.Module, read: ReadPrompts, states: KeyValues, rows: slice, answers: Sequence[list[int]]
) -> Tensor:
    """Log-likelihoods of some labels as the answers to some rows; one forward pass.

    The labels stand one behind the other; each sees the prompt and itself, at the positions that it would have alone.

    Returns:
        Shape (rows, answers), float32.
    """
    mask, device = read.mask[rows], read.mask.device
    first = read.logits[rows].float()
    starts = torch.tensor([answer[0] for answer in answers], device=device)
    scores = first[:, starts] - first.logsumexp(dim=-1, keepdim=True)
    owners = [number for number, answer in enumerate(answers) for _ in answer[:-1]]
    if not owners:
        return scores
    fed, targets, depths = (
        torch.tensor(numbers, device=device)
        for numbers in (
            [token for answer in answers for token in answer[:-1]],  # `<eos>` is predicted, never read
            [token for answer in answers for token in answer[1:]],
            [depth for answer in answers for depth in range(len(answer) - 1)],
        )
    )
    owner = torch.tensor(owners, device=device)
    own = (owner[:, None] == owner[None, :]) & (depths[:, None] >= depths[None, :])
    visible = torch.cat([mask[:, None, :].expand(-1, len(fed), -1).bool(), own.expand(len(mask), -1, -1)], dim=2)
    dtype = states.buffers[0][0].dtype
    logits = feed(
        model,
        read,
        states.cache(mask.shape[1], rows),
        fed.expand(len(mask), -1),
        as_attention_mask(model, visible, dtype),
        read.next_position[rows] + depths,
    )
    for number, row in enumerate(logits):  # one by one in float32: the vocabulary is 257,152 wide
        found = row.float()
        chosen = found.gather(1, targets[:, None])[:, 0] - found.logsumexp(dim=-1)
        scores[number].index_add_(0, owner, chosen)
    return scores


def _score_alone(model: torch.nn.Module, read: ReadPrompts, answer: list[int]) -> Tensor:
    """Log-likelihood of one label as the answer to every row, token by token: shape (rows, 1), float32.

    For layers that take no mask of ours, or keep states in which labels would mix.
    """
    cache, mask, logits = copy.deepcopy(read.cache), read.mask, read.logits
    assert cache is not None
    score = torch.zeros((len(mask), 1), device=mask.device)
    for step, token in enumerate(answer):
        if step:
            ids = torch.full_like(read.next_position, answer[step - 1])
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            logits = feed(model, read, cache, ids, mask, read.next_position + step - 1)[:, -1]
        found = logits.float()
        score += found[:, token, None] - found.logsumexp(dim=-1, keepdim=True)
    return score
