"""Generation and label scoring, used by all commands: evaluation, `predict` and every other command answer through it.

Greedy answers come from a loop of our own, in which a row that has said `<eos>` leaves the batch; beam search, sampling
and whatever else GenerationConfig offers are transformers'. A closed set of labels is scored by likelihood instead, all
labels in one forward pass where the model's layers allow that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ftlib.errors import UserError
from ftlib.models.attention import as_attention_mask, supports_custom_mask
from ftlib.models.encoding import EncodedExample, truncate_left
from ftlib.models.registry import InputProcessor

MAX_LABEL_TOKENS = 512
"""How many label tokens of a row go into one forward pass."""

MAX_HEAD_TOKENS = 2048
"""How many label tokens of all rows do: with 257,152 words their logits are 1 GiB in bfloat16."""


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
            f"{problem}: no room for an answer", "Bound the images (model.image_arguments, data.max_pixels)."
        )
    return [truncate_left(row, processor.max_length, max_new_tokens, processor.prefix_length) for row in rows]


def label_loglikelihoods(
    model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample], labels: Sequence[str]
) -> Tensor:
    """Log-likelihood of every label, `<eos>` included, as the answer to every row.

    All labels stand behind the prompt in one sequence; each sees the prompt and itself, at the positions that it would
    have alone. In a model with layers that take no such mask each label has a forward pass to itself.

    Returns:
        Shape (rows, labels), float32, on the CPU.
    """
    model.eval()
    answers = [processor.encode_answer(label) for label in labels]
    with torch.inference_mode():
        rows = truncate_prompts(processor, rows, max(map(len, answers)))
        chunks = list(_label_chunks(answers))
        longest = max(len(row.input_ids) for row in rows) + max(sum(map(len, chunk)) for chunk in chunks)
        single_label = not (processor.labels_share_prompt and supports_custom_mask(model, longest))
        if single_label:
            chunks = [[answer] for answer in answers]
        size = max(1, MAX_HEAD_TOKENS // max(sum(map(len, chunk)) for chunk in chunks))
        parts = []
        for start in range(0, len(rows), size):
            batch = processor.embed_prompts(model, rows[start : start + size])
            found = [_loglikelihoods(model, processor, batch, chunk, single_label) for chunk in chunks]
            parts.append(torch.cat(found, dim=1))
    return torch.cat(parts).cpu()


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
    batch = processor.embed_prompts(model, rows)
    mask, position, ends = batch["attention_mask"], batch.pop("next_position"), processor.stop_token_ids
    axes = batch["position_ids"].shape[:-2]  # a model may count several positions for each token
    answers: list[list[int]] = [[] for _ in mask]
    open_rows = list(range(len(mask)))
    steps: list[tuple[list[int], Tensor]] = []
    output = model(**batch, use_cache=True, logits_to_keep=1)
    while True:
        last = output.logits[:, -1]
        if forced is None:
            tokens = last.argmax(dim=-1)
        else:
            tokens = torch.tensor([forced[row][len(answers[row])] for row in open_rows], device=last.device)
        numbers = last.float()
        chosen = numbers.gather(1, tokens[:, None])[:, 0] - numbers.logsumexp(dim=-1)
        steps.append((open_rows, chosen))
        going = []
        for index, token in enumerate(tokens.tolist()):
            answer = answers[open_rows[index]]
            answer.append(token)
            if token not in ends and len(answer) < rooms[open_rows[index]]:
                going.append(index)
        if not going:
            return answers, _by_row(steps, len(answers))
        cache = output.past_key_values
        if len(going) < len(open_rows):
            kept = torch.tensor(going, device=mask.device)
            cache.reorder_cache(kept)  # which layers with states other than keys and values have, too
            mask, position, tokens = mask[kept], position[kept], tokens[kept]
            open_rows = [open_rows[index] for index in going]
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=position.expand(*axes, *position.shape),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        position = position + 1


def _by_row(steps: Sequence[tuple[list[int], Tensor]], rows: int) -> list[list[float]]:
    """The log-probabilities of every row's tokens; they are fetched from the GPU at once."""
    found: list[list[float]] = [[] for _ in range(rows)]
    owners = [row for open_rows, _ in steps for row in open_rows]
    for row, number in zip(owners, torch.cat([chosen for _, chosen in steps]).tolist(), strict=True):
        found[row].append(number)
    return found


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


def _loglikelihoods(
    model: torch.nn.Module,
    processor: InputProcessor,
    batch: Mapping[str, Any],
    answers: Sequence[list[int]],
    single_label: bool = False,
) -> Tensor:
    """Shape (rows, answers), float32.

    Args:
        batch: of `InputProcessor.embed_prompts`.
        single_label: there is one answer, so that the model's own mask will do.
    """
    prompt_mask, next_position = batch["attention_mask"], batch["next_position"]
    rows, shape = len(prompt_mask), prompt_mask.shape
    fed = [token for answer in answers for token in answer[:-1]]  # `<eos>` is predicted, never read
    ids = torch.tensor(fed, dtype=torch.int64, device=prompt_mask.device)
    owner = [number for number, answer in enumerate(answers) for _ in answer[:-1]]
    depth = torch.tensor([step for answer in answers for step in range(len(answer) - 1)], dtype=torch.int64).to(
        ids.device
    )
    positions = batch["position_ids"]
    behind = (next_position + depth).expand(*positions.shape[:-1], -1)
    arguments: dict[str, Any] = {"position_ids": torch.cat([positions, behind], dim=-1)}
    if "inputs_embeds" in batch:
        prompts = batch["inputs_embeds"]
        texts = model.get_input_embeddings()(ids).expand(rows, -1, -1)  # type: ignore[operator]
        arguments["inputs_embeds"] = torch.cat([prompts, texts], dim=1) if fed else prompts
    else:  # the answer's tokens have type 0
        fillers = {name: ids if name == "input_ids" else torch.zeros_like(ids) for name in batch}
        other = {name: value for name, value in batch.items() if name not in (*arguments, "next_position")}
        for name, value in other.items():
            by_token = isinstance(value, Tensor) and value.shape == shape
            arguments[name] = torch.cat([value, fillers[name].expand(rows, -1)], dim=1) if by_token else value
    if single_label:
        arguments["attention_mask"] = torch.cat([prompt_mask, prompt_mask.new_ones((rows, len(fed)))], dim=1)
    else:
        mask = _attention_mask(prompt_mask, processor.prefix_bidirectional, owner, depth)
        arguments["attention_mask"] = as_attention_mask(model, mask, arguments["inputs_embeds"].dtype)
    logits = model(**arguments, logits_to_keep=len(fed) + 1, use_cache=False).logits
    columns, targets, numbers = _targets(answers)
    chosen = torch.stack([_log_probabilities(row, columns, targets) for row in logits])
    sums = chosen.new_zeros((rows, len(answers)))
    return sums.index_add_(1, torch.tensor(numbers, device=sums.device), chosen)


def _attention_mask(prompt_mask: Tensor, prefix_bidirectional: bool, owner: list[int], depths: Tensor) -> Tensor:
    """What every position may look at: the prompt, and within its own label what came before.

    Args:
        prefix_bidirectional: whether the prompt itself sees all of the prompt, or only what came before.

    Returns:
        Shape (rows, length, length), bool.
    """
    rows, longest = prompt_mask.shape
    owners = torch.tensor(owner, device=prompt_mask.device)
    length = longest + len(owner)
    seen = torch.zeros((rows, length, length), dtype=torch.bool, device=prompt_mask.device)
    seen[:, :, :longest] = prompt_mask[:, None, :].bool()
    if not prefix_bidirectional:
        seen[:, :longest, :longest] &= torch.ones_like(seen[0, :longest, :longest]).tril()
    own = (owners[:, None] == owners[None, :]) & (depths[:, None] >= depths[None, :])
    seen[:, longest:, longest:] = own
    return seen


def _targets(answers: Sequence[list[int]]) -> tuple[list[int], list[int], list[int]]:
    """For every answer token: the column of the logits that predicts it, the token, the answer's number."""
    columns, targets, numbers = [], [], []
    fed = 0
    for number, answer in enumerate(answers):
        columns += [0, *range(fed + 1, fed + len(answer))]
        fed += len(answer) - 1
        targets += answer
        numbers += [number] * len(answer)
    return columns, targets, numbers


def _log_probabilities(logits: Tensor, columns: list[int], targets: list[int]) -> Tensor:
    """Row by row in float32: the vocabulary is 257,152 wide."""
    indices = torch.tensor([columns, targets], device=logits.device)
    numbers = logits.float()
    picked: Tensor = numbers[indices[0], indices[1]] - numbers.logsumexp(dim=-1)[indices[0]]
    return picked
