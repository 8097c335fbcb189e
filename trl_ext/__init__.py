"""SLiC-HF and its neighbours for TRL: drop-in subclasses of `trl.DPOTrainer`.

Public names are imported on first use, so that `import trl_ext` and a recipe's `--help` stay fast. `shared_prefixes`
and `per_token_logps` need torch and transformers alone; all others need TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .methods import METHODS as _METHODS

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    **{
        f"{method.classes}{kind}": f"methods.{method.folder}.{kind.lower()}"
        for method in _METHODS.values()
        if method.is_public
        for kind in ("Config", "Trainer")
    },
    "CandidateCollator": "data.collator",
    "CandidateConfig": "trainers.candidate_config",
    "CandidateTrainer": "trainers.candidate_trainer",
    "enable_prefix_sharing": "execution.prefix_sharing",
    "per_token_logps": "execution.shared_prefixes",
    "share_prefixes": "execution.prefix_sharing",
    "shared_prefixes": "execution.shared_prefixes",
}
_WITHOUT_TRL = ("per_token_logps", "shared_prefixes")
__all__ = sorted(_PUBLIC_NAMES)

# for editors and type checkers, which do not run what is above
if TYPE_CHECKING:
    from .data.collator import CandidateCollator as CandidateCollator
    from .execution.prefix_sharing import enable_prefix_sharing as enable_prefix_sharing
    from .execution.prefix_sharing import share_prefixes as share_prefixes
    from .execution.shared_prefixes import per_token_logps as per_token_logps
    from .execution.shared_prefixes import shared_prefixes as shared_prefixes
    from .methods.click.config import CLICKConfig as CLICKConfig
    from .methods.click.trainer import CLICKTrainer as CLICKTrainer
    from .methods.ipo.config import IPOConfig as IPOConfig
    from .methods.ipo.trainer import IPOTrainer as IPOTrainer
    from .methods.rrhf.config import RRHFConfig as RRHFConfig
    from .methods.rrhf.trainer import RRHFTrainer as RRHFTrainer
    from .methods.slic.config import SLiCConfig as SLiCConfig
    from .methods.slic.trainer import SLiCTrainer as SLiCTrainer
    from .methods.spin.config import SPINConfig as SPINConfig
    from .methods.spin.trainer import SPINTrainer as SPINTrainer
    from .trainers.candidate_config import CandidateConfig as CandidateConfig
    from .trainers.candidate_trainer import CandidateTrainer as CandidateTrainer


def __getattr__(name: str):
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}; it offers {', '.join(__all__)}")
    if name not in _WITHOUT_TRL:
        import_module("._trl", __name__).check_trl_version()
    return getattr(import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
