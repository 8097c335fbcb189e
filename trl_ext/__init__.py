"""SLiC-HF and its neighbours for TRL: drop-in subclasses of `trl.DPOTrainer`.

Public names are imported on first use, so that `import trl_ext` and a recipe's `--help` stay fast. `shared_prefixes`
and `per_token_logps` need torch and transformers alone; all others need TRL.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC_NAMES = {
    "CLICKConfig": "methods.click.config",
    "CLICKTrainer": "methods.click.trainer",
    "CandidateCollator": "data.collator",
    "CandidateConfig": "trainers.candidate_config",
    "CandidateTrainer": "trainers.candidate_trainer",
    "IPOConfig": "methods.ipo.config",
    "IPOTrainer": "methods.ipo.trainer",
    "RRHFConfig": "methods.rrhf.config",
    "RRHFTrainer": "methods.rrhf.trainer",
    "SLiCConfig": "methods.slic.config",
    "SLiCTrainer": "methods.slic.trainer",
    "SPINConfig": "methods.spin.config",
    "SPINTrainer": "methods.spin.trainer",
    "enable_prefix_sharing": "execution.prefix_sharing",
    "per_token_logps": "execution.shared_prefixes",
    "share_prefixes": "execution.prefix_sharing",
    "shared_prefixes": "execution.shared_prefixes",
}
_WITHOUT_TRL = ("per_token_logps", "shared_prefixes")
__all__ = [
    "CLICKConfig",
    "CLICKTrainer",
    "CandidateCollator",
    "CandidateConfig",
    "CandidateTrainer",
    "IPOConfig",
    "IPOTrainer",
    "RRHFConfig",
    "RRHFTrainer",
    "SLiCConfig",
    "SLiCTrainer",
    "SPINConfig",
    "SPINTrainer",
    "enable_prefix_sharing",
    "per_token_logps",
    "share_prefixes",
    "shared_prefixes",
]

if TYPE_CHECKING:
    from .data.collator import CandidateCollator
    from .execution.prefix_sharing import enable_prefix_sharing, share_prefixes
    from .execution.shared_prefixes import per_token_logps, shared_prefixes
    from .methods.click.config import CLICKConfig
    from .methods.click.trainer import CLICKTrainer
    from .methods.ipo.config import IPOConfig
    from .methods.ipo.trainer import IPOTrainer
    from .methods.rrhf.config import RRHFConfig
    from .methods.rrhf.trainer import RRHFTrainer
    from .methods.slic.config import SLiCConfig
    from .methods.slic.trainer import SLiCTrainer
    from .methods.spin.config import SPINConfig
    from .methods.spin.trainer import SPINTrainer
    from .trainers.candidate_config import CandidateConfig
    from .trainers.candidate_trainer import CandidateTrainer


def __getattr__(name: str):
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}; it offers {', '.join(__all__)}")
    if name not in _WITHOUT_TRL:
        import_module("._trl", __name__).check_trl_version()
    return getattr(import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
