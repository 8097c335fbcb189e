"""Checks of adapters before training, shared by every trainer in this package."""

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel, PeftType, get_peft_model
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from ..execution.support import adapter_reason
from ..runtime.models import load_config, without_weights

# initialisations of LoRA that leave the base weights alone and begin with a product of 0
STARTS_AT_BASE = (True, "gaussian", "eva", "orthogonal", "mica")


# adapters that compute something else than the base at the start, as PEFT initialises them by default
STARTS_ELSEWHERE = ("C3A", "UNILORA", "VBLORA")


# initialisations of LoRA that change the base weights by something that loading the adapter does not repeat
NOT_REPEATED = ("pissa_niter", "corda", "lora_ga")


def check_adapter(model: Any, args: Any, peft_config: PeftConfig | None, *, fused_head: bool = True) -> None:
    """
    Refuse an adapter that does not fit the model, before its weights are loaded: modules that are not there, an
    architecture without default modules, tokens trained in a tied LM head, and an initialisation that changes the base
    weights in a way that loading the adapter does not repeat.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): what was given to the trainer.
        args: the trainer's settings.
        peft_config ([`~peft.PeftConfig`], *optional*): the adapter it will get.
        fused_head (`bool`): whether log-probabilities are computed from the LM head's weight.
    """
    if isinstance(model, PeftModel):
        if fused_head:
            _refuse_trained_head(model)
        return
    if peft_config is None:
        return
    init = getattr(peft_config, "init_lora_weights", True)
    if isinstance(init, str) and init.startswith(NOT_REPEATED):
        raise ValueError(
            f"`init_lora_weights` must be an initialisation that loading the adapter repeats, got {init!r}: random "
            "numbers or data change the base weights, which the saved adapter would not fit. Set 'pissa', or `True`, "
            "PEFT's default."
        )
    twin = without_weights(model, args, peft_config)
    if twin is None:
        return
    config = copy.deepcopy(peft_config)
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the others compute with weights
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(twin, config)
    except ValueError as error:
        all_linear = "Set `target_modules='all-linear'` (recipes: `--lora_target_modules all-linear`)"
        if "Please specify `target_modules`" in str(error):
            raise ValueError(
                f"PEFT has no default `target_modules` for {type(twin).__name__}. {all_linear}, or name modules."
            ) from None
        if ("arget modules" in str(error) and "not found" in str(error)) or "No modules were targeted" in str(error):
            raise ValueError(
                f"`target_modules` must name modules of {type(twin).__name__}, got {config.target_modules}. "
                f"{all_linear}, or name others."
            ) from None
        return  # PEFT says the rest itself
    except (NotImplementedError, RuntimeError, TypeError):  # not everything can be built without weights
        return
    if fused_head:
        _refuse_trained_head(adapted)


def _refuse_trained_head(model: nn.Module) -> None:
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper | TrainableTokensLayer):
        raise ValueError(
            "An adapter must not train single tokens (`trainable_token_indices`, `TrainableTokensConfig`) on tied "
            "embeddings: it trains the LM head with them, and log-probabilities are computed from the head's weight "
            "alone. Use a model with `tie_word_embeddings=False`, or train the embeddings whole "
            "(`modules_to_save=['embed_tokens']`)."
        )


def check_peft_model(model: Any, args: Any, *, has_reference: bool, uses_reference: bool) -> None:
    """Refuse PEFT objects for which TRL would make no reference, the wrong one, or one it cannot make."""
    if isinstance(model, PeftMixedModel):
        raise NotImplementedError("`model` must be a PeftModel with one adapter, got a PeftMixedModel.")
    if not isinstance(model, PeftModel):
        return
    adapters = list(model.peft_config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"The PeftModel (adapters {adapters}) must have trainable weights, got none. Load it with "
            "`is_trainable=True`."
        )
    if has_reference:
        return
    if "default" not in adapters:
        raise ValueError(
            f"The PeftModel must have an adapter called 'default', got {adapters}. Load it with "
            "`adapter_name='default'`."
        )
    if "ref" in adapters:
        raise ValueError(
            f"The PeftModel must not have an adapter called 'ref', got {adapters}: TRL adds one, and an earlier "
            "trainer has left its own. Remove it with `model.delete_adapter('ref')`."
        )
    if model.peft_config["default"].peft_type == PeftType.ADALORA:
        raise ValueError(
            "The PeftModel must not be AdaLoRA, which takes no second adapter: TRL adds one. Pass the base model, "
            "and the AdaLoraConfig as `peft_config`."
        )
    if uses_reference and model.active_adapters != ["default"]:
        raise ValueError(
            f"The active adapter of the PeftModel must be 'default' alone, got {model.active_adapters} of {adapters}: "
            "TRL copies 'default' as reference. Activate 'default' alone."
        )


def refuse_drifting_reference(model: Any, peft_config: PeftConfig | None, what: str) -> None:
    """
    Refuse an adapter with which the model, its adapter switched off, is not what training starts from.

    Args:
        model: what was given to the trainer; of a `PeftModel` TRL takes a copy of the adapter as the reference.
        peft_config ([`~peft.PeftConfig`], *optional*): the adapter it will get.
        what (`str`): what uses the reference, for the message.

    Raises:
        ValueError: the initialisation changes the base weights or what the model computes, or base weights are
            trained.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    for config in [*configs, *([] if peft_config is None else [peft_config])]:
        kind = getattr(config.peft_type, "value", config.peft_type)
        remedy = "Set another initialisation (`True` is PEFT's default)"
        reason = None
        if getattr(config, "bias", "none") not in ("none", None, False):
            reason = f"bias={config.bias!r} trains biases of the base model"
            remedy = "Set bias='none'"
        elif config is peft_config:
            init = getattr(config, "init_lora_weights", True)
            others = [name for name in vars(config) if name.startswith("init_") and getattr(config, name) is False]
            if init not in STARTS_AT_BASE:
                reason = f"init_lora_weights={init!r} changes the base weights or what the model computes at the start"
            elif others:
                reason = f"{others[0]}=False changes what the model computes at the start"
            elif config.is_prompt_learning:
                reason = f"a {kind} adapter changes what the model computes at the start"
                remedy = "Use LoRA"
            elif kind in STARTS_ELSEWHERE and getattr(config, "init_weights", None) is not True:
                reason = f"a {kind} adapter changes what the model computes at the start"
                remedy = "Use LoRA"
        if reason is not None:
            raise ValueError(
                f"{what} takes the model with its adapter switched off for the model that training starts from, and "
                f"{reason}. {remedy}, or pass that model as `ref_model`."
            )


@contextlib.contextmanager
def keeps_base_weights(model: Any) -> Iterator[None]:
    """
    Within, TRL may copy a `PeftModel`'s adapter without initialising the copy, which changes the base weights for
    PiSSA, OLoRA and the like. The copy is written over in any case.
    """
    configs = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
    kept = [(config, config.init_lora_weights) for config in configs if hasattr(config, "init_lora_weights")]
    for config, init in kept:
        config.init_lora_weights = init if init in STARTS_AT_BASE else True
    try:
        yield
    finally:
        for config, init in kept:
            config.init_lora_weights = init


def check_chunking(args: Any, model: Any, peft_config: PeftConfig | None) -> None:
    """Refuse `max_completions_per_forward` where the parts of a batch do not add up to the whole."""
    args.refuse_reentrant_checkpointing()  # again: the dict may have been changed since
    given = f"max_completions_per_forward={args.max_completions_per_forward}"
    for adapter in [peft_config, *getattr(model, "peft_config", {}).values()]:
        reason = None if adapter is None else adapter_reason(adapter)
        if reason is not None:
            raise NotImplementedError(
                f"{given} cuts a batch by rows, which this adapter does not support: {reason}. Remove it, or use LoRA."
            )
    config = load_config(model, args) if isinstance(model, str) else model.config
    config = config.get_text_config()
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    if hasattr(config, "output_router_logits") and coefficient != 0:
        raise NotImplementedError(
            f"{given} runs a batch in parts, which changes the balancing loss of a mixture of experts. Remove it, or "
            "set router_aux_loss_coef=0."
        )
