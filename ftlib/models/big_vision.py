"""PaliGemma's checkpoints as its authors publish them (big_vision, Kaggle: `.npz`) → a model folder of transformers.

An `.npz` is a zip of `.npy` files, most of which hold one parameter of all layers. Each is read once, from its
beginning to its end, a layer at a time, and written to its places in one safetensors file, in its original dtype.
So memory holds a layer of one array and never the model, and the zip's checksums are verified on the way. Which model
it is (PaliGemma 1 or 2, its sizes) follows from names and shapes. Nothing is unpickled.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from PIL import Image
from transformers import (
    AddedToken,
    Gemma2Config,
    GemmaConfig,
    GemmaTokenizer,
    PaliGemmaConfig,
    PaliGemmaProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from ftlib.config.npz_checkpoints import CONVERSION_RECORD, NpzCheckpoint
from ftlib.core import files, log
from ftlib.errors import UserError
from ftlib.models.libraries import quiet_libraries
from ftlib.models.sentencepiece import read_gemma_tokenizer

SCALED_BY_WIDTH = (46, 4608, 32)
"""Layers, width and heads of the language model of the 28B. Its queries are scaled by (width / heads)^-½, those of all
others by (size of a head)^-½.
"""

LOCATIONS = [f"<loc{number:04d}>" for number in range(1024)]
SEGMENTS = [f"<seg{number:03d}>" for number in range(128)]
IMAGE = "<image>"

_DTYPES = {"<f4": ("F32", "float32"), "<f2": ("F16", "float16"), "|V2": ("BF16", "bfloat16")}
"""numpy's type → safetensors' and torch's name. numpy has no bfloat16: it stores its two bytes as they are."""

_BLOCK_BYTES = 1 << 26

Array = np.ndarray[Any, Any]
Parts = Sequence[tuple[str, Callable[[Array], Array]]]
"""Names of transformers → what of an array (of one layer) goes there, and how."""


def _same(a: Array) -> Array:
    return a


def _transposed(a: Array) -> Array:
    """(…, out) → (out, …)."""
    return a.reshape(-1, a.shape[-1]).T


def _heads_out(a: Array) -> Array:
    """(in, heads, size) → (heads · size, in)."""
    return a.reshape(a.shape[0], -1).T


def _heads(a: Array) -> Array:
    """(heads, in, size) → (heads · size, in)."""
    return a.swapaxes(1, 2).reshape(-1, a.shape[1])


def _patches(a: Array) -> Array:
    """(height, width, colour, out) → (out, colour, height, width)."""
    return a.transpose(3, 2, 0, 1)


def _flat(a: Array) -> Array:
    return a.reshape(-1)


def _rows(a: Array) -> Array:
    """(1, positions, width) → (positions, width)."""
    return a[0]


_UNCHANGED = (_same, _flat, _rows)
"""What leaves the bytes as they are, such as those of the embeddings, which need not be in memory together."""


def _nth(index: int, how: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda a: how(a[index])


@dataclass(frozen=True)
class _Rule:
    """Where an array goes.

    Attributes:
        name: big_vision's; of a layer's arrays the name below the layer.
        axes: a letter for each size that other arrays share, or a digit for a fixed one.
        parts: of a layer's arrays the names below the layer.
    """

    name: str
    axes: str
    parts: Parts


def _norm(name: str, target: str) -> list[_Rule]:
    return [
        _Rule(f"{name}/scale", "W", [(f"{target}.weight", _same)]),
        _Rule(f"{name}/bias", "W", [(f"{target}.bias", _same)]),
    ]


_VISION = "vision_tower.vision_model."
_LANGUAGE = "language_model.model."
_IMAGE_RULES = [
    _Rule("img/embedding/kernel", "PP3W", [(f"{_VISION}embeddings.patch_embedding.weight", _patches)]),
    _Rule("img/embedding/bias", "W", [(f"{_VISION}embeddings.patch_embedding.bias", _same)]),
    _Rule("img/pos_embedding", "1SW", [(f"{_VISION}embeddings.position_embedding.weight", _rows)]),
    *_norm("img/Transformer/encoder_norm", f"{_VISION}post_layernorm"),
    _Rule("img/head/kernel", "WE", [("multi_modal_projector.linear.weight", _transposed)]),
    _Rule("img/head/bias", "E", [("multi_modal_projector.linear.bias", _same)]),
]
_ATTENTION = "MultiHeadDotProductAttention_0"
_IMAGE_LAYER_RULES = [
    *_norm("LayerNorm_0", "layer_norm1"),
    *_norm("LayerNorm_1", "layer_norm2"),
    _Rule("MlpBlock_0/Dense_0/kernel", "WF", [("mlp.fc1.weight", _transposed)]),
    _Rule("MlpBlock_0/Dense_0/bias", "F", [("mlp.fc1.bias", _same)]),
    _Rule("MlpBlock_0/Dense_1/kernel", "FW", [("mlp.fc2.weight", _transposed)]),
    _Rule("MlpBlock_0/Dense_1/bias", "W", [("mlp.fc2.bias", _same)]),
    *[
        rule
        for name, target in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
        for rule in (
            _Rule(f"{_ATTENTION}/{name}/kernel", "WNH", [(f"self_attn.{target}.weight", _heads_out)]),
            _Rule(f"{_ATTENTION}/{name}/bias", "NH", [(f"self_attn.{target}.bias", _flat)]),
        )
    ],
    _Rule(f"{_ATTENTION}/out/kernel", "NHW", [("self_attn.out_proj.weight", _transposed)]),
    _Rule(f"{_ATTENTION}/out/bias", "W", [("self_attn.out_proj.bias", _same)]),
]
_TEXT_RULES = [
    _Rule("llm/embedder/input_embedding", "VE", [(f"{_LANGUAGE}embed_tokens.weight", _same)]),
    _Rule("llm/final_norm/scale", "E", [(f"{_LANGUAGE}norm.weight", _same)]),
]
_QKV = "attn/qkv_einsum/w"
_POST_NORM = "post_attention_norm/scale"


def _text_layer_rules(gemma2: bool, qkv: bool) -> list[_Rule]:
    """
    Args:
        qkv: queries, keys and values have as many heads, and one array.
    """
    query, key, value = (f"self_attn.{name}_proj.weight" for name in "qkv")
    grouped = [
        _Rule("attn/q_einsum/w", "QEG", [(query, _heads)]),
        _Rule("attn/kv_einsum/w", "2KEG", [(key, _nth(0, _heads)), (value, _nth(1, _heads))]),
    ]
    together = [_Rule(_QKV, "3QEG", [(name, _nth(at, _heads)) for at, name in enumerate((query, key, value))])]
    before_mlp = "pre_feedforward_layernorm" if gemma2 else "post_attention_layernorm"
    after = [
        _Rule(_POST_NORM, "E", [("post_attention_layernorm.weight", _same)]),
        _Rule("post_ffw_norm/scale", "E", [("post_feedforward_layernorm.weight", _same)]),
    ]
    gates = [("mlp.gate_proj.weight", _nth(0, _transposed)), ("mlp.up_proj.weight", _nth(1, _transposed))]
    return [
        *(together if qkv else grouped),
        _Rule("attn/attn_vec_einsum/w", "QGE", [("self_attn.o_proj.weight", _transposed)]),
        _Rule("mlp/gating_einsum", "2EM", gates),
        _Rule("mlp/linear", "ME", [("mlp.down_proj.weight", _transposed)]),
        _Rule("pre_attention_norm/scale", "E", [("input_layernorm.weight", _same)]),
        _Rule("pre_ffw_norm/scale", "E", [(f"{before_mlp}.weight", _same)]),
        *(after if gemma2 else []),
    ]


# The file: what is in it, and reading it from its beginning to its end.


@dataclass(frozen=True)
class NpzArray:
    """An array of the file as its header describes it.

    Attributes:
        entry: its name in the zip.
        dtype: of numpy, as in `_DTYPES`.
    """

    entry: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def list_arrays(archive: zipfile.ZipFile, path: Path) -> dict[str, NpzArray]:
    """The parameters of a checkpoint by name, without `params/` before it and without an optimizer's state.

    Raises:
        UserError: an entry that is no array of floating-point numbers, damaged, or there twice.
    """
    found: dict[str, NpzArray] = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        if name == entry.filename or name in found:
            what = "there twice" if name in found else "no .npy array"
            raise UserError(f"{path}: {entry.filename}: {what}", "This is no checkpoint of big_vision.")
        with archive.open(entry) as file:
            shape, dtype = _read_npy_header(file, f"{path}: {name}")
            array = NpzArray(entry.filename, shape, dtype)
            if file.tell() + array.nbytes != entry.file_size:
                raise UserError(f"{path}: {name}: its size does not fit its shape {shape}: the file is damaged")
        found[name] = array
    if any(name.startswith("params/") for name in found):
        found = {name: array for name, array in found.items() if not name.startswith(("opt/", "chrono/"))}
        plain = {name.removeprefix("params/"): array for name, array in found.items()}
        if len(plain) < len(found):
            both = next(name for name in found if f"params/{name}" in found)
            raise UserError(f"{path}: {both}: there twice, with and without params/")
        return plain
    return found


def _read_npy_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], str]:
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        shape, fortran_order, dtype = read(file)
    except (ValueError, KeyError, SyntaxError, zlib.error, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{where}: not an array that numpy wrote: {error}") from None
    if dtype.hasobject:
        raise UserError(f"{where}: holds Python objects, which could run somebody's code; they are never read")
    if dtype.str not in _DTYPES or dtype.fields or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise UserError(f"{where}: holds {dtype}{order}; weights are float32, float16 or bfloat16 (two raw bytes)")
    return shape, dtype.str


def _read_exactly(file: IO[bytes], count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise zipfile.BadZipFile("it ends too early")
    return data


# What goes where.


@dataclass(frozen=True)
class _Source:
    """One array of the file.

    Attributes:
        layers: None for an array without a first axis of layers, else the prefix of each layer's names.
        parts: see `_Rule`.
    """

    array: NpzArray
    layers: Sequence[str] | None
    parts: Parts

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one layer."""
        return self.array.shape if self.layers is None else self.array.shape[1:]

    @property
    def prefixes(self) -> Sequence[str]:
        return [""] if self.layers is None else self.layers


class _Matcher:
    """Takes every array of a file once and learns the model's sizes from their shapes."""

    def __init__(self, arrays: Mapping[str, NpzArray], path: Path) -> None:
        self.left = dict(arrays)
        self.path = path
        self.sizes: dict[str, int] = {}
        self.missing: list[str] = []
        self.sources: list[_Source] = []

    def take(self, rules: Sequence[_Rule]) -> None:
        """Arrays without layers."""
        for rule in rules:
            self._take(rule.name, rule.axes, None, rule.parts)

    def take_layers(self, stacked: str, single: str, depth: str, target: str, rules: Sequence[_Rule]) -> None:
        """Arrays of layers: one array with all layers, or one for each layer.

        Args:
            stacked: what stands before the names of stacked arrays.
            single: the same for one layer, with `{}` for its number.
            depth: the letter of the number of layers.
            target: what stands before transformers' names of a layer, with `{}` for its number.
        """
        pattern = re.compile(re.escape(single).replace(r"\{\}", "([0-9]+)"))
        numbers = {int(match[1]) for name in self.left if (match := pattern.match(name))}
        if numbers and not any(f"{stacked}{rule.name}" in self.left for rule in rules):
            self._bind(depth, len(numbers), single.format("…"))
            for number in range(len(numbers)):
                for rule in rules:
                    parts = [(target.format(number) + name, how) for name, how in rule.parts]
                    self._take(single.format(number) + rule.name, rule.axes, None, parts)
            return
        for rule in rules:
            self._take(f"{stacked}{rule.name}", depth + rule.axes, target, rule.parts)

    def _take(self, name: str, axes: str, target: str | None, parts: Parts) -> None:
        array = self.left.pop(name, None)
        if array is None:
            self.missing.append(name)
            return
        if len(array.shape) != len(axes):
            raise UserError(f"{self.path}: {name}: has shape {array.shape}, but {len(axes)} axes are expected")
        for axis, size in zip(axes, array.shape, strict=True):
            self._bind(axis, size, f"{name}: has shape {array.shape}")
        layers = None if target is None else [target.format(number) for number in range(array.shape[0])]
        self.sources.append(_Source(array, layers, parts))

    def _bind(self, axis: str, size: int, what: str) -> None:
        expected = int(axis) if axis.isdigit() else self.sizes.setdefault(axis, size)
        if size != expected or not size:
            raise UserError(f"{self.path}: {what}, with {size} where other arrays have {expected}")

    def finish(self) -> None:
        """
        Raises:
            UserError: an array is missing or left over.
        """
        for word, names in (("missing", self.missing), ("left over", sorted(self.left))):
            if names:
                shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
                problem = f"{self.path}: not a PaliGemma of big_vision: {len(names)} arrays are {word}: {shown}"
                raise UserError(problem, "Every array has to be known, so that no weight is lost or made up.")


@dataclass(frozen=True)
class Layout:
    """What a checkpoint holds.

    Attributes:
        sizes: letter of an axis → size: see the rules.
        gemma2: PaliGemma 2.
    """

    sources: Sequence[_Source]
    sizes: Mapping[str, int]
    gemma2: bool

    @property
    def image_size(self) -> int:
        """In pixels."""
        return self.sizes["P"] * math.isqrt(self.sizes["S"])

    @property
    def dtypes(self) -> list[str]:
        """torch's names of the types of its arrays."""
        return sorted({_DTYPES[source.array.dtype][1] for source in self.sources})

    @property
    def nbytes(self) -> int:
        return sum(source.array.nbytes for source in self.sources)


def match_arrays(arrays: Mapping[str, NpzArray], path: Path) -> Layout:
    """Find the place of every array.

    Raises:
        UserError: arrays that are missing, left over, or of shapes that do not fit together.
    """
    matcher = _Matcher(arrays, path)
    text = [name for name in arrays if name.startswith("llm/layers/")]
    gemma2 = any(name.endswith(f"/{_POST_NORM}") for name in text)
    text_rules = _text_layer_rules(gemma2, any(name.endswith(f"/{_QKV}") for name in text))
    matcher.take(_IMAGE_RULES)
    blocks = "img/Transformer/encoderblock"
    matcher.take_layers(f"{blocks}/", f"{blocks}_{{}}/", "L", f"{_VISION}encoder.layers.{{}}.", _IMAGE_LAYER_RULES)
    matcher.take(_TEXT_RULES)
    matcher.take_layers("llm/layers/", "llm/layers/{}/", "D", f"{_LANGUAGE}layers.{{}}.", text_rules)
    matcher.finish()
    sizes = matcher.sizes
    if math.isqrt(sizes["S"]) ** 2 != sizes["S"]:
        raise UserError(f"{path}: img/pos_embedding: {sizes['S']} positions are no square")
    if sizes["N"] * sizes["H"] != sizes["W"] or sizes["Q"] % sizes.setdefault("K", sizes["Q"]):
        raise UserError(f"{path}: the numbers of heads do not fit: {sizes}")
    return Layout(matcher.sources, sizes, gemma2)


def model_config(layout: Layout, tokenizer: GemmaTokenizer) -> PaliGemmaConfig:
    """The config of a checkpoint's shapes; what these leave open is the same in all models of the authors."""
    sizes = layout.sizes
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = {
        "vocab_size": sizes["V"],
        "hidden_size": sizes["E"],
        "intermediate_size": sizes["M"],
        "num_hidden_layers": sizes["D"],
        "num_attention_heads": sizes["Q"],
        "num_key_value_heads": sizes["K"],
        "head_dim": sizes["G"],
        **special,
    }
    dtype = layout.dtypes[0] if len(layout.dtypes) == 1 else "float32"
    vision = SiglipVisionConfig(
        hidden_size=sizes["W"],
        intermediate_size=sizes["F"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["N"],
        patch_size=sizes["P"],
        image_size=layout.image_size,
        vision_use_head=False,
        projection_dim=sizes["E"],
        dtype=dtype,
    )
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=_gemma2_config(sizes, text, dtype) if layout.gemma2 else GemmaConfig(**text, dtype=dtype),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        hidden_size=sizes["E"],
        projection_dim=sizes["E"],
        dtype=dtype,
        **special,
    )


def _gemma2_config(sizes: Mapping[str, int], text: Mapping[str, Any], dtype: str) -> Gemma2Config:
    """Without the sliding window of transformers' Gemma 2, which the authors' PaliGemma 2 does not have."""
    by_width = (sizes["D"], sizes["E"], sizes["Q"]) == SCALED_BY_WIDTH
    return Gemma2Config(
        **text,
        query_pre_attn_scalar=sizes["E"] // sizes["Q"] if by_width else sizes["G"],
        layer_types=["full_attention"] * sizes["D"],
        dtype=dtype,
    )


# The processor.


def make_processor(tokenizer: GemmaTokenizer, layout: Layout, path: Path) -> PaliGemmaProcessor:
    """The processor of a checkpoint: images are resized bilinearly, as the authors do, where transformers is bicubic.

    Args:
        tokenizer: Gemma's, with or without the tokens of PaliGemma, which are added in the authors' order.
        path: of the tokenizer, for messages.

    Raises:
        UserError: the tokenizer does not belong to the model.
    """
    tokenizer.add_tokens(LOCATIONS + SEGMENTS)
    words = tokenizer.get_vocab()
    if IMAGE not in words:
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(IMAGE, normalized=False, special=True)]})
    highest = max(number for word, number in words.items() if word != IMAGE)
    rows = layout.sizes["V"]
    for first, tokens in ((LOCATIONS[0], LOCATIONS), (SEGMENTS[0], SEGMENTS)):
        if [words.get(token) for token in tokens] != list(range(words[first], words[first] + len(tokens))):
            raise UserError(f"{path}: not the tokenizer of PaliGemma: {first} … do not follow each other")
    if highest >= rows:
        problem = f"{path}: its tokens have ids up to {highest:,}, but the checkpoint has {rows:,} rows"
        raise UserError(problem, "This tokenizer belongs to another model.")
    if highest + 1 < rows:
        log.warning(f"{path}: the checkpoint has {rows - highest - 1:,} more rows than the tokenizer has tokens")
    size = layout.image_size
    images = SiglipImageProcessorPil(size={"height": size, "width": size}, resample=Image.Resampling.BILINEAR)
    images.image_seq_length = layout.sizes["S"]
    return PaliGemmaProcessor(image_processor=images, tokenizer=tokenizer)


# Writing.


def _safetensors_header(sources: Sequence[_Source]) -> tuple[bytes, dict[str, int]]:
    """The beginning of the file, and where each tensor begins: those of larger numbers first, so that all are aligned.

    github.com/huggingface/safetensors, "Format".
    """
    entries = []
    for source in sources:
        shapeless = np.broadcast_to(np.uint8(0), source.shape)  # one byte, whatever the shape
        for name, how in source.parts:
            entries += [(prefix + name, source.array.dtype, how(shapeless).shape) for prefix in source.prefixes]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, dtype, shape in sorted(entries, key=lambda entry: (-np.dtype(entry[1]).itemsize, entry[0])):
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": _DTYPES[dtype][0], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
    return len(text).to_bytes(8, "little") + text, offsets


def _write_weights(archive: zipfile.ZipFile, sources: Sequence[_Source], path: Path) -> None:
    header, offsets = _safetensors_header(sources)
    with path.open("xb") as file:
        file.write(header)
        for source in log.track(sources, "array"):
            with archive.open(source.array.entry) as stream:
                _read_npy_header(stream, source.array.entry)
                _write_source(stream, source, file, offsets)
                if stream.read(1):  # at the end of an entry its checksum is compared
                    raise zipfile.BadZipFile(f"{source.array.entry} is longer than its shape says")


def _write_source(stream: IO[bytes], source: _Source, file: IO[bytes], offsets: Mapping[str, int]) -> None:
    width = np.dtype(source.array.dtype).itemsize
    count = math.prod(source.shape) * width
    for prefix in source.prefixes:
        name, how = source.parts[0]
        if how in _UNCHANGED:
            file.seek(offsets[prefix + name])
            for start in range(0, count, _BLOCK_BYTES):
                file.write(_read_exactly(stream, min(_BLOCK_BYTES, count - start)))
            continue
        values = np.frombuffer(bytearray(_read_exactly(stream, count)), f"i{width}").reshape(source.shape)
        for name, how in source.parts:
            file.seek(offsets[prefix + name])
            in_order = torch.from_numpy(how(values)).contiguous()  # several times as fast as numpy
            file.write(in_order.numpy().reshape(-1).view(np.uint8).data)


def convert(npz: NpzCheckpoint, tokenizer: Path, folder: Path) -> None:
    """Write the model that a checkpoint holds into a folder.

    Args:
        tokenizer: a `.model` or `tokenizer.json` file.

    Raises:
        UserError: not a PaliGemma of big_vision, a damaged file, or a tokenizer of another model.
    """
    path = npz.file
    try:
        with zipfile.ZipFile(path) as archive:
            layout = match_arrays(list_arrays(archive, path), path)
            files.require_space(folder, layout.nbytes)
            processor = make_processor(load_tokenizer(tokenizer), layout, tokenizer)
            quiet_libraries()
            log.info(f"{path}: {describe(layout)}")
            _write_weights(archive, layout.sources, folder / "model.safetensors")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{path}: the file is damaged: {error}", "Download it again.") from None
    processor.save_pretrained(folder)
    config = model_config(layout, processor.tokenizer)
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    config.save_pretrained(folder)
    names: dict[str, Any] = {"checkpoint": path.name, "sha256": npz.sha256, "dtypes": layout.dtypes}
    names |= {"tokenizer": Path(npz.tokenizer).name if npz.tokenizer_sha256 else npz.tokenizer}
    files.write_json(folder / CONVERSION_RECORD, {**names, "tokenizer_sha256": npz.tokenizer_sha256})


def load_tokenizer(path: Path) -> GemmaTokenizer:
    """The tokenizer of a `.model` file or a tokenizer.json. `<mask>` is a word like any other, as for the authors.

    Raises:
        UserError: not a tokenizer of a Gemma.
    """
    if path.suffix == ".model":
        return read_gemma_tokenizer(path)
    try:
        tokenizer = GemmaTokenizer(tokenizer_file=str(path), mask_token=None)
    except Exception as error:  # tokenizers raises nothing more special
        raise UserError(f"{path}: not a tokenizer.json: {str(error).splitlines()[0]}") from None
    return tokenizer


def describe(layout: Layout) -> str:
    """A line about a checkpoint."""
    sizes = layout.sizes
    parameters = sum(math.prod(source.array.shape) for source in layout.sources)
    return (
        f"PaliGemma{' 2' if layout.gemma2 else ''}, {parameters:,} parameters ({', '.join(layout.dtypes)}), images of "
        f"{layout.image_size} pixels, {sizes['L']} + {sizes['D']} layers, {sizes['V']:,} rows of embeddings"
    )
