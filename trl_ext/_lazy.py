"""Public names of a package, imported on first use, so that importing the package stays fast."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """
    `__getattr__`, `__dir__` and `__all__` of a package.

    Args:
        package (`str`): its `__name__`.
        modules (`Mapping[str, str]`): module of the package that defines a public name, by that name.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it offers {', '.join(modules)}")
        return getattr(import_module(f".{modules[name]}", package), name)

    return get, lambda: sorted(modules), list(modules)
