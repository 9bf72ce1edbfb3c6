"""4-bit models on CPUs with and without AVX512-BF16, whatever CPU this is: the same numbers, and nothing said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from ftlib.models.tiny import tiny_tokenizer

SCRIPT = """
import importlib.machinery
import sys
from pathlib import Path

class Answered(importlib.machinery.PathFinder):
    \"\"\"bitsandbytes asks for the CPU's features as it is imported, and for every layer.\"\"\"

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "bitsandbytes.functional":
            return None
        spec = super().find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            assert callable(module.has_avx512bf16)
            module.has_avx512bf16 = lambda: sys.argv[2] == "yes"

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Answered)
from ftlib.core import log
log.configure()  # as a command does, before anything imports bitsandbytes
import torch
from ftlib.config.schema import Lora
from ftlib.models.adapters import prepare_for_training
from ftlib.models.loading import load_weights
from tests.models.test_adapters import batch_of, logits_of, train_a_little

torch.manual_seed(0)
folders = {"gpt_neox": Path(sys.argv[1])}
batch = batch_of(folders, "gpt_neox")
model = load_weights(folders["gpt_neox"], "bfloat16", "causal", "nf4")
stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
model = prepare_for_training(model, Lora(method="lora", r=4, alpha=8), "x", "causal")
losses = []
for turn in range(3):  # training is interrupted by questions, as for the best checkpoint
    print(logits_of(model, batch).double().sum().item())
    losses += train_a_little(model.train(), batch, steps=5)
assert losses[-1] < 0.9 * losses[0], losses
print(*losses)
now = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().state_dict().items()}
assert all(torch.equal(tensor, now[name]) for name, tensor in stored.items()), "the base model's weights have changed"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers' shapes suit no kernel: 64 and 32 divide none of them."""
    folder = tmp_path_factory.mktemp("models") / "narrow"
    tokenizer = tiny_tokenizer()
    shape = {"hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_4_bit_layers_compute_alike_on_every_kind_of_cpu(folder: Path) -> None:
    found = {}
    for answer in ("yes", "no"):
        command = [sys.executable, "-c", SCRIPT, str(folder), answer]
        found[answer] = subprocess.run(command, capture_output=True, text=True)
        assert found[answer].returncode == 0, found[answer].stderr[-3000:]
    assert found["yes"].stdout == found["no"].stdout and len(found["yes"].stdout.splitlines()) == 4
    said = "nf4: 8 linear layers of the language model; everything else is bfloat16"
    assert {line for one in found.values() for line in one.stderr.splitlines()} == {said}
