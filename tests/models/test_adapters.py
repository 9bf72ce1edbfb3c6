"""What each method trains: names, counts, freezing, quantization; saved results in plain peft and transformers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForCausalLM, PaliGemmaConfig, PaliGemmaForConditionalGeneration

from ftlib.config.schema import Attention, Full, Lora
from ftlib.errors import UserError
from ftlib.models.adapters import count_parameters, no_decay_parameter_names, prepare_for_training
from ftlib.models.causal_lm import CausalProcessor
from ftlib.models.encoding import model_inputs
from ftlib.models.loading import load_adapter, load_weights
from ftlib.models.loss import answer_loss
from ftlib.models.paligemma import PaliGemmaInputProcessor
from ftlib.training.trainer import ResumableTrainer
from tests.models.tiny_causal import ARCHITECTURES, save

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
FAMILY = dict.fromkeys(ARCHITECTURES, "causal") | {"paligemma": "paligemma"}


@pytest.fixture(scope="module")
def folders(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {"paligemma": shared / "model", **{name: save(name, root / name) for name in ARCHITECTURES}}


def batch_of(folders: dict[str, Path], name: str) -> dict[str, Tensor]:
    if name == "paligemma":
        inputs = PaliGemmaInputProcessor.load(folders[name])
        images = [Image.new("RGB", (32, 32), (shade, 90, 255 - shade)) for shade in (0, 200)]
        return inputs.collate(
            [inputs.encode_train("read", images[0], "7"), inputs.encode_train("", images[1], "0 or 1")]
        )
    causal = CausalProcessor.load(folders[name])
    return causal.collate([causal.encode_train("1+1=", None, "2"), causal.encode_train("spell two:", None, "t-w-o")])


def logits_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.eval()(**model_inputs(batch)).logits
    return logits


def train_a_little(
    model: torch.nn.Module, batch: dict[str, Tensor], steps: int = 5, mixed: bool = False
) -> list[float]:
    """Adam on one batch; the losses before each step."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = answer_loss(model, batch, "token")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def layer_of(name: str) -> str:
    return name.split(".lora_")[0].rpartition(".")[2]


def paligemma_3b() -> PaliGemmaForConditionalGeneration:
    """The shapes of google/paligemma-3b-pt-224, from its config.json; no weights."""
    text = {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18,
        "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 257216,
    }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 224, "projection_dim": 2048,
        "vision_use_head": False,
    }  # fmt: skip
    with torch.device("meta"):
        config = PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2048, image_token_index=257152)
        return PaliGemmaForConditionalGeneration(config)


def test_parameters_of_the_real_model_from_its_architecture_alone() -> None:
    """Rank 8 on layers of these seven names trains 11,298,816, as published for this model: three of the names stand in
    the vision tower too. The language model's own are 18 × 8 × (2 · 4096 + 2 · 2304 + 3 · 18432) of them.
    """
    model = paligemma_3b()
    assert count_parameters(model)[1] == 2_923_466_480
    adapted = prepare_for_training(model, Lora(method="lora", r=8, targets=sorted(SEVEN), freeze=[]), "x")
    assert count_parameters(adapted) == (11_298_816, 2_923_466_480 + 11_298_816)
    language = prepare_for_training(paligemma_3b(), Lora(method="lora", r=8), "x")
    assert count_parameters(language)[0] == 9_805_824 == 11_298_816 - 27 * 3 * 8 * (1152 + 1152)
    assert {layer_of(name) for name in trained_names(language)} == SEVEN
    attention = prepare_for_training(paligemma_3b(), Attention(method="attention"), "x")
    assert count_parameters(attention)[0] == 18 * 2048 * 256 * (8 + 1 + 1 + 8)


@pytest.mark.parametrize(
    ("targets", "freeze", "layers"),
    [
        (["language"], ["vision"], 2 * 7),
        (["vision"], [], 2 * 6),
        (["projector"], ["vision"], 1),
        (["attention"], [], 2 * 4 + 2 * 4),
        (["mlp", "projector"], ["language"], 2 * 2 + 1),
        (["fc1"], [], 2),
        (["layers.1.self_attn.q_proj"], [], 2),
        ([r".*language_model\.layers\.1\..*_proj"], ["vision"], 7),
    ],
)
def test_targets(folders: dict[str, Path], targets: list[str], freeze: list, layers: int) -> None:
    weights = load_weights(folders["paligemma"], "float32")
    before = {name for name, _ in weights.named_modules()}
    model = prepare_for_training(weights, Lora(method="lora", r=2, targets=targets, freeze=freeze), "x")
    assert len(trained_names(model)) == 2 * layers
    assert model.peft_config["default"].target_modules.count("|") < 14, "layers are not listed one by one"
    assert not [name for name in before if "lora" in name]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["vision"], "adapter.targets: vision: nothing is left to adapt, since adapter.freeze names vision"),
        (["attention", "query_key_value"], "adapter.targets: query_key_value: no such linear layer"),
        (["lm_head"], "no such linear layer"),
        (["(q_proj"], "not a regular expression"),
    ],
)
def test_targets_that_are_none(folders: dict[str, Path], targets: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare_for_training(load_weights(folders["paligemma"], "float32"), Lora(method="lora", targets=targets), "x")
    assert message in str(error.value)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_only(folders: dict[str, Path], name: str, dtype: str, tmp_path: Path) -> None:
    """The language model's attention learns in float32; every other weight keeps its type and its bits."""
    model = load_weights(folders[name], dtype, FAMILY[name])
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    prepare_for_training(model, Attention(method="attention"), "x", FAMILY[name])
    assert trained_names(model) and all(re_attention(key) for key in trained_names(model))
    losses = train_a_little(model, batch_of(folders, name), steps=8, mixed=dtype == "bfloat16")
    assert losses[-1] < 0.8 * losses[0]
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor.to(before[key]), before[key])}
    assert moved and all(re_attention(key) and model.state_dict()[key].dtype == torch.float32 for key in moved)
    kept = set(before) - trained_names(model)
    assert {model.state_dict()[key].dtype for key in kept} == {getattr(torch, dtype)}
    model.save_pretrained(tmp_path)
    auto = PaliGemmaForConditionalGeneration if name == "paligemma" else AutoModelForCausalLM
    plain = auto.from_pretrained(tmp_path, dtype=torch.float32)
    exact = load_weights(folders[name], "float32", FAMILY[name])
    exact.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(plain, batch_of(folders, name)), logits_of(exact, batch_of(folders, name)))


def frozen_parts() -> list[tuple[str, list[str]]]:
    """Every family's models, with nothing frozen and with each of its parts."""
    parts = {"paligemma": ["vision", "projector", "embeddings", "language"], "causal": ["embeddings", "language"]}
    return [(name, freeze) for name, family in FAMILY.items() for freeze in ([], *([part] for part in parts[family]))]


@pytest.mark.parametrize(("name", "freeze"), frozen_parts())
def test_bfloat16_models_train_float32_weights(folders: dict[str, Path], name: str, freeze: list) -> None:
    model = load_weights(folders[name], "bfloat16", FAMILY[name])
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    prepare_for_training(model, Full(method="full", freeze=freeze), "x", FAMILY[name])
    batch, trained = batch_of(folders, name), trained_names(model)
    losses = train_a_little(model, batch, mixed=True)
    assert losses[-1] < losses[0]
    for key, parameter in model.named_parameters():
        if key in trained:
            assert parameter.dtype == torch.float32
        else:
            assert parameter.dtype == torch.bfloat16 and torch.equal(parameter, before[key]), key
    assert bool(freeze) == (trained != set(before))


def test_small_updates_are_rounded_away_by_name_only(folders: dict[str, Path]) -> None:
    """Adam moves every weight by about its learning rate, here 1/1,000 to 1/10,000 of most of them, ten times."""

    def moved(adapter: Full) -> float:
        model = load_weights(folders["llama"], "bfloat16", "causal")
        before = {key: parameter.detach().float() for key, parameter in model.named_parameters()}
        prepare_for_training(model, adapter, "x", "causal")
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-5)
        batch = batch_of(folders, "llama")
        for _ in range(10):
            with torch.autocast("cpu", torch.bfloat16, enabled=adapter.master_weights):
                answer_loss(model, batch, "token").backward()
            optimizer.step()
            optimizer.zero_grad()
        layers = [key for key in before if ".layers." in key]
        return sum((model.get_parameter(key) != before[key]).float().mean().item() for key in layers) / len(layers)

    assert moved(Full(method="full")) > 0.99
    assert moved(Full(method="full", master_weights=False)) < 0.5


def re_attention(key: str) -> bool:
    return "attn" in key.replace("attention", "attn") and "vision" not in key


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("name", FAMILY)
def test_saved_adapters_in_plain_peft(folders: dict[str, Path], name: str, method: str, tmp_path: Path) -> None:
    from peft import PeftModel

    family, batch = FAMILY[name], batch_of(folders, name)
    base = logits_of(load_weights(folders[name], "float32", family), batch)
    adapter = Lora(method=method, r=4, alpha=8, rslora=name == "llama", targets=["attention", "mlp"], freeze=[])
    model = prepare_for_training(load_weights(folders[name], "float32", family), adapter, "b/b", family, "v1").eval()
    torch.testing.assert_close(logits_of(model, batch), base, rtol=1e-5, atol=1e-5)
    losses = train_a_little(model, batch)
    assert losses[-1] < 0.9 * losses[0]
    ours = logits_of(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits_of(load_adapter(load_weights(folders[name], "float32", family), tmp_path), batch), ours)
    auto = PaliGemmaForConditionalGeneration if family == "paligemma" else AutoModelForCausalLM
    plain = PeftModel.from_pretrained(auto.from_pretrained(folders[name]), tmp_path)
    assert torch.equal(logits_of(plain, batch), ours)
    assert (plain.peft_config["default"].base_model_name_or_path, plain.peft_config["default"].revision) == (
        "b/b",
        "v1",
    )
    merged = logits_of(plain.merge_and_unload(), batch)
    torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)
    assert (ours - base).abs().max() > 0.05


NORMS = {
    "gpt_neox": ["input_layernorm.weight", "post_attention_layernorm.weight", "final_layer_norm.weight"],
    "gpt2": ["ln_1.weight", "ln_2.weight", "ln_f.weight"],
    "llama": ["input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"],
    "gemma": ["input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight"],
    "paligemma": [
        "input_layernorm.weight", "post_attention_layernorm.weight", "norm.weight",
        "layer_norm1.weight", "layer_norm2.weight", "post_layernorm.weight",
    ],
}  # fmt: skip
TABLES = {
    "gpt_neox": ["embed_in.weight"],  # its head is not tied
    "gpt2": ["wte.weight", "wpe.weight"],
    "llama": ["embed_tokens.weight"],
    "gemma": ["embed_tokens.weight"],
    "paligemma": ["embed_tokens.weight", "position_embedding.weight"],
}


@pytest.mark.parametrize("method", ["full", "attention", "lora", "dora"])
@pytest.mark.parametrize("name", FAMILY)
def test_what_weight_decay_leaves_alone(folders: dict[str, Path], name: str, method: str) -> None:
    """By hand for every family: norms, biases, embeddings and magnitudes; what is a matrix decays."""
    kinds = {"full": Full, "attention": Attention, "lora": Lora, "dora": Lora}
    adapter = kinds[method](method=method, **({"freeze": []} if method != "attention" else {}))
    weights = load_weights(folders[name], "float32", FAMILY[name])
    model = prepare_for_training(weights, adapter, "x", FAMILY[name])
    rest = ["bias", "lora_magnitude_vector.default.weight"]
    endings = tuple(f".{ending}" for ending in [*NORMS[name], *TABLES[name], *rest])
    spared = {key for key in trained_names(model) if key.endswith(endings)}
    assert no_decay_parameter_names(model) == spared
    assert set(ResumableTrainer.get_decay_parameter_names(None, model)) == trained_names(model) - spared
    decayed = trained_names(model) - spared
    assert decayed and all(model.get_parameter(key).dim() > 1 for key in decayed)
    seen = {ending for ending in endings if any(key.endswith(ending) for key in spared)}
    biased = {"full": ["gpt_neox", "gpt2", "paligemma"], "attention": ["gpt_neox", "gpt2"]}
    expected = {f".{ending}" for ending in [*NORMS[name], *TABLES[name]]} if method == "full" else set()
    expected |= {".bias"} if name in biased.get(method, []) else set()
    assert seen == expected | ({f".{rest[1]}"} if method == "dora" else set())


def test_rslora_scales_by_the_square_root(folders: dict[str, Path]) -> None:
    def scaling(rslora: bool) -> float:
        adapter = Lora(method="lora", r=16, alpha=8, rslora=rslora, targets=["q_proj"])
        model = prepare_for_training(load_weights(folders["llama"], "float32", "causal"), adapter, "x", "causal")
        return model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling["default"]

    assert scaling(False) == 8 / 16
    assert scaling(True) == 8 / math.sqrt(16)


QUANTIZED = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}


@pytest.mark.parametrize("quantization", QUANTIZED)
@pytest.mark.parametrize("name", FAMILY)
def test_only_the_language_models_linear_layers_are_quantized(
    folders: dict[str, Path], name: str, quantization: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = load_weights(folders[name], "float32", FAMILY[name])
    model = load_weights(folders[name], "bfloat16", FAMILY[name], quantization)
    quantized = {key for key, module in model.named_modules() if type(module).__name__ == QUANTIZED[quantization]}
    kinds = ("Linear", "Conv1D")
    linear = {key for key, module in plain.named_modules() if type(module).__name__ in kinds}
    assert quantized == {key for key in linear if ".layers." in key or ".h." in key} - {
        key for key in linear if "vision" in key
    }
    for key, parameter in model.named_parameters():
        if key.rpartition(".")[0] not in quantized:
            assert parameter.dtype == torch.bfloat16, key
    said = f"{quantization}: {len(quantized)} linear layers of the language model; everything else is bfloat16"
    assert said in capsys.readouterr().err
    assert count_parameters(model)[1] == count_parameters(plain)[1]
    if quantization == "nf4":
        states = [parameter.quant_state for parameter in model.parameters() if hasattr(parameter, "quant_state")]
        assert {state.quant_type for state in states} == {"nf4"}
        assert all(state.nested for state in states), "double quantization"


@pytest.mark.parametrize(("quantization", "method"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")])
@pytest.mark.parametrize("name", ["paligemma", "gpt_neox"])
def test_adapters_on_quantized_bases(
    folders: dict[str, Path], name: str, quantization: str, method: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    family, batch = FAMILY[name], batch_of(folders, name)

    def base() -> torch.nn.Module:
        return load_weights(folders[name], "bfloat16", family, quantization)

    model = prepare_for_training(base(), Lora(method=method, r=4, alpha=8), "x", family).eval()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    losses = train_a_little(model, batch, steps=8)
    assert losses[-1] < 0.9 * losses[0]
    ours = logits_of(model, batch)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits_of(load_adapter(base(), tmp_path), batch), ours)
    assert torch.equal(logits_of(PeftModel.from_pretrained(base(), tmp_path), batch), ours)


def test_dora_on_int8_needs_a_gpu(folders: dict[str, Path]) -> None:
    model = load_weights(folders["llama"], "bfloat16", "causal", "int8")
    with pytest.raises(UserError, match="int8 needs a GPU"):
        prepare_for_training(model, Lora(method="dora"), "x", "causal")


def test_quantization_without_bitsandbytes(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="nf4 needs bitsandbytes"):
        load_weights(folders["llama"], "bfloat16", "causal", "nf4")


@pytest.mark.parametrize("name", ["paligemma", "gpt2"])
@pytest.mark.parametrize("adapter", [Lora(method="lora", r=4), Attention(method="attention"), Full(method="full")])
def test_recomputed_activations_give_the_same_gradients(
    folders: dict[str, Path], name: str, adapter: Lora | Attention | Full
) -> None:
    """With frozen inputs too, and with the same dropout."""
    batch = batch_of(folders, name)

    def gradients(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        weights = load_weights(folders[name], "float32", FAMILY[name])
        model = prepare_for_training(weights, adapter, "x", FAMILY[name]).train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        answer_loss(model, batch, "token").backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    kept, recomputed = gradients(False), gradients(True)
    assert kept and all(torch.equal(kept[key], recomputed[key]) for key in kept | recomputed)
