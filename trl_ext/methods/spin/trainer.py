"""SPIN."""

import shutil
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ...logps import CompletionLogps
from ...losses import spin_loss
from ...runs.curves import SPIN_PANELS
from ...runs.manifest import STAGE_MARKER
from ...runtime.run_warnings import ToldApart
from ...trainers.batches import best_and_worst
from ...trainers.candidate_trainer import CandidateTrainer
from ...trainers.referenced_trainer import ReferencedTrainer
from .config import BY_ITERATION, SPINConfig
from .rows import is_sft_data
from .self_play import SelfPlay


class SPINTrainer(ReferencedTrainer):
    r"""
    Trainer for SPIN, self-play fine-tuning (https://huggingface.co/papers/2401.01335), eq. 4.7. With y the real answer
    to x and y' the one that the opponent, the model at the start of the iteration, has generated:

        loss = l(beta * h),    h = log p(y|x) / p_opponent(y|x) - log p(y'|x) / p_opponent(y'|x)

    as a mean over prompts, l(t) = log(1 + exp(-t)) or, with `loss="hinge"`, relu(1 - t). What comes out is the next
    opponent. It takes `DPOTrainer`'s place and arguments. What `train()` does depends on the rows:

    - `prompt` and `completion`, or `messages`: all iterations, each of them generating, training and evaluating in
      fresh processes, in `args.output_dir`. Afterwards `model` is the model to take. With
      `train(resume_from_checkpoint=True)` an interrupted run goes on where it was and ends with the same weights.
      `eval_dataset` holds rows of the same kind to evaluate each model with. See [`SelfPlay`]. A script has to
      protect its main part with `if __name__ == "__main__":`, because each process reads it again.
    - `prompt`, `chosen` (the real answer) and `rejected` (the generated one): one iteration.

    The reference is the model itself as it was when the trainer was constructed, whatever is on disk under its name,
    with its adapters as they were. It goes over the data once, sharing prompts, before anything is trained, and no
    copy of it is kept. In self-play the constructor runs in a process that has just loaded what the iteration before
    has saved. With LoRA each iteration trains an adapter of its own and merges it into the weights afterwards, so the
    next one's reference, its model with the adapter off, is the opponent.

    The first loss is ln 2 (hinge: 1). If it is not, training stops and says so.

    Departures from the paper: none with the default settings. Departures from the authors' code: prompts go through
    the same chat template in generation and in training; the end token is scored once; both are what the code gets
    wrong. Answers that are empty or equal the real one are left out, as they would teach nothing. A generated answer
    that reached `max_new_tokens` gets no end token, which it did not say: pushing that down made answers ever longer.

    Logged besides `Trainer`'s own: `rewards/{chosen,rejected}` (beta times the log-ratio), `rewards/margins`,
    `rewards/accuracies`, `logps/{chosen,rejected}` (summed, in nats), `lengths/{chosen,rejected}` in tokens,
    `hinge/active` (share of pairs still inside the margin, with `loss="hinge"`), `logits/{chosen,rejected}`,
    `entropy`, `mean_token_accuracy`, `num_tokens`. "chosen" is the real answer, "rejected" the generated one.

    Example:
    ```python
    from datasets import load_dataset
    from trl_ext import SPINConfig, SPINTrainer

    if __name__ == "__main__":
        trainer = SPINTrainer(
            model="alignment-handbook/zephyr-7b-sft-full",
            args=SPINConfig("zephyr-7b-SPIN", num_iterations=3, learning_rate=[5e-7, 5e-7, 1e-7]),
            train_dataset=load_dataset("HuggingFaceH4/ultrachat_200k", split="train_sft"),
        )
        trainer.train()
    ```

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with `args` an [`SPINConfig`]. `compute_metrics` is refused, and in self-play
            also objects that cannot go to other processes: `data_collator`, `callbacks`, `optimizers`.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Only with `args.reference="initial"`, for one iteration: the model that started the first. It is run once
            and let go.

    Raises:
        TypeError, ValueError, NotImplementedError: see [`CandidateTrainer`]; before any weight is loaded.
    """

    panels = SPIN_PANELS
    config_class = SPINConfig
    _tag_names = ["trl", "spin"]
    _name = "SPIN"
    _paper = {
        "title": "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
        "id": "2401.01335",
        "citation": textwrap.dedent("""\
            @inproceedings{chen2024spin,
                title     = {{Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models}},
                author    = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
                booktitle = {Proceedings of the 41st International Conference on Machine Learning},
                year      = 2024,
            }"""),
    }

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: str | PreTrainedModel | None = None,
        args: SPINConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        self._self_play: SelfPlay | None = None
        self._played: str | None = None
        self._told_apart = ToldApart()
        if train_dataset is not None and model is not None and is_sft_data(train_dataset):
            objects = {
                "ref_model": ref_model,
                "data_collator": data_collator,
                "compute_metrics": compute_metrics,
                "callbacks": callbacks,
                "optimizers": optimizers if any(optimizers) else None,
            }
            self._self_play = SelfPlay.for_trainer(
                type(self),
                model,
                args,
                train_dataset,
                eval_dataset,
                processing_class,
                objects,
                {"quantization_config": quantization_config, "peft_config": peft_config},
            )
            self.args = self._self_play.config
            return
        self._check_reference(args, model, ref_model)
        super().__init__(
            model,
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class,
            compute_metrics,
            callbacks,
            optimizers,
            quantization_config,
            peft_config,
        )

    def _check_arguments(self, args, model, ref_model, train_dataset, compute_metrics, peft_config) -> None:
        super()._check_arguments(args, model, ref_model, train_dataset, compute_metrics, peft_config)
        for name in BY_ITERATION:
            if isinstance(getattr(args, name), list):
                raise ValueError(
                    f"`{name}` must be one value for rows of `chosen` and `rejected`, which are one iteration, got "
                    f"{getattr(args, name)}."
                )
        columns = train_dataset.column_names
        if not {"chosen", "rejected", "completions", "prompt_ids"} & set(columns):
            raise ValueError(
                "The train dataset must have `prompt` and `completion` (the real answer) or `messages` to run all "
                "iterations. To run one, it must have `prompt`, `chosen` (the real answer) and `rejected` (the "
                f"generated one). Got the columns {sorted(columns)}. Rename or add the columns."
            )
        if "completions" in columns:
            raise ValueError(
                "The train dataset must have `chosen` (the real answer) and `rejected` (the generated one) for one "
                f"iteration of SPIN, got the columns {sorted(columns)}. Split `completions` into these two."
            )

    @staticmethod
    def _check_reference(args: SPINConfig | None, model: Any, ref_model: str | PreTrainedModel | None) -> None:
        kind = getattr(args, "reference", "previous")
        if ref_model is not None and kind == "previous":
            raise ValueError(
                "`ref_model` must not be set with reference='previous', where the model before training is the "
                "reference. Remove `ref_model`, or set reference='initial'."
            )
        if kind == "initial" and (ref_model is None or ref_model is model):
            raise ValueError(
                "`ref_model` must be the model that started the first iteration, another object than `model`, with "
                "reference='initial' on rows of `chosen` and `rejected`. Pass it, or set reference='previous'."
            )

    def __getattr__(self, name: str):
        if self.__dict__.get("_self_play") is not None and not name.startswith("__"):
            raise AttributeError(
                f"{type(self).__name__} has no {name!r} before `train()` has run the iterations: no model is loaded "
                "until then."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # All iterations

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        Train on pairs, as `Trainer.train`; or play all iterations, where the rows are those of SFT.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                As in [`~transformers.Trainer`]. In self-play `True` goes on in `args.output_dir`, and there are no
                checkpoints to name.

        Returns:
            `TrainOutput` of `Trainer`; in self-play that of the iteration whose model was taken (of iteration 0 where
            the start is kept), with the figures of all models as `metrics`.
        """
        if self._played is not None:
            raise self._nothing_left("train")
        if self._self_play is None:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        output, model_to_take, last = self._self_play.play_for_trainer(resume_from_checkpoint)
        self._self_play, self._played = None, model_to_take
        CandidateTrainer.__init__(self, **last)  # the model to take, to look at, save or publish; no reference
        return output

    def _nothing_left(self, what: str) -> RuntimeError:
        return RuntimeError(
            f"The iterations are played, and there is nothing left to {what} here: `model` is the model to take, its "
            f"figures are in {self.args.output_dir}/spin.json. To play further, construct a trainer with a larger "
            "`num_iterations` and call `train(resume_from_checkpoint=True)`."
        )

    def evaluate(self, *args, **kwargs):
        if self._played is not None:
            raise self._nothing_left("evaluate")
        return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        if self._played is not None:
            raise self._nothing_left("predict")
        return super().predict(*args, **kwargs)

    def push_to_hub(self, *args, **kwargs):
        if self._played is not None:
            raise RuntimeError(
                "The output folder holds the models of all iterations. Push the final one: `hf upload NAME "
                f"{self._played}`."
            )
        return super().push_to_hub(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`; after self-play the model to take is copied from where it is, whole."""
        if self._played is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            shutil.copytree(
                self._played,
                output_dir or self.args.output_dir,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("checkpoint-*", "reference_*.npz", "manifest.json", STAGE_MARKER),
            )

    # One iteration

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        beta, loss = self.args.beta, self.args.loss
        real_row, generated_row, _ = best_and_worst(inputs)
        log_ratios = logps.sums - inputs["reference_logps"]
        real, generated = log_ratios[real_row], log_ratios[generated_row]
        losses = spin_loss(real, generated, beta=beta, loss=loss)
        self.check_first_loss(losses, log_ratios, logps.lengths)
        with torch.no_grad():
            margins = beta * (real - generated)
            metrics = {
                "rewards/chosen": beta * real,
                "rewards/rejected": beta * generated,
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
            }
            if loss == "hinge":
                metrics["hinge/active"] = (margins < 1).float()
            for name, rows in (("chosen", real_row), ("rejected", generated_row)):
                metrics[f"logps/{name}"] = logps.sums[rows]
                metrics[f"lengths/{name}"] = logps.lengths[rows].float()
        return losses, metrics

    def _look_at_logs(self, logs: dict[str, float]) -> None:
        super()._look_at_logs(logs)
        args = self.args
        pairs = args.train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        self._warn(self._told_apart.look(logs, self.state.global_step, pairs))

    @property
    def expected_first_loss(self) -> str:
        return "ln 2 = 0.6931" if self.args.loss == "sigmoid" else "1"
