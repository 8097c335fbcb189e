"""SLiC-HF and its neighbours for TRL: drop-in subclasses of `trl.DPOTrainer`.

Public names are imported on first use, so that `import trl_ext` and a recipe's `--help` stay fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._trl import check_trl_version

__version__ = "0.1.0"

check_trl_version()

_PUBLIC_NAMES = {
    "CLICKConfig": "click_config",
    "CLICKTrainer": "click_trainer",
    "CandidateCollator": "collators",
    "CandidateConfig": "candidate_config",
    "CandidateTrainer": "candidate_trainer",
    "IPOConfig": "ipo_config",
    "IPOTrainer": "ipo_trainer",
    "RRHFConfig": "rrhf_config",
    "RRHFTrainer": "rrhf_trainer",
    "SLiCConfig": "slic_config",
    "SLiCTrainer": "slic_trainer",
    "SPINConfig": "spin_config",
    "SPINTrainer": "spin_trainer",
    "enable_prefix_sharing": "prefix_sharing",
    "share_prefixes": "prefix_sharing",
}
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
    "share_prefixes",
]

if TYPE_CHECKING:
    from .candidate_config import CandidateConfig
    from .candidate_trainer import CandidateTrainer
    from .click_config import CLICKConfig
    from .click_trainer import CLICKTrainer
    from .collators import CandidateCollator
    from .ipo_config import IPOConfig
    from .ipo_trainer import IPOTrainer
    from .prefix_sharing import enable_prefix_sharing, share_prefixes
    from .rrhf_config import RRHFConfig
    from .rrhf_trainer import RRHFTrainer
    from .slic_config import SLiCConfig
    from .slic_trainer import SLiCTrainer
    from .spin_config import SPINConfig
    from .spin_trainer import SPINTrainer


def __getattr__(name: str):
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module 'trl_ext' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *__all__])
