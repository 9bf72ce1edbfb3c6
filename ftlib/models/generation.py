"""Generation and label scoring, used by all commands: evaluation, `predict` and every other command answer through it.

Greedy answers come from a loop of our own, in which a row that has said `<eos>` leaves the batch and waiting rows take
its place; beam search, sampling and whatever else GenerationConfig offers are transformers'. A closed set of labels is
scored by likelihood instead, behind prompts that are read once. How prompts are read: prompt_cache.py.
"""

from __future__ import annotations

import copy
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig

from ftlib.errors import UserError
from ftlib.models.attention import as_attention_mask
from ftlib.models.encoding import EncodedExample, truncate_left
from ftlib.models.prompt_cache import KeyValues, PromptReader, ReadPrompts, collect_rows, feed
from ftlib.models.registry import InputProcessor

MAX_LABEL_TOKENS = 512
"""How many label tokens of a row go into one forward pass."""

MAX_HEAD_TOKENS = 2048
"""How many label tokens of all rows do: with 257,152 words their logits are 1 GiB in bfloat16."""

STEPS_BETWEEN_CHECKS = {"cpu": 1, "cuda": 4}
"""By device, how many tokens are generated before the CPU waits for them to see which rows have ended. On the CPU
itself an ended row leaves the batch at once."""

GROWTH = 64
"""For how many tokens the cache gets room at a time."""


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
    batch_size: int | None = None,
) -> list[GeneratedAnswer]:
    """Answer rows; each stops at its own `<eos>`, or where the model's positions end.

    Greedy decoding knows the probabilities of its tokens. What transformers generates is read once more, token by
    token, which costs as much as greedy decoding.

    Args:
        rows: prompts of any lengths; they are padded on the left. One that leaves no room for an answer
            is truncated at its start.
        num_beams: 1 is greedy decoding.
        generation: other fields of GenerationConfig, and `seed` for sampling: the same rows give the same answers.
        batch_size: how many rows are answered at a time; in greedy decoding others take the places of those that end.
            None: all.
    """
    if not rows:
        return []
    model.eval()
    rows = truncate_prompts(processor, rows, max_new_tokens=1)
    rooms, size = _max_new_tokens_per_row(processor, rows, max_new_tokens), batch_size or len(rows)
    with torch.inference_mode():
        if num_beams == 1 and not generation:
            answers, logprobs = _decode(model, processor, rows, rooms, size)
        else:
            settings = {"do_sample": False, "num_beams": num_beams, **(generation or {})}
            answers = []
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                answers += _generate_by_transformers(model, processor, batch, settings, max_new_tokens)
            logprobs = _logprobs_of(model, processor, rows, answers, size)
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
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids))
        chunks = list(_label_chunks(answers))
        longest = max(sum(map(len, chunk)) for chunk in chunks)
        read = PromptReader(model, processor, rows, longest).read(order, longest)
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
    batch_size: int,
    forced: Sequence[list[int]] | None = None,
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy decoding.

    Args:
        rooms: how many tokens the answer to every row may have.
        batch_size: how many rows are open at a time.
        forced: answers to read instead, to know the probabilities of their tokens; not empty.

    Returns:
        The tokens of every answer, its end token included, and their log-probabilities.
    """
    reader, waiting = PromptReader(model, processor, rows, max(rooms)), _groups(rows, batch_size)
    answers: list[list[int]] = [[] for _ in rows]
    numbers: list[list[float]] = [[] for _ in rows]
    batch: _Batch | None = None
    while True:
        if batch is None:
            taken = _take(waiting, rows, batch_size)
            batch = _Batch(model, taken, reader.read(taken, min(GROWTH, max(rooms))))
        elif reader.can_join and (taken := _take(waiting, rows, batch_size - len(batch.rows), batch_size // 4)):
            left = [rooms[row] - len(answers[row]) for row in [*batch.rows, *taken]]
            batch.join(_Batch(model, taken, reader.read(taken, 0)), max(left))
        # Tokens stay on the device until rows are checked; no row gets more than it has room for.
        left = [rooms[row] - len(answers[row]) for row in batch.rows]
        device = batch.logits.device
        steps: list[tuple[Tensor, Tensor]] = []
        for step in range(min(STEPS_BETWEEN_CHECKS.get(device.type, 1), *left)):
            if step:
                batch.feed(steps[-1][0], max(left))
            if forced is None:
                tokens = batch.logits.argmax(dim=-1)
            else:
                due = [(forced[row], len(answers[row]) + step) for row in batch.rows]
                tokens = torch.tensor([ids[min(place, len(ids) - 1)] for ids, place in due], device=device)
            found = batch.logits.float()
            steps.append((tokens, found.gather(1, tokens[:, None])[:, 0] - found.logsumexp(dim=-1)))
        kept = []
        columns = [torch.stack(column, dim=1).tolist() for column in zip(*steps, strict=True)]
        for index, (row, ids, logprobs) in enumerate(zip(batch.rows, *columns, strict=True)):
            end = next((place for place, token in enumerate(ids, 1) if token in processor.stop_token_ids), None)
            answers[row] += ids[:end]
            numbers[row] += logprobs[:end]
            if end is None and len(answers[row]) < rooms[row]:
                kept.append(index)
        if kept:
            batch.keep(kept, max(left))
            batch.feed(steps[-1][0][kept], max(left))
        elif waiting:
            batch = None
        else:
            return answers, numbers


class _Batch:
    """Rows whose answers are being generated, and what the model has read of them.

    Methods are told how many tokens a row has `left` to get, at most: the cache needs no room for more.

    Attributes:
        rows: their indices.
        logits: of the next token of each, shape (rows, vocabulary).
    """

    def __init__(self, model: torch.nn.Module, rows: list[int], read: ReadPrompts) -> None:
        """Begin behind prompts."""
        self.rows, self.logits = rows, read.logits
        self._model, self._axes = model, read.axes
        self._mask, self._position, self._states = read.mask, read.next_position, read.states
        self._cache: Any = read.cache if read.states is None else read.states.cache(self._mask.shape[1])

    def feed(self, tokens: Tensor, left: int) -> None:
        """Read the next token of every row."""
        if self._states is not None and self._mask.shape[1] == self._states.capacity:
            self._collect([self], left)
        self._mask = pad(self._mask, (0, 1), value=1)
        given = (tokens[:, None], self._mask, self._position)
        self.logits = feed(self._model, self._axes, self._cache, *given)[:, -1]
        self._position = self._position + 1

    def keep(self, kept: Sequence[int], left: int) -> None:
        """Keep some rows; the others leave."""
        if len(kept) == len(self.rows):
            return
        chosen = torch.tensor(kept, device=self._mask.device)
        self.rows = [self.rows[index] for index in kept]
        self._mask, self._position = self._mask[chosen], self._position[chosen]
        if self._states is None:
            self._cache.reorder_cache(chosen)  # which layers with states other than keys and values have, too
        else:
            self._collect([self], left, chosen)

    def join(self, other: _Batch, left: int) -> None:
        """Take in rows that have just been read. All rows end in the same column then."""
        self.rows = [*self.rows, *other.rows]
        self.logits = torch.cat([self.logits, other.logits])
        self._position = torch.cat([self._position, other._position])
        self._collect([self, other], left)

    def _collect(self, batches: Sequence[_Batch], left: int, chosen: Tensor | None = None) -> None:
        """Move rows into buffers with room for more tokens. First columns in which none has a token are left out."""
        begins = [int(one._mask.any(dim=0).int().argmax()) for one in batches]
        length = max(one._mask.shape[1] - begin for one, begin in zip(batches, begins, strict=True))
        parts, masks = [], []
        for one in batches:
            filled = one._mask.shape[1]
            rows = torch.arange(len(one._mask), device=one._mask.device) if chosen is None else chosen
            assert one._states is not None
            parts.append((one._states, rows, filled))
            masks.append(pad(one._mask, (length - filled, 0)))  # shorter by what is negative
            one._cache = None
        self._mask = torch.cat(masks)
        self._states = collect_rows(parts, length, length + min(GROWTH, left), release=True)
        self._cache = self._states.cache(length)


def _groups(rows: Sequence[EncodedExample], batch_size: int) -> deque[list[int]]:
    """Indices of rows that are read together, because they are about the same image; the longest prompts come first."""
    by_image: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        by_image.setdefault(id(row.image_inputs) if row.image_inputs else (index,), []).append(index)
    whole = sorted(by_image.values(), key=lambda group: -max(len(rows[index].input_ids) for index in group))
    return deque(group[start : start + batch_size] for group in whole for start in range(0, len(group), batch_size))


def _take(waiting: deque[list[int]], rows: Sequence[EncodedExample], places: int, least: int = 0) -> list[int]:
    """Remove the rows for which there is a place; none if they are fewer than it is worth to read."""
    count = total = 0
    for group in waiting:
        if total + len(group) > places:
            break
        count, total = count + 1, total + len(group)
    if total < min(least, sum(map(len, waiting))):
        return []
    taken = [index for _ in range(count) for index in waiting.popleft()]
    return sorted(taken, key=lambda index: len(rows[index].input_ids))


def _logprobs_of(
    model: torch.nn.Module,
    processor: InputProcessor,
    rows: Sequence[EncodedExample],
    answers: Sequence[list[int]],
    batch_size: int,
) -> list[list[float]]:
    """Log-probabilities of the tokens of given answers."""
    found: list[list[float]] = [[] for _ in rows]
    some = [index for index, answer in enumerate(answers) if answer]
    if some:
        forced = [answers[index] for index in some]
        _, numbers = _decode(model, processor, [rows[index] for index in some], [*map(len, forced)], batch_size, forced)
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
        read.axes,
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
            logits = feed(model, read.axes, cache, ids, mask, read.next_position + step - 1)[:, -1]
        found = logits.float()
        score += found[:, token, None] - found.logsumexp(dim=-1, keepdim=True)
    return score
