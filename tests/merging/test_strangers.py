"""Models as others publish them: what does not fit is refused or reported; what fits equals PEFT and transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ftlib.core.paths import Site
from ftlib.errors import UserError
from ftlib.merging.merge import merge
from ftlib.merging.recipe import Recipe
from ftlib.merging.vocabulary import read_vocabulary
from tests.merging import bare

Merge = Callable[..., Path]
IDS = torch.arange(40).reshape(2, 20)
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
WORDS = {"model": {"vocab": {f"w{number}": number for number in range(38)}}}


@pytest.fixture
def merged(tmp_path: Path) -> Merge:
    """Merge models of the test's folder over its `base`; the result's folder."""

    def run(*models: str, **fields: Any) -> Path:
        entries = [{"model": str(tmp_path / model)} for model in models]
        output = tmp_path / f"merged{len(list(tmp_path.iterdir()))}"
        recipe = {"base": str(tmp_path / "base"), "models": entries, "output": str(output), "method": "linear"}
        return merge(Recipe.model_validate({**recipe, **fields}), Site(tmp_path / "store", tmp_path / "runs"))

    return run


def llama(folder: Path, seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings}))
    model.save_pretrained(folder)
    return model


def gpt2(folder: Path) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50, n_positions=20))
    model.save_pretrained(folder)
    return model


def adapter(folder: Path, model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    """A random adapter, saved; PEFT's model is returned."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings}))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            step = torch.randn_like(parameter) * 0.1
            parameter.data.copy_(parameter.data.abs() + step.abs() if "magnitude" in name else parameter.data + step)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return tuned


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; None removes one."""
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in {**known, **fields}.items() if value is not None}))


def edit_adapter(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.detach()


@pytest.mark.parametrize(
    "field",
    [
        {"rope_theta": 1000.0, "rope_parameters": None},
        {"hidden_act": "gelu"},
        {"max_position_embeddings": 77},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ],
    ids=lambda field: min(field),
)
def test_configs_that_compute_something_else_are_refused(tmp_path: Path, merged: Merge, field: dict[str, Any]) -> None:
    llama(tmp_path / "base")
    llama(tmp_path / "a", seed=1)
    edit(tmp_path / "a" / "config.json", **field)
    with pytest.raises(UserError, match="forward pass differs from the base's: ") as error:
        merged("a")
    assert {"rope_theta": "rope_parameters"}.get(max(field), max(field)) in str(error.value)


def test_fields_without_effect_are_no_obstacle(tmp_path: Path, merged: Merge) -> None:
    """Another transformers' spelling of the same rope, and what only training and generation look at."""
    llama(tmp_path / "base")
    model = llama(tmp_path / "a", seed=1)
    harmless = {"attention_dropout": 0.1, "use_cache": False, "unsloth_version": "2025.1", "eos_token_id": 5}
    edit(tmp_path / "a" / "config.json", rope_parameters=None, rope_theta=10000.0, rms_norm_eps=None, **harmless)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(merged("a"))), logits(model))


def test_adapters_that_change_nothing(tmp_path: Path, merged: Merge) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj", "v_proj"])
    shutil.copytree(tmp_path / "a", tmp_path / "plain")

    def again() -> Path:
        shutil.rmtree(tmp_path / "a")
        shutil.copytree(tmp_path / "plain", tmp_path / "a")
        return tmp_path / "a"

    edit_adapter(again(), lambda weights: {})
    with pytest.raises(UserError, match="the adapter is empty") as error:
        merged("a")
    assert "ZeRO-3" in error.value.remedy
    edit_adapter(again(), lambda weights: {name: torch.zeros(0) for name in weights})
    with pytest.raises(UserError, match=r"is empty \(shape \[0\]\).*ZeRO-3"):
        merged("a")
    edit(again() / "adapter_config.json", lora_alpha=0)
    with pytest.raises(UserError, match="lora_alpha is 0"):
        merged("a")
    edit_adapter(again(), lambda weights: {name: t * ("lora_B" not in name) for name, t in weights.items()})
    with pytest.raises(UserError, match="lora_B is zero in all"):
        merged("a")


def test_layers_that_change_nothing_are_reported(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj", "v_proj"])
    edit_adapter(tmp_path / "a", lambda weights: {n: t * ("v_proj.lora_B" not in n) for n, t in weights.items()})
    merged("a")
    assert "2 of its 4 layers change nothing (lora_B is zero)" in capsys.readouterr().err


def test_an_adapter_without_some_of_its_own_layers(tmp_path: Path, merged: Merge) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules="all-linear")
    edit_adapter(tmp_path / "a", lambda weights: {n: t for n, t in weights.items() if "layers.1.mlp.up_proj" not in n})
    with pytest.raises(UserError, match=r"1 layers of its target_modules are missing in its file: layers\.1\.mlp"):
        merged("a")
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    edit(tmp_path / "a" / "adapter_config.json", modules_to_save=["lm_head"])
    with pytest.raises(UserError, match="the weights of lm_head are missing"):
        merged("a")


@pytest.mark.parametrize(
    "field", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0]}, {"exclude_modules": ["v_proj"]}]
)
def test_an_adapter_with_layers_that_peft_would_ignore(tmp_path: Path, merged: Merge, field: dict[str, Any]) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj", "v_proj"])
    edit(tmp_path / "a" / "adapter_config.json", **field)
    with pytest.raises(UserError, match="2 layers of its file are not among those that its config adapts"):
        merged("a")


ODD: dict[str, tuple[object, ...]] = {
    "a/adapter_config.json": ([], None, "x"),
    "m/config.json": ([], None, {"quantization_config": 3}),
    "base/config.json": ([], 3),
    "m/tokenizer.json": ([], {}, {"model": 3}, {"model": {"vocab": 5}}, {"model": {"vocab": {"a": "b"}}}, {"model": {},
                         "added_tokens": [3]}),
    "m/tokenizer_config.json": ([], {"added_tokens_decoder": {"x": 3}}, {"added_tokens_decoder": {"1": 3}}),
    "m/added_tokens.json": ([], {"a": []}),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_files_are_named(tmp_path: Path, merged: Merge, name: str) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    llama(tmp_path / "m", seed=1)
    words(tmp_path / "base")
    words(tmp_path / "m")
    for content in ODD[name]:
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=name.partition("/")[2] if content != {"quantization_config": 3} else "m:"):
            merged(name.partition("/")[0].replace("base", "m"))


def test_files_that_are_no_text_and_links_to_nothing(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "base")
    llama(tmp_path / "m", seed=1)
    for name in ("vocab.txt", "chat_template.jinja"):
        (tmp_path / "m" / name).write_bytes(b"\xff")
        with pytest.raises(UserError, match=f"{name}: not UTF-8"):
            merged("m")
        (tmp_path / "m" / name).unlink()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "blob")
    (tmp_path / "m" / "model.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="a link to a file that does not exist"):
        merged("m")


@pytest.mark.parametrize("owner", ["base", "m"])
def test_layers_of_integers_are_quantized(tmp_path: Path, merged: Merge, owner: str) -> None:
    llama(tmp_path / "base")
    llama(tmp_path / "m", seed=1)
    path = tmp_path / owner / "model.safetensors"
    weights = {name: t.to(torch.int8) if "q_proj" in name else t for name, t in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match="has dtype int8: its weights are quantized"):
        merged("m")


def test_numbers_of_an_adapter_config_that_are_none(tmp_path: Path, merged: Merge) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    for field, message in (
        ({"lora_alpha": "x"}, "lora_alpha of .*q_proj must be a number, got 'x'"),
        ({"lora_alpha": 8, "alpha_pattern": {"q_proj": None}}, "lora_alpha of .*q_proj must be a number"),
        ({"base_model_name_or_path": 3}, "must be text or null"),
    ):
        path = tmp_path / "a" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | field))
        with pytest.raises(UserError, match=message):
            merged("a")


def test_a_word_that_separates_lines_keeps_the_numbers_of_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("a\n\x85\n\u2028\nb\n", encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path)
    assert vocabulary and vocabulary.words == {"a": 0, "\x85": 1, "\u2028": 2, "b": 3}


def test_a_config_that_transformers_cannot_read_is_told(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "base")
    llama(tmp_path / "a", seed=1)
    for name in ("base", "a"):
        edit(tmp_path / name / "config.json", model_type="unheard of")
    merged("a")
    assert capsys.readouterr().err.count("transformers cannot read its config.json") == 2


def test_two_adapters_in_one_file(tmp_path: Path, merged: Merge) -> None:
    adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])

    def doubled(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace(".weight", f".{other}.weight"): tensor * factor
            for name, tensor in weights.items()
            for other, factor in (("default", 1), ("other", 2))
        }

    edit_adapter(tmp_path / "a", doubled)
    with pytest.raises(UserError, match=r"has two updates.*the file contains two adapters"):
        merged("a")


def test_a_shard_that_is_missing(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "a", seed=1)
    model = llama(tmp_path / "base")
    model.save_pretrained(tmp_path / "base", max_shard_size="12KB")
    (tmp_path / "base" / "model.safetensors").unlink()
    shards = sorted((tmp_path / "base").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    (tmp_path / "base" / "model.safetensors.index.json").unlink()
    merged("a")
    shards[-1].rename(tmp_path / "last")
    with pytest.raises(UserError, match=f"1 of {len(shards)} shards of model are missing: number {len(shards)}"):
        merged("a")
    for path in shards[:-1]:
        path.unlink()
    weights = load_file(tmp_path / "a" / "model.safetensors")
    for lost in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight"):
        for folder in ("base", "a"):  # of both, so that they agree
            save_file({n: t for n, t in weights.items() if n != lost}, tmp_path / folder / "model.safetensors")
        with pytest.raises(UserError, match=f"base: 1 weights of its architecture are missing: {lost}"):
            merged("a")


def test_an_index_that_tells_something_else(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "a", seed=1)
    llama(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "model-00001-of-00001.safetensors")
    for index, message in (
        ({"metadata": {}}, "no valid weight_map"),
        ({"weight_map": {"model.odd.weight": "model-00001-of-00001.safetensors"}}, "model.odd.weight is not in"),
    ):
        (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=message):
            merged("a")


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("flag", [False, True])
def test_transposed_layers_are_known_by_the_model(tmp_path: Path, merged: Merge, method: str, flag: bool) -> None:
    """PEFT corrects fan_in_fan_out by the layer's class; c_proj is square, so that its shape does not tell."""
    settings = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": method == "dora"}
    tuned = adapter(tmp_path / "a", gpt2(tmp_path / "base"), **settings)
    edit(tmp_path / "a" / "adapter_config.json", fan_in_fan_out=flag)
    expected = logits(tuned)
    result = GPT2LMHeadModel.from_pretrained(merged("a"))
    torch.testing.assert_close(logits(result), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, logits(GPT2LMHeadModel.from_pretrained(tmp_path / "base")), atol=1e-2)


def store_head(folder: Path, factor: float = 1.0) -> None:
    """Store the head of a tied model, too."""
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone() * factor
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})


def test_a_tied_head_that_is_stored_stays_one_matrix(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    base = llama(tmp_path / "base", tie_word_embeddings=True)
    llama(tmp_path / "b", seed=1, tie_word_embeddings=True)
    for name in ("base", "b"):
        store_head(tmp_path / name)
    adapter(tmp_path / "a", base, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(UserError, match="it changes the embeddings but not the head"):
        merged("a")
    merged("a", parts={"embeddings": "base"})
    result = merged("b", "b", method="dare_ties")  # drops other entries of another name
    model, info = LlamaForCausalLM.from_pretrained(result, output_loading_info=True)
    assert not info["missing_keys"] and model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(result / "model.safetensors")
    assert "its head is tied to its embeddings; the result stores this matrix once" in capsys.readouterr().err
    store_head(tmp_path / "base", 1.5)
    with pytest.raises(UserError, match="its files contain two different"):
        merged("b")


def piece(text: str) -> bytes:
    return b"\x0a" + bytes([len(text) + 2]) + b"\x0a" + bytes([len(text)]) + text.encode()


VOCABULARIES = {
    "tokenizer.model": [
        b"".join(piece(word) for word in words) for words in (("<s>", "ab", "cd"), ("<s>", "cd", "ab"))
    ],
    "vocab.json": [
        json.dumps({"<s>": 0, "ab": 1, "cd": 2}).encode(),
        json.dumps({"<s>": 0, "ab": 2, "cd": 1}).encode(),
    ],
    "vocab.txt": [b"<s>\nab\ncd\n", b"<s>\ncd\nab\n"],
    "words.tiktoken": [b"YQ== 0\nYg== 1\n", b"YQ== 1\nYg== 0\n"],
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabularies_in_other_files_than_tokenizer_json(tmp_path: Path, merged: Merge, name: str) -> None:
    ours, theirs = VOCABULARIES[name]
    for folder, seed, content in (("base", 0, ours), ("a", 1, ours), ("b", 1, theirs)):
        llama(tmp_path / folder, seed)
        (tmp_path / folder / name).write_bytes(content)
    assert (merged("a") / name).read_bytes() == ours
    with pytest.raises(UserError, match="different vocabulary: 2 of its"):
        merged("b")


def test_sentencepieces_and_tokenizer_json_are_compared(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "base")
    llama(tmp_path / "a", seed=1)
    (tmp_path / "base" / "tokenizer.model").write_bytes(VOCABULARIES["tokenizer.model"][0])
    edit(tmp_path / "a" / "tokenizer.json", model={"vocab": {"<s>": 0, "ab": 2, "cd": 1}})
    with pytest.raises(UserError, match="'cd' has ID 1, ID 2 in the base"):
        merged("a")
    edit(tmp_path / "a" / "tokenizer.json", model={"vocab": {"<s>": 0, "ab": 1, "cd": 2}})
    merged("a")


def chat_model(folder: Path, seed: int, template: str, end: str, **generation: Any) -> None:
    llama(folder, seed)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / "tokenizer.json", **WORDS)
    edit(folder / "tokenizer_config.json", chat_template=template or None, eos_token=end)
    if generation:
        edit(folder / "generation_config.json", **generation)


def test_the_tuned_models_chat_template_and_end_are_kept(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    chat_model(tmp_path / "base", 0, "", "w1")
    chat_model(tmp_path / "a", 1, "", "w1")
    chat_model(tmp_path / "b", 2, "chat of b", "w7", eos_token_id=7, temperature=0.6)
    (tmp_path / "b" / "additional_chat_templates").mkdir()
    (tmp_path / "b" / "additional_chat_templates" / "tool.jinja").write_text("tools")
    for name in ("base", "b"):
        (tmp_path / name / "LICENSE").write_text(f"licence of {name}")
    (tmp_path / "base" / "tokenizer.model.v3").write_text("v3")
    result = merged("a", "b")
    assert "tokenizer, chat template and generation settings: from b, for its chat template" in capsys.readouterr().err
    said = json.loads((result / "tokenizer_config.json").read_text())
    assert said == {"chat_template": "chat of b", "eos_token": "w7"}
    assert json.loads((result / "generation_config.json").read_text()) == {"eos_token_id": 7, "temperature": 0.6}
    assert json.loads((result / "config.json").read_text())["eos_token_id"] == 7
    assert (result / "additional_chat_templates" / "tool.jinja").read_text() == "tools"
    assert (result / "LICENSE").read_text() == "licence of base"
    assert (result / "LICENSE-b").read_text() == "licence of b"
    assert json.loads((result / "merge.json").read_text())["tokenizer"]["from"] == "b"
    for source in ("base", "a"):
        result = merged("a", "b", tokenizer_from=source)
        assert "chat_template" not in json.loads((result / "tokenizer_config.json").read_text())
        assert json.loads((result / "config.json").read_text())["eos_token_id"] != 7
    assert (merged("a", "b", tokenizer_from="base") / "tokenizer.model.v3").read_text() == "v3"


def test_an_adapters_end_of_sequence_reaches_the_generation_config(tmp_path: Path, merged: Merge) -> None:
    chat_model(tmp_path / "base", 0, "", "w1", eos_token_id=1)
    adapter(tmp_path / "a", LlamaForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    edit(tmp_path / "a" / "tokenizer.json", **WORDS)
    edit(tmp_path / "a" / "tokenizer_config.json", chat_template="of a", eos_token={"content": "w7"})
    result = merged("a")
    assert json.loads((result / "generation_config.json").read_text())["eos_token_id"] == [7, 1]
    assert json.loads((result / "config.json").read_text())["eos_token_id"] == 7


def test_what_the_base_lacks_comes_from_a_model_or_is_reported(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    llama(tmp_path / "base")
    chat_model(tmp_path / "a", 1, "", "w1")
    (tmp_path / "base" / "config.json").unlink()
    result = merged("a")
    LlamaForCausalLM.from_pretrained(result)
    assert (result / "tokenizer.json").is_file()
    assert "the base has no config.json; using that of" in capsys.readouterr().err
    for path in [*(tmp_path / "a").glob("*.json"), *(tmp_path / "base").glob("*.json")]:
        path.unlink()
    merged("a")
    assert "no input has a config.json, so transformers cannot load the result" in capsys.readouterr().err


def test_the_stored_type_is_told_and_can_be_chosen(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = bare.random_weights(0)
    bare.save(tmp_path / "base", weights, torch.bfloat16)
    bare.save(tmp_path / "a", bare.tuned(weights, 1), torch.float16)
    bare.save(tmp_path / "b", bare.tuned(weights, 2), torch.bfloat16)
    assert {tensor.dtype for tensor in bare.load(merged("b")).values()} == {torch.bfloat16}
    assert "weights are stored in" not in capsys.readouterr().err
    wide = bare.load(merged("a"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    told = capsys.readouterr().err
    assert "weights are stored in float32, the only dtype that represents all inputs (the base bfloat16, " in told
    narrow = bare.load(merged("a", dtype="bfloat16"))
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].bfloat16()), name


def test_tensors_that_trimming_empties_are_told(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a tensor with fewer than 1/density entries none is kept, as in PEFT; mergekit would keep one."""
    weights = bare.random_weights(0)
    bare.save(tmp_path / "base", weights)
    bare.save(tmp_path / "a", bare.tuned(weights, 1))
    result = merged("a", method="ties", density=0.1)
    assert torch.equal(bare.load(result)["model.norm.weight"], bare.load(tmp_path / "base")["model.norm.weight"])
    assert peft.utils.merge_utils.prune(torch.arange(1.0, 6.0), 0.1, "magnitude").tolist() == [0.0] * 5
    assert json.loads((result / "merge.json").read_text())["trimmed_to_nothing"] == ["model.norm.weight"]
    assert "1 tensors have fewer than 1/density entries, so none are kept" in capsys.readouterr().err


def test_a_git_lfs_pointer_and_a_config_without_alpha(tmp_path: Path, merged: Merge) -> None:
    tuned = adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    edit(tmp_path / "a" / "adapter_config.json", lora_alpha=None)  # PEFT's own is 8
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(merged("a"))), logits(tuned))
    path = tmp_path / "base" / "model.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 100\n")
    with pytest.raises(UserError, match="a git-lfs pointer") as error:
        merged("a")
    assert "git lfs pull" in error.value.remedy


def enlarge(model: Any, rows: int) -> None:
    model.resize_token_embeddings(rows, mean_resizing=False)
    for matrix in (model.get_input_embeddings(), model.get_output_embeddings()):
        matrix.weight.data[40:] += torch.randn_like(matrix.weight[40:])


def words(folder: Path, *added: tuple[str, int]) -> None:
    tokens = [{"content": word, "id": number} for word, number in added]
    edit(folder / "tokenizer.json", **WORDS, added_tokens=tokens)


def test_a_vocabulary_with_added_tokens(tmp_path: Path, merged: Merge) -> None:
    """The rows that the base has are merged; those of added tokens are the average of the models that have them."""
    llama(tmp_path / "base")
    words(tmp_path / "base")
    for name, seed, rows, added in (("a", 1, 42, [("x", 40), ("y", 41)]), ("b", 2, 41, [("x", 40)])):
        model = llama(tmp_path / name, seed)
        enlarge(model, rows)
        model.save_pretrained(tmp_path / name)
        words(tmp_path / name, *added)
    alone = merged("a")
    torch.testing.assert_close(
        logits(LlamaForCausalLM.from_pretrained(alone)), logits(LlamaForCausalLM.from_pretrained(tmp_path / "a"))
    )
    for method in ("linear", "ties"):
        result = merged("b", "a", method=method)
        a, b, both = (load_file(path / "model.safetensors") for path in (tmp_path / "a", tmp_path / "b", result))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert both[name].shape == (42, 16)
            torch.testing.assert_close(both[name][40], (a[name][40] + b[name][40]) / 2)
            assert torch.equal(both[name][41], a[name][41])
            if method == "linear":
                torch.testing.assert_close(both[name][:40], (a[name][:40] + b[name][:40]) / 2)
        assert json.loads((result / "config.json").read_text())["vocab_size"] == 42
        assert (result / "tokenizer.json").read_bytes() == (tmp_path / "a" / "tokenizer.json").read_bytes()
        LlamaForCausalLM.from_pretrained(result)
    words(tmp_path / "b", ("z", 40))
    with pytest.raises(UserError, match=r"'z' has ID 40, in .*a 'x'"):
        merged("a", "b")


def test_added_rows_without_a_tokenizer(tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of one model are kept and reported; those of two could be of different tokens."""
    llama(tmp_path / "base")
    for name, seed in (("a", 1), ("b", 2)):
        model = llama(tmp_path / name, seed)
        enlarge(model, 42)
        model.save_pretrained(tmp_path / name)
    llama(tmp_path / "c", seed=3)
    result = merged("a", "c")
    assert "has 42 rows, the base's has 40, and there is no tokenizer" in capsys.readouterr().err
    a, both = (load_file(path / "model.safetensors") for path in (tmp_path / "a", result))
    assert torch.equal(both["lm_head.weight"][40:], a["lm_head.weight"][40:])
    with pytest.raises(UserError, match=r"a: .* no tokenizer with the added tokens; another model has added rows, too"):
        merged("a", "b")
    words(tmp_path / "a", ("x", 40), ("y", 41))
    with pytest.raises(UserError, match=r"b: .* another model has added rows, too"):
        merged("a", "b")


def test_an_adapter_with_added_tokens(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "base")
    words(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    enlarge(model, 41)
    tuned = adapter(tmp_path / "a", model, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    words(tmp_path / "a", ("<pad>", 40))
    result = LlamaForCausalLM.from_pretrained(merged("a"))
    torch.testing.assert_close(logits(result), logits(tuned), rtol=1e-4, atol=1e-5)


def test_a_pad_token_in_a_spare_row_and_one_without_a_row(tmp_path: Path, merged: Merge) -> None:
    model = llama(tmp_path / "base")
    words(tmp_path / "base")
    tuned = adapter(tmp_path / "a", model, target_modules=["q_proj"])
    expected = logits(tuned)
    words(tmp_path / "a", ("<pad>", 38))
    result = merged("a")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(result)), expected, rtol=1e-4, atol=1e-5)
    assert "<pad>" in (result / "tokenizer.json").read_text()
    words(tmp_path / "a", ("<pad>", 40))
    with pytest.raises(UserError, match="'<pad>' has ID 40, but the embeddings have 40 rows"):
        merged("a")
    assert "<pad>" not in (merged("a", tokenizer_from="base") / "tokenizer.json").read_text()


def test_files_beside_the_weights_are_no_obstacle(tmp_path: Path, merged: Merge) -> None:
    llama(tmp_path / "base")
    model = llama(tmp_path / "b", seed=1)
    tuned = adapter(tmp_path / "a", LlamaForCausalLM.from_pretrained(tmp_path / "base"), target_modules=["q_proj"])
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "base" / name)
        shutil.copy(tmp_path / "base" / "model.safetensors", tmp_path / "b" / name)
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "other.safetensors")
    for name, expected in (("a", tuned), ("b", model)):
        result = LlamaForCausalLM.from_pretrained(merged(name))
        torch.testing.assert_close(logits(result), logits(expected), rtol=1e-4, atol=1e-5)


def test_bin_files_are_converted_once(tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    for folder, old, new in (("base", "model", "pytorch_model"), ("a", "adapter_model", "adapter_model")):
        path = tmp_path / folder / f"{old}.safetensors"
        torch.save(load_file(path), tmp_path / folder / f"{new}.bin")
        path.unlink()
    for told in (2, 0):
        result = LlamaForCausalLM.from_pretrained(merged("a"))
        torch.testing.assert_close(logits(result), logits(tuned), rtol=1e-4, atol=1e-5)
        assert capsys.readouterr().err.count("to safetensors, once") == told
    edit(tmp_path / "a" / "adapter_config.json", lora_alpha=1)
    assert not torch.allclose(logits(LlamaForCausalLM.from_pretrained(merged("a"))), logits(tuned), atol=1e-5)
    assert capsys.readouterr().err.count("to safetensors, once") == 1, "with the settings of now"
    torch.save({"a": torch.ones(2), "b": os.system}, tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(UserError, match="contains more than tensors"):
        merged("a")


@pytest.mark.parametrize("name", ["/home/somebody/models/base", "unsloth/base-bnb-4bit"])
def test_a_base_of_another_machine_is_overridden(
    tmp_path: Path, merged: Merge, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tuned = adapter(tmp_path / "a", llama(tmp_path / "base"), target_modules=["q_proj"])
    edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path=name)
    torch.testing.assert_close(
        logits(LlamaForCausalLM.from_pretrained(merged("a"))), logits(tuned), rtol=1e-4, atol=1e-5
    )
    assert f"has {name} as its base, which was not found: using" in capsys.readouterr().err
    llama(tmp_path / "other", seed=3)
    edit(tmp_path / "a" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(UserError, match="its weights differ from those of"):
        merged("a")
