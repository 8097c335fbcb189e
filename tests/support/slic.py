"""A SLiCTrainer of a few words."""

from tests.support.data import PAIRS
from trl_ext import SLiCConfig, SLiCTrainer

REFERENCES = ["four", PAIRS[1]["rejected"], "It is down.", "yes", "nay", "word", "ta ta", "forty-two"]


def build(model, tokenizer, dataset, config_kwargs, **settings):
    trainer_keys = ("eval_dataset", "ref_model", "peft_config", "data_collator", "callbacks", "compute_metrics")
    trainer_kwargs = {key: settings.pop(key) for key in trainer_keys if key in settings}
    return SLiCTrainer(
        model=model,
        args=SLiCConfig(**{**config_kwargs, **settings}),
        train_dataset=dataset,
        processing_class=tokenizer,
        **trainer_kwargs,
    )
