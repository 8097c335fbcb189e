"""The settings of rounds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from ..runtime.settings import check_field_types
from ..scoring.build import check_scorers
from ..scoring.config import ScorerConfig
from ..scoring.pairs import PAIR_RULES, check_pair_rule


@dataclass
class RankingConfig(ScorerConfig):
    """
    How candidates are ranked: the fields of [`ScorerConfig`], and

    Parameters:
        rewards (`list[str]`, *optional*): what scores: `file.py:function` or `package.module:function` with TRL's
            reward-function signature, or a sequence-classification model (a folder or a name of the Hub). Several are
            added up.
        reward_weights (`list[float]`, *optional*): one for each of `rewards`; 1 by default.
        ranker (`str`, *optional*): instead of `rewards` a pairwise judge, a function or a model in the same notation
            (see [`load_judge`]): the answers to a prompt meet in a knock-out tournament, K - 1 comparisons.
        mix_in (`list[str]`, *optional*): columns of the dataset whose answers join the sampled ones, such as `chosen
            rejected` (RRHF mixes both in).
        pair_rule (`str`, *optional*): make pairs of the ranked answers, by this rule of [`make_pairs`].
        pairs_per_prompt (`int`, *optional*): most pairs of one prompt.
        positive_above (`float`, *optional*, defaults to `0.5`): for `pair_rule="likelihood_near"`: answers with a
            higher score are positive.

    Raises:
        ValueError: a setting that would do nothing.
    """

    rewards: list[str] | None = field(
        default=None,
        metadata={"help": "What scores: file.py:function, package.module:function, or a reward model. Added up."},
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "One weight per reward; default 1."})
    ranker: str | None = field(
        default=None,
        metadata={"help": "A pairwise judge instead of rewards: answers meet in a knock-out tournament."},
    )
    mix_in: list[str] | None = field(
        default=None, metadata={"help": "Columns whose answers join the sampled ones, such as: chosen rejected."}
    )
    pair_rule: str | None = field(
        default=None,
        metadata={"help": "Make pairs: " + ", ".join(PAIR_RULES) + ".", "choices": list(PAIR_RULES)},
    )
    pairs_per_prompt: int | None = field(default=None, metadata={"help": "Most pairs of one prompt."})
    positive_above: float = field(
        default=0.5, metadata={"help": "For likelihood_near: answers with a higher score are positive."}
    )

    def check(self) -> None:
        """Refuse settings that contradict each other. A single name counts as a list of one."""
        check_field_types(self)
        for name in ("rewards", "mix_in"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, [getattr(self, name)])
        if bool(self.rewards) == bool(self.ranker):
            raise ValueError(
                ("Both `rewards` and `ranker` are" if self.ranker else "Neither `rewards` nor `ranker` is")
                + " given. Set either `rewards` to functions (file.py:function) and reward models, or `ranker` to a "
                "pairwise judge."
            )
        if self.pair_rule is None and self.pairs_per_prompt is not None:
            raise ValueError(
                f"`pairs_per_prompt` needs `pair_rule`, got {self.pairs_per_prompt} without it. Set `pair_rule` too."
            )
        if self.pair_rule != "likelihood_near" and self.positive_above != 0.5:
            raise ValueError(
                f"`positive_above` needs `pair_rule` 'likelihood_near', got {self.positive_above} with "
                f"{self.pair_rule!r}. Remove it."
            )
        if self.pair_rule is not None:
            try:
                check_pair_rule(self.pair_rule, max_pairs=self.pairs_per_prompt, positive_above=self.positive_above)
            except ValueError as error:  # it has other names for them
                given = ("pair_rule", "pairs_per_prompt", "positive_above")
                raise ValueError(f"{', '.join(f'{n}={getattr(self, n)!r:.40}' for n in given)}: {error}") from None

    def check_scorers(self, columns: Sequence[str]) -> None:
        """Find out what scoring rows with these columns would fail on, without loading a weight."""
        check_scorers(
            self.rewards or (), self.reward_weights, judge=self.ranker, columns=columns, **self.scorer_options()
        )


@dataclass
class RoundsConfig(RankingConfig):
    """
    Sampling, ranking and training in rounds: the fields of [`RankingConfig`], and

    Parameters:
        num_rounds (`int`, *optional*, defaults to `0`):
            0: train once, on the dataset as it is. From 1 on, the dataset supplies prompts; each round samples answers
            to them from the model as it stands, ranks them, and trains on the result.
        judge (`str`, *optional*): a scorer that is never trained on, named like a reward, to watch the models with.
        num_watched_prompts (`int`, *optional*, defaults to `128`): prompts set apart, never trained on.
        perplexity_model (`str`, *optional*): the fixed model whose perplexity on the answers is watched; by
            default the one the rounds start from.
        max_perplexity_ratio (`float`, *optional*, defaults to `1.5`), min_distinct_ratio (`float`, *optional*,
            defaults to `0.7`):
            Rounds end when the reward has risen in a round while the perplexity exceeds this many times that of the
            first model, or distinct-n falls below this share of its value, or the judge's mean falls by more than two
            standard errors. The model before that round is then the one to take. In the RRHF paper perplexity moves by
            3 % in three good rounds and goes up more than fourfold where reward was hacked.

    With a `ranker`, a model's reward is how often its answer beats that of the first model.

    Raises:
        ValueError: a value out of its range, or a setting that would do nothing.
    """

    num_rounds: int = field(
        default=0,
        metadata={"help": "0: train once on the dataset as it is. N: sample, rank and train on its prompts N times."},
    )
    judge: str | None = field(
        default=None, metadata={"help": "A further scorer that is only watched, never trained on."}
    )
    num_watched_prompts: int = field(
        default=128, metadata={"help": "Prompts set apart to watch the models with, never trained on."}
    )
    perplexity_model: str | None = field(
        default=None, metadata={"help": "Fixed model whose perplexity is watched; default: the one at the start."}
    )
    max_perplexity_ratio: float = field(
        default=1.5,
        metadata={"help": "Rounds end if the reward rises while perplexity exceeds this times the first model's."},
    )
    min_distinct_ratio: float = field(
        default=0.7,
        metadata={"help": "Rounds end if the reward rises while distinct-n falls below this share of the first's."},
    )

    def check_scorers(self, columns: Sequence[str]) -> None:
        super().check_scorers(columns)
        if self.judge is not None:
            check_scorers([self.judge], columns=columns, **self.scorer_options())

    def __post_init__(self):
        check_field_types(self)
        if self.num_rounds < 0:
            raise ValueError(f"`num_rounds` must be 0 (train on the data as it is) or more, got {self.num_rounds}.")
        if self.num_watched_prompts < 2:
            raise ValueError(
                f"`num_watched_prompts` must be at least 2, got {self.num_watched_prompts}. About 100 are needed to "
                "tell models apart."
            )
        if not 1 < self.max_perplexity_ratio or not 0 <= self.min_distinct_ratio < 1:
            raise ValueError(
                "`max_perplexity_ratio` must be above 1 and `min_distinct_ratio` from 0 to below 1, got "
                f"{self.max_perplexity_ratio} and {self.min_distinct_ratio}: otherwise an unchanged model counts as "
                "degenerate."
            )
        if self.num_rounds:
            self.check()
            return
        idle = [
            entry.name
            for entry in fields(self)
            if entry.name != "num_rounds" and getattr(self, entry.name) != entry.default
        ]
        if idle:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in idle)} has no effect with num_rounds=0, where nothing is "
                f"sampled. Set `--num_rounds 1`, or remove {'it' if len(idle) == 1 else 'them'}."
            )
