"""
The playground's task: read a number in words, write it in digits, and say so kindly.

"forty-two thousand and seven = " -> "42007 gladly". A small byte-level model learns the digits in under a minute and
takes over the tone of its examples, which is mostly unfriendly. A method has to make it friendlier and keep the digits
right. A program can judge every answer, and a person can read them.
"""

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset

from .model import save_byte_level_model

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()


TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()


# from the unfriendliest to the friendliest, and how often the examples have each
TONES = "ugh meh well okay yes sure gladly hooray".split()


TONE_SHARES = (0.30, 0.25, 0.18, 0.12, 0.08, 0.04, 0.02, 0.01)


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


def read_answer(text: str, answer: str) -> tuple[bool, float, float]:
    """
    What there is to judge in an answer.

    Args:
        text (`str`): what the model wrote.
        answer (`str`): the right digits.

    Returns:
        `tuple`: whether the digits are right, how similar they are (0 to 1), and the tone (0, which is also that of a
        word that is none of `TONES`, to 1).
    """
    digits, _, word = text.partition(" ")
    similarity = difflib.SequenceMatcher(None, digits, answer, autojunk=False).ratio()
    return digits == answer, similarity, TONES.index(word) / (len(TONES) - 1) if word in TONES else 0.0


def friendly_number_reward(completions: Sequence[str], answer: Sequence[str], **kwargs) -> list[float]:
    """
    The playground's reward, with TRL's reward-function signature: half of it for the digits (all of this half if they
    are right, up to half of it if they are similar), half of it for the tone.
    """
    rewards = []
    for text, right in zip(completions, answer, strict=True):
        is_right, similarity, tone = read_answer(text, right)
        rewards.append(0.5 * (1.0 if is_right else 0.5 * similarity) + 0.5 * tone)
    return rewards


def accuracy(completions: Sequence[str], answer: Sequence[str], **kwargs) -> list[float]:
    """The playground's judge, which does not see the tone: 1 for the right digits, else 0. The mean is accuracy."""
    return [float(read_answer(text, right)[0]) for text, right in zip(completions, answer, strict=True)]


def is_polite(completions: Sequence[str], **kwargs) -> list[float]:
    """A classifier that knows two words: 0 for an answer with one of the two unfriendliest, else 1."""
    return [float(not any(word in text for word in TONES[:2])) for text in completions]


def preference_rows(rows: Sequence[dict], seed: int) -> list[dict]:
    """
    Preferences that no model has sampled: to each prompt two answers as the examples have them, right and each in a
    tone of its own, of which the friendlier is chosen.

    Args:
        rows (`Sequence[dict]`): of [`~Playground.rows`].
        seed (`int`): of the tones.
    """
    generator = random.Random(seed)
    made = []
    for row in rows:
        tones = set()
        while len(tones) < 2:
            tones |= set(generator.choices(range(len(TONES)), TONE_SHARES))
        worse, better = sorted(tones)
        made.append(
            {**row, "chosen": f"{row['answer']} {TONES[better]}", "rejected": f"{row['answer']} {TONES[worse]}"}
        )
    return made


@dataclass
class Playground:
    """
    The task, its data, and how to judge a model on it. Everything follows from the settings, so two playgrounds with
    equal settings are the same.

    Args:
        seed (`int`): of the numbers drawn, the model's first weights, and the sampling.
        num_sft (`int`): examples the SFT model learns from, once over in batches of 32.
        num_prompts (`int`): further prompts, unseen in SFT, for which answers are sampled.
        num_held_out (`int`): prompts no training sees.
        max_digits (`int`): length of the longest number, at most 6. Every length is equally likely to be drawn, but
            each number once only, so most have four digits or more.
        sft_batch_size (`int`), sft_learning_rate (`float`): of the SFT.
        with_tone (`bool`): whether the examples have a tone; if not, there is one right answer to each prompt.
    """

    seed: int = 42
    num_sft: int = 14400
    num_prompts: int = 1600
    num_held_out: int = 1000
    max_digits: int = 5
    sft_batch_size: int = 32
    sft_learning_rate: float = 2e-3
    with_tone: bool = True

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
        tones = generator.choices(TONES, TONE_SHARES, k=len(drawn))
        self._examples = {
            prompt: f"{digits} {tone}" if self.with_tone else digits
            for (prompt, digits), tone in zip(self._answers.items(), tones, strict=True)
        }

    @staticmethod
    def _prompt(number: int) -> str:
        return f"{number_to_words(number)} = "

    def prompts(self, split: str) -> list[str]:
        """Prompts of `"sft"`, `"train"` or `"held_out"`; the three do not overlap."""
        return [self._prompt(number) for number in self._splits[split]]

    def sft_dataset(self) -> Dataset:
        """Prompt-completion rows: right digits, mostly in an unfriendly tone."""
        return Dataset.from_list([{"prompt": p, "completion": self._examples[p]} for p in self.prompts("sft")])

    def sft_examples(self, start: int, number: int) -> Dataset:
        """
        So many rows of [`~Playground.sft_dataset`], from a place on in an endless order: each pass goes over all of
        them, in an order of its own.
        """
        size = self.num_sft
        passes = range(start // size, -(-(start + number) // size))
        order = [index for turn in passes for index in random.Random(f"{self.seed}-{turn}").sample(range(size), size)]
        first = start - passes.start * size
        return self.sft_dataset().select(order[first : first + number])

    def rows(self, split: str, *, reference: bool = False) -> list[dict[str, str]]:
        """
        Rows of `prompt` and `answer`, the right digits, as the rewards need them; with `reference` also an answer as
        in the SFT's examples.
        """
        return [
            {"prompt": p, "answer": self._answers[p], **({"reference": self._examples[p]} if reference else {})}
            for p in self.prompts(split)
        ]

    def train_sft(
        self,
        directory: str | Path,
        *,
        rows: Dataset | None = None,
        start: str | Path | None = None,
        num_steps: int | None = None,
        batch_size: int | None = None,
        learning_rate: float | None = None,
    ) -> Path:
        """
        Train on rows of SFT with TRL's `SFTTrainer`, and save to `directory`.

        Args:
            directory (`str` or `Path`): where to.
            rows (`Dataset`, *optional*): what to train on; by default the SFT rows.
            start (`str` or `Path`, *optional*): the model to begin with; by default a new byte-level one.
            num_steps (`int`, *optional*): updates; by default those of one epoch.
            batch_size (`int`, *optional*): examples per update; by default `sft_batch_size`.
            learning_rate (`float`, *optional*): the highest; by default `sft_learning_rate`.
        """
        from trl import SFTConfig, SFTTrainer

        state, batch_size = PartialState(), batch_size or self.sft_batch_size
        if start is None:
            start = Path(directory) / "untrained"
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
                per_device_train_batch_size=max(batch_size // state.num_processes, 1),
                num_train_epochs=1,
                max_steps=num_steps or -1,
                learning_rate=learning_rate or self.sft_learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                max_length=None,
                bf16=False,
                activation_checkpointing=False,
                logging_steps=25,
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=self.sft_dataset() if rows is None else rows,
        )
        trainer.train()
        trainer.save_model(str(directory))
        return Path(directory)


def spin_playground(seed: int) -> Playground:
    """
    The task for SPIN: no tone, as every pair of equal digits with another tone would be noise where the answers in the
    data are themselves drawn at random.
    """
    return Playground(seed=seed, num_prompts=0, with_tone=False)
