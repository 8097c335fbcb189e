"""Candidates to scores, ranked lists and pairs."""

from .._lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "FunctionScorer": "functions",
        "PairwiseScorer": "tournament",
        "RankerModelJudge": "models",
        "RewardModelScorer": "models",
        "Scorer": "functions",
        "ScorerConfig": "config",
        "ScoringError": "functions",
        "build_scorers": "build",
        "combine": "score",
        "make_pairs": "pairs",
        "pair_rows": "pairs",
        "rank_rows": "lists",
        "score_rows": "score",
        "tournament_scores": "tournament",
    },
)
