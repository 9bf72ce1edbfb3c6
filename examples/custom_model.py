"""A model family of its own: a causal language model that was trained on dialogues of one form.

    User: PROMPT
    Assistant: ANSWER

Every prompt is put into that form, in training and in evaluation alike. Used by examples/custom_model.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ftlib.config.schema import Config
from ftlib.core.registry import register_model
from ftlib.models.causal_lm import CausalProcessor, module_group
from ftlib.models.encoding import EncodedExample
from ftlib.models.registry import ModelFamily


def dialogue(prompt: str) -> str:
    return f"User: {prompt.strip()}\nAssistant: "


class DialogueProcessor(CausalProcessor):
    """The rows of causal models, with prompts as the model knows them. See `InputProcessor` for all that is asked."""

    def encode_train(self, prompt: str, image: Image.Image | None, answer: str) -> EncodedExample:
        return super().encode_train(dialogue(prompt), image, answer)

    def encode_prompts(self, prompts: Sequence[str], image: Image.Image | None) -> list[EncodedExample]:
        return super().encode_prompts([dialogue(prompt) for prompt in prompts], image)

    def token_lengths(self, prompts: Sequence[str], answers: Sequence[str]) -> list[tuple[int, int]]:
        return super().token_lengths([dialogue(prompt) for prompt in prompts], answers)


def load_processor(folder: Path, config: Config) -> DialogueProcessor:
    return DialogueProcessor.load(
        folder, max_length=config.model.max_length, labels_on=config.loss.on, packing=config.loss.packing
    )


@register_model(
    name="dialogue",
    title="dialogue models",
    model_class="AutoModelForCausalLM",
    pipeline_tag="text-generation",
    parts=["embeddings", "language"],
    packing=True,
)
def make_family() -> ModelFamily:
    return ModelFamily(load_processor, module_group)
