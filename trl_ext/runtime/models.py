"""Models in folders and on the Hub: found or refused in one line, adapters merged into a model to start from."""

import copy
import functools
import hashlib
import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.logging import get_logger
from huggingface_hub import snapshot_download
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification, PeftConfig
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import find_adapter_config_file

from .._trl import loaded_whole
from .model_folders import has_tokenizer, refuse_without_tokenizer
from .processes import process_state
from .trust import explain_remote_code, weights_only

logger = get_logger(__name__)

ADAPTER_FILE = "adapter_config.json"
# what is downloaded of an adapter
ADAPTER_PATTERNS = ("*.json", "adapter_model.*", "*.model", "*.jinja", "*.txt", "*.tiktoken")


def refuse_missing_model(name: str | Path, called: str = "`model`") -> None:
    """
    Raise a `FileNotFoundError` of one line unless `name` is a model's or an adapter's folder, or can be a name of the
    Hub.
    """
    path = Path(name).expanduser()
    must_be = f"{called} must be a model's folder or a name of the Hub, got {str(name)!r}"
    if path.is_file():
        raise FileNotFoundError(f"{must_be}, which is a file. Pass the folder that holds it.")
    if path.is_dir():
        if not any((path / file).is_file() for file in ("config.json", ADAPTER_FILE)):
            raise FileNotFoundError(
                f"{must_be}, a folder with neither a `config.json` nor an `{ADAPTER_FILE}`. Pass the folder in which "
                "the model was saved."
            )
    elif str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"{must_be}, and there is no such folder. Correct the path.")


def is_adapter(model: Any, revision: str | None = None) -> bool:
    """Whether `model` is the folder or the Hub name of a PEFT adapter."""
    return adapter_folder(model, revision) is not None


def adapter_folder(model: Any, revision: str | None = None) -> Path | None:
    """The folder of a PEFT adapter, given by its path or by its name on the Hub; `None` of any other model."""
    if not isinstance(model, str | Path):
        return None
    path = Path(model)
    if path.is_dir():
        return path if (path / ADAPTER_FILE).is_file() else None
    if str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        return None
    return _downloaded_adapter(str(model), revision)


@functools.cache
def _downloaded_adapter(name: str, revision: str | None) -> Path | None:
    """The folder of an adapter of the Hub, downloaded once; `None` if there is none of that name."""
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(ADAPTER_PATTERNS)))
    except (OSError, ValueError):  # whatever loads the model says what is wrong with the name
        return None


def adapter_config(folder: str | Path) -> dict[str, Any]:
    """The config of an adapter's folder, with its `base_model_name_or_path`, text or `None`."""
    file = Path(folder) / ADAPTER_FILE
    try:
        adapter = json.loads(file.read_text(encoding="utf-8"))
        base = adapter.get("base_model_name_or_path")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} must be an adapter's config in JSON: {error}. Correct it, or use another model."
        ) from None
    if not isinstance(base, str | None):
        raise ValueError(f"`base_model_name_or_path` in {file} must be a name, got {base!r:.80}. Correct it.")
    return {**adapter, "base_model_name_or_path": base}


def whole_model(model: str | Path, revision: str | None = None) -> tuple[str, str | None]:
    """Name and revision of a model, or of the base of an adapter."""
    folder = adapter_folder(model, revision)
    if folder is None:
        return str(model), revision
    adapter = adapter_config(folder)
    base = adapter["base_model_name_or_path"]
    if base is None:
        raise ValueError(f"`base_model_name_or_path` in {folder / ADAPTER_FILE} must be a name, got None. Set it.")
    refuse_missing_model(base, f"`base_model_name_or_path` in {folder / ADAPTER_FILE}")
    return base, adapter.get("revision") or "main"


def load_config(model: str, args: Any) -> PreTrainedConfig:
    """
    The config of the model that a trainer with these settings will load, without its weights; an adapter's base's.

    Raises:
        FileNotFoundError, ValueError: there is no such model; in one line.
    """
    refuse_missing_model(model)
    names = ("revision", "trust_remote_code", "cache_dir", "token", "subfolder", "attn_implementation")
    init_kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    name, init_kwargs["revision"] = whole_model(model, init_kwargs.get("revision"))
    kwargs = {key: value for key, value in init_kwargs.items() if key in names}
    with explain_remote_code():
        try:
            return AutoConfig.from_pretrained(name, **kwargs)
        except OSError as error:
            raise _not_found(model, error) from error


def load_processor(
    model: str | Path,
    *,
    auto_class: type = AutoProcessor,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """
    The tokenizer, or the processor, of a model; of an adapter's base where the adapter's folder has none.

    Raises:
        FileNotFoundError: there is none; in one line.
    """
    folder = adapter_folder(model, revision)
    if folder is not None:
        model, revision = (folder, None) if has_tokenizer(folder) else whole_model(folder)
    if not Path(model).is_dir():
        refuse_missing_model(model)
    else:
        refuse_without_tokenizer(model)
    with explain_remote_code():
        try:
            return auto_class.from_pretrained(model, revision=revision or "main", trust_remote_code=trust_remote_code)
        except OSError as error:
            raise _not_found(model, error) from error


def _not_found(model: str | Path, error: OSError) -> FileNotFoundError:
    return FileNotFoundError(
        f"`model` must be a model's folder or a name of the Hub, got {str(model)!r}: there is no folder of that name "
        f"here, and from the Hub: {_in_one_line(error)}. Correct the name."
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(". ")


# Adapters


def merged(adapter: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    An adapter on its base, merged, as an ordinary model, loaded whole on this process.

    Args:
        adapter (`str` or `Path`): the folder or the Hub name of a PEFT adapter.
        kwargs: for `from_pretrained`; `dtype` is float32 unless it is given.

    Raises:
        FileNotFoundError, ValueError: its base is not there, or it cannot be merged.
    """
    folder = adapter_folder(adapter, kwargs.pop("revision", None))
    config = adapter_config(folder)
    whole_model(folder)
    kind = config.get("peft_type")
    if str(kind).endswith("_TUNING") and kind != "LN_TUNING":
        raise ValueError(
            f"An adapter to merge must not add tokens, got {adapter} of type {kind}. Pass it to a trainer as a "
            "`PeftModel`, or use a LoRA adapter."
        )
    model_class = AutoPeftModelForCausalLM
    if config.get("task_type") == "SEQ_CLS":
        model_class, kwargs = AutoPeftModelForSequenceClassification, {"num_labels": 1, **kwargs}
    kwargs = {"dtype": torch.float32, **kwargs}
    with loaded_whole(), explain_remote_code(), weights_only():
        model = model_class.from_pretrained(str(folder), **kwargs).merge_and_unload()
    repair_generation_config(model)
    return model


def save_merged(adapter: str | Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Save an adapter merged into its base in a folder, as an ordinary model in float32, without a tokenizer."""
    merged(adapter, trust_remote_code=trust_remote_code).save_pretrained(folder)


def copy_model(source: str | Path, folder: Path) -> None:
    """Copy a model's weights, configs and code to a new folder, without its tokenizer."""
    folder.mkdir(parents=True)
    for pattern in ("config.json", "generation_config.json", "*.safetensors*", "pytorch_model*", "*.py"):
        for file in Path(source).glob(pattern):
            shutil.copyfile(file, folder / file.name)


def merge_adapter(adapter: str | Path, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Save an adapter merged into its base in a folder, as an ordinary model in float32, with the tokenizer."""
    save_merged(adapter, folder, trust_remote_code=trust_remote_code)
    load_processor(adapter, auto_class=AutoTokenizer, trust_remote_code=trust_remote_code).save_pretrained(folder)


def model_to_start_from(model: Any, args: Any, *, gets_adapter: bool) -> Any:
    """
    The model to start from: an adapter is merged into its base, in `start` in the output folder, once; every
    other model is returned as it is.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): what was given to a trainer.
        args ([`~transformers.TrainingArguments`]): its settings.
        gets_adapter (`bool`): whether an adapter of its own is trained on it.
    """
    folder = adapter_folder(model, (getattr(args, "model_init_kwargs", None) or {}).get("revision"))
    if folder is None:
        return model
    start, state = Path(args.output_dir) / "start", PartialState()
    if state.is_main_process:
        files = sorted(path for path in folder.glob("adapter_*") if path.is_file())
        digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
        mark = start / "merged_from.json"
        made_of = {"adapter": str(model), "sha256": digest}
        if not mark.is_file() or json.loads(mark.read_text()) != made_of:
            unfinished = start.with_name("start.unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            merge_adapter(folder, unfinished, trust_remote_code=args.trust_remote_code)
            (unfinished / mark.name).write_text(json.dumps(made_of))
            shutil.rmtree(start, ignore_errors=True)
            unfinished.rename(start)
    state.wait_for_everyone()
    what = (
        "A new adapter is trained on it"
        if gets_adapter
        else "All its weights are trained; to train a new adapter on it, set `peft_config` (recipes: `--use_peft`)"
    )
    logger.log(
        logging.WARNING,
        f"{model} is an adapter: it was merged into its base {whole_model(folder)[0]}, and training starts from the "
        f"result, {start}. {what}.",
    )
    return str(start)


# Generation configs


def repair_generation_config(model: PreTrainedModel) -> None:
    """
    Reset what `save_pretrained` would refuse in a model's generation config, after the training, and warn.

    What is reset has no effect as it stands (a `temperature` without `do_sample`), or is invalid.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _problem(config) is None:
        return
    defaults, reset = vars(GenerationConfig()), {}
    while (problem := _problem(config)) is not None:
        named = (name for name in re.findall(r"`(\w+)`", problem) if name in defaults and name not in reset)
        name = next((name for name in named if getattr(config, name) != defaults[name]), None)
        if name is None:
            break
        reset[name] = getattr(config, name)
        setattr(config, name, defaults[name])
    if _problem(config) is not None:  # nothing helps: keep which tokens begin, end and pad
        kept = {name: value for name, value in vars(config).items() if name.endswith("token_id")}
        reset |= {name: value for name, value in config.to_diff_dict().items() if name not in kept}
        model.generation_config = GenerationConfig(**kept)
    logger.log(
        logging.WARNING,
        "The model's generation config could not be saved: transformers refuses settings that have no effect or are "
        f"invalid. Reset: {', '.join(f'{name}={value!r}' for name, value in reset.items())}.",
    )


def _problem(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def without_weights(model: Any, args: Any, peft_config: PeftConfig | None = None) -> nn.Module | None:
    """The modules of a model, on the meta device; `None` where they cannot be built, as of code from the Hub."""
    if isinstance(model, str):
        config = load_config(model, args)
        model_class = getattr(transformers, (config.architectures or ["?"])[0], None)
        if peft_config is not None and peft_config.task_type == "SEQ_CLS":
            model_class = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    else:
        config, model_class = copy.deepcopy(model.config), type(model)
    if model_class is None:
        return None
    try:
        with torch.device("meta"):  # not `from_config`, which under ZeRO-3 makes weights
            return model_class(config)
    except (AttributeError, ImportError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # loading it says what is wrong


def load_causal_lm(model_name_or_path: str | Path, **model_init_kwargs) -> PreTrainedModel:
    """A model, or an adapter on its base, whole on this process's device, without gradients."""
    from transformers import AutoModelForCausalLM

    device = process_state().device
    kwargs = {"trust_remote_code": False}  # at `None` transformers would ask on the terminal
    kwargs |= {key: value for key, value in model_init_kwargs.items() if value is not None}
    kwargs.setdefault("dtype", torch.float32 if device.type == "cpu" else "auto")
    with explain_remote_code(), weights_only():
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, **kwargs)
    return for_inference(model, device)


def for_inference(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """
    A model on a device, without gradients and dropout. On CUDA, cuDNN's attention is switched off: it prepares itself
    for each new length, and a sampled answer has a new one at every token.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(model_name_or_path: str | Path, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; `hub` may have `revision` and `trust_remote_code`, which is off by default."""
    return load_processor(model_name_or_path, auto_class=AutoTokenizer, **hub)


def load_model_config(model_name_or_path: str | Path, *, revision: str = "main", trust_remote_code: bool = False):
    refuse_missing_model(model_name_or_path)
    name, revision = whole_model(model_name_or_path, revision)
    with explain_remote_code():
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def context_window(model_name_or_path: str | Path, **hub) -> int | None:
    """Longest sequence in tokens that the model was made for; `None` if its config does not say."""
    return getattr(load_model_config(model_name_or_path, **hub).get_text_config(), "max_position_embeddings", None)


def sampling_dtype(model_name_or_path: str | Path, dtype: Any = None, **hub) -> str:
    """
    The name of the dtype a model is sampled in: the given one; without one float32 on a CPU, else the checkpoint's, as
    for `"auto"`. `"auto"` comes back only where the checkpoint's config does not say.
    """
    if dtype is None and process_state().device.type == "cpu":
        return "float32"
    if dtype in (None, "auto"):
        config = load_model_config(model_name_or_path, **hub)
        dtype = config.dtype or config.get_text_config().dtype or "auto"
    return str(dtype).removeprefix("torch.")
