"""One recipe trains a few steps and prints what it took as JSON; `training.py` starts it.

All recipes train the same LoRA on the same rows with the same optimizer, through transformers' Trainer; a step is timed
from one micro-batch's beginning to the next one's, so that loading and the optimizer are in it. The process ends when
the last step begins.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.time()


class Meter:
    """Times of micro-batches, and memory beyond what stood when the second one began.

    In every recipe the first one imports and allocates what stays for good: modules, optimizer state, thread pools.
    """

    def __init__(self) -> None:
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self.first = 0.0
        self.base = 0
        self.peak = 0

    def begin(self, started: float, steps: int) -> None:
        """Called before each micro-batch; ends the process before the last one."""
        if not self.walls:
            self.first = time.time()
        if len(self.walls) == 1:
            self.base = self.peak = anonymous_bytes()
            threading.Thread(target=self._watch, daemon=True).start()
        self.walls.append(time.monotonic())
        self.cpus.append(time.process_time())
        if len(self.walls) == steps:
            print(json.dumps(self.facts(started)), flush=True)
            os._exit(0)

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.01)

    def facts(self, started: float) -> dict[str, float]:
        """Medians over the micro-batches after the first."""

        def median(times: list[float]) -> float:
            return statistics.median(after - before for before, after in itertools.pairwise(times[1:]))

        facts = {"seconds": median(self.walls), "cpu_seconds": median(self.cpus), "start_up": self.first - started}
        return {**facts, "peak": self.peak - self.base}


def anonymous_bytes() -> int:
    """This process's memory without mapped files."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def metered(meter: Meter, steps: int) -> None:
    """Have transformers' Trainer call the meter."""
    from transformers import Trainer

    real = Trainer.training_step

    def training_step(self: Any, *given: Any, **more: Any) -> Any:
        meter.begin(STARTED, steps)
        return real(self, *given, **more)

    Trainer.training_step = training_step


def ftlib(plan: dict[str, Any], meter: Meter) -> None:
    """`ftlib train`."""
    from ftlib.__main__ import main

    metered(meter, plan["steps"])
    raise SystemExit(main(["train", plan["config"]]))


def seed(plan: dict[str, Any], meter: Meter) -> None:
    """The seeds' recipe: processor in the collator, padded to the longest, all logits."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        Trainer,
        TrainingArguments,
    )

    metered(meter, plan["steps"])
    processor = PaliGemmaProcessor.from_pretrained(plan["base"], trust_remote_code=False)
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        plan["base"], dtype=torch.float32, trust_remote_code=False
    )
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    collate = image_collate(processor)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=targets))
    arguments = TrainingArguments(
        output_dir=plan["output"], max_steps=plan["steps"], per_device_train_batch_size=plan["micro_batch"],
        learning_rate=1e-4, gradient_checkpointing=True, save_strategy="no", report_to="none",
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=plan_rows(plan), data_collator=collate).train()


def llamafactory(plan: dict[str, Any], meter: Meter) -> None:
    """`llamafactory-cli train`, with its template for PaliGemma; it adds a line break between prompt and answer."""
    from llamafactory.train.tuner import run_exp

    metered(meter, plan["steps"])
    folder = Path(plan["output"])
    folder.mkdir(exist_ok=True)
    rows = [
        {
            "messages": [
                {"role": "user", "content": "<image>" + row["prefix"]},
                {"role": "assistant", "content": row["suffix"]},
            ],
            "images": [row["image"]],
        }
        for row in plan_rows(plan)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    data = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(data))
    run_exp(
        {
            "model_name_or_path": plan["base"], "stage": "sft", "do_train": True, "finetuning_type": "lora",
            "lora_rank": 8, "lora_alpha": 16, "lora_target": "all", "dataset": "rows", "dataset_dir": str(folder),
            "template": "paligemma", "cutoff_len": 1024, "output_dir": str(folder / "result"), "use_cpu": True,
            "max_steps": plan["steps"], "per_device_train_batch_size": plan["micro_batch"], "learning_rate": 1e-4,
            "save_strategy": "no", "report_to": "none", "overwrite_cache": True, "dataloader_num_workers": 0,
        }
    )  # fmt: skip


def image_collate(processor: Any) -> Callable[[list[dict[str, str]]], Any]:
    """As in the seeds' notebooks."""
    from PIL import Image

    def collate(rows: list[dict[str, str]]) -> Any:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        texts, suffixes = ["<image>" + row["prefix"] for row in rows], [row["suffix"] for row in rows]
        return processor(text=texts, images=images, suffix=suffixes, return_tensors="pt", padding="longest")

    return collate


def plan_rows(plan: dict[str, Any]) -> list[dict[str, str]]:
    """The rows with the paths of their images."""
    root = Path(plan["rows"])
    rows = [json.loads(line) for line in (root / "data.jsonl").read_text().splitlines()]
    return [{**row, "image": str(root / row["image"])} for row in rows]


def main() -> None:
    """`python worker.py PLAN.json`; PYTHONPATH says whose ftlib it is."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    meter = Meter()
    {"ftlib": ftlib, "seed": seed, "llamafactory": llamafactory}[plan["recipe"]](plan, meter)
    raise SystemExit("training ended early")


if __name__ == "__main__":
    main()
