"""The classes of every method in the package's table, by the method's folder; and their trainers in a few words."""

from importlib import import_module

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from tests.support.training import Losses
from trl_ext.methods import METHODS

TRAINERS, CONFIGS = (
    {
        name: getattr(import_module(f"trl_ext.methods.{name}.{kind.lower()}"), method.classes + kind)
        for name, method in METHODS.items()
    }
    for kind in ("Trainer", "Config")
)


def all_but(*names: str) -> dict[str, tuple[type, type]]:
    """Trainer and config of every method but these."""
    return {name: (TRAINERS[name], CONFIGS[name]) for name in METHODS if name not in names}


OWN = {name: (TRAINERS[name], CONFIGS[name]) for name, method in METHODS.items() if method.is_public}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
OF_THE_TRAINER = ("eval_dataset", "ref_model", "peft_config", "data_collator", "callbacks", "compute_metrics")


def build(method, model, tokenizer, rows, config_kwargs, **settings):
    """A trainer; `settings` are those of its config and arguments of the trainer itself."""
    trainer, config = TRAINERS[method], CONFIGS[method]
    kwargs = {key: settings.pop(key) for key in OF_THE_TRAINER if key in settings}
    return trainer(
        model=model,
        args=config(**{**config_kwargs, **settings}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=tokenizer,
        **kwargs,
    )


def run(method, model_dir, tokenizer, rows, config_kwargs, resume=None, **settings):
    """A finished training of the model in a folder, and what it logged."""
    losses = Losses()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    trainer = build(method, model, tokenizer, rows, {}, callbacks=[losses], **{**config_kwargs, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer, losses
