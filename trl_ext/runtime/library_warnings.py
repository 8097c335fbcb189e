"""
Silence warnings of libraries that tell a recipe's user nothing: defaults of TRL and of this package set them off, on
every run. Importing this module does it, so that it can come before the libraries, in a recipe and in its stages.
"""

import logging
import re
import warnings

# TRL has the old names, whatever the user says
RENAMED = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "is_gradient_checkpointing",
    "gradient_checkpointing_enable", "gradient_checkpointing_disable",
)  # fmt: skip
PYTHON_WARNINGS = (  # whole messages
    *(f"`{old}` is deprecated and will be removed in v6. Use `{old.replace('gradient', 'activation')}` instead."
      for old in RENAMED),
    # transformers' default
    "'pin_memory' argument is set as true but no accelerator is found, then device pinned memory won't be used.",
)  # fmt: skip
LOGGED = {  # logger: whole messages
    "DeepSpeed": ("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",),
    "trl.experimental.orpo.orpo_trainer": (
        "When using DPODataCollatorWithPadding, you should set `remove_unused_columns=False` in your "
        "TrainingArguments we have set it for you, but you should do it yourself in the future.",
    ),
    "transformers.configuration_utils": ("`torch_dtype` is deprecated! Use `dtype` instead!",),
    "transformers.modeling_utils": ("`torch_dtype` is deprecated! Use `dtype` instead!",),
}


def _silence() -> None:
    for message in PYTHON_WARNINGS:
        warnings.filterwarnings("ignore", message=f"{re.escape(message)}$")
    for name, messages in LOGGED.items():
        logging.getLogger(name).addFilter(lambda record, messages=messages: _without_rank(record) not in messages)


def _without_rank(record: logging.LogRecord) -> str:
    """A message without what Accelerate puts in front."""
    return re.sub(r"^\[RANK \d+\] ", "", record.getMessage())


_silence()
