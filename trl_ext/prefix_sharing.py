"""Prefix sharing for a trainer: the public switch over `execution/`."""

import contextlib
from collections.abc import Iterator

from trl import DPOTrainer

from ._trl import after_fused_lm_head
from .execution.sharing import PrefixSharing


def enable_prefix_sharing(
    trainer: DPOTrainer, prefix_sharing: str | bool = "auto", *, self_check: bool = False
) -> PrefixSharing | None:
    """
    Make a [`~trl.DPOTrainer`] compute each prompt once for all its completions, with the same results.

    Losses, metrics, sampling order, step counts and checkpoints stay TRL's: a batch is rearranged inside the model's
    forward, and the per-token outputs are put back where TRL expects them. The reference model, if there is one,
    is treated the same. Works with every loss type, WPO weighting, `ld_alpha`, PEFT, gradient checkpointing, DDP and
    DeepSpeed. The trainers of this package do it by themselves (`prefix_sharing` of their configs).

    With dropout (LoRA's, say) the noise is drawn for other shapes, and completions of a prompt share the noise in it.

    What the constructor computes with `precompute_ref_log_probs=True` comes before this call: construct the trainer
    inside [`share_prefixes`] to have that shared as well.

    Args:
        trainer ([`~trl.DPOTrainer`]):
            The trainer, before or between calls of `train` and `evaluate`.
        prefix_sharing (`str` or `bool`, *optional*, defaults to `"auto"`):
            `"auto"` rearranges the batches for which that is expected to be faster, and leaves models alone that
            cannot share, with one warning that says why. `True` rearranges every batch, and what cannot be is an
            error. `False` undoes an earlier call.
        self_check (`bool`, *optional*, defaults to `False`):
            Run the first rearranged batch both ways, compare per-token log-probabilities and gradients, and stop with
            the difference if they disagree.

    Returns:
        [`PrefixSharing`], also kept as `trainer.prefix_sharing`: `statistics` tells what was saved, `remove()` undoes
        this call. `None` with `prefix_sharing=False`.

    Raises:
        TypeError: not a `DPOTrainer`.
        ValueError: `prefix_sharing=True` and the model cannot share.

    Example:
    ```python
    from trl import DPOTrainer
    from trl_ext import enable_prefix_sharing

    trainer = DPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", train_dataset=dataset)
    enable_prefix_sharing(trainer)
    trainer.train()
    ```
    """
    if not isinstance(trainer, DPOTrainer):
        raise TypeError(
            f"enable_prefix_sharing got a {type(trainer).__name__}. It knows how `trl.DPOTrainer` calls its models; "
            "pass one, or a subclass."
        )
    if getattr(trainer, "prefix_sharing", None) is not None:
        trainer.prefix_sharing.remove()
        trainer.prefix_sharing = None
    if prefix_sharing is False:
        return None
    sharing = PrefixSharing(prefix_sharing, self_check)
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            sharing.install(trainer.accelerator.unwrap_model(model))
    trainer.prefix_sharing = sharing
    return sharing


@contextlib.contextmanager
def share_prefixes(prefix_sharing: str | bool = "auto", *, self_check: bool = False) -> Iterator[PrefixSharing]:
    """
    Share prefixes in every `DPOTrainer` that is constructed inside the block, from its first forward on.

    Needed only where the constructor itself runs the model, which it does with `precompute_ref_log_probs=True`.

    Args:
        prefix_sharing, self_check:
            As in [`enable_prefix_sharing`].

    Example:
    ```python
    with trl_ext.share_prefixes():
        trainer = DPOTrainer(model, args=DPOConfig(precompute_ref_log_probs=True), train_dataset=dataset)
    trainer.train()
    ```
    """
    sharing = PrefixSharing(prefix_sharing, self_check)
    with after_fused_lm_head(sharing.install):
        yield sharing
