"""Parallelism that splits one sequence or one layer over devices, which is refused, and FSDP."""

import os

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, is_initialized
from transformers import PreTrainedModel, TrainingArguments

KINDS = ("tp", "cp", "sp")


def sequence_split(args: TrainingArguments, model: str | PreTrainedModel | None = None) -> str | None:
    """
    The setting under which a process would not compute its sequences whole, and where it stands; `None` if there is
    none. Tensor, context and sequence parallelism do that; DDP, ZeRO and FSDP do not.

    Looked at: an `Accelerator` that exists, `args.parallelism_config`, what `accelerate launch` put into the
    environment, DeepSpeed's config, what a model by name is to be loaded with, and what one given was.

    Args:
        args ([`~transformers.TrainingArguments`]): the trainer's settings.
        model (`str` or [`~transformers.PreTrainedModel`], *optional*): the trainer's model.
    """
    for place, config in _parallelism_configs(args):
        for kind in KINDS:
            size = getattr(config, f"{kind}_size", None) or 1
            if size > 1:
                return f"{kind}_size={size} ({place})"
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None:
        given = plugin.deepspeed_config
        tensor_parallel = given.get("tensor_parallel") or {}
        sizes = {
            "tensor_parallel.autotp_size": tensor_parallel.get("autotp_size"),
            "sequence_parallel_size": given.get("sequence_parallel_size"),
        }
        for name, size in sizes.items():
            if (size or 1) > 1:
                return f"{name}={size} (DeepSpeed's config)"
    if isinstance(model, str):
        init_kwargs = getattr(args, "model_init_kwargs", None) or {}
        loaded = {"tp_plan": init_kwargs.get("tp_plan"), "tp_size": init_kwargs.get("tp_size")}
        distributed = init_kwargs.get("distributed_config")
        place = "model_init_kwargs"
    else:
        loaded = {"tp_size": getattr(model, "tp_size", None)}
        distributed = getattr(getattr(model, "config", None), "distributed_config", None)
        place = "what the model was loaded with"
    for name in ("tp_plan", "tp_size", "pp_size", "ep_size"):
        value = loaded.get(name) or (
            distributed.get(name) if isinstance(distributed, dict) else getattr(distributed, name, None)
        )
        if value and value != 1:
            return f"{name}={value!r} ({place})"
    return None


def _parallelism_configs(args: TrainingArguments) -> list[tuple[str, ParallelismConfig]]:
    found = []
    if is_initialized():
        found.append(("the Accelerator that exists already", AcceleratorState().parallelism_config))
    found.append(("parallelism_config", getattr(args, "parallelism_config", None)))
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
        found.append(("accelerate's config file, or its command line", ParallelismConfig()))
    return [(place, config) for place, config in found if config is not None]


def asks_for_fsdp(args: TrainingArguments) -> str | None:
    """What asks for FSDP, the settings or the launcher; `None` if nothing does."""
    if args.fsdp:
        return f"fsdp={args.fsdp!r}"
    if _is_set("ACCELERATE_USE_FSDP"):
        return "A launch with FSDP (distributed_type: FSDP)"
    return None


def refuse_sharding_that_would_not_be(args: TrainingArguments) -> None:
    """
    Raise `ValueError` where Accelerate would quietly run DDP, in which every process holds the whole model, though
    sharding is asked for: FSDP on a CPU, and DeepSpeed with ACCELERATE_USE_CPU.
    """
    fsdp = asks_for_fsdp(args)
    if fsdp is not None and (args.use_cpu or not torch.accelerator.is_available()):
        raise ValueError(
            f"{fsdp} needs GPUs. On a CPU Accelerate would run DDP without a warning, with the whole model on every "
            "process. Launch with accelerate_configs/cpu.yaml for DDP or zero3.yaml for sharded weights, or use GPUs."
        )
    if _is_set("ACCELERATE_USE_DEEPSPEED") and _is_set("ACCELERATE_USE_CPU"):
        raise ValueError(
            "ACCELERATE_USE_CPU must not be set with DeepSpeed: Accelerate would run DDP without a warning. Unset it. "
            "On a machine with an accelerator, set `use_cpu=True` and DS_ACCELERATOR=cpu instead."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes", "on")
