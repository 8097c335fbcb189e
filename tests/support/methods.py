"""The classes of every method in the package's table, by the method's folder."""

from importlib import import_module

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
