"""The base of the methods' trainers: K completions to a prompt, and what that changes in `trl.DPOTrainer`."""

import contextlib
import copy
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from accelerate.data_loader import SkipBatchSampler
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalPrediction
from trl import DPOTrainer

from .._trl import get_config_model_id, without_reference_model
from ..data.collator import CandidateCollator
from ..data.limits import Limits
from ..data.prepare import PREPARED_FEATURES, PreparationReport, prepare_dataset
from ..data.rows import RowOptions
from ..data.tokens import tokenizer_of
from ..execution.chunking import add_chunking, chunk_sizes
from ..execution.forward import score_completions
from ..execution.prefix_sharing import enable_prefix_sharing, refuse_unless_shareable
from ..logps import CompletionLogps, completion_logps
from ..metrics import MetricAccumulator
from ..runtime.models import load_processor, model_to_start_from, refuse_missing_model
from ..runtime.parallelism import refuse_sharding_that_would_not_be, sequence_split
from ..runtime.trust import explain_remote_code, weights_only
from .adapter_checks import (
    check_adapter,
    check_chunking,
    check_peft_model,
    keeps_base_weights,
    refuse_drifting_reference,
)
from .batches import _check_batch, _keep_gradients_of_quantized_layers
from .candidate_config import CandidateConfig
from .checks import check_sampling_strategy, with_lengths
from .logged_metrics import LoggedMetrics
from .resumable import ResumableTrainer

logger = logging.getLogger(__name__)


class CandidateTrainer(LoggedMetrics, ResumableTrainer, DPOTrainer):
    """
    A [`~trl.DPOTrainer`] for losses over the log-likelihoods of K completions of one prompt.

    It takes over what K completions change: preparing rows (`data/`), collating them (`data/collator.py`), the model
    call (`execution/`), the mean over prompts, and the metrics. A method is a subclass with a config class and one
    function, [`~CandidateTrainer.loss_from_logps`].

    Unlike `DPOTrainer`:

    - No reference model is built, loaded or run unless `args.uses_reference_model` says so.
    - Data is prepared and checked before any weight is loaded.
    - The loss is the mean over the prompts of the whole optimiser step, counted once over all micro-batches and
      processes. TRL averages the means of the micro-batches, which weighs prompts unequally when the last ones are
      smaller. Prompts that only fill up the last batch of a distributed run count neither in the loss nor in metrics.
    - Metrics are sums divided once, over all processes, when they are logged. `log` is therefore a collective call, as
      `Trainer`'s own logging of the loss is. With several eval sets each has its own (`eval_<name>_logps/chosen`).
    - `compute_metrics` is refused: it needs the full logits, which are never built.
    - `args.accelerator_config.dispatch_batches` is set to False, for lists as for streams.

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
        callbacks, optimizers, quantization_config, peft_config:
            As in [`~trl.DPOTrainer`], with rows as described in `data/`. A custom `data_collator` must return
            the batch that [`CandidateCollator`] documents.

    Raises:
        TypeError: `args` is not of the trainer's config class.
        ValueError: unusable rows or settings, before any weight is loaded.
        NotImplementedError: something this trainer does not do (images, `compute_metrics`, sharding of one sequence
            over several devices).
    """

    shares_by_config = True  # `share_prefixes` leaves these trainers alone

    # the loss that `compute_loss` returns is divided by the number of prompts of the whole step already
    loss_is_scaled_for_ga = True

    config_class: ClassVar[type[CandidateConfig]] = CandidateConfig
    # with several eval sets, metrics are named after each
    metrics_of_each_eval_set = True
    # parts of the loss as they are logged, without their weights: the setting that is the weight, if there is one
    loss_terms: ClassVar[dict[str, str | None]] = {}
    # for the model card, which would name DPO's
    _name = "trl_ext"
    _tag_names = ["trl"]
    _paper: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",  # noqa: F821
        ref_model: PreTrainedModel | None = None,
        args: CandidateConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset
        | IterableDataset
        | DatasetDict
        | IterableDatasetDict
        | dict[str, Dataset | IterableDataset]
        | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: "PeftConfig | None" = None,  # noqa: F821
    ):
        if model is None:
            raise ValueError("`model` must be a name, a folder or a model object, got None.")
        if isinstance(model, str):
            refuse_missing_model(model)
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = self.config_class(f"{model_id.rstrip('/').split('/')[-1]}-{self._name}")
        self._check_arguments(args, model, ref_model, train_dataset, compute_metrics, peft_config)

        if processing_class is None:
            revision = (args.model_init_kwargs or {}).get("revision")
            processing_class = load_processor(model_id, revision=revision, trust_remote_code=args.trust_remote_code)
        tokenizer = tokenizer_of(processing_class)
        pad_token = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
        if pad_token is None:
            raise ValueError(
                "The tokenizer must have a padding token or an end token, got neither. Set `tokenizer.pad_token`."
            )
        if pad_token not in tokenizer.get_vocab():
            raise ValueError(
                f"`pad_token` must be in the tokenizer's vocabulary, got {pad_token!r}. Set it to a token of the "
                "vocabulary, or remove it."
            )
        tokenizer.pad_token = pad_token
        # Accelerate's dispatcher, its default for streams, cuts every tensor of a batch to the number of prompts; ours
        # have a row per completion. So each process reads its own batches.
        args.accelerator_config.dispatch_batches = False

        self.data_reports: dict[str, PreparationReport] = {}
        self._limits = Limits(model, args)
        train_dataset = self._prepare(train_dataset, processing_class, args, "train", self._row_options(args))
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: self._prepare_dataset(dataset, processing_class, args, name)
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            eval_dataset = self._prepare_dataset(eval_dataset, processing_class, args, "eval")

        if data_collator is None:
            data_collator = CandidateCollator(
                pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of
            )

        model = model_to_start_from(model, args, gets_adapter=peft_config is not None)
        checkpointing_kwargs = copy.copy(args.activation_checkpointing_kwargs)
        with contextlib.ExitStack() as stack:
            if not args.uses_reference_model:
                stack.enter_context(without_reference_model(policy_is_loaded_by_trl=isinstance(model, str)))
            stack.enter_context(explain_remote_code())
            stack.enter_context(weights_only())
            stack.enter_context(args.hidden_from_trl())
            stack.enter_context(keeps_base_weights(model))
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        for name in filter(vars(self).__contains__, args.redeclared_fields()):  # TRL's copies of settings, `beta` say
            setattr(self, name, getattr(args, name))
        _keep_gradients_of_quantized_layers(self.model)
        if not args.uses_reference_model:
            # TRL copies the adapter of a PeftModel to serve as reference; drop it before it gets into checkpoints
            if is_peft_model(self.model) and "ref" in self.model.peft_config:
                self.model.delete_adapter("ref")
            if self.ref_model is not None:
                raise RuntimeError(
                    f"{type(self).__name__} has no reference model, and this version of TRL built one. Report it with "
                    "the version of TRL."
                )
        else:
            self._prepare_reference_model()
        self.prefix_sharing = None
        if args.prefix_sharing is not False:
            enable_prefix_sharing(self, args.prefix_sharing, self_check=args.check_prefix_sharing)
        if args.max_completions_per_forward is not None:
            # For PEFT under ZeRO-3, `DPOTrainer` sets 'use_reentrant': True, whatever the user says, in the dict that
            # `Trainer` reads. Then each part would have a backward pass of its own, and ZeRO-3 would take the first
            # for all; and running the parts again is what makes ZeRO-3 work without it.
            args.activation_checkpointing_kwargs = args.gradient_checkpointing_kwargs = checkpointing_kwargs
            policy = self.model.get_base_model() if is_peft_model(self.model) else self.model
            add_chunking(policy, multiple_of=args.pad_to_multiple_of or 1)
        self._metric_sums = {"train": MetricAccumulator(), "eval": MetricAccumulator()}
        self._eval_prefix = "eval"
        self._terms_are_compared = False

    def _prepare_reference_model(self) -> None:
        """What a method has to do to its reference model, where it has one."""

    def _check_arguments(self, args, model, ref_model, train_dataset, compute_metrics, peft_config) -> None:
        """Refuse what cannot be honoured, before anything expensive happens."""
        trainer = type(self).__name__
        if not isinstance(args, self.config_class):
            raise TypeError(
                f"`args` must be a {self.config_class.__name__}, got {type(args).__name__}. A "
                f"{self.config_class.__name__} takes the same fields."
            )
        if train_dataset is None:
            raise ValueError("`train_dataset` must be a `Dataset` or an `IterableDataset`, got None.")
        if not isinstance(train_dataset, Dataset | IterableDataset):
            raise TypeError(
                f"`train_dataset` must be a `Dataset` or an `IterableDataset`, got {type(train_dataset).__name__}. Of "
                "a `DatasetDict` pass one split."
            )
        if args.accelerator_config.dispatch_batches:
            raise ValueError(
                "`dispatch_batches` of `accelerator_config` must be False, got True: one process would cut the batch "
                "by rows, and separate a prompt's completions. Remove it."
            )
        if args.enable_jit_checkpoint:
            raise ValueError(
                "`enable_jit_checkpoint` must be False, got True: each process would save at another step, and wait "
                f"for the others forever. Remove it. {trainer} saves on SIGTERM itself, at one step on all processes."
            )
        split = sequence_split(args, model)
        if split is not None:
            raise NotImplementedError(
                f"{trainer} does not support {split}: its loss needs each sequence whole on one device. Remove it, "
                "and use DDP, ZeRO or FSDP. For long sequences set activation_checkpointing=True and "
                "max_completions_per_forward=1."
            )
        refuse_sharding_that_would_not_be(args)
        check_peft_model(model, args, has_reference=ref_model is not None, uses_reference=args.uses_reference_model)
        check_sampling_strategy(args, train_dataset)
        if ref_model is not None and not args.uses_reference_model:
            raise ValueError(f"`ref_model` must be None for {trainer}, whose loss has no reference model. Remove it.")
        if compute_metrics is not None:
            raise NotImplementedError(
                f"`compute_metrics` must be None for {trainer}: it takes full logits, which are never computed here. "
                "Use the logged metrics, or a `TrainerCallback` with `on_evaluate`."
            )
        if args.prefix_sharing is True:
            refuse_unless_shareable(model, args, peft_config)
        if args.max_completions_per_forward is not None:
            check_chunking(args, model, peft_config)
        if args.uses_reference_model and ref_model is None:
            refuse_drifting_reference(model, peft_config, "The reference model")
        check_adapter(model, args, peft_config)

    # Rows and batches

    def _row_options(self, args: CandidateConfig) -> RowOptions:
        """What this trainer wants of its rows; a method that wants something else overrides it."""
        return RowOptions(max_length=args.max_length)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """Prepare rows to evaluate on: training rows come here too, from TRL's constructor, but prepared already."""
        options = dataclasses.replace(self._row_options(args), best_only=False)
        return self._prepare(dataset, processing_class, args, dataset_name, options)

    def _prepare(self, dataset, processing_class, args, dataset_name, options):
        options = dataclasses.replace(options, eos_token=tokenizer_of(processing_class).eos_token)
        if options.eos_token is None:
            warnings.warn(
                "The tokenizer has no end token: plain-text answers get none, and the model does not learn to stop. "
                "Set `tokenizer.eos_token`.",
                stacklevel=3,
            )
        dataset, report = prepare_dataset(
            dataset,
            processing_class,
            options,
            name=dataset_name,
            num_proc=args.dataset_num_proc,
            on_invalid_row=args.on_invalid_row,
            keep_columns=not args.remove_unused_columns,
        )
        if report is not None:
            self.data_reports[dataset_name] = report
        return self._limits.check(dataset, dataset_name, tokenizer_of(processing_class), options.max_length)

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            self._signature_columns = list(PREPARED_FEATURES)

    def _get_train_sampler(self, train_dataset=None):
        return super()._get_train_sampler(with_lengths(train_dataset or self.train_dataset, self.args))

    def _get_eval_sampler(self, eval_dataset):
        return super()._get_eval_sampler(with_lengths(eval_dataset, self.args))

    def compute_ref_log_probs(self, model, inputs):
        raise NotImplementedError(
            f"{type(self).__name__} has no reference log-probabilities of two halves, as DPOTrainer has."
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The micro-batches of one optimiser step, and how many prompts they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._ignore_repeated_prompts(batches[-1])
        num_prompts = sum(batch["prompt_weights"].sum() for batch in batches).to(device)
        return batches, self.accelerator.reduce(num_prompts, reduction="sum")

    def _ignore_repeated_prompts(self, batch: dict[str, torch.Tensor]) -> None:
        """
        Give weight 0 to the prompts that accelerate repeats to fill up the last batches of a distributed run.

        The gathered last batch holds the real prompts first, in the order of the processes, as
        `Accelerator.gather_for_metrics` relies on too.
        """
        _check_batch(batch)  # training and evaluation both pass here before they read anything
        if self.accelerator.num_processes == 1 or not self.accelerator.gradient_state.end_of_dataloader:
            return
        remainder = self._rows_of_last_batch()
        if remainder > 0:
            weights = batch["prompt_weights"]
            num_real = remainder - self.accelerator.process_index * len(weights)
            weights[max(num_real, 0) :] = 0

    def _rows_of_last_batch(self) -> int:
        """
        Rows of the data in the last batch, over all processes; 0 if it is full, -1 if that is unknown, as of a stream.

        In the epoch in which a run is resumed, some batches are left out by a sampler without a `batch_size`, for
        which Accelerate (1.15) takes what is known for unknown.
        """
        state = self.accelerator.gradient_state
        loader = state.active_dataloader
        if state.remainder >= 0 or not isinstance(getattr(loader, "batch_sampler", None), SkipBatchSampler):
            return state.remainder
        sampler = loader.batch_sampler.batch_sampler
        return len(loader.dataset) % (sampler.batch_size * (1 if sampler.split_batches else sampler.num_processes))

    # Loss

    def loss_from_logps(
        self, logps: CompletionLogps, inputs: dict[str, torch.Tensor], outputs: Any
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """
        The method's loss.

        Args:
            logps ([`CompletionLogps`]): log-likelihood and length of each of the N rows.
            inputs (`dict[str, torch.Tensor]`): the batch, see [`CandidateCollator`].
            outputs: what the model returned, for methods that need more than log-likelihoods.

        Returns:
            `tuple`: losses `(B,)`, one per prompt, and metrics by name: a tensor `(B,)` to be averaged over prompts,
            or a pair of them, numerators and denominators.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `loss_from_logps`.")

    def forward_batch(self, model: nn.Module, inputs: dict[str, torch.Tensor], **model_kwargs: Any):
        """The model call for one batch; a method that needs more from the model overrides it."""
        if self.args.max_completions_per_forward is not None:
            model_kwargs["chunk_sizes"] = self._chunk_sizes(inputs)
        return score_completions(model, inputs, **model_kwargs)

    def _chunk_sizes(self, inputs: dict[str, torch.Tensor]) -> list[int] | None:
        """How many rows to run at a time; `None` if they all may."""
        sizes = chunk_sizes(inputs["prompt_index"].tolist(), self.args.max_completions_per_forward)
        num_chunks = len(sizes)
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            # weights that are spread over processes are collected by all of them together, each time they are used
            counts = self.accelerator.gather(torch.tensor([num_chunks], device=self.accelerator.device))
            num_chunks = int(counts.max())
        return None if num_chunks == 1 else sizes + [0] * (num_chunks - len(sizes))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ):
        """
        The mean loss over prompts.

        Args:
            model (`torch.nn.Module`): the model, wrapped or not.
            inputs (`dict[str, torch.Tensor]`): a batch of [`CandidateCollator`], on the model's device.
            return_outputs (`bool`, defaults to `False`): also return what the model returned (no logits).
            num_items_in_batch (`torch.Tensor`, *optional*): prompts of the whole optimiser step, over all
                micro-batches and processes. `None`: the mean over this batch.

        Returns:
            The scalar loss, or `(loss, outputs)`.
        """
        _check_batch(inputs)
        outputs = self.forward_batch(
            model, inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {})
        )
        logps = completion_logps(outputs.log_probs, inputs["completion_mask"])
        losses, metrics = self.loss_from_logps(logps, inputs, outputs)

        weights = inputs["prompt_weights"]
        if num_items_in_batch is None:
            scale = 1 / weights.sum().clamp(min=1)
        else:
            scale = self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over processes
        loss = (losses * weights).sum() * scale
        if self.aux_loss_enabled:
            # the router's balancing loss has no prompts to average over: weigh it by this micro-batch's share of them
            share = weights.sum() * scale
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss * share
            metrics["aux_loss"] = outputs.aux_loss.detach().expand_as(weights)
            losses = losses.detach() + self.router_aux_loss_coef * outputs.aux_loss.detach()
        if not self.model.training:
            # `Trainer` repeats a batch's mean by the batch size set, which is too often for the last batch of a stream
            metrics["loss"] = losses
        self._accumulate(metrics, inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def _prepare_input(self, data):
        # under DeepSpeed `Trainer` casts what is floating to the model's dtype: scores that differ by less than
        # bfloat16 can tell would become equal
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        self._ignore_repeated_prompts(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        return loss, None, None

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        """
        The metrics of [`~Trainer.evaluate`] on a dataset, raw or prepared. There are no predictions to return:
        `Trainer` would collect the full logits, which are never built.
        """
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, metric_key_prefix)
        output = super().predict(test_dataset, ignore_keys, metric_key_prefix)
        output.metrics.update(self._reduce_metrics("eval"))
        return output
