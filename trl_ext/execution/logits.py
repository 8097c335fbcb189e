"""Changes that architectures make to their logits after the LM head."""


def logit_transform(text_config) -> tuple[float, float | None]:
    """
    What an architecture does to its logits after the LM head: a factor, and a soft cap or `None`.

    The names are those TRL's fused LM head looks for; the KL has to see the same logits.
    """
    scale = next(
        (
            getattr(text_config, name)
            for name in ("logit_scale", "output_multiplier", "lm_head_multiplier")
            if getattr(text_config, name, None) is not None
        ),
        None,
    )
    divisor = getattr(text_config, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if text_config.model_type == "hyperclovax" else 1 / divisor
    return 1.0 if scale is None else scale, getattr(text_config, "final_logit_softcapping", None)
