"""Run the authors' own code of PaliGemma on tiny random parameters, and keep what it gives as small arrays.

    make oracle BIG_VISION=/path/to/big_vision

BIG_VISION is a checkout of github.com/google-research/big_vision; nothing of it is kept here. The Makefile makes an
environment with JAX and TensorFlow beside ftlib's (big_vision/requirements.txt). `test_big_vision.py` compares ftlib
with the arrays and needs neither.

What runs is theirs: preprocessing and tokenization (`pp`), the models (`models/proj/paligemma`, `models/ppp/gemma`,
`models/vit`), the loss (taken out of `trainers/proj/paligemma/train.py`, where it is a local function) and decoding
(`predict_fns`). Made here are the sizes, the parameters and the examples.

For each of the models in `VARIANTS`:

- `NAME.npz`: the parameters, as the authors' checkpoints hold them.
- `NAME-expected.npz`: for a batch of rows its `text`, `mask_ar`, `mask_loss`, `image` (in [-1, 1]), the `logits` that
  predict its answers, the `loss` of each row and of the batch, without and with label smoothing, the batch's gradients
  (`gradient/NAME`), greedy answers and those of a beam search (`decoded`, `beams`), as token ids.

`pixels.npz` has images and what their `resize` makes of them; `texts.json` the token ids of texts.
"""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "big_vision"
TOKENIZER = Path(__file__).parents[1] / "models" / "sentencepiece" / "tokenizer.model"

TEXT_LENGTH, MAX_TEXT_LENGTH, ANSWER_LENGTH = 24, 120, 12
BEAMS = 3
SMOOTHING = 0.3
EXAMPLES = (
    ("which digit is this?", "7"),
    ("detect cat ; dog", "<loc0003><loc0512><loc0700><loc1023> cat"),
    ("", "a b"),
)
"""Prefix and suffix of the rows."""

IMAGE_SIZES = ((28, 40), (11, 9), (16, 16), (90, 33))
"""Height and width of the images. The first ones belong to the rows."""

TEXTS = (
    "answer en what is in the image?",
    "detect a cat ; two dogs",
    " leading and trailing blanks  ",
    "two\nlines\n\nand a gap",
    "ends in a newline\n",
    "ends in newlines\n\n",
    "<loc0000><loc1023> <seg000><seg127>",
    "a <mask> and <eos> and <image>",
    "日本語 と かな, ÄÖÜ ß, Ελληνικά, кириллица 😀",
    "▁ meta ▁▁ tabs\tand\r\n",
    "",
)
"""As prefixes."""

VARIANTS: dict[str, tuple[str, dict[str, int], int]] = {
    "paligemma": ("gemma_2b", {"num_heads": 2, "num_kv_heads": 1}, 6),
    "paligemma2": ("gemma2_2b", {"num_heads": 4, "num_kv_heads": 2}, 2),
    "paligemma2-28b": ("gemma2_27b", {"num_heads": 4, "num_kv_heads": 2}, 2),
}
"""Name → variant of their Gemma, its heads, seed of its parameters."""

TEXT_SIZES = {"width": 8, "depth": 2, "mlp_dim": 12, "head_dim": 4}
IMAGE_SETTINGS = {"patch_size": (4, 4), "width": 6, "depth": 2, "mlp_dim": 10, "num_heads": 2}
SIDE = 16
"""Of the model's images, in pixels."""


def main() -> None:
    """Import theirs and write all files."""
    import jax
    import numpy as np

    jax.config.update("jax_default_matmul_precision", "highest")
    FOLDER.mkdir(exist_ok=True)
    pixels, texts = preprocess_images(), tokenize_texts()
    np.savez_compressed(FOLDER / "pixels.npz", **pixels)
    (FOLDER / "texts.json").write_text(json.dumps(texts, ensure_ascii=True, indent=1) + "\n", encoding="ascii")
    for name in VARIANTS:
        parameters, expected = run_model(name)
        if not (name.endswith("28b")):  # which has the parameters of the one before
            save(FOLDER / f"{name}.npz", {f"params/{key}": array for key, array in parameters.items()})
        save(FOLDER / f"{name}-expected.npz", expected)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.stat().st_size:9,} {path.name}")


def save(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays; float32 bytes hardly compress, and checkpoints are not compressed."""
    import numpy as np

    np.savez(path, **arrays)


def tokenizer_name() -> str:
    """Their name of Gemma's tokenizer with PaliGemma's tokens, from a file of ours."""
    return f'gemma(tokensets=("loc", "seg"), model="{TOKENIZER}")'


def pipeline(*steps: str, length: int = TEXT_LENGTH) -> Any:
    """Their preprocessing."""
    from big_vision.configs.proj.paligemma.transfers import common
    from big_vision.pp import (  # noqa: F401  (ops are registered when they are imported)
        builder,
        ops_general,
        ops_image,
        ops_text,
    )
    from big_vision.pp.proj.paligemma import ops  # noqa: F401

    common.TOKENIZER = tokenizer_name()
    train = common.combine_and_keep_train(length)
    evaluate = common.combine_and_keep_eval(length)
    return builder.get_preprocess_fn("|".join(steps).format(train=train, evaluate=evaluate), log_data=False)


def images() -> list[Any]:
    """uint8, shape (height, width, 3): waves with noise, black and white edges."""
    import numpy as np

    found = []
    for seed, (height, width) in enumerate(IMAGE_SIZES):
        random = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        waves = [127 + 90 * np.sin((seed + 1) * (x * (1 + c) + y * (3 - c)) / 17 + c) for c in range(3)]
        image = np.stack(waves, -1) + random.normal(0, 20, (height, width, 3))
        image[height // 3 : height // 2, ::3], image[-3:, :5] = 255, 0
        found.append(np.clip(image, 0, 255).astype(np.uint8))
    return found


def as_png(image: Any) -> bytes:
    import tensorflow as tf

    encoded: bytes = tf.io.encode_png(image).numpy()
    return encoded


def preprocess_images() -> dict[str, Any]:
    """`image/N`, and with and without antialiasing `antialias/N` and `plain/N`, in [-1, 1]."""
    found = {}
    for number, image in enumerate(images()):
        found[f"image/{number}"] = image
        for name, option in (("antialias", "antialias=True"), ("plain", "antialias=False")):
            resize = pipeline(f"decode|resize({SIDE}, {option})|value_range(-1, 1)")
            found[f"{name}/{number}"] = resize({"image": as_png(image)})["image"].numpy()
    return found


def tokenize_texts() -> list[Any]:
    """Texts and the ids of a prompt with each: `<bos>`, the text, the separator."""
    import tensorflow as tf

    steps = pipeline("{evaluate}", length=MAX_TEXT_LENGTH)
    found = []
    for text in TEXTS:
        row = steps({"image": 0, "prefix": tf.constant(text)})
        count = int(row["mask_input"].numpy().sum())
        assert count < MAX_TEXT_LENGTH, text
        found.append([text, row["text"].numpy()[:count].tolist()])
    return found


def batch_of(split: str) -> dict[str, Any]:
    """The rows, stacked."""
    import numpy as np
    import tensorflow as tf

    steps = pipeline(f"decode|resize({SIDE}, antialias=True)|value_range(-1, 1)", "{" + split + "}")
    rows = []
    for image, (prefix, suffix) in zip(images(), EXAMPLES, strict=False):
        answer = {"suffix": tf.constant(suffix)} if split == "train" else {}
        rows.append(steps({"image": as_png(image), "prefix": tf.constant(prefix), **answer}))
    return {name: np.stack([np.asarray(row[name]) for row in rows]) for name in rows[0]}


def tiny_model(variant: str, heads: dict[str, int], rows: int) -> Any:
    """Their model in tiny sizes, with the settings of their transfers."""
    import ml_collections
    from big_vision.models.ppp import gemma
    from big_vision.models.proj.paligemma import paligemma

    original = ORIGINAL.setdefault("get_config", gemma.get_config)

    def get_config(name: str) -> Any:
        config = original(name)
        config.update({**TEXT_SIZES, **heads})
        return config

    gemma.get_config = get_config
    settings = {
        "img": {"variant": "So400m/14", "pool_type": "none", "scan": True, **IMAGE_SETTINGS},
        "llm": {
            "variant": variant,
            "vocab_size": rows,
            "dropout": 0.0,
            "final_logits_softcap": 0.0,  # "Better for transfer."
            "cache_dtype": "float32",  # theirs is bfloat16 to save memory
        },
    }
    return paligemma.Model(**ml_collections.FrozenConfigDict(settings))


ORIGINAL: dict[str, Any] = {}


def random_parameters(model: Any, batch: dict[str, Any], eos: int, seed: int) -> dict[str, Any]:
    """By name, of the shapes that their model initializes."""
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch["image"], batch["text"], batch["mask_ar"]))[
        "params"
    ]
    random, found = np.random.default_rng(seed), {}
    for name, leaf in flatten_dict(shapes, sep="/").items():
        shape = getattr(leaf, "value", leaf).shape
        centre, spread = 0.0, 0.3
        if "kernel" in name or "einsum" in name or name.endswith("linear"):
            spread = shape[-1] ** -0.5
        elif name.startswith("img") and name.endswith("scale"):
            centre = 1.0  # that of RMSNorm is counted from 1
        elif "final_norm" in name:
            centre = 4.0  # so that few tokens are likely
        elif name.endswith("post_attention_norm/scale") or name.endswith("post_ffw_norm/scale"):
            centre = 0.5
        found[name] = (centre + spread * random.standard_normal(shape)).astype(np.float32)
    found["llm/embedder/input_embedding"][eos] *= 3  # so that some answers end
    return found


def loss_function() -> Any:
    """(model, parameters, batch, label smoothing) → the loss of a batch, by the function in their trainer."""
    import jax
    from big_vision.trainers.proj.paligemma import predict_fns

    file = Path(predict_fns.__file__).with_name("train.py")  # whose imports are those of a whole training
    tree = ast.parse(file.read_text())
    [function] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "loss_fn"]
    code = compile(ast.Module([function], []), str(file), "exec")

    def loss(parameters: Any, model: Any, batch: dict[str, Any], smoothing: float) -> Any:
        names = {"imgs": batch["image"], "txts": batch["text"], "mask_ar": batch["mask_ar"], "batch": batch}
        config = {"label_smoothing": smoothing}
        names |= {"model": model, "config": config, "rng_model": jax.random.key(0), "jax": jax, "jnp": jax.numpy}
        exec(code, names)
        return names["loss_fn"](parameters)[0]

    return loss


def run_model(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of a model, and what it gives."""
    import jax
    import numpy as np
    from big_vision.pp import tokenizer
    from big_vision.trainers.proj.paligemma import predict_fns
    from flax.traverse_util import flatten_dict, unflatten_dict

    variant, heads, seed = VARIANTS[name]
    words = tokenizer.get_tokenizer(tokenizer_name())
    model = tiny_model(variant, heads, words.vocab_size)
    batch, prompts = batch_of("train"), batch_of("evaluate")
    flat = random_parameters(model, batch, words.eos_token, seed)
    parameters = unflatten_dict(flat, sep="/")
    predict = predict_fns.get_all(model)

    logits = np.asarray(predict["logits"]({"params": parameters}, batch)[0])
    expected = {key: batch[key] for key in ("image", "text", "mask_ar", "mask_loss")}
    expected["logits"] = logits[batch["mask_loss"][:, 1:] > 0]
    loss = loss_function()
    for key, smoothing in (("loss", 0.0), ("smoothed", SMOOTHING)):
        singles = [{k: v[row : row + 1] for k, v in batch.items()} for row in range(len(EXAMPLES))]
        expected[f"{key}/rows"] = np.stack([loss(parameters, model, row, smoothing) for row in singles])
        expected[f"{key}/batch"] = np.asarray(loss(parameters, model, batch, smoothing))
    decode = {"devices": jax.devices(), "max_decode_len": ANSWER_LENGTH, "eos_token": words.eos_token}
    prompts["_mask"] = np.ones(len(EXAMPLES), bool)
    expected["decoded"] = np.asarray(predict["decode"]({"params": parameters}, prompts, **decode))
    expected["beams"] = np.asarray(predict["beam_decode"]({"params": parameters}, prompts, beam_size=BEAMS, **decode))
    if not name.endswith("28b"):
        gradients = jax.grad(loss)(parameters, model, batch, 0.0)
        expected |= {f"gradient/{key}": np.asarray(a) for key, a in flatten_dict(gradients, sep="/").items()}
    print(name, textwrap.shorten(str({k: v for k, v in expected.items() if k in ("decoded", "beams")}), 2000))
    return flat, expected


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    main()
