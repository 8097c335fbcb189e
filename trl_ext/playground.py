"""
An offline task on which every recipe runs with no arguments, no network and no GPU.

The task: read a number in words, write it in digits ("forty-two thousand and seven" -> "42007"). A small byte-level
model learns it half-way in seconds, on prompts it has not seen a program can judge every answer, and a person can read
them.

    python -m trl_ext.playground DIRECTORY

makes a small untrained byte-level model there, for trying any recipe on any text.
"""

import argparse
import difflib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_utils import set_seed

# ChatML, without the line break after the last message that would be scored behind the end-of-sequence token
CHAT_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


def number_to_words(number: int) -> str:
    """English words for 0 ... 999 999: `42007` -> `"forty-two thousand and seven"`."""
    if number < 20:
        return ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return TENS[tens] + (f"-{ONES[ones]}" if ones else "")
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return f"{ONES[hundreds]} hundred" + (f" and {number_to_words(rest)}" if rest else "")
    thousands, rest = divmod(number, 1000)
    joint = " and " if rest < 100 else " "
    return f"{number_to_words(thousands)} thousand" + (joint + number_to_words(rest) if rest else "")


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, a ChatML template, and nothing that has to be downloaded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special_tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: index for index, token in enumerate([*special_tokens, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def save_byte_level_model(
    directory: str | Path,
    *,
    hidden_size: int = 128,
    num_layers: int = 3,
    max_position_embeddings: int = 4096,
    seed: int = 42,
) -> Path:
    """
    Save an untrained byte-level Llama with its tokenizer, an ordinary local checkpoint.

    Args:
        directory (`str` or `Path`): where to.
        hidden_size (`int`, defaults to 128): a multiple of 32, the size of a head.
        num_layers (`int`, defaults to 3): 0.63 M parameters with the default width.
        max_position_embeddings (`int`, defaults to 4096): longest sequence in bytes.
        seed (`int`, defaults to 42): of the weights.

    Returns:
        `Path`: `directory`.
    """
    tokenizer = byte_level_tokenizer()
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


@torch.no_grad()
def sample_answers(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    num_answers: int = 1,
    temperature: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 12,
    batch_size: int = 256,
    seed: int = 42,
    desc: str = "Sampling",
) -> list[list[str]]:
    """
    Sample `num_answers` answers to every prompt, split over the processes of the run.

    Prompts are batched by length. The answers depend on the seed and on the number of processes, not on the global
    random state.

    Returns:
        `list[list[str]]`: answers in the order of the prompts, without the end-of-sequence token.
    """
    state = PartialState()
    model.eval()
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    mine = by_length[state.process_index :: state.num_processes]
    rows = max(batch_size // num_answers, 1)
    answers: list[tuple[int, list[str]]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed + state.process_index)
        for start in tqdm(range(0, len(mine), rows), desc=desc, disable=not state.is_main_process, leave=False):
            indices = mine[start : start + rows]
            inputs = tokenizer([prompts[index] for index in indices], padding=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            tokens = model.generate(
                **inputs,
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                top_p=1.0,
                max_new_tokens=max_new_tokens,
                num_return_sequences=num_answers,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)
            for row, index in enumerate(indices):
                answers.append((index, texts[row * num_answers : (row + 1) * num_answers]))
    if state.num_processes > 1:
        answers = gather_object(answers)
    return [texts for _index, texts in sorted(answers)]


@torch.no_grad()
def answer_logps(model, tokenizer, prompts: Sequence[str], answers: Sequence[str], batch_size: int = 256):
    """Summed log-likelihood of each answer with its end-of-sequence token, `(len(prompts),)`, float32."""
    sums = []
    for start in range(0, len(prompts), batch_size):
        chunk = slice(start, start + batch_size)
        texts = [
            prompt + answer + tokenizer.eos_token
            for prompt, answer in zip(prompts[chunk], answers[chunk], strict=True)
        ]
        inputs = tokenizer(texts, padding=True, return_tensors="pt").to(model.device)
        logps = model(**inputs).logits[:, :-1].float().log_softmax(-1)
        logps = logps.gather(2, inputs["input_ids"][:, 1:].unsqueeze(2)).squeeze(2)
        lengths = torch.tensor(
            [len(ids) for ids in tokenizer([a + tokenizer.eos_token for a in answers[chunk]])["input_ids"]]
        )
        from_the_end = torch.arange(logps.size(1), 0, -1)
        sums.append((logps.cpu() * (from_the_end <= lengths.unsqueeze(1))).sum(dim=1))
    return torch.cat(sums)


@dataclass
class Playground:
    """
    The task, its data, and how to judge a model on it. Everything follows from the settings, so two playgrounds with
    equal settings are the same.

    Args:
        seed (`int`): of the numbers drawn, the model's first weights, and the sampling.
        num_sft (`int`): examples the SFT model learns from, once over in batches of 32.
        num_prompts (`int`): further prompts, unseen in SFT, for which candidates are sampled.
        num_candidates (`int`): candidates per prompt.
        pairs_per_prompt (`int`): most preference pairs made from the candidates of one prompt.
        num_held_out (`int`): prompts no training sees.
        max_digits (`int`): length of the longest number, at most 6. Every length is equally likely to be drawn, but
            each number once only, so most have four digits or more.
        sft_batch_size (`int`), sft_learning_rate (`float`): of the SFT.
        temperature (`float`): of all sampling. At 1 the model is judged as it is, neither sharpened nor flattened.
    """

    seed: int = 42
    num_sft: int = 6400
    num_prompts: int = 3200
    num_candidates: int = 8
    pairs_per_prompt: int = 3
    num_held_out: int = 1000
    max_digits: int = 5
    sft_batch_size: int = 32
    sft_learning_rate: float = 2e-3
    temperature: float = 1.0

    def __post_init__(self):
        generator = random.Random(self.seed)
        wanted = self.num_sft + self.num_prompts + self.num_held_out
        numbers: dict[int, None] = {}  # a set that keeps the order
        while len(numbers) < wanted:
            digits = generator.randint(1, self.max_digits)
            numbers[generator.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)] = None
        drawn = list(numbers)
        generator.shuffle(drawn)
        self._splits = {
            "sft": drawn[: self.num_sft],
            "train": drawn[self.num_sft : self.num_sft + self.num_prompts],
            "held_out": drawn[self.num_sft + self.num_prompts :],
        }
        self._answers = {self._prompt(number): str(number) for number in drawn}

    @staticmethod
    def _prompt(number: int) -> str:
        return f"{number_to_words(number)} = "

    def prompts(self, split: str) -> list[str]:
        """Prompts of `"sft"`, `"train"` or `"held_out"`; the three do not overlap."""
        return [self._prompt(number) for number in self._splits[split]]

    def sft_dataset(self) -> Dataset:
        """Prompt-completion rows with right answers."""
        return Dataset.from_list([{"prompt": p, "completion": self._answers[p]} for p in self.prompts("sft")])

    def answer(self, prompt: str) -> str:
        """The right answer."""
        return self._answers[prompt]

    def score(self, prompt: str, answer: str) -> float:
        """1 for the right answer, otherwise half the share of it that is right (0 ... 0.5)."""
        right = self.answer(prompt)
        return 1.0 if answer == right else 0.5 * difflib.SequenceMatcher(None, answer, right, autojunk=False).ratio()

    def train_sft(self, directory: str | Path) -> Path:
        """Make the byte-level model, train it on the SFT rows with TRL's `SFTTrainer`, and save it to `directory`."""
        from trl import SFTConfig, SFTTrainer

        state, start = PartialState(), Path(directory) / "untrained"
        if state.is_main_process:
            save_byte_level_model(start, max_position_embeddings=256, seed=self.seed)
        state.wait_for_everyone()
        trainer = SFTTrainer(
            model=str(start),
            args=SFTConfig(
                str(directory),
                seed=self.seed,
                # arguments made without it would end a distributed run on CPUs: they set the process's state anew
                use_cpu=state.device.type == "cpu",
                per_device_train_batch_size=max(self.sft_batch_size // state.num_processes, 1),
                num_train_epochs=1,
                learning_rate=self.sft_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                max_length=None,
                bf16=False,
                activation_checkpointing=False,
                logging_steps=25,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=self.sft_dataset(),
        )
        trainer.train()
        trainer.save_model(str(directory))
        return Path(directory)

    def sample_candidates(self, model_path: str | Path) -> list[dict]:
        """Candidates of a model for the `"train"` prompts: rows of `prompt`, `completions` and `scores`."""
        model, tokenizer = load_model(model_path)
        prompts = self.prompts("train")
        answers = sample_answers(
            model,
            tokenizer,
            prompts,
            num_answers=self.num_candidates,
            temperature=self.temperature,
            seed=self.seed,
            desc="Sampling candidates",
        )
        return [
            {"prompt": prompt, "completions": texts, "scores": [self.score(prompt, text) for text in texts]}
            for prompt, texts in zip(prompts, answers, strict=True)
        ]

    def preference_dataset(self, candidates: Sequence[dict]) -> Dataset:
        """
        Up to `pairs_per_prompt` pairs per prompt from its candidates: the best one against others that score lower,
        drawn at random.

        Prompts on which all candidates score alike, because the model knows the answer or because every candidate is
        equally wrong, give no pair. Empty answers are left out, and no pair is made twice.
        """
        generator = random.Random(self.seed)
        pairs = []
        for row in candidates:
            scored = [(s, text) for s, text in zip(row["scores"], row["completions"], strict=True) if text.strip()]
            best_score, best = max(scored, default=(0.0, ""))
            worse = sorted({text for score, text in scored if score < best_score})
            for rejected in generator.sample(worse, min(self.pairs_per_prompt, len(worse))):
                pairs.append({"prompt": row["prompt"], "chosen": best, "rejected": rejected})
        return Dataset.from_list(pairs)

    def evaluate(self, model_path: str | Path, sft_path: str | Path) -> "Comparison":
        """Sample one answer per held-out prompt from each of two saved models and compare them."""
        PartialState().wait_for_everyone()  # whoever saved the models has finished
        prompts = self.prompts("held_out")
        answers, logps = {}, {}
        for offset, (name, path) in enumerate((("sft", sft_path), ("trained", model_path))):
            model, tokenizer = load_model(path)
            [*answers[name]] = (
                texts[0]
                for texts in sample_answers(
                    model,
                    tokenizer,
                    prompts,
                    temperature=self.temperature,
                    seed=self.seed + 1 + offset,  # not the same noise twice
                    desc=f"Answering held-out prompts ({name})",
                )
            )
            if name == "trained":
                logps[name] = answer_logps(model, tokenizer, prompts, answers["trained"])
        model, tokenizer = load_model(sft_path)
        logps["sft"] = answer_logps(model, tokenizer, prompts, answers["trained"])
        return Comparison(
            prompts=prompts,
            right_answers=[self.answer(prompt) for prompt in prompts],
            sft_answers=answers["sft"],
            trained_answers=answers["trained"],
            sft_scores=[self.score(prompt, text) for prompt, text in zip(prompts, answers["sft"], strict=True)],
            trained_scores=[
                self.score(prompt, text) for prompt, text in zip(prompts, answers["trained"], strict=True)
            ],
            kl_to_sft=(logps["trained"] - logps["sft"]).mean().item(),
        )


@dataclass
class Comparison:
    """A trained model against the SFT model on held-out prompts, one sampled answer of each per prompt."""

    prompts: list[str]
    right_answers: list[str]
    sft_answers: list[str]
    trained_answers: list[str]
    sft_scores: list[float]
    trained_scores: list[float]
    kl_to_sft: float

    @property
    def num_wins(self) -> int:
        return sum(t > s for t, s in zip(self.trained_scores, self.sft_scores, strict=True))

    @property
    def num_decided(self) -> int:
        return sum(t != s for t, s in zip(self.trained_scores, self.sft_scores, strict=True))

    def metrics(self) -> dict[str, float]:
        """
        Figures by name: accuracy and mean length in characters before and after; the share of wins among decided
        comparisons with its 95 % Wilson interval; KL(trained || SFT) in nats per answer, estimated on the trained
        model's own answers.
        """
        wins, decided = self.num_wins, self.num_decided
        interval = binomtest(wins, max(decided, 1)).proportion_ci(method="wilson")

        return {
            "playground/accuracy_before": fmean(score == 1 for score in self.sft_scores),
            "playground/accuracy_after": fmean(score == 1 for score in self.trained_scores),
            "playground/score_before": fmean(self.sft_scores),
            "playground/score_after": fmean(self.trained_scores),
            "playground/win_rate": wins / max(decided, 1),
            "playground/win_rate_low": interval.low,
            "playground/win_rate_high": interval.high,
            "playground/num_decided": decided,
            "playground/num_held_out": len(self.prompts),
            "playground/length_before": fmean(map(len, self.sft_answers)),
            "playground/length_after": fmean(map(len, self.trained_answers)),
            "playground/kl_to_sft": self.kl_to_sft,
        }

    def print(self, name: str, num_examples: int = 8) -> None:
        """Print the figures before and after, and some held-out answers on which the models differ."""
        metrics = self.metrics()
        console = Console(width=110)
        table = Table(title=f"{len(self.prompts)} held-out prompts, one sampled answer each", title_justify="left")
        for heading in ("", "SFT", name):
            table.add_column(heading, justify="left" if not heading else "right")

        table.add_row("accuracy", *(f"{metrics[f'playground/accuracy_{when}']:.1%}" for when in ("before", "after")))
        table.add_row("mean score", *(f"{metrics[f'playground/score_{when}']:.3f}" for when in ("before", "after")))
        table.add_row("mean length", *(f"{metrics[f'playground/length_{when}']:.2f}" for when in ("before", "after")))
        table.add_row("KL to SFT, nats per answer", "0", f"{metrics['playground/kl_to_sft']:.2f}")
        low, high = metrics["playground/win_rate_low"], metrics["playground/win_rate_high"]
        table.add_row(
            f"wins of {self.num_decided} decided comparisons",
            "",
            f"{metrics['playground/win_rate']:.1%} ({low:.1%} to {high:.1%})",
        )
        console.print(table)

        examples = Table(title="Where they differ", title_justify="left")
        for heading in ("prompt", "right", "SFT", name):
            examples.add_column(heading)
        differing = [i for i, score in enumerate(self.sft_scores) if score != self.trained_scores[i]]
        for i in differing[:num_examples]:
            marks = [
                f"{text} {'[green]ok[/green]' if score == 1 else '[red]x[/red]'}"
                for text, score in (
                    (self.sft_answers[i], self.sft_scores[i]),
                    (self.trained_answers[i], self.trained_scores[i]),
                )
            ]
            examples.add_row(self.prompts[i].removesuffix(" = "), self.right_answers[i], *marks)
        console.print(examples)


def load_model(path: str | Path):
    """Model (float32, on this process's device) and tokenizer of a local checkpoint, a full one or an adapter."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(PartialState().device)
    return model, AutoTokenizer.from_pretrained(path)


def build_playground(playground: Playground, directory: str | Path, *, reuse: bool = False) -> tuple[Path, list[dict]]:
    """
    Train the SFT model and sample the candidates, or take up what an interrupted run left in `directory`.

    Args:
        playground ([`Playground`]): the settings.
        directory (`str` or `Path`): where the SFT model (`sft/`) and `candidates.jsonl` are kept; a folder that all
            processes see.
        reuse (`bool`, defaults to `False`): take what is there. It must come from the same settings.

    Returns:
        `tuple`: path of the SFT model, and the candidate rows.

    Raises:
        ValueError: `reuse` with what other settings made.
    """
    state = PartialState()
    directory = Path(directory)
    state_file, sft, candidates_file = (directory / name for name in ("playground.json", "sft", "candidates.jsonl"))
    settings, stages_done = asdict(playground), []
    if reuse and state_file.exists():
        found = json.loads(state_file.read_text())
        if found["settings"] != settings:
            changed = {key for key in settings if found["settings"].get(key) != settings[key]}
            raise ValueError(
                f"{directory} was made with other settings ({', '.join(sorted(changed))}). Use the same settings to "
                "resume, or another output folder to start afresh."
            )
        stages_done = found["stages"]
    state.wait_for_everyone()
    if state.is_main_process and not stages_done:
        state_file.unlink(missing_ok=True)  # what is there counts no longer

    def finish(stage: str) -> None:
        stages_done.append(stage)
        if state.is_main_process:
            _write_atomically(state_file, json.dumps({"settings": settings, "stages": stages_done}, indent=2))
        state.wait_for_everyone()

    if "sft" not in stages_done:
        playground.train_sft(sft)
        finish("sft")
    if "candidates" not in stages_done:
        candidates = playground.sample_candidates(sft)
        if state.is_main_process:
            _write_atomically(candidates_file, "".join(json.dumps(row) + "\n" for row in candidates))
        finish("candidates")
    return sft, [json.loads(line) for line in candidates_file.read_text().splitlines()]


def holds_playground(output_dir: str | Path) -> bool:
    """Whether a recipe has run its playground in this output folder before."""
    return (Path(output_dir) / "playground" / "playground.json").is_file()


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a small untrained byte-level model, for trying recipes.")
    parser.add_argument("directory", help="where to save it")
    parser.add_argument("--hidden_size", type=int, default=128, help="a multiple of 32 (default 128)")
    parser.add_argument("--num_layers", type=int, default=3, help="default 3")
    parser.add_argument("--max_position_embeddings", type=int, default=4096, help="longest sequence (default 4096)")
    parser.add_argument("--seed", type=int, default=42, help="of the weights (default 42)")
    options = vars(parser.parse_args())
    directory = save_byte_level_model(options.pop("directory"), **options)
    print(f"Saved a byte-level model and its tokenizer to {directory}")


if __name__ == "__main__":
    main()
