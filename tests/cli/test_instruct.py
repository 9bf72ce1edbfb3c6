"""Causal models through the whole chain, as a user runs it; adapters as plain transformers and peft read them."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ftlib.cli import chat
from ftlib.core import files, log
from ftlib.data.example import write_records
from tests.conftest import read_lines
from tests.models.tiny_causal import CHATML, save

Ftlib = Callable[..., tuple[int, str, str]]

CONFIG = """\
name: instruct
task: instruct
seed: 3
model: {family: causal, base: BASE}
adapter: {method: lora, r: 4, alpha: 16, targets: [query_key_value]}
data: {source: string_tasks, root: ROOT, split: {valid: 0.2, test: 0.2}}
training:
  max_steps: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  learning_rate: 3.0e-2
evaluation: {splits: [test], max_new_tokens: 6, batch_size: 5}
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gpt_neox", tmp_path_factory.mktemp("base"), chat=True)


@pytest.fixture
def config(base: Path, tmp_path: Path, store: Path) -> Path:
    """Thirty instructions, every second one with an input, two of them too long for the model."""
    draw = random.Random(0)
    root = tmp_path / "data"
    root.mkdir()
    rows = []
    for number in range(30):
        own = "ghijklmnop"[number % 10] + "qrs"[number // 10]  # no word occurs twice
        word = ("".join(draw.choices("abcdef", k=draw.randint(1, 3))) + own) * (300 if number in (3, 4) else 1)
        asked = {"instruction": "reverse", "input": word} if number % 2 else {"instruction": f"reverse {word}"}
        rows.append({"id": str(number), **asked, "output": word[::-1]})
    write_records(root / "data.jsonl", rows)
    path = tmp_path / "instruct.yaml"
    path.write_text(CONFIG.replace("BASE", str(base)).replace("ROOT", str(root)))
    return path


@pytest.fixture
def trained(config: Path, ftlib: Ftlib) -> Path:
    assert ftlib("prepare", config)[0] == 0
    code, output, error = ftlib("train", config)
    assert code == 0, error
    return Path(output.strip().splitlines()[-1])


def plain_answers(base: Path, adapter: Path, prompts: list[str], end: str = "") -> list[str]:
    """Greedy answers as a user without ftlib would get them, one by one; `end` is a token that ends a turn."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    ends = [tokenizer.eos_token_id, *tokenizer(end, add_special_tokens=False)["input_ids"]]
    found = []
    for prompt in prompts:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=ends[0], eos_token_id=ends)
        found.append(tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def test_the_chain_and_what_plain_peft_makes_of_the_adapter(trained: Path, base: Path, ftlib: Ftlib) -> None:
    prepared = files.read_json(trained / "data.json")["splits"]
    noted = [line for line in read_lines(trained / "history.jsonl") if line["event"] == "too long"]
    lost = noted[0]["dropped"] if noted else 0
    assert 28 <= 30 - lost == prepared["train"]["rows"] - lost + prepared["valid"]["rows"] + prepared["test"]["rows"]
    code, output, error = ftlib("evaluate", "instruct", "--split", "train", "--split", "test", "--json")
    assert code == 0, error
    results = json.loads(output)
    assert [(result["when"], result["split"]) for result in results] == [
        ("before", "train"), ("before", "test"), ("after", "train"), ("after", "test"),
    ]  # fmt: skip
    assert set(results[0]["metrics"]) >= {"exact match", "token F1", "BLEU"}
    assert results[-1]["training_overlap"] == {"rows": 0, "rows_with_trained_images": 0}
    folder = trained / "eval" / "string_tasks"
    records = [
        record for split in ("test", "train") for record in read_lines(folder / split / "after" / "predictions.jsonl")
    ]
    before = [r for split in ("test", "train") for r in read_lines(folder / split / "before" / "predictions.jsonl")]
    assert [record["prediction"] for record in records] != [record["prediction"] for record in before]
    cut = [record for record in records if "cut" in record]
    assert cut == [record for record in records if record["id"] in ("3", "4")] != []
    assert any("prompts were too long for the model" in remark for result in results for remark in result["remarks"])
    whole = [record for record in records if "cut" not in record][:8]
    assert any("### Input:" in record["prompt"] for record in whole)
    assert plain_answers(base, trained / "adapter", [r["prompt"] for r in whole]) == [r["prediction"] for r in whole]
    settings = json.loads((trained / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)


def test_rows_that_are_too_long_are_said_and_noted(config: Path, ftlib: Ftlib) -> None:
    config.write_text(config.read_text().replace("split: {valid: 0.2, test: 0.2}", "split: {valid: 0.04, test: 0.04}"))
    assert ftlib("prepare", config)[0] == 0
    code, output, error = ftlib("train", config, "name=dropped")
    assert code == 0 and "tokens: 2 dropped" in error
    history = read_lines(Path(output.strip()) / "history.jsonl")
    assert [(r["limit"], r["dropped"], r["truncated"]) for r in history if r["event"] == "too long"] == [(512, 2, 0)]
    code, _, error = ftlib("train", config, "name=stopped", "model.too_long=stop")
    assert code == 2 and error.count("tokens, the maximum is 512") == 2


def test_predict_with_and_without_context(trained: Path, base: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    adapter = trained / "adapter"
    head = "Below is an instruction that describes a task"
    tail = "Write a response that appropriately completes the request.\n\n### Instruction:\nreverse"
    bare = f"{head}. {tail}\n\n### Response:\n"
    told = (
        f"{head}, paired with an input that provides further context. {tail}\n\n### Input:\nCONTEXT\n\n### Response:\n"
    )
    (without,) = plain_answers(base, adapter, [bare])
    candidates = ["abc", "feed", "what?", "1 2 3", "XYZ", "あ"]
    found = plain_answers(base, adapter, [told.replace("CONTEXT", each) for each in candidates])
    told_text, with_it = next(pair for pair in zip(candidates, found, strict=True) if pair[1] != without)
    assert ftlib("predict", "instruct", "--prompt", "reverse")[:2] == (0, f"{without}\n")
    (tmp_path / "note.txt").write_text(f"{told_text}\n")
    for context in (told_text, tmp_path / "note.txt"):
        code, output, _ = ftlib("predict", "instruct", "--prompt", "reverse", "--context", context)
        lines = [line.strip() for line in output.strip("\n").split("\n")]
        wanted = ["question:        reverse", f"without context: {without}", f"with context:    {with_it}"]
        assert code == 0 and lines == [line.strip() for line in wanted]
    questions = tmp_path / "questions.jsonl"
    lines = [{"prompt": "reverse", "context": told_text}, {"prompt": "reverse"}, {"prompt": "何？"}]
    questions.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    code, output, _ = ftlib("predict", "instruct", "--file", questions, "--json")
    records = json.loads(output)
    sure = ("mean_logprob", "min_logprob", "answer_tokens")
    assert code == 0 and list(records[0]) == [
        *("prompt", "answer", *sure),
        *(f"{name} with context" for name in ("answer", *sure)),
    ]
    assert (records[0]["answer"], records[0]["answer with context"]) == (without, with_it)
    assert records[1] == {name: records[0][name] for name in ("prompt", "answer", *sure)}
    for record in records:
        assert record["min_logprob"] <= record["mean_logprob"] <= 0 < record["answer_tokens"]


def test_a_split_with_and_without_context(trained: Path, base: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    command = ["evaluate", "instruct", "--split", "train", "--json"]
    plain = json.loads(ftlib(*command)[1])
    code, output, error = ftlib(*command, "evaluation.without_context=true")
    assert code == 0, error
    records = read_lines(trained / "eval/string_tasks/train/after/predictions.jsonl")
    told = [record for record in records if "### Input:" in record["prompt"]]
    assert 0 < len(told) < len(records)
    assert [record for record in records if "without_context" in record] == told
    bare = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nreverse\n\n### Response:\n"
    )
    assert {record["without_context"]["prediction"] for record in told} == set(
        plain_answers(base, trained / "adapter", [bare])
    )
    for scores, alone in zip(json.loads(output), plain, strict=True):
        assert scores["metrics"] == alone["metrics"] and "parts" not in alone
        assert {name: part["n"] for name, part in scores["parts"].items()} == {
            "with context": len(told), "without context": len(told)
        }  # fmt: skip
        found = scores["parts"]["without context"]["metrics"]["token F1"]["value"]
    assert found == pytest.approx(100 * sum(r["without_context"]["score"] for r in told) / len(told))
    assert "string_tasks/without context" in error
    assert ftlib("report", "instruct", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert "<dt>without context</dt>" in page and "train without context" in page
    bare_template = ["data.prompt={instruction}", "name=blind", "--before", "--split", "test"]
    config = tmp_path / "instruct.yaml"
    assert ftlib("prepare", config, *bare_template[:2])[0] == 0
    code, _, error = ftlib("evaluate", config, *bare_template, "evaluation.without_context=true")
    assert code == 0 and "none was evaluated without it" in error, error
    code, _, error = ftlib("evaluate", config, "task=caption", "evaluation.without_context=true")
    assert code == 2 and "evaluation.without_context requires task: instruct" in error


MISTAKES = {
    "nothing asked": ([], "no input"),
    "both": (["--prompt", "x", "--file", "q.jsonl"], "no input"),
    "an image": (["--prompt", "x", "--image", "i.png"], "is text-only"),
    "no file": (["--file", "none.jsonl"], "cannot be read"),
    "bad lines": (["--file", "bad.jsonl"], "bad.jsonl:2: field prompt: is missing"),
    "no lines": (["--file", "empty.jsonl"], "contains no questions"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_predict(
    name: str, trained: Path, ftlib: Ftlib, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        '{"prompt": "x"}',
        '{"context": "x"}',
        "[]",
        "nonsense",
        '{"prompt": 1}',
        '{"prompt": "x", "picture": "y"}',
    ]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty.jsonl").write_text("\n")
    arguments, words = MISTAKES[name]
    code, output, error = ftlib("predict", "instruct", *arguments)
    assert code == 2 and words in error and output == "" and "Traceback" not in error
    if name == "bad lines":
        assert error.count("bad.jsonl:") == 5


def test_a_session(
    trained: Path, ftlib: Ftlib, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*arguments: object) -> str:
        return json.loads(ftlib("predict", "instruct", "--json", *arguments)[1])[0]

    bare, told = answer("--prompt", "reverse")["answer"], answer("--prompt", "reverse", "--context", "abc def")
    lines = [
        "reverse",
        "",
        "/context abc def",
        "reverse",
        "/image /no/such.png",
        "/dance",
        "/context",
        "reverse",
        "/quit",
        "x",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert chat.main(["instruct"]) == 0
    output, error = capsys.readouterr()
    wanted = [bare, f"without context: {told['answer']}", f"with context:    {told['answer with context']}", bare]
    assert output.strip("\n").split("\n") == wanted
    assert "/no/such.png: no such image" in error and "/dance: no such command" in error
    assert error.startswith(chat.SINGLE_TURN_NOTICE)
    monkeypatch.setattr("sys.stdin", io.StringIO("reverse"))
    assert chat.main(["instruct"]) == 0
    assert capsys.readouterr().out == f"{bare}\n"


def test_a_conversation_is_remembered_until_reset(
    config: Path, base: Path, ftlib: Ftlib, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    assert ftlib("prepare", config, "data.prompt=chat")[0] == 0
    code, output, error = ftlib("train", config, "data.prompt=chat", "name=talk")
    assert code == 0, error
    adapter, tokenizer = Path(output.strip()) / "adapter", AutoTokenizer.from_pretrained(base)
    turns: list[dict[str, str]] = []

    def follow(question: str) -> str:
        turns.append({"role": "user", "content": question})
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        (answer,) = plain_answers(base, adapter, [text], end="<|im_end|>")
        turns.append({"role": "assistant", "content": answer})
        return answer

    wanted = [follow("reverse abc"), follow("again"), follow("again\n\nxyz")]
    del turns[:]
    wanted.append(follow("again"))
    asked = ["reverse abc", "again", "/context xyz", "again", "/context", "/reset", "again"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(asked) + "\n"))
    assert chat.main(["talk"]) == 0
    output, error = capsys.readouterr()
    wanted = [log.escape_control_characters(answer) for answer in wanted]
    found = output.strip("\n").split("\n")
    assert [found[0], found[1], found[3].removeprefix("with context:    "), found[4]] == wanted
    assert len(set(wanted)) > 2 and "Questions are independent" not in error
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(["reverse " + "abc" * 20] * 12) + "\n"))
    assert chat.main(["talk"]) == 0
    assert "too long for the model" in capsys.readouterr().err


def test_recomputed_activations_change_nothing(config: Path, ftlib: Ftlib) -> None:
    assert ftlib("prepare", config)[0] == 0
    logs = []
    for name, checkpointing in (("kept", "false"), ("recomputed", "true")):
        code, output, error = ftlib("train", config, f"name={name}", f"training.gradient_checkpointing={checkpointing}")
        assert code == 0, error
        logs.append([(r["loss"], r["grad_norm"]) for r in read_lines(Path(output.strip()) / "metrics.jsonl")])
    assert logs[0] == [pytest.approx(pair, rel=1e-5) for pair in logs[1]]
    assert all(norm > 0 for _, norm in logs[1])


@pytest.mark.parametrize(
    "override", ["loss.packing=true", "data.prompt=chat", "loss.on=everything", "adapter={method: full}"]
)
def test_other_ways_to_train(config: Path, ftlib: Ftlib, override: str) -> None:
    code, _, error = ftlib("prepare", config, override)
    assert code == 0, error
    assert ftlib("train", config, override)[0] == 0
    code, output, error = ftlib(
        "evaluate", config, override, "evaluation.generation={do_sample: true, seed: 5}", "--json"
    )
    assert code == 0, error
    assert json.loads(output)[-1]["settings"]["generation"] == {"do_sample": True, "seed": 5}
    if override == "data.prompt=chat":
        prompt = read_lines(
            next(Path(config).parent.glob("store/runs/*/instruct/*/eval/*/test/after/predictions.jsonl"))
        )[0]
        assert json.loads(str(prompt["prompt"]))[0]["role"] == "user"


def test_images_are_nothing_for_a_causal_model(
    write_config: Callable[..., Path], store: Path, base: Path, ftlib: Ftlib
) -> None:
    config = write_config("{method: lora}", base=str(base), replace=("paligemma", "causal"))
    assert ftlib("prepare", config)[0] == 0
    code, _, error = ftlib("train", config)
    assert code == 2 and "model.family causal reads text only" in error


def test_rows_that_would_see_each_other_are_not_packed(config: Path, ftlib: Ftlib, tmp_path: Path) -> None:
    overrides = (f"model.base={save('opt', tmp_path / 'opt')}", "adapter.targets=[attention]", "loss.packing=true")
    assert ftlib("prepare", config, *overrides)[0] == 0
    code, _, error = ftlib("train", config, *overrides)
    assert code == 2 and "loss.packing: in this model's architecture (opt) rows" in error
    code, _, error = ftlib("train", config, *overrides, "loss.packing=false", "loss.average=example")
    assert code == 0, error


def test_arguments_of_the_chat_template_are_those_of_training_wherever_the_model_is_asked(
    config: Path, base: Path, ftlib: Ftlib, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(base, tmp_path / "polite")
    template = CHATML.replace("assistant\n", "assistant\n{% if polite %}Yes. {% endif %}")
    (folder / "chat_template.jinja").write_text(template)
    polite = ["data.prompt=chat", "model.chat_template_arguments={polite: true}"]
    assert ftlib("prepare", config, f"model.base={folder}", *polite)[0] == 0
    code, output, error = ftlib("train", config, f"model.base={folder}", *polite, "name=refused")
    assert code == 2 and "asks with 'Yes. ', but writes nothing before an answer" in error
    template = template.replace("{{ m['content'] }}", "{% if polite and m.role == 'assistant' %}Yes. {% endif %}", 1)
    template = template.replace("{% endif %}<|im_end|>", "{% endif %}{{ m['content'] }}<|im_end|>")
    (folder / "chat_template.jinja").write_text(template)
    folders = {}
    for name, own in (("rude", polite[:1]), ("polite", polite)):
        code, output, error = ftlib("train", config, f"model.base={folder}", *own)
        assert code == 0, error
        folders[name] = Path(output.strip())
    assert folders["rude"] != folders["polite"]
    text = "<|im_start|>user\nreverse abc<|im_end|>\n<|im_start|>assistant\n"
    for name, behind in (("rude", ""), ("polite", "Yes. ")):
        code, output, error = ftlib("predict", folders[name], "--prompt", "reverse abc")
        assert code == 0, error
        (wanted,) = plain_answers(folder, folders[name] / "adapter", [text + behind], end="<|im_end|>")
        assert output.strip("\n") == wanted
    code, output, error = ftlib("evaluate", folders["polite"], "--json")
    assert code == 0, error
    assert json.loads(output)[-1]["settings"]["loaded"]["chat_template_arguments"] == {"polite": True}
    assert "chat_template" not in json.loads(output)[-1]["settings"]
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace("name: instruct", "name: other"))
    code, _, error = ftlib("evaluate", folders["polite"], "--data", other)
    assert code == 2 and "its data.prompt is 'alpaca', this run's is 'chat'" in error
    code, _, error = ftlib("train", config, polite[1])
    assert code == 2 and "model.chat_template_arguments requires data.prompt: chat" in error


def test_a_completed_generation_prompt_is_told_and_is_part_of_what_was_asked(
    config: Path, base: Path, ftlib: Ftlib, tmp_path: Path
) -> None:
    folder = shutil.copytree(base, tmp_path / "headless")
    (folder / "chat_template.jinja").write_text(CHATML.partition("{% if add")[0])
    overrides = [f"model.base={folder}", "data.prompt=chat"]
    assert ftlib("prepare", config, *overrides)[0] == 0
    code, output, error = ftlib("train", config, *overrides)
    assert code == 0 and "asks without '<|im_start|>assistant\\n', but writes it before an answer" in error
    run = Path(output.strip())
    code, output, error = ftlib("predict", run, "--prompt", "reverse abc")
    text = "<|im_start|>user\nreverse abc<|im_end|>\n<|im_start|>assistant\n"
    assert [output.strip("\n")] == plain_answers(folder, run / "adapter", [text], end="<|im_end|>")
    code, output, error = ftlib("evaluate", run, "--json")
    assert code == 0, error
    assert all("asks without" in scores["settings"]["chat_template"] for scores in json.loads(output))
