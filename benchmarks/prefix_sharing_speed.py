"""
Time of forward, forward + backward and whole training steps, padded and with shared prompts.

    python benchmarks/prefix_sharing_speed.py

Every way to run a batch is timed in turn on the same batches, so that a busy machine slows all of them. `seconds` is
the mean over the batches, `times_padded` the median over the batches of how many times as fast as `padded` it was.
Rows are appended to `benchmarks/results/prefix_sharing_speed.csv`; `benchmarks/plot.py` draws them.

Ways:
- `padded`: TRL's forward, K rows per prompt (TRL's trainer; for SLiC and RRHF, our trainer over that forward).
- `auto`, `always`: `prefix_sharing="auto"` and `True`.
- `scored head`: the padded batch, but only scored positions reach the LM head. What lies between this and `always` is
  the sharing itself; what lies between `padded` and this is the head, which TRL restricts on GPUs only.
- `CPO`: TRL's experimental `CPOTrainer` with the hinge loss, the nearest thing to SLiC in TRL.
- `LM, all`, `LM, scored`, `LM, TRL head`: a plain causal language model step over rows of equal length with the same
  number of distinct tokens: with the loss on all of them, on as many as here, or on as many as here through TRL's
  fused head. The last is the limit that sharing can reach without another head.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import torch
from common import MODELS, RESULTS, Shape, append, circumstances, make_model

from tests.equivalence.baseline import padded_dpo_trainer, padded_rrhf_trainer, padded_slic_trainer
from trl_ext import enable_prefix_sharing
from trl_ext._trl import add_fused_lm_head
from trl_ext.execution.cost import CostModel
from trl_ext.execution.sharing import PrefixSharing
from trl_ext.playground.model import byte_level_tokenizer

SHAPES = [
    Shape("TL;DR", (300, 400), (25, 50), 2, 2),
    Shape("long prompt", (340, 360), (35, 45), 2, 2),
    Shape("multi-turn HH", (100, 400), (30, 120), 2, 2),
    Shape("medium", (150, 300), (20, 70), 2, 2),
    Shape("even", (256, 256), (256, 256), 2, 2),
    Shape("UltraFeedback", (40, 200), (150, 400), 2, 2),
    Shape("short prompt", (28, 36), (250, 350), 2, 2),
    Shape("nothing to gain", (8, 8), (248, 248), 2, 2),
    Shape("ranked 4", (150, 250), (40, 90), 4, 2),
    Shape("ranked 6", (190, 210), (54, 74), 6, 2),
    Shape("ranked 6, long answers", (60, 200), (150, 300), 6, 1),
    Shape("ranked 8", (400, 512), (48, 80), 8, 1),
    Shape("ranked 16", (190, 210), (54, 74), 16, 1),
    Shape("ranked 16, short prompt", (16, 32), (100, 200), 16, 1),
]
STAGES = ("forward", "forward+backward", "step")
# to keep the time of a run bounded, the parts of a step are timed for these only
STAGED_SHAPES = ("TL;DR", "UltraFeedback", "ranked 6")
STAGED_WAYS = ("padded", "auto")
SCORED_HEAD = ("scored head", "scored head")


pays = CostModel.pays


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Run:
    """One trainer and the stages of its training step, to be timed from outside."""

    def __init__(self, trainer, batches):
        self.trainer, self.batches = trainer, batches
        self.model = trainer.accelerator.prepare_model(trainer.model)
        self.model.train()
        trainer.current_gradient_accumulation_steps = 1
        self.optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)

    def __call__(self, stage: str, index: int) -> None:
        batch = dict(self.batches[index % len(self.batches)])
        if stage == "forward":
            with torch.no_grad():
                self.trainer.compute_loss(self.model, self.trainer._prepare_inputs(batch))
            return
        self.trainer.training_step(self.model, batch)
        if stage == "step":
            torch.nn.utils.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()


class LanguageModelRun:
    """A causal LM step over rows of `length` tokens with the loss on the last `scored` of each (`None`: on all)."""

    def __init__(self, model, rows: int, length: int, scored: int | None, through_trl_head: bool):
        self.model, self.scored, self.through_trl_head = model.train(), scored, through_trl_head
        if through_trl_head:
            add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
            PrefixSharing("auto").install(model)  # only for its scored head: nothing here is shared
        self.ids = torch.randint(0, 32000, (rows, length), device=model.device)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        self.autocast = torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda")

    def __call__(self, stage: str, index: int) -> None:
        with torch.set_grad_enabled(stage != "forward"), self.autocast:
            if self.through_trl_head:
                labels = self.ids.clone()
                labels[:, : -self.scored] = -100
                mask = torch.ones_like(self.ids)
                loss = self.model(input_ids=self.ids, attention_mask=mask, labels=labels, fused_lm_head=True).loss
            elif self.scored is None:
                loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
            else:
                hidden = self.model.model(input_ids=self.ids, use_cache=False).last_hidden_state
                logits = self.model.lm_head(hidden[:, -self.scored - 1 : -1])
                loss = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1).float(), self.ids[:, -self.scored :].flatten()
                )
        if stage == "forward":
            return
        loss.backward()
        if stage == "step":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.optimizer.zero_grad()


def collate(trainer, num_batches: int) -> list[dict[str, torch.Tensor]]:
    columns = [name for name in trainer.train_dataset.column_names if name in (trainer._signature_columns or [])]
    rows = list(trainer.train_dataset.select_columns(columns) if columns else trainer.train_dataset)
    size = len(rows) // num_batches
    return [trainer.data_collator(rows[i * size : (i + 1) * size]) for i in range(num_batches)]


def cpo_trainer(model, dataset, settings):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    # without the NLL term: SLiC is run without its own regulariser as well
    return CPOTrainer(
        model,
        args=CPOConfig(**settings, loss_type="hinge", cpo_alpha=0.0),
        train_dataset=dataset,
        processing_class=byte_level_tokenizer(),
    )


def other_trainer(method: str, model, dataset, settings):
    """TRL's trainer of reward models, of ORPO or of KTO, which has the answers of a prompt in one batch here."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

    tokenizer, more = byte_level_tokenizer(), {}
    if method == "reward":
        config = model.config
        config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
        model = AutoModelForSequenceClassification.from_config(config, attn_implementation=config._attn_implementation)
        config, trainer = RewardConfig(**settings), RewardTrainer
    elif method == "KTO":
        config, trainer, more = KTOConfig(**settings), KTOTrainer, {"ref_model": copy.deepcopy(model)}
        dataset = Dataset.from_list(
            [
                {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
                for row in dataset
                for name in ("chosen", "rejected")
            ]
        )
    else:
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        config, trainer = ORPOConfig(**settings), ORPOTrainer
    return trainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, **more)


def ways_of(shape: Shape, options, directory: str):
    """`(method, way, call, prepare)` for everything that is timed on a shape; `prepare` runs untimed before it."""
    from datasets import Dataset

    dataset = Dataset.from_list(shape.rows(options.batches))
    settings = {
        "output_dir": directory,
        "bf16": torch.cuda.is_available(),
        "report_to": "none",
        "activation_checkpointing": False,
        "max_length": None,
        "disable_tqdm": True,
    }

    def switch(trainer, mode):
        def prepare():
            CostModel.pays = pays if mode != "scored head" else lambda *_: False
            enable_prefix_sharing(trainer, "auto" if mode == "scored head" else mode)

        return prepare

    def trainer_ways(method, trainer, *more):
        trainer._set_signature_columns_if_needed()
        run = Run(trainer, collate(trainer, options.batches))
        for way, mode in (("padded", False), *more, ("auto", "auto"), ("always", True)):
            yield method, way, run, switch(trainer, mode)

    def model():
        return make_model(options.model, options.attn_implementation)

    if shape.k == 2 and "DPO" in options.methods:
        yield from trainer_ways("DPO", padded_dpo_trainer(model(), dataset, settings, ref_model=model()), SCORED_HEAD)
    if shape.k > 2 and "RRHF" in options.methods:
        yield from trainer_ways("RRHF", padded_rrhf_trainer(model(), dataset, settings), SCORED_HEAD)
    for method in ("reward", "ORPO", "KTO"):
        if shape.k == 2 and method in options.methods:
            yield from trainer_ways(method, other_trainer(method, model(), dataset, settings))
    if "SLiC-HF" not in options.methods:
        return
    slic = padded_slic_trainer(model(), dataset, {**settings, "reg_weight": 0.0})
    yield from trainer_ways("SLiC-HF", slic, SCORED_HEAD)
    if shape.k == 2:
        trainer = cpo_trainer(model(), dataset, settings)
        rows = list(trainer.train_dataset)
        batches = [
            trainer.data_collator(rows[i * shape.prompts : (i + 1) * shape.prompts]) for i in range(options.batches)
        ]
        yield "SLiC-HF", "CPO", Run(trainer, batches), lambda: None
    rows = shape.rows(options.batches)
    answers = sum(len(text) + 1 for row in rows for text in row.get("completions") or (row["chosen"], row["rejected"]))
    scored = round(answers / len(rows))
    length = round(sum(len(row["prompt"]) for row in rows) / len(rows)) + scored
    for way, number in (("LM, TRL head", scored), ("LM, scored", scored), ("LM, all", None)):
        run = LanguageModelRun(model().to(slic.model.device), shape.prompts, length, number, way == "LM, TRL head")
        yield "SLiC-HF", way, run, lambda: setattr(CostModel, "pays", lambda *_: False)


def measure(shape: Shape, options) -> list[dict]:
    with tempfile.TemporaryDirectory() as directory:
        ways = list(ways_of(shape, options, directory))
        timed = [
            (*way, stage)
            for way in ways
            for stage in options.stages
            if stage == "step" or (shape.name in STAGED_SHAPES and way[1] in STAGED_WAYS)
        ]
        times = {(method, way, stage): [] for method, way, _, _, stage in timed}
        positions = {}
        for repeat in range(options.repeats + 1):  # the first round warms up
            for method, way, call, prepare, stage in timed:
                prepare()
                synchronize()
                start = time.perf_counter()
                call(stage, repeat)
                synchronize()
                if repeat:
                    times[method, way, stage].append(time.perf_counter() - start)
                sharing = getattr(getattr(call, "trainer", None), "prefix_sharing", None)
                if sharing is not None:
                    counted, seen = sharing.statistics, positions.setdefault((method, way), {})
                    seen[repeat % options.batches] = (counted.positions_padded, counted.positions_computed)
    rows = []
    for (method, way, stage), seconds in times.items():
        pairs = zip(times[method, "padded", stage], seconds, strict=True)  # the same batch, one after the other
        rows.append(
            {
                "method": method,
                "shape": shape.name,
                "prompt": "-".join(map(str, shape.prompt)),
                "answer": "-".join(map(str, shape.answer)),
                "k": shape.k,
                "prompts": shape.prompts,
                "model": options.model,
                "attention": options.attn_implementation or "sdpa",
                "stage": stage,
                "way": way,
                "seconds": round(statistics.mean(seconds), 4),
                "fastest": round(min(seconds), 4),
                "slowest": round(max(seconds), 4),
                "times_padded": round(statistics.median(padded / other for padded, other in pairs), 3),
                "positions": sum(computed for _, computed in positions.get((method, way), {}).values()) or "",
                "positions_padded": sum(padded for padded, _ in positions.get((method, way), {}).values()) or "",
                "repeats": len(seconds),
                **circumstances(),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="30M", choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--methods", nargs="+", default=["DPO", "SLiC-HF", "RRHF", "reward", "ORPO", "KTO"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds over all ways, after one that warms up")
    parser.add_argument("--batches", type=int, default=3, help="different batches, used in turn")
    parser.add_argument("--attn_implementation", choices=["sdpa", "eager", "flex_attention"])
    options = parser.parse_args()
    for shape in SHAPES:
        if shape.name not in options.shapes:
            continue
        rows = measure(shape, options)
        append(RESULTS / "prefix_sharing_speed.csv", rows)
        for row in rows:
            if row["stage"] == options.stages[-1]:
                print(
                    f"{row['shape']:<24} {row['method']:<8} {row['way']:<12} {row['stage']:<8} "
                    f"{row['seconds']:8.3f} s  {row['times_padded']:5.2f} x padded",
                    flush=True,
                )


if __name__ == "__main__":
    main()
