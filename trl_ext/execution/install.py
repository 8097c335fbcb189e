"""
The one place where a model's `forward` is replaced: by what this package adds to it, in one order, however often and
whenever parts are added and removed.
"""

import functools
from collections.abc import Callable
from itertools import count
from types import MethodType
from typing import Any

from torch import nn

# Innermost first: each part of a batch that is run in parts shares prefixes by itself, and models are compared at the
# positions that sharing has left.
ORDER = ("kl_head", "sharing", "chunking")
_KEYS = count()


def add_layer(model: nn.Module, name: str, layer: Callable[..., Any]) -> None:
    """
    Put a layer around a model's `forward`, in its place among those that are there, in place of one of the same name.

    Once accelerate has wrapped the model for mixed precision, layers that are there stay beneath its wrapper, and more
    join them. A deep copy of the model has the same layers and runs its own weights.

    Args:
        model (`torch.nn.Module`): the model, unwrapped. It went through TRL's `add_fused_lm_head`.
        name (`str`): one of `ORDER`.
        layer (`Callable`): `layer(model, call, *args, **kwargs)`, where `call(*args, **kwargs)` is what it wraps. It
            should not hold the model.
    """
    wrapper = getattr(model.forward, "__func__", model.forward)
    while wrapper is not None and not hasattr(wrapper, "layers_key"):
        wrapper = getattr(wrapper, "__wrapped__", None)  # accelerate's, for mixed precision
    if wrapper is not None:
        key = wrapper.layers_key
    else:  # no layer yet, or another of TRL's LM heads on top of them
        key, original = next(_KEYS), model.forward
        own = getattr(original, "__self__", None) is model
        inner = original.__func__ if own else lambda _module, *args, **kwargs: original(*args, **kwargs)

        @functools.wraps(type(model).forward)
        def forward(module, *args, **kwargs):
            call = functools.partial(inner, module)
            layers = module._forward_layers[key]
            for layer in filter(None, map(layers.get, ORDER)):
                call = functools.partial(layer, module, call)
            return call(*args, **kwargs)

        forward.layers_key, forward.replaces = key, (forward, original)
        vars(model).setdefault("_forward_layers", {})[key] = {}
        model.forward = MethodType(forward, model)
    model._forward_layers[key][name] = layer


def remove_layer(model: nn.Module, name: str, layer: Callable[..., Any]) -> None:
    """Undo [`add_layer`]. With its last layer, `forward` becomes what it was, unless somebody has wrapped it since."""
    for layers in vars(model).get("_forward_layers", {}).values():
        if layers.get(name) is layer:
            del layers[name]
    ours, original = getattr(model.forward, "replaces", (None, None))
    if ours is not None and getattr(model.forward, "__func__", None) is ours:
        if not model._forward_layers[ours.layers_key]:
            del model._forward_layers[ours.layers_key]
            model.forward = original
