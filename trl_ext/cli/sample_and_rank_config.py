"""Settings of the recipe that makes ranked lists or pairs from prompts."""

from dataclasses import dataclass, field

from trl import ModelConfig

from ..runs.config import RankingConfig


@dataclass
class SampleAndRankConfig(RankingConfig):
    """
    What to make of the candidates: the fields of [`RankingConfig`], and

    Parameters:
        output_dir (`str`): folder for the data.
        seed (`int`, *optional*, defaults to `42`): of tournaments and pairs.
        trust_remote_code (`bool`, *optional*, defaults to `False`): run code that comes with the model.
    """

    output_dir: str = field(default="runs/candidates", metadata={"help": "Folder for the data."})
    seed: int = field(default=42, metadata={"help": "Of tournaments and pairs."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        self.check()


@dataclass
class WholeModelConfig(ModelConfig):
    """
    TRL's arguments of a model, with another default.

    Parameters:
        dtype (`str`, *optional*): float32 on a CPU, elsewhere the type the weights were saved in.
    """

    dtype: str | None = field(
        default=None, metadata={"help": "Type of the weights; default: float32 on a CPU, else as they were saved."}
    )
