"""The base of the trainers whose loss compares with a reference, the model as it was before training."""

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from ..data.prepare import PREPARED_FEATURES
from .candidate_config import CandidateConfig
from .candidate_trainer import CandidateTrainer
from .reference import Reference, ReferenceCollator, refuse_fsdp

# how far from the reference's a log-likelihood may be before anything was trained, in nats over the square root of its
# number of tokens, as a quadratic mean over a batch: batches of other shapes round differently. The value for half
# precision is a guess on the wide side: a run stopped without cause could not go on
ROUNDING = {"float32": 1e-3, "half": 0.1}


class ReferencedTrainer(CandidateTrainer):
    """
    The reference goes over the data once, sharing prompts, when the trainer is constructed, and no copy of it is kept:
    batches have `reference_logps` `(N,)`, float32, in nats. A method is a subclass with [`~CandidateTrainer`]'s
    `loss_from_logps`, which calls [`~ReferencedTrainer.check_first_loss`], and with `expected_first_loss`.

    Args:
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*): the reference; by default the model itself
            as it is, whatever is on disk under its name, with its adapters as they are.
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics, callbacks,
        optimizers, quantization_config, peft_config:
            As in [`CandidateTrainer`].

    Raises:
        NotImplementedError: a stream, or FSDP.
        TypeError, ValueError: see [`CandidateTrainer`]; before any weight is loaded.
    """

    _has_reference = False

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: str | PreTrainedModel | None = None,
        args: CandidateConfig | None = None,
        data_collator: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
    ):
        evaluated = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        for name, dataset in (("train_dataset", train_dataset), *(("eval_dataset", one) for one in evaluated)):
            self._refuse_stream(dataset, name)
        if ref_model is not None and ref_model is model:
            raise ValueError(
                f"`ref_model` must be another object than `model`, which {type(self).__name__} trains. Remove "
                "`ref_model`: the reference is then the model as it is now."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        # attention of some architectures keeps its dropout in a number of its own
        for module in self.model.modules():
            for name, value in list(vars(module).items()):
                if "dropout" in name and isinstance(value, float):
                    setattr(module, name, 0.0)
        self.data_collator = ReferenceCollator(self.data_collator)
        self._checks_first_loss = ref_model is None
        with Reference(self, ref_model) as reference:
            self.train_dataset = reference.add_to(self.train_dataset, "train")
            if isinstance(self.eval_dataset, dict):
                self.eval_dataset = {name: reference.add_to(rows, name) for name, rows in self.eval_dataset.items()}
            elif self.eval_dataset is not None:
                self.eval_dataset = reference.add_to(self.eval_dataset, "eval")
        self._has_reference = True

    def _refuse_stream(self, dataset: Any, name: str) -> None:
        if isinstance(dataset, IterableDataset):
            raise NotImplementedError(
                f"`{name}` must be a `Dataset` for {type(self).__name__}, got a stream: the reference reads all rows "
                "before the first step."
            )

    def _check_arguments(self, args, model, ref_model, train_dataset, compute_metrics, peft_config) -> None:
        super()._check_arguments(args, model, ref_model, train_dataset, compute_metrics, peft_config)
        refuse_fsdp(args, type(self).__name__)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        self._refuse_stream(dataset, dataset_name)
        dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if not self._has_reference or "reference_logps" in dataset.column_names:
            return dataset
        # rows given to `evaluate` or `predict`
        if self.state.global_step > 0 or not self._checks_first_loss:
            raise ValueError(
                f"The rows of the {dataset_name} dataset have no reference log-probabilities: the reference ran once, "
                "before training. Pass these rows as `eval_dataset` to the constructor."
            )
        with Reference(self, None) as reference:
            return reference.add_to(dataset, dataset_name)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = [*PREPARED_FEATURES, "reference_logps"]

    @torch.no_grad()
    def check_first_loss(self, losses: torch.Tensor, log_ratios: torch.Tensor, lengths: torch.Tensor) -> None:
        """
        Stop unless the first batch says that training starts from the reference.

        Args:
            losses (`torch.Tensor` of shape `(B,)`): of the batch.
            log_ratios (`torch.Tensor` of shape `(N,)`): log-likelihood under the model less that under the reference.
            lengths (`torch.Tensor` of shape `(N,)`): scored tokens.

        Raises:
            RuntimeError: log-likelihoods differ from the reference's by more than rounding explains.
        """
        if not (self.model.training and self.state.global_step == 0 and self._checks_first_loss):
            return
        self._checks_first_loss = False
        half = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        allowed = ROUNDING["half" if half else "float32"]
        distance = (log_ratios / lengths.sqrt()).square().mean().sqrt().item()
        if not distance <= allowed:
            raise RuntimeError(
                f"The first loss is {losses.mean().item():.4f}, where {self.expected_first_loss} is right: the "
                f"log-likelihoods are {distance:.4f} nats / sqrt(tokens) off the reference's, and rounding explains "
                f"{allowed}. So the reference is not the model that training starts from. Either the weights were "
                "changed after the trainer was constructed, which is when the reference is computed: construct it "
                "anew. Or the model computes something else in training: look for dropout, noise on the embeddings "
                "(`neftune_noise_alpha`) or another source of chance, and switch it off."
            )

    @property
    def expected_first_loss(self) -> str:
        """The loss of a model that is its own reference, for a message."""
        raise NotImplementedError
