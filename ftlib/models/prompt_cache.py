"""Prompts read into a key-value cache, from which answers are generated and labels are scored.

The cache has room for further tokens, instead of being copied for every one. What several prompts begin with (an image
and the words before the question, instructions before a text) is read once where attention is causal, so that its keys
and values do not depend on what follows. In PaliGemma image and prompt attend to each other both ways: there only the
vision tower's work is shared (`embed_prompts`).

On the CPU few rows are read at a time, without each other's padding: activations of many rows exceed the caches, and
the allocator returns them to the system after every layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ftlib.models.attention import supports_custom_mask
from ftlib.models.columns import last_column_only
from ftlib.models.encoding import EncodedExample, pad_left, position_ids
from ftlib.models.registry import InputProcessor

CPU_CHUNK_TOKENS = 640
"""How many tokens the CPU reads at a time, at least one row: two or three questions about an image of 224 pixels."""

_LEAST_SAVED = 0.25
"""The part of a batch's tokens that sharing must save, to be worth a second forward pass."""


@dataclass
class KeyValues:
    """Keys and values of a batch, one pair of buffers for each layer.

    Attributes:
        rows: of the batch.
        capacity: columns (tokens) that a row has room for.
        buffers: keys and values of every layer, shape (rows, heads, capacity, head size); filled in the first forward
            pass.
    """

    rows: int
    capacity: int
    buffers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def cache(self, length: int, rows: slice = slice(None), first: int = 0) -> Cache:
        """A view that a model reads and writes as its cache.

        Args:
            length: columns that are filled.
            rows: of this batch.
            first: columns before it are padding in all these rows, and not in the view.
        """
        if not length:
            layers: list[_LayerView] = []

            def next_layer() -> _LayerView:
                layers.append(_LayerView(self, len(layers), rows, first, first))
                return layers[-1]

            return Cache(layer_class_to_replicate=next_layer)
        return Cache(layers=[_LayerView(self, index, rows, first, length) for index in range(len(self.buffers))])

    def allocate(self, like: Tensor) -> Tensor:
        """A buffer for keys or values such as these. Zeros: what is masked is multiplied by 0, and must be finite."""
        return like.new_zeros((self.rows, like.shape[1], self.capacity, like.shape[3]))


def collect_rows(
    parts: Sequence[tuple[KeyValues, Tensor, int]], length: int, capacity: int, release: bool = False
) -> KeyValues:
    """Copy rows of some batches into buffers of their own, in which all end at the same column.

    Args:
        parts: batch, rows of it (the same one several times if wanted), and how many of its columns are filled.
        length: columns filled in the copy; of a batch with more, the first ones must be padding.
        release: empty the batches layer by layer, so that no memory is needed for all of them twice. There must be no
            view of them.
    """
    found = KeyValues(sum(len(rows) for _, rows, _ in parts), capacity)
    for index in range(len(parts[0][0].buffers)):
        pairs = [states.buffers.pop(0) if release else states.buffers[index] for states, _, _ in parts]
        keys, values = (found.allocate(one) for one in pairs[0])
        start = 0
        for pair, (_, rows, filled) in zip(pairs, parts, strict=True):
            width, end = min(length, filled), start + len(rows)
            for old, new in zip(pair, (keys, values), strict=True):
                columns = old[:, :, filled - width : filled]
                torch.index_select(columns, 0, rows, out=new[start:end, :, length - width : length])
            start = end
        found.buffers.append((keys, values))
    return found


class _LayerView(DynamicLayer):
    """Some rows and columns of a layer's buffers, as transformers' attention knows a layer of its cache."""

    def __init__(self, owner: KeyValues, index: int, rows: slice, first: int, length: int) -> None:
        super().__init__()
        self._owner, self._index, self._rows, self._first, self._length = owner, index, rows, first, length
        if index < len(owner.buffers) and length > first:
            self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._index == len(self._owner.buffers):
            pair = (self._owner.allocate(key_states), self._owner.allocate(value_states))
            self._owner.buffers.append(pair)
        end = self._length + key_states.shape[-2]
        for buffer, states in zip(self._owner.buffers[self._index], (key_states, value_states), strict=True):
            buffer[self._rows, :, self._length : end] = states
        self._length = end
        self._show()
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self._length - self._first

    def _show(self) -> None:
        views = (one[self._rows, :, self._first : self._length] for one in self._owner.buffers[self._index])
        self.keys, self.values = views
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True


@dataclass(frozen=True)
class ReadPrompts:
    """What a model has read.

    Attributes:
        logits: of every answer's first token, shape (rows, vocabulary).
        mask: which columns of the cache hold a token of the row, shape (rows, length), int64.
        next_position: of the answer's first token, shape (rows, 1).
        axes: in front of the shape of `position_ids`: a model may count several positions for each token.
        states: keys and values; None if the model's layers keep anything else.
        cache: the model's own then.
    """

    logits: Tensor
    mask: Tensor
    next_position: Tensor
    axes: torch.Size
    states: KeyValues | None
    cache: Cache | None


class PromptReader:
    """Reads the prompts of rows, all of them or some at a time.

    What those read at a time share is read once. A text with which all rows begin, or which was read last, is kept for
    those read later.
    """

    def __init__(
        self, model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample], room: int
    ) -> None:
        """
        Args:
            room: tokens that will be fed behind the prompts, at most.
        """
        self._model, self._processor, self._rows, self._room = model, processor, rows, room
        everything = [row.input_ids for row in rows]
        self._common = [] if any(row.image_inputs for row in rows) else everything[0][: _common_length(everything)]
        self._texts: list[tuple[list[int], ReadPrompts]] = []
        longest = max(map(len, everything))  # a prefix and what follows are no longer, each
        self.can_join = _keeps_key_values(model, 2 * (longest + room))
        """Whether rows can be read beside others that have got tokens already, see `collect_rows`."""

    def read(self, chosen: Sequence[int], room: int) -> ReadPrompts:
        """Read some prompts.

        Args:
            chosen: their rows, best in the order of their lengths, so that neighbours need little padding.
            room: columns that the cache has behind the prompts.
        """
        rows = [self._rows[index] for index in chosen]
        shared = None if self._processor.prefix_bidirectional else self._shared_prefixes(rows)
        with last_column_only(self._model):
            if shared and _keeps_key_values(self._model, shared.longest + shared.rest + self._room):
                return self._read_behind_prefixes(rows, shared, room)
            return _read(self._model, self._processor, rows, room, self._room)

    def _shared_prefixes(self, rows: Sequence[EncodedExample]) -> _SharedPrefixes | None:
        """What rows begin with: of what they share, and of texts that are kept, what leaves the least to read."""
        found = _find_shared_prefixes(self._model, rows)
        if any(row.image_inputs for row in rows):
            return found
        lengths = [len(row.input_ids) for row in rows]
        least = found.tokens if found else (1 - _LEAST_SAVED) * sum(lengths)
        for ids in (self._common, *(ids for ids, _ in self._texts)):
            count = len(ids)
            tokens = len(rows) * (max(lengths) - count)
            if tokens <= least and min(lengths) > count and all(row.input_ids[:count] == ids for row in rows):
                least = tokens
                found = _SharedPrefixes([0] * len(rows), [EncodedExample(ids, 0)], count, max(lengths) - count)
        return found

    def _read_behind_prefixes(self, rows: Sequence[EncodedExample], shared: _SharedPrefixes, room: int) -> ReadPrompts:
        """Read prefixes, then what follows each of them in the rows: `[padding] prefix [padding] remainder`.

        Remainders are text, and counted from where their prefixes end, as generated tokens are.
        """
        first = shared.prefixes[0]
        begun = next((read for ids, read in self._texts if ids is first.input_ids), None)
        if begun is None:
            begun = _read(self._model, self._processor, shared.prefixes, 0, 0)
            if len(shared.prefixes) == 1 and not first.image_inputs:
                kept = [one for one in self._texts if one[0] is self._common]
                self._texts = [*kept, (first.input_ids, begun)]
        assert begun.states is not None
        prefixes = [shared.prefixes[owner] for owner in shared.owners]
        remainders = [
            EncodedExample(row.input_ids[len(prefix.input_ids) :], 0)
            for row, prefix in zip(rows, prefixes, strict=True)
        ]
        padded = pad_left(remainders, self._processor.pad_token_id)
        ids, behind, owners = (
            one.to(begun.mask.device)
            for one in (padded["input_ids"], padded["attention_mask"], torch.tensor(shared.owners))
        )
        positions = begun.next_position[owners] + position_ids(behind, first=0)
        mask = torch.cat([begun.mask[owners], behind], dim=1)
        before, length = begun.mask.shape[1], mask.shape[1]
        states = collect_rows([(begun.states, owners, before)], before, length + room)
        lengths = [len(remainder.input_ids) for remainder in remainders]
        logits = []
        for chunk in _chunks(lengths, ids.device):
            start = length - max(lengths[chunk])
            fed = (ids[chunk, start - before :], mask[chunk], positions[chunk, start - before :])
            logits.append(feed(self._model, begun.axes, states.cache(start, chunk), *fed, kept=1)[:, -1])
        return ReadPrompts(torch.cat(logits), mask, positions[:, -1:] + 1, begun.axes, states, None)


def feed(
    model: torch.nn.Module,
    axes: torch.Size,
    cache: Cache,
    ids: Tensor,
    mask: Any,
    positions: Tensor,
    kept: int | None = None,
) -> Tensor:
    """Read further tokens behind prompts, into their cache.

    Args:
        axes: see `ReadPrompts`.
        ids, positions: shape (rows, tokens).
        kept: of how many of the last tokens logits are wanted; None: of all.

    Returns:
        Logits, shape (rows, kept, vocabulary).
    """
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions.expand(*axes, *positions.shape),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=kept or ids.shape[1],
    )
    logits: Tensor = output.logits
    return logits


def _keeps_key_values(model: torch.nn.Module, length: int) -> bool:
    """Whether in a sequence of this length the model keeps keys and values of all tokens, and nothing else."""
    layers = DynamicCache(config=model.config).layers
    usual = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return usual and supports_custom_mask(model, length)


def _read(
    model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample], room: int, most: int
) -> ReadPrompts:
    """Read a batch from its beginning.

    Args:
        room: columns that the cache has behind the prompts.
        most: how many tokens may be fed there in the end.
    """
    length = max(len(row.input_ids) for row in rows)
    if not _keeps_key_values(model, length + most):
        batch = processor.embed_prompts(model, rows)
        next_position = batch.pop("next_position")
        output = model(**batch, use_cache=True, logits_to_keep=1)
        axes = batch["position_ids"].shape[:-2]
        return ReadPrompts(
            output.logits[:, -1], batch["attention_mask"], next_position, axes, None, output.past_key_values
        )
    states = KeyValues(len(rows), length + room)
    logits, masks, next_positions = [], [], []
    axes = torch.Size()
    for chunk, part in _embed_chunks(model, processor, rows):
        next_positions.append(part.pop("next_position"))
        first = length - part["attention_mask"].shape[1]
        cache = states.cache(0, chunk, first)
        logits.append(model(**part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1])
        masks.append(pad(part["attention_mask"], (first, 0)))
        axes = part["position_ids"].shape[:-2]
    return ReadPrompts(torch.cat(logits), torch.cat(masks), torch.cat(next_positions), axes, states, None)


def _embed_chunks(
    model: torch.nn.Module, processor: InputProcessor, rows: Sequence[EncodedExample]
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """Rows that are read together, and what `embed_prompts` makes of them, without columns in which none has a token.

    Where rows share what a vision tower makes of their images, they are embedded together.
    """
    lengths = [len(row.input_ids) for row in rows]
    chunks = _chunks(lengths, next(model.parameters()).device)
    if len(chunks) > 1 and not processor.prefix_bidirectional:
        for chunk in chunks:
            yield chunk, processor.embed_prompts(model, rows[chunk])
        return
    batch = processor.embed_prompts(model, rows)
    if len(chunks) == 1 or "inputs_embeds" not in batch:  # image arguments are not counted by rows
        yield slice(0, len(rows)), batch
        return
    next_position = batch.pop("next_position")
    for chunk in chunks:
        first = max(lengths) - max(lengths[chunk])
        yield chunk, {**_cut(batch, chunk, first), "next_position": next_position[chunk]}


def _chunks(lengths: Sequence[int], device: torch.device) -> list[slice]:
    """Rows that are read together: all of them, but on the CPU."""
    if device.type != "cpu":
        return [slice(0, len(lengths))]
    chunks, start = [], 0
    for index in range(1, len(lengths) + 1):
        if index == len(lengths) or max(lengths[start : index + 1]) * (index + 1 - start) > CPU_CHUNK_TOKENS:
            chunks.append(slice(start, index))
            start = index
    return chunks


def _cut(batch: dict[str, Any], rows: slice, first: int) -> dict[str, Any]:
    """Some rows of a batch, without the columns before `first`; every tensor counts rows and tokens."""
    return {
        name: tensor[..., rows, first:] if name == "position_ids" else tensor[rows, first:]
        for name, tensor in batch.items()
    }


@dataclass(frozen=True)
class _SharedPrefixes:
    """How prompts begin.

    Attributes:
        owners: the number of every row's prefix.
        prefixes: rows of their own.
        longest, rest: the tokens of the longest prefix, and of the longest remainder of a row.
    """

    owners: list[int]
    prefixes: list[EncodedExample]
    longest: int
    rest: int

    @property
    def tokens(self) -> int:
        """How many are read, padding included."""
        return len(self.prefixes) * self.longest + len(self.owners) * self.rest


def _common_length(texts: Sequence[list[int]]) -> int:
    """How many tokens all begin with, besides the last token of any, whose logits are wanted."""
    shortest = min(map(len, texts)) - 1
    outermost = enumerate(zip(min(texts), max(texts), strict=False))
    return min(shortest, next((place for place, (one, other) in outermost if one != other), shortest))


def _find_shared_prefixes(model: torch.nn.Module, rows: Sequence[EncodedExample]) -> _SharedPrefixes | None:
    """What rows about the same images begin with, and what rows without images do; None if that is not worth it.

    Images lie in the prefix: what stands behind it is read without them.
    """
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(id(row.image_inputs) if row.image_inputs else 0, []).append(index)
    owners, prefixes, rest = [0] * len(rows), [], 0
    config: Any = model.config
    images = {getattr(config, name, None) for name in ("image_token_id", "image_token_index")} - {None}
    for number, group in enumerate(groups.values()):
        ids = [rows[index].input_ids for index in group]
        common = _common_length(ids)
        if any(not images.isdisjoint(one[common:]) for one in ids):
            return None
        rest = max(rest, max(map(len, ids)) - common)
        prefixes.append(replace(rows[group[0]], input_ids=ids[0][:common]))
        for index in group:
            owners[index] = number
    total = sum(len(row.input_ids) for row in rows)
    longest = max(len(prefix.input_ids) for prefix in prefixes)
    found = _SharedPrefixes(owners, prefixes, longest, rest)
    if found.tokens > (1 - _LEAST_SAVED) * total or not all(prefix.input_ids for prefix in prefixes):
        return None
    return found
