"""Which answers each method trains towards, where the rows have the task's own answer in `reference` too."""

import importlib.util

import pytest
from transformers import Trainer

from tests.support.data import PAIRS, REPOSITORY, REWARDS, read_jsonl
from trl_ext import methods
from trl_ext.comparison.config import ComparisonConfig
from trl_ext.comparison.methods import METHODS
from trl_ext.comparison.seed_run import SeedRun
from trl_ext.runs.rounds import Rounds
from trl_ext.runs.run import Run
from trl_ext.runtime.jsonl import write_jsonl

TASK = "the task's own"  # never sampled
ROWS = [{**row, "prompt": f"{row['prompt']}{n} ", "reference": f"{TASK} {n}"} for n in range(2) for row in PAIRS]


def trained_on(recipe, data, model_dir, tmp_path, tokenizer, monkeypatch, *words):
    """Texts of all answers that a recipe's trainer is given, and of those that its regulariser looks at."""
    spec = importlib.util.spec_from_file_location(recipe, REPOSITORY / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = []

    def keep(trainer, *args, **kwargs):
        found.append(trainer.train_dataset)
        raise InterruptedError

    monkeypatch.setattr(Trainer, "train", keep)
    settings = {
        "model_name_or_path": model_dir, "dataset_name": data, "output_dir": tmp_path / recipe, "bf16": False,
        "report_to": "none", "use_cpu": True, "max_length": 128, "on_invalid_row": "drop",
    }  # fmt: skip
    arguments = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    with pytest.raises(InterruptedError):
        module.main([*arguments, *words])
    (rows,) = found
    answers, targets = set(), set()
    for row in rows:
        ids = [row[name] for name in row if name.endswith("_ids") and name != "prompt_ids"]
        ids = [one for several in ids for one in (several if several and isinstance(several[0], list) else [several])]
        texts = [tokenizer.decode(one, skip_special_tokens=True) for one in ids]
        answers |= set(texts)
        if "target_index" in row:
            targets.add(texts[row["target_index"]])
    return answers, targets


@pytest.fixture
def in_this_process(monkeypatch):
    """One round without evaluations; its stages are run here."""

    def stage(run, name, function, *, inputs=None, shards_models=False, title=None, **arguments):
        run.path(name).mkdir(parents=True, exist_ok=True)
        return function(run.path(name), **(inputs or {}), **arguments)

    def play(rounds, train, arguments):
        data = rounds.make_candidates("round-1", rounds.model)
        train(arguments, model=rounds.model, data=str(data), output_dir=str(rounds.run.path("model")))

    monkeypatch.setattr(Run, "stage", stage)
    monkeypatch.setattr(Rounds, "play", play)


ON_PAIRS = ("dpo", "ipo", "orpo", "kto")


@pytest.mark.parametrize(
    ("recipe", "rule", "sees_the_task"),
    [
        ("slic", "tournament", False),
        ("train_click", "likelihood_near", True),  # its language-modelling loss is on the task's own data
        *((recipe, "best_worst", False) for recipe in ON_PAIRS),
        *(
            (method.recipe, None, False)
            for method in methods.METHODS.values()
            if method.recipe not in (*ON_PAIRS, "train_click", "spin", "reward", "rl")
        ),
    ],
)
def test_rounds_train_towards_sampled_answers(
    recipe, rule, sees_the_task, model_dir, tokenizer, tmp_path, in_this_process, monkeypatch
):
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    words = "--num_rounds 1 --num_candidates 6 --max_new_tokens 8 --num_watched_prompts 4 --temperature 1.0".split()
    words += ["--rewards", f"{REWARDS}:vowels"]
    words += [] if rule is None else ["--pair_rule", rule]
    if rule == "likelihood_near":
        words += ["--positive_above", "0.05"]
    answers, targets = trained_on(recipe, tmp_path / "rows.jsonl", model_dir, tmp_path, tokenizer, monkeypatch, *words)
    assert answers and any(TASK in answer for answer in answers) == sees_the_task
    if recipe == "slic":
        ranked = read_jsonl(tmp_path / "slic" / "round-1" / "ranked" / "ranked.jsonl")
        best = {answer for row in ranked for answer, score in zip(row["completions"], row["scores"], strict=True)
                if score == max(row["scores"])}  # fmt: skip
        assert targets <= best, "y_ref of sample-rank is the best of the sampled answers"


def test_direct_trains_towards_the_reference(model_dir, tokenizer, tmp_path, monkeypatch):
    """SLiC-HF direct has the target of SFT for y_ref, as in the paper, and `chosen` where there is none."""
    write_jsonl(tmp_path / "rows.jsonl", [{**ROWS[0]}, {**ROWS[1], "reference": None}])
    _, targets = trained_on("slic", tmp_path / "rows.jsonl", model_dir, tmp_path, tokenizer, monkeypatch)
    assert targets == {ROWS[0]["reference"], ROWS[1]["chosen"]}


def test_the_task_of_a_comparison_reaches_those_that_train_on_it(tmp_path, in_this_process):
    """SLiC-HF direct, SPIN and CLICK; what is ranked is all the others have."""
    scored = [
        {**{key: row[key] for key in ("prompt", "reference")}, "completions": ["a", "b"], "scores": [1.0, 0.0],
         "logps": [-1.0, -2.0], "sources": ["model", "model"]}
        for row in ROWS
    ]  # fmt: skip
    write_jsonl(tmp_path / "scored.jsonl", scored)
    write_jsonl(tmp_path / "prompts.jsonl", ROWS)
    game = SeedRun.__new__(SeedRun)
    run = Run(tmp_path / "run", {}, resume=False)
    game.seed, game.on_playground, game.config = 1, False, ComparisonConfig(str(tmp_path))
    game.rounds = type("Rounds", (), {"run": run, "prompts": tmp_path / "prompts.jsonl"})
    game._candidates = lambda: tmp_path / "scored.jsonl"
    game._num_sampled = lambda name: 0
    for name in ("slic_sample_rank", "slic_direct", "click"):
        data, _ = game._data(METHODS[name])
        rows = read_jsonl(data)
        assert len(rows) == len(ROWS)
        assert all("reference" in row for row in rows) == (name != "slic_sample_rank")
