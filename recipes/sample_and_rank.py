"""
Make a dataset: sample answers to prompts from a model, score them, and write ranked rows or pairs.

    accelerate launch recipes/sample_and_rank.py --model_name_or_path MODEL --dataset_name prompts.jsonl \
        --rewards my_rewards.py:score --output_dir data/ranked

One row of the prompts: `prompt` (text or messages) and whatever the reward function needs. The result is
`ranked.jsonl` (`prompt`, `completions`, `scores`) for `recipes/rrhf.py` and `recipes/slic.py`; with `--pair_rule` also
`pairs.jsonl` (`prompt`, `chosen`, `rejected`) for `recipes/slic.py`, `recipes/train_click.py` and, named in a config
file (`datasets: [{path: json, data_files: data/ranked/pairs.jsonl}]`), TRL's own scripts.

The same command again goes on where it was interrupted, with any number of processes. Answers that are in the data
join in with `--mix_in chosen rejected`. Of TRL's options those are refused that mean nothing without training.
"""

from pathlib import Path

from trl_ext.cli import parse_args, refuse_all_but, run_recipe
from trl_ext.cli.arguments import with_config_apart
from trl_ext.data.load import load_prompts
from trl_ext.runs.settings import local_model

DATACLASSES = (
    "trl.ScriptArguments",
    "trl_ext.cli.sample_and_rank_config.SampleAndRankConfig",
    "trl_ext.cli.sample_and_rank_config.WholeModelConfig",
    "trl.DatasetMixtureConfig",
    "trl_ext.sampling.config.SamplingConfig",
)
MADE = ("ranked.jsonl", "pairs.jsonl")
# of TRL's arguments, what has a meaning here
USED = (
    "dataset_name", "dataset_config", "dataset_train_split", "datasets",
    "model_name_or_path", "model_revision", "dtype", "attn_implementation",
)  # fmt: skip


def main(arguments):
    from trl_ext.runs.next_commands import after_ranking, print_next
    from trl_ext.runs.run import all_processes
    from trl_ext.runs.stages import rank_stage, sample_stage
    from trl_ext.runtime.run_lock import hold_folder

    parsed = parse_args(DATACLASSES, with_config_apart(arguments))
    script_args, config, model_args, dataset_args, sampling = parsed
    if model_args.model_name_or_path is None or (script_args.dataset_name is None and not dataset_args.datasets):
        raise ValueError("`--model_name_or_path` and `--dataset_name` must be set: who answers, and to what.")
    refuse_all_but(USED, script_args, model_args, dataset_args)
    state, folder = all_processes(), Path(config.output_dir)
    hold_folder(folder)
    model = local_model(model_args, trust_remote_code=config.trust_remote_code)
    with state.main_process_first():
        prompts = load_prompts(script_args, dataset_args)
    config.check_scorers(list(prompts[0]))
    init = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    load = {"model_init_kwargs": init, "trust_remote_code": config.trust_remote_code}
    sample_stage(folder, model=model, prompts=prompts, config=sampling, mix_in=config.mix_in or (), load=load)
    state.wait_for_everyone()
    if state.is_main_process:  # what an earlier call has made of other candidates
        for made in MADE:
            (folder / made).unlink(missing_ok=True)
    rank_stage(folder, candidates=folder / "candidates.jsonl", config=config, seed=config.seed, min_completions=2)
    state.wait_for_everyone()
    state.print(f"{', '.join(made for made in MADE if (folder / made).exists())} in {folder}")
    if state.is_main_process:
        print_next(after_ranking(str(model), folder))


if __name__ == "__main__":
    run_recipe(main, DATACLASSES, __doc__)
