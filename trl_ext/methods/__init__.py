"""The methods, a folder for each, and the table that lists of methods are made from. Imports nothing of a method."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """
    A method of this package.

    Attributes:
        folder (`str`): here, with `trainer.py` and `config.py`.
        label (`str`): what readers see.
        classes (`str`): what the names of its classes begin with: `SLiC` for `SLiCTrainer` and `SLiCConfig`.
        recipe (`str`): its script in `recipes/`, without `.py`.
        is_public (`bool`): whether `trl_ext` exports the classes. The others are TRL's trainers, with the rows and
            checkpoints of this package.
    """

    folder: str
    label: str
    classes: str
    recipe: str
    is_public: bool = False

    @property
    def page(self) -> str:
        """Its page in the documentation, relative to `docs/`."""
        return f"methods/{self.folder.replace('_', '-')}.md"


METHODS = {
    method.folder: method
    for method in (
        Method("slic", "SLiC-HF", "SLiC", "slic", is_public=True),
        Method("rrhf", "RRHF", "RRHF", "rrhf", is_public=True),
        Method("spin", "SPIN", "SPIN", "spin", is_public=True),
        Method("click", "CLICK", "CLICK", "train_click", is_public=True),
        Method("dpo", "DPO", "DPO", "dpo"),
        Method("ipo", "IPO", "IPO", "ipo", is_public=True),
        Method("orpo", "ORPO", "ORPO", "orpo"),
        Method("kto", "KTO", "KTO", "kto"),
        Method("best_of_n", "best-of-n", "BestOfN", "best_of_n"),
        Method("reward", "reward model", "Reward", "reward"),
        Method("rloo", "RLOO", "RLOO", "rl"),
    )
}
