"""big_vision's checkpoints: converted models compute what their arrays say; nothing is lost, made up or guessed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PaliGemmaForConditionalGeneration

from ftlib.config.npz_checkpoints import NpzCheckpoint
from ftlib.errors import UserError
from ftlib.models import big_vision
from ftlib.models.encoding import model_inputs
from ftlib.models.generation import generate_answers
from ftlib.models.loading import load_weights
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.models.sentencepiece import read_gemma_tokenizer
from tests.models import literal_big_vision as literal

FIXTURES = Path(__file__).parent / "sentencepiece"
TOKENIZER = FIXTURES / "tokenizer.model"
"""Made by SentencePiece 0.2.3 with the settings of Gemma's, and without the tokens of PaliGemma."""
PIECES = 480
ROWS = PIECES + 1024 + 128
FORMS = ("float32", "bfloat16", "float16", "mixed")
SIZES = {1: literal.FIRST, 2: literal.SECOND}

Arrays = dict[str, literal.Array]


def arrays_of(generation: int, rows: int = ROWS, **sizes: int) -> Arrays:
    return literal.parameters({**SIZES[generation], **sizes}, rows, gemma2=generation == 2)


def convert(folder: Path, arrays: Arrays, tokenizer: Path = TOKENIZER, **settings: Any) -> Path:
    """A model folder beside the checkpoint that it is converted from."""
    npz = literal.save_npz(folder / "model.npz", arrays, **settings)
    converted = folder / "model"
    converted.mkdir()
    big_vision.convert(NpzCheckpoint(npz, "digest", str(tokenizer), "digest", converted), tokenizer, converted)
    return converted


def compare(model: Path, arrays: Arrays, scale: float = 0) -> None:
    """The logits of a training row, against those that the arrays stand for; in float32."""
    inputs = PaliGemmaInputProcessor.load(model)
    side = inputs.processor.image_processor.size["width"]
    pixels = np.random.default_rng(5).integers(0, 256, (side, side, 3), dtype=np.uint8)
    row = inputs.encode_train("which digit is this?", Image.fromarray(pixels), "7 or <loc0007>")
    batch = inputs.collate([row])
    weights = load_weights(model, "float32").eval()
    with torch.no_grad():
        found = weights(**model_inputs(batch)).logits[0]
    text = row.input_ids[len(inputs._image_ids) :]
    prompt, answer = text[: -row.n_labels], text[-row.n_labels :]
    wide = {name: literal.as_float32(array) for name, array in arrays.items()}
    expected = literal.logits(wide, pixels / 127.5 - 1, prompt, answer, scale)
    assert found.shape == expected.shape
    difference = np.abs(found.double().numpy() - expected).max() / np.abs(expected).max()
    assert difference < 1e-5 and np.abs(expected).max() > 1, difference


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("generation", [1, 2])
def test_logits_are_those_of_the_arrays(generation: int, form: str, tmp_path: Path) -> None:
    arrays = literal.in_form(arrays_of(generation), form)
    model = convert(tmp_path, arrays)
    compare(model, arrays)
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == ("float32" if form == "mixed" else form)
    stored = {str(tensor.dtype).removeprefix("torch.") for tensor in load_file(model / "model.safetensors").values()}
    assert stored == ({"float32", "float16"} if form == "mixed" else {form})


@pytest.mark.parametrize("generation", [1, 2])
def test_every_way_of_writing_the_arrays_gives_the_same_files(generation: int, tmp_path: Path) -> None:
    arrays = arrays_of(generation)
    ways: dict[str, dict[str, Any]] = {
        "plain": {"arrays": arrays},
        "without": {"arrays": arrays, "before": ""},
        "unstacked": {"arrays": literal.unstacked(arrays)},
        "compressed": {"arrays": arrays, "compressed": True},
        "backwards": {"arrays": dict(reversed(arrays.items()))},
    }
    found = {}
    for name, settings in ways.items():
        (tmp_path / name).mkdir()
        found[name] = (convert(tmp_path / name, **settings) / "model.safetensors").read_bytes()
    assert set(found.values()) == {found["plain"]}


def test_a_training_state_counts_only_with_its_parameters(tmp_path: Path) -> None:
    arrays = arrays_of(1)
    state = {f"params/{name}": array for name, array in arrays.items()}
    state |= {f"opt/0/mu/{name}": array for name, array in arrays.items()}
    state |= {"chrono/accum_train_time": np.float32(3.0)}
    (tmp_path / "state").mkdir()
    ours = convert(tmp_path / "state", state, before="")
    assert (ours / "model.safetensors").read_bytes() == (convert(tmp_path, arrays) / "model.safetensors").read_bytes()


def test_as_many_heads_of_keys_as_of_queries_in_one_array(tmp_path: Path) -> None:
    arrays = arrays_of(1, K=2)
    together = dict(arrays)
    queries, keys_values = (together.pop(f"llm/layers/attn/{name}_einsum/w") for name in ("q", "kv"))
    together["llm/layers/attn/qkv_einsum/w"] = np.concatenate([queries[:, None], keys_values], axis=1)
    compare(convert(tmp_path, together), arrays)


@pytest.mark.parametrize(("side", "patch"), [(2, 14), (6, 4), (7, 3)])
def test_the_image_size_follows_from_the_positions(side: int, patch: int, tmp_path: Path) -> None:
    arrays = arrays_of(2, S=side * side, P=patch)
    model = convert(tmp_path, arrays)
    assert PaliGemmaInputProcessor.load(model).processor.image_processor.size["width"] == side * patch
    compare(model, arrays)


def released(depth: int, width: int, mlp: int, heads: int, kv: int, size: int, positions: int) -> dict[str, Any]:
    """Headers of a released model's arrays: shapes alone."""
    sizes = {"L": 27, "W": 1152, "N": 16, "H": 72, "F": 4304, "P": 14, "S": positions}
    sizes |= {"D": depth, "E": width, "M": mlp, "Q": heads, "K": kv, "G": size}
    tiny = literal.parameters(literal.SECOND if depth > 18 else literal.FIRST, 4, gemma2=depth > 18)
    letters = {
        "llm/embedder/input_embedding": "VE",
        "llm/final_norm/scale": "E",
        "llm/layers/attn/q_einsum/w": "DQEG",
        "llm/layers/attn/kv_einsum/w": "D2KEG",
        "llm/layers/attn/attn_vec_einsum/w": "DQGE",
        "llm/layers/mlp/gating_einsum": "D2EM",
        "llm/layers/mlp/linear": "DME",
        "img/embedding/kernel": "PP3W",
        "img/pos_embedding": "1SW",
        "img/head/kernel": "WE",
        "img/head/bias": "E",
    }
    block = literal.BLOCK
    letters |= {f"{block}MlpBlock_0/Dense_0/kernel": "LWF", f"{block}MlpBlock_0/Dense_0/bias": "LF"}
    letters |= {f"{block}MlpBlock_0/Dense_1/kernel": "LFW", f"{literal.ATTENTION}out/kernel": "LNHW"}
    for name in ("query", "key", "value"):
        letters |= {f"{literal.ATTENTION}{name}/kernel": "LWNH", f"{literal.ATTENTION}{name}/bias": "LNH"}
    found = {}
    for name in tiny:
        axes = letters.get(name) or {"llm": "DE", "img": "LW" if name.startswith(block) else "W"}[name[:3]]
        shape = tuple(257_152 if axis == "V" else sizes.get(axis) or int(axis) for axis in axes)
        found[name] = big_vision.NpzArray(name, shape, "|V2")
    return found


@pytest.mark.parametrize(
    ("sizes", "pixels", "gemma2", "scalar", "total"),
    [
        ((18, 2048, 16384, 8, 1, 256, 256), 224, False, None, 2_923_335_408),
        ((18, 2048, 16384, 8, 1, 256, 4096), 896, False, None, 2_927_759_088),
        ((26, 2304, 9216, 8, 4, 256, 1024), 448, True, 256, 3_032_979_696),
        ((42, 3584, 14336, 16, 8, 256, 256), 224, True, 256, 9_662_409_456),
        ((46, 4608, 36864, 32, 16, 128, 4096), 896, True, 144, 27_654_615_792),
    ],
    ids=["3b-224", "3b-896", "2-3b-448", "2-10b-224", "2-28b-896"],
)
def test_released_shapes(sizes: tuple[int, ...], pixels: int, gemma2: bool, scalar: int | None, total: int) -> None:
    """PaliGemma 3B at 224 pixels has 2,923,466,480 parameters in transformers, 64 rows of 2,048 more than here."""
    arrays = released(*sizes)
    layout = big_vision.match_arrays(arrays, Path("x.npz"))
    assert (layout.image_size, layout.gemma2, len(arrays)) == (pixels, gemma2, 34 if gemma2 else 32)
    assert layout.nbytes == 2 * total
    config = big_vision.model_config(layout, read_gemma_tokenizer(TOKENIZER))
    text = config.text_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == sizes[:3]
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == sizes[3:6]
    assert getattr(text, "query_pre_attn_scalar", None) == scalar
    with torch.device("meta"):
        model = PaliGemmaForConditionalGeneration(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == total


def test_the_28b_scales_its_queries_by_width_and_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tiny arrays that count as those of the 28B."""
    arrays = arrays_of(2)
    sizes = literal.SECOND
    monkeypatch.setattr(big_vision, "SCALED_BY_WIDTH", (sizes["D"], sizes["E"], sizes["Q"]))
    compare(convert(tmp_path, arrays), arrays, scale=(sizes["E"] / sizes["Q"]) ** -0.5)


def changed(arrays: Arrays, change: Callable[[Arrays], Any]) -> Arrays:
    found = dict(arrays)
    change(found)
    return found


LINEAR = "llm/layers/mlp/linear"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: a.pop("img/head/bias"), "1 arrays are missing: img/head/bias"),
        (lambda a: a.update(extra=np.zeros(2, "f4")), "1 arrays are left over: extra"),
        (lambda a: a.pop("llm/layers/post_ffw_norm/scale"), "missing: llm/layers/post_ffw_norm/scale"),
        (lambda a: a.update({LINEAR: a[LINEAR][:1]}), f"{LINEAR}: has shape (1, 44, 28), with 1 where other arrays"),
        (lambda a: a.update({LINEAR: a[LINEAR][0]}), f"{LINEAR}: has shape (44, 28), but 3 axes are expected"),
        (lambda a: a.update({LINEAR: a[LINEAR].astype("f8")}), f"{LINEAR}: holds float64"),
        (lambda a: a.update({LINEAR: a[LINEAR].view("V4")}), f"{LINEAR}: holds |V4"),
        (lambda a: a.update({LINEAR: np.array([{"a": 1}])}), f"{LINEAR}: holds Python objects"),
        (lambda a: a.update({"img/pos_embedding": a["img/pos_embedding"][:, :15]}), "15 positions are no square"),
        (lambda a: a.update({f"params/{LINEAR}": a[LINEAR]}), f"{LINEAR}: there twice"),
    ],
    ids=["missing", "left-over", "one-norm", "layers", "axes", "double", "void", "objects", "positions", "twice"],
)
def test_what_does_not_fit_is_named(change: Callable[[Arrays], Any], told: str, tmp_path: Path) -> None:
    arrays = changed(arrays_of(2), change)
    with pytest.raises(UserError) as error:
        convert(tmp_path, arrays, before="" if f"params/{LINEAR}" in arrays else "params/")
    assert told in str(error.value)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    npz = literal.save_npz(tmp_path / "whole.npz", arrays_of(1))
    whole = npz.read_bytes()
    with zipfile.ZipFile(npz) as archive:
        inside = archive.getinfo(f"params/{LINEAR}.npy").header_offset + 1000
    torn = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:inside] + bytes([whole[inside] ^ 1]) + whole[inside + 1 :],
        "text": b"version https://git-lfs.github.com/spec/v1\n",
        "empty": b"",
    }
    for name, data in torn.items():
        path, folder = tmp_path / f"{name}.npz", tmp_path / name
        path.write_bytes(data)
        folder.mkdir()
        with pytest.raises(UserError, match="the file is damaged"):
            big_vision.convert(NpzCheckpoint(path, "", str(TOKENIZER), "", folder), TOKENIZER, folder)


# Tokenizers.


def test_the_tokenizer_is_that_of_sentencepiece(tmp_path: Path) -> None:
    """Ids that SentencePiece gives, before and after the tokenizer is saved and read again."""
    model = convert(tmp_path, arrays_of(1))
    inputs = PaliGemmaInputProcessor.load(model)
    cases = json.loads((FIXTURES / "encodings.json").read_text())
    assert len(cases) == 150
    fresh = read_gemma_tokenizer(TOKENIZER)
    for text, ids in cases:
        assert fresh(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ids
        assert inputs.encode_answer(text) == [*ids, inputs.eos_token_id]
        assert inputs.decode(ids) == text.replace("▁", " ")
    words = inputs.tokenizer.get_vocab()
    assert [words[name] for name in ("<pad>", "<eos>", "<bos>")] == [0, 1, 2]
    ids = [words[name] for name in ("<loc0000>", "<loc1023>", "<seg000>", "<seg127>", "<image>")]
    assert ids == [PIECES, PIECES + 1023, PIECES + 1024, ROWS - 1, ROWS]


def with_pieces(model: bytes, texts: list[str]) -> bytes:
    """A SentencePiece file with user-defined pieces at its end, as in paligemma_tokenizer.model."""

    def field(number: int, data: bytes) -> bytes:
        assert len(data) < 128
        return bytes([number << 3 | 2, len(data)]) + data

    return model + b"".join(field(1, field(1, text.encode()) + b"\x18\x04") for text in texts)


def test_tokenizers_with_and_without_the_tokens_of_paligemma_are_the_same(tmp_path: Path) -> None:
    arrays = arrays_of(1)
    baked = tmp_path / "paligemma_tokenizer.model"
    baked.write_bytes(with_pieces(TOKENIZER.read_bytes(), big_vision.LOCATIONS + big_vision.SEGMENTS))
    folders = [tmp_path / name for name in ("plain", "baked", "json")]
    for folder in folders:
        folder.mkdir()
    plain = convert(folders[0], arrays)
    models = [plain, convert(folders[1], arrays, baked), convert(folders[2], arrays, plain / "tokenizer.json")]
    every = [PaliGemmaInputProcessor.load(model) for model in models]
    text = "a box: <loc0012><seg003> <mask>  and\n\n<eos> 日本"
    assert len({tuple(sorted(inputs.tokenizer.get_vocab().items())) for inputs in every}) == 1
    assert len({tuple(inputs.encode_answer(text)) for inputs in every}) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "not a SentencePiece model"),
        (b"", "it has no pieces"),
        (with_pieces(b"", ["<pad>", "<eos>"]), "not the tokenizer of a Gemma"),
        (TOKENIZER.read_bytes()[:-40], "not a"),
        (with_pieces(TOKENIZER.read_bytes(), ["new"]), "ids up to 1,632, but the checkpoint has 1,632 rows"),
        (with_pieces(TOKENIZER.read_bytes(), ["<loc0005>"]), "<loc0000> … do not follow each other"),
    ],
    ids=["text", "empty", "bare", "cut", "longer", "order"],
)
def test_other_tokenizers_are_refused(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "other.model"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        convert(tmp_path, arrays_of(1), path)
    assert told in str(error.value) and str(path) in str(error.value)


# A table that ends before `<image>`, and one with rows that no token has.


def answers(model: Path, **settings: Any) -> list[str]:
    inputs = PaliGemmaInputProcessor.load(model)
    image = Image.new("RGB", (16, 16), (200, 30, 90))
    rows = inputs.encode_prompts(["which digit is this?", "cat"], image)
    return generate_answers(load_weights(model, "float32"), inputs, rows, 6, **settings)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"generation": {"do_sample": True, "seed": 3}}])
@pytest.mark.parametrize("generation", [1, 2])
def test_answers_of_a_table_without_a_row_for_image(generation: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """They are those of the same model with rows behind the table that are never chosen."""
    arrays = arrays_of(generation)
    for name, more in (("exact", 0), ("padded", 64)):
        table = arrays["llm/embedder/input_embedding"]
        padded = np.concatenate([table, np.zeros((more, table.shape[1]), "f4")])
        (tmp_path / name).mkdir()
        convert(tmp_path / name, {**arrays, "llm/embedder/input_embedding": padded})
    exact = answers(tmp_path / "exact" / "model", **settings)
    assert any(exact)
    if "generation" not in settings:  # there the rows behind count
        assert exact == answers(tmp_path / "padded" / "model", **settings)


@pytest.mark.parametrize("setting", [{"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 1}])
def test_settings_that_look_up_scores_of_image_tokens_are_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    model = convert(tmp_path, arrays_of(1))
    with pytest.raises(UserError, match="counts the image's tokens, for which this model has no scores"):
        answers(model, generation=setting)
    assert answers(model, generation={"no_repeat_ngram_size": 2})


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_rows_that_no_token_has_are_decoded_as_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    """They are kept as they are, and count like all others."""
    arrays = arrays_of(1, rows=ROWS + 64)
    model = convert(tmp_path, arrays)
    table = arrays["llm/embedder/input_embedding"]
    stored = load_file(model / "model.safetensors")["language_model.model.embed_tokens.weight"]
    assert torch.equal(stored, torch.from_numpy(table))
    inputs = PaliGemmaInputProcessor.load(model)
    assert inputs.decode([ROWS + 8, *inputs.encode_answer("a 7")[:-1], ROWS + 63]) == "a 7"
    unlikely = np.zeros_like(table)
    unlikely[ROWS + 1 :] = 9 * table[ROWS + 1 :]
    (tmp_path / "odd").mkdir()
    odd = convert(tmp_path / "odd", {**arrays, "llm/embedder/input_embedding": unlikely})
    assert answers(odd, **settings) == ["", ""]
