"""What prefix sharing is compared with, in tests and benchmarks: the padded forward as TRL runs it."""

from trl import DPOConfig, DPOTrainer

from trl_ext import RRHFConfig, RRHFTrainer, SLiCConfig, SLiCTrainer
from trl_ext.playground.model import byte_level_tokenizer


def padded_dpo_trainer(model, train_dataset, settings, **arguments) -> DPOTrainer:
    """TRL's own trainer, nothing of ours."""
    return DPOTrainer(
        model=model,
        args=DPOConfig(**settings),
        train_dataset=train_dataset,
        processing_class=byte_level_tokenizer(),
        **arguments,
    )


def padded_slic_trainer(model, train_dataset, settings, **arguments) -> SLiCTrainer:
    """Our trainer over TRL's padded forward: K rows per prompt, which TRL has no trainer for."""
    return SLiCTrainer(
        model=model,
        args=SLiCConfig(**settings, prefix_sharing=False),
        train_dataset=train_dataset,
        processing_class=byte_level_tokenizer(),
        **arguments,
    )


def padded_rrhf_trainer(model, train_dataset, settings, **arguments) -> RRHFTrainer:
    """The same with RRHF's loss."""
    return RRHFTrainer(
        model=model,
        args=RRHFConfig(**settings, prefix_sharing=False),
        train_dataset=train_dataset,
        processing_class=byte_level_tokenizer(),
        **arguments,
    )
