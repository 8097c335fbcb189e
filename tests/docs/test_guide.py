"""The pages under `docs/`: their rows are read, their figures computed and their code run; and links hold."""

import functools
import json
import re
import shutil
import sys
import textwrap
from importlib import import_module
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from trl import DatasetMixtureConfig, ScriptArguments

from tests.support.data import REPOSITORY
from tests.support.methods import all_but
from tests.support.reference import sequence_logp
from trl_ext.cli.options import recipe_dataclasses
from trl_ext.cli.parse import imported
from trl_ext.data.limits import Limits
from trl_ext.data.load import load_datasets, load_prompts
from trl_ext.data.prompts import check_prompts
from trl_ext.data.rows import RowOptions
from trl_ext.methods import METHODS
from trl_ext.methods.rloo.trainer import _usable_prompts
from trl_ext.methods.spin.rows import is_sft_data, sft_rows
from trl_ext.scoring.build import build_scorers
from trl_ext.scoring.score import score_rows
from trl_ext.trainers.prepared_rows import PreparedRowsMixin

DOCS = REPOSITORY / "docs"
PAGES = sorted(str(page.relative_to(REPOSITORY)) for page in [
    *REPOSITORY.glob("*.md"), *DOCS.glob("**/*.md"), REPOSITORY / "recipes" / "README.md",
    REPOSITORY / "accelerate_configs" / "README.md", REPOSITORY / "benchmarks" / "claims" / "README.md",
])  # fmt: skip


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def section(name: str, title: str) -> str:
    """Text of a section of a page, without its heading."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page(name), re.S | re.M)[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_page_and_its_rows(name):
    method = METHODS[name]
    assert (DOCS / method.page).is_file(), f"docs/{method.page} is not there"
    readme, costs = (REPOSITORY / "README.md").read_text(), section("choosing", "What each costs")
    row = re.search(rf"^\| \[{re.escape(method.label)}\]\(docs/{method.page}\) \|.*$", readme, re.M)
    assert row and f"`recipes/{method.recipe}.py`" in row[0], f"README.md has no row of {method.label} in Methods"
    assert not method.is_public or f"`{method.classes}Trainer`" in row[0]
    if name != "reward":  # trains no policy
        assert f"\n| {method.label} |" in costs, f"docs/choosing.md has no row of {method.label} in What each costs"


def test_editors_know_every_public_name():
    import trl_ext

    source = (REPOSITORY / "trl_ext" / "__init__.py").read_text()
    named = re.findall(r"import (\w+) as \1$", source.partition("if TYPE_CHECKING:")[2], re.M)
    assert sorted(named) == trl_ext.__all__, "name them below TYPE_CHECKING in trl_ext/__init__.py"


# Data


DATA = section("data", "A row of each format")
TRAINERS = {METHODS[name].recipe: trainer for name, (trainer, _) in all_but("rloo").items()}


def comparing_recipes() -> set[str]:
    """What the page calls "the comparing recipes"."""
    others = re.search(r'"the comparing recipes" are all but (.+?)\. ', DATA.replace("\n", " "))[1]
    return {file.stem for file in (REPOSITORY / "recipes").glob("*.py")} - set(re.findall(r"`(\w+)\.py`", others))


def formats() -> dict[str, tuple[dict, set[str]]]:
    """Each format that the page shows: its row, and what reads it."""
    found = re.findall(r"^\*\*(.+?)\.\*\*(.+?)\n+```json\n(.+?)\n```", DATA, re.S | re.M)
    shown = {}
    for name, text, row in found:
        said = re.search(r"Read by (.+?)\.$", text.replace("\n", " ").strip())[1]
        readers = set(re.findall(r"`(\w+)\.py`", said))
        readers |= comparing_recipes() if "the comparing recipes" in said else set()
        readers |= {"prompts"} if re.search(r"\bprompts\b", said) else set()
        shown[name] = json.loads(row), readers
    return shown


FORMATS = formats()


def saved(name: str, folder: Path) -> Path:
    """The row of a format as a file."""
    (folder / "rows.jsonl").write_text(json.dumps(FORMATS[name][0]) + "\n")
    return folder / "rows.jsonl"


def load(path: Path) -> Dataset:
    return load_datasets(ScriptArguments(str(path)), DatasetMixtureConfig(), with_eval=False, seed=0)[0]


def read(reader: str, path: Path, tokenizer, dataset: Dataset | None = None) -> list[dict]:
    """What a recipe makes of a file of rows, by the code with which it reads them, before any model is loaded."""
    if reader == "prompts":
        rows = load_prompts(ScriptArguments(str(path)), DatasetMixtureConfig())
        return check_prompts(rows, tokenizer, RowOptions(reference=True), (), "error")
    dataset, args = load(path) if dataset is None else dataset, config(reader)
    if reader == "rl":
        return _usable_prompts(dataset, tokenizer, args, "train").to_list()
    if reader == "spin" and is_sft_data(dataset):
        return sft_rows(dataset, tokenizer, args, None, "train")
    trainer = TRAINERS[reader].__new__(TRAINERS[reader])  # with a model, it would only take longer
    trainer.data_reports, trainer._limits = {}, Limits(tokenizer.name_or_path, args)
    if isinstance(trainer, PreparedRowsMixin):
        return trainer.trl_rows(dataset, tokenizer, args, "train").to_list()
    trainer._check_arguments(args, "model", None, dataset, None, None)
    return trainer._prepare(dataset, tokenizer, args, "train", trainer._row_options(args)).to_list()


@functools.cache
def config(recipe: str):
    """The recipe's own config, as it is without arguments."""
    return imported(recipe_dataclasses(REPOSITORY / "recipes" / f"{recipe}.py"))[1]("unused", bf16=False)


def test_no_recipe_and_no_format_is_overlooked():
    assert comparing_recipes() == set(TRAINERS) - {"spin"}
    assert len(FORMATS) == page("data").count("```json\n") > 10


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_is_read_by_those_that_the_page_names_and_refused_by_the_others(name, tmp_path, tokenizer):
    readers, path = FORMATS[name][1], saved(name, tmp_path)
    dataset = load(path)
    for reader in [*TRAINERS, "rl", "prompts"]:
        if reader in readers:
            assert read(reader, path, tokenizer, dataset), reader
        else:
            with pytest.raises(ValueError, match="dataset must (not )?have"):
                read(reader, path, tokenizer, dataset)
                pytest.fail(f"{reader} reads it, and the page does not say so")


def test_what_the_page_says_of_a_row_is_what_comes_out(tmp_path, tokenizer):
    def made(name, reader):
        return read(reader, saved(name, tmp_path), tokenizer)

    def text(ids):
        return tokenizer.decode(ids)

    assert set(FORMATS) >= {"Pair", "Ranked list", "Single answer with a label", "Row of SFT", "Prompt", "Tools"}
    for name in ("Pair", "Pair with an implicit prompt"):
        (row,) = made(name, "slic")
        assert text(row["prompt_ids"]).strip() == "2 + 2?" and len(row["completion_ids"]) == 2
    for name in ("Pair, conversational", "Pair of whole conversations"):
        (row,) = made(name, "dpo")
        assert text(row["prompt_ids"]) == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
        assert made(name, "prompts")[0]["prompt"] == [{"role": "user", "content": "2 + 2?"}]
    (row,) = made("Pair with a reference", "slic")
    assert text(row["completion_ids"][row["target_index"]]) == "It is 4.<|im_end|>"
    (row,) = made("Pair with scores", "rrhf")
    assert row["scores"] == [9.0, 2.5]
    assert made("Pair with a margin", "reward")[0]["margin"] == 1.5
    assert len(made("Ranked list", "ipo")[0]["completion_ids"]) == 3
    assert len(made("Ranked list", "kto")) == 2 and made("Single answer with a label", "kto")[0]["label"] is True
    assert text(made("Ranked list", "best_of_n")[0]["input_ids"]) == "2 + 2? 4<|im_end|>"
    assert '"name": "add"' in text(made("Tools", "slic")[0]["prompt_ids"])
    (row,) = made("Conversation of SFT", "spin")
    assert row["completion"] == [{"role": "assistant", "content": "4"}]


def test_the_message_about_unusable_rows_is_the_printed_one(tmp_path, tokenizer):
    """Row 3 has no preference, row 7 a prompt of 1311 tokens."""
    (message,) = re.findall(r"^```\n(.+?)\n```", section("data", "Rows that cannot be used"), re.S | re.M)
    rows = [{"prompt": f"{number} + 2? ", "chosen": "4", "rejected": "5"} for number in range(24)]
    rows[3]["rejected"] = "4"
    token = tokenizer.decode(tokenizer("a a a").input_ids[-1:])
    rows[7]["prompt"] = token * 1311
    assert len(tokenizer(rows[7]["prompt"]).input_ids) == 1311
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError) as refused:
        read("slic", tmp_path / "rows.jsonl", tokenizer)
    assert str(refused.value) == message


def test_the_reward_function_scores_the_rows_beside_it(tmp_path):
    (code,) = re.findall(r"```python\n(.+?)```", DATA, re.S)
    (tmp_path / "my_rewards.py").write_text(code)
    row = {**FORMATS["Prompt with columns for a reward"][0], "completions": ["4", "5", " 4 it is"]}
    (scored,) = score_rows([row], build_scorers([f"{tmp_path / 'my_rewards.py'}:score"]))
    assert scored["scores"] == [1.0, 0.0, 1.0]


# From an SFT model to a comparison


def test_an_adapter_of_a_reward_model_is_merged_as_the_page_does_it(model_dir, tokenizer, tmp_path, monkeypatch):
    name, tokens = "runs/reward-lora", tokenizer("2 + 2? 4<|im_end|>", return_tensors="pt")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1)
    lora = LoraConfig(task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False)
    adapted = get_peft_model(base, lora).eval()
    adapted.save_pretrained(name)
    tokenizer.save_pretrained(name)
    with torch.no_grad():
        expected = adapted(**tokens).logits.item()
    row = {"prompt": "2 + 2? ", "completions": ["4"]}
    with pytest.raises(ValueError, match="got the PEFT adapter"):
        build_scorers([name])
    (code,) = re.findall(r"```python\n(.+?)```", section("quickstart", "From an SFT model to a comparison"), re.S)
    exec(textwrap.dedent(code))
    (scored,) = score_rows([row], build_scorers(["runs/reward"]))
    assert scored["scores"] == [pytest.approx(expected, rel=1e-4)] and abs(expected) > 1e-3


# Hardware


def test_the_memory_of_lora_is_what_the_model_computes(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    scaling = import_module("scaling_tables")
    model = scaling.ARCHITECTURES[0]
    held = scaling.states("ddp", model.parameters + model.lora, model.lora, 1)
    rows = re.findall(r"^\| K = (\d), (\w+) \| (.+) \|$", section("memory-and-scaling", "What to do"), re.M)
    assert len(rows) == 4
    for k, way, cells in rows:
        batch, shared = (2048, 512, int(k)), way == "shared"
        assert batch in scaling.BATCHES
        each = model.activations(*scaling.tokens_of(batch, shared), checkpointing=True, shared=shared)
        assert cells.split(" | ") == [f"{(held + prompts * each) / 1e9:.1f}" for prompts in (1, 2, 4)]
    assert f"{2 * model.parameters / 1e9:.1f} GB" in section("memory-and-scaling", "What to do")


# A loss of one's own

ROWS = [
    {"prompt": "The capital of France is ", "completions": ["Paris", "Lyon", "a city"], "scores": [1.0, 0.0, 0.4]},
    {"prompt": "What is two and two? ", "completions": ["4", "22, I think"], "scores": [1.0, 0.0]},
    {"prompt": "The opposite of up is ", "completions": ["down", "up", "left", "in"], "scores": [0.9, 0.1, 0.5, 0.5]},
    {"prompt": "Say yes, please. ", "completions": ["yes", "no"], "scores": [1.0, 1.0]},
]


@pytest.fixture
def own_loss(tmp_path, monkeypatch):
    """The module that the page shows, imported from a file as a user's would be."""
    (code,) = re.findall(r"```python\n(.+?)```", section("extending", "A loss of your own"), re.S)
    (tmp_path / "own_loss.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_loss", raising=False)
    yield import_module("own_loss")
    del sys.modules["own_loss"]


def squared_hinge(model, tokenizer, margin):
    """The mean loss over `ROWS`, one sequence and one pair at a time."""
    losses = []
    for row in ROWS:
        prompt, means = tokenizer(row["prompt"])["input_ids"], []
        for completion in row["completions"]:
            ids = tokenizer(completion + tokenizer.eos_token)["input_ids"]
            means.append(sequence_logp(model, prompt, ids).item() / len(ids))
        hinges = [
            max(margin - (means[i] - means[j]), 0.0) ** 2
            for i, better in enumerate(row["scores"])
            for j, worse in enumerate(row["scores"])
            if better > worse
        ]
        losses.append(sum(hinges) / len(hinges) if hinges else 0.0)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_the_loss_of_the_page_is_its_formula_and_trains(prefix_sharing, own_loss, model, tokenizer, config_kwargs):
    expected = squared_hinge(model, tokenizer, margin=0.7)
    kwargs = {**config_kwargs, "per_device_train_batch_size": 4, "num_train_epochs": 4}
    args = own_loss.SquaredHingeConfig(**kwargs, margin=0.7, prefix_sharing=prefix_sharing)
    trainer = own_loss.SquaredHingeTrainer(model, args=args, train_dataset=Dataset.from_list(ROWS),
                                           processing_class=tokenizer)  # fmt: skip
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[0] == pytest.approx(expected, rel=1e-5) and expected > 0.1
    assert squared_hinge(model, tokenizer, margin=0.7) < losses[-1] < losses[0] / 10
    first = trainer.state.log_history[0]
    assert 0 <= first["rewards/accuracies"] <= 1 and "rewards/margins" in first and "entropy" in first
    assert (trainer.prefix_sharing is not None) == prefix_sharing
    if prefix_sharing:
        assert trainer.prefix_sharing.statistics.batches_shared == 4


def test_the_loss_of_the_page_goes_on_after_an_interruption(own_loss, model_dir, config_kwargs):
    kwargs = {**config_kwargs, "num_train_epochs": 2, "save_strategy": "steps"}

    def train(folder, resume=False):
        args = own_loss.SquaredHingeConfig(**{**kwargs, "output_dir": folder}, save_steps=2)
        trainer = own_loss.SquaredHingeTrainer(model_dir, args=args, train_dataset=Dataset.from_list(ROWS))
        trainer.train(resume_from_checkpoint=resume or None)
        trainer.save_model()
        return load_file(Path(folder) / "model.safetensors")

    folder = Path(kwargs["output_dir"])
    whole = train(str(folder))
    shutil.rmtree(folder / "checkpoint-4")
    resumed = train(str(folder), resume=True)
    assert all(torch.equal(resumed[name], weights) for name, weights in whole.items())
    assert "squared-hinge" in (folder / "README.md").read_text()


# Links


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)", text, re.M)
    titles = [re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles]
    return {title + (f"-{n}" if (n := titles[:place].count(title)) else "") for place, title in enumerate(titles)}


def links(page: Path) -> list[str]:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.S | re.M)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


def test_no_page_and_no_link_is_overlooked():
    assert len(PAGES) > 25 and sum(len(links(REPOSITORY / name)) for name in PAGES) > 150


def test_files_that_pages_name_are_there():
    folders = "trl_ext|tests|benchmarks|recipes|accelerate_configs"
    named = {
        (name, path)
        for name in PAGES
        for path in re.findall(rf"`((?:{folders})/[\w/.-]+)`", (REPOSITORY / name).read_text())
        if "NAME" not in path
    }
    assert len(named) > 30 and not [one for one in sorted(named) if not (REPOSITORY / one[1]).exists()]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = REPOSITORY / name
    found, broken = links(page), []
    for link in found:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken
