"""Reward models and pairwise ranker models as scorers."""

import inspect
import math
import os
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from .._trl import _tokenize
from ..data.columns import as_given
from ..data.messages import as_text, template_kwargs
from ..data.tokens import text_ids, without_end
from ..runtime.fingerprints import model_fingerprint
from ..runtime.models import for_inference
from ..runtime.processes import process_state
from ..runtime.trust import UnsafeFileError, explain_remote_code, weights_only
from .config import DEFAULT_LABELS, DEFAULT_TEMPLATE
from .functions import ScoringError

# architectures without a next token, by the ends of their names
OTHER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")


def _load_tokenizer(name_or_path: str, **kwargs) -> PreTrainedTokenizerBase:
    with explain_remote_code("reward_trust_remote_code"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **kwargs)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"The tokenizer of {name_or_path} must have a padding or an end token, got neither. Texts cannot be "
                "batched without. Set `pad_token` in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token  # as TRL does
    return tokenizer


def _longest_input(name: str, max_length: int | None, config, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """`max_length`, or what the model can take; `None` if that is not known."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is None:
        known = [tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else None, positions]
        return min((length for length in known if length), default=None)
    if max_length < 1:
        raise ValueError(f"`max_length` must be at least 1, or None for what the model can take, got {max_length}.")
    if positions is not None and max_length > positions:
        raise ValueError(
            f"`max_length` must be at most the {positions} positions of {name}, got {max_length}. Lower it, or set it "
            "to None."
        )
    return max_length


def _cut_left(ids: list[int], max_length: int | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The end of a sequence that is too long, as RRHF scores it. A begin token stays at the beginning."""
    if max_length is None or len(ids) <= max_length:
        return ids
    begins = (tokenizer.bos_token_id, tokenizer.cls_token_id)
    kept = 1 if max_length > 1 and ids[0] in [token for token in begins if token is not None] else 0
    return ids[:kept] + ids[len(ids) - max_length + kept :]


def _padded_batches(
    sequences: list[list[int]], batch_size: int, pad_token_id: int, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """
    Batches of sequences of like length, padded on the right; the longest first, so that memory runs out at once or not
    at all.

    Yields:
        `tuple`: which sequences, input ids (batch_size, length), attention mask (batch_size, length).
    """
    by_length = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(by_length), batch_size):
        indices = by_length[start : start + batch_size]
        input_ids = torch.full((len(indices), len(sequences[indices[0]])), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, index in enumerate(indices):
            input_ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
            attention_mask[row, : len(sequences[index])] = 1
        yield indices, input_ids.to(device), attention_mask.to(device)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")


class RewardModelScorer:
    """
    Scores completions with a sequence-classification model of one output, on the device of this process.

    The model reads what TRL's `RewardTrainer` trains on: the chat template of prompt and completion, or, for plain
    text, prompt + completion + the end token. (`GRPOTrainer` shows its reward models plain text without the begin and
    end token.) Sequences that are too long lose their beginning, which is counted in `counts`.

    Args:
        model_name_or_path (`str`): a folder or Hub id.
        batch_size (`int`, defaults to 16): completions at a time; batches are of like length.
        dtype (`str`, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        max_length (`int`, *optional*): longest sequence in tokens; by default what the model can take.
        name (`str`, *optional*): what messages and columns call it; by default the last part of its path.
        revision (`str`, *optional*), trust_remote_code (`bool`, defaults to `False`): as in transformers.

    Raises:
        ValueError: there is no such model, it has another number of outputs than one, its head is not in the
            checkpoint, it is an adapter, or `max_length` exceeds what it can take.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        batch_size: int = 16,
        dtype: str = "auto",
        max_length: int | None = None,
        name: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        path = str(model_name_or_path)
        _check_batch_size(batch_size)
        self.batch_size, self.name = batch_size, name or Path(path).name
        self.counts: Counter[str] = Counter()
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        config, self.tokenizer, self.max_length = _read_reward_model(path, max_length, **kwargs)
        self.identity = _model_identity(path, revision, dtype, self.max_length)
        self.model, loading = _load(
            AutoModelForSequenceClassification, path, "reward model", config=config, dtype=dtype,
            output_loading_info=True, **kwargs,
        )  # fmt: skip
        random_weights = [*sorted(loading["missing_keys"]), *sorted(map(str, loading["mismatched_keys"]))]
        if random_weights:
            raise ValueError(
                f"The reward model {path} lacks {', '.join(random_weights[:5])}{', ...' if random_weights[5:] else ''}"
                f" of {type(self.model).__name__}. transformers fills them with random numbers: the scores would be "
                "noise. Train it as a reward model first (TRL's RewardTrainer), or name one that is trained."
            )
        self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id  # finds the last token by it
        for_inference(self.model, process_state().device)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
        """
        Scores of every completion.

        Raises:
            ScoringError: the model gave NaN or infinity.
        """
        places = [(index, number) for index, row in enumerate(rows) for number in range(len(row["completions"]))]
        sequences = []
        for index, number in places:
            ends = rows[index].get("ends")
            is_cut = ends is not None and ends[number] == "length"
            ids = self._token_ids(rows[index], rows[index]["completions"][number], is_cut)
            sequences.append(_cut_left(ids, self.max_length, self.tokenizer))
            self.counts["completions"] += 1
            if len(sequences[-1]) < len(ids):
                self.counts[f"texts cut on the left at max_length={self.max_length}"] += 1
        scores: list[list[float | None]] = [[None] * len(row["completions"]) for row in rows]
        batches = _padded_batches(sequences, self.batch_size, self.tokenizer.pad_token_id, self.model.device)
        for indices, input_ids, attention_mask in batches:
            with torch.inference_mode():
                logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits  # (batch_size, 1)
            for position, logit in zip(indices, logits[:, 0].float().tolist(), strict=True):
                index, number = places[position]
                if not math.isfinite(logit):
                    raise ScoringError(
                        f"The reward model {self.name!r}", index, number,
                        f'must give a finite number, got {logit}. Try dtype="float32", and check the completion.',
                    )  # fmt: skip
                scores[index][number] = logit
        return scores

    def _token_ids(self, row: Mapping[str, Any], completion: str | list, is_cut: bool = False) -> list[int]:
        """Prompt and completion as in training: without an end token where the completion was cut by its length."""
        if isinstance(completion, list):
            row = as_given({**row, "completion": completion})
            ids = _tokenize(self.tokenizer, row["prompt"] + row["completion"], **template_kwargs(row))["input_ids"]
        else:
            end = self.tokenizer.eos_token or ""
            ids = text_ids(self.tokenizer, row["prompt"] + completion.removesuffix(end) + end)
        return without_end(ids, self.tokenizer) if is_cut else ids


def _read_reward_model(path: str, max_length: int | None, **kwargs) -> tuple:
    """Config, tokenizer and longest input of a reward model, checked, without its weights."""
    _refuse_adapter(path, "reward model", **kwargs)
    config = _load(AutoConfig, path, "reward model", **kwargs)
    found = f"num_labels={config.num_labels} (architecture: {', '.join(config.architectures or ['unknown'])})"
    if config.num_labels != 1:
        raise ValueError(
            f"The reward model {path} must have num_labels=1, got {found}. Name a sequence-classification model as "
            "TRL's RewardTrainer writes it. A language model that compares two answers is a judge."
        )
    tokenizer = _load_tokenizer(path, **kwargs)
    return config, tokenizer, _longest_input(path, max_length, config, tokenizer)


def _read_judge(path: str, max_length: int | None, **kwargs) -> tuple:
    """Config, tokenizer and longest input of a language model that compares, checked, without its weights."""
    _refuse_adapter(path, "judge", **kwargs)
    config = _load(AutoConfig, path, "judge", **kwargs)
    other = next((name for name in config.architectures or [] if name.endswith(OTHER_HEADS)), None)
    if other is not None:
        raise ValueError(
            f"The judge {path} must be a causal language model, got {other}. A sequence-classification model with one "
            "output is a reward model."
        )
    tokenizer = _load_tokenizer(path, **kwargs)
    return config, tokenizer, _longest_input(path, max_length, config, tokenizer)


def _model_identity(path: str, revision: str | None, dtype: str, max_length: int | None) -> list:
    """What a model's scores depend on."""
    is_local = os.path.isdir(path)
    return [model_fingerprint(path), None if is_local else revision or "main", str(dtype), max_length]


def _refuse_adapter(path: str, role: str, *, revision: str | None = None, trust_remote_code: bool = False) -> None:
    try:
        adapter = find_adapter_config_file(path, revision=revision)
    except (OSError, ValueError):  # no such thing, or no network; loading it says so better
        return
    if adapter is not None:
        raise ValueError(
            f"The {role} must be a whole model, got the PEFT adapter {path}. Merge it into its base model "
            "(`merge_and_unload()`), save that with its tokenizer, and name the result."
        )


def _load(auto_class, path: str, role: str, **kwargs):
    try:
        with weights_only():
            return auto_class.from_pretrained(path, **kwargs)
    except UnsafeFileError:
        raise
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            with explain_remote_code("reward_trust_remote_code"):
                raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The {role} {path!r} could not be loaded: {reason.rstrip('.')}. Give the folder or Hub id of a model; a "
            "function is written 'package.module:function' or 'path/to/file.py:function'."
        ) from error


class RankerModelJudge:
    """
    A causal language model that compares two completions, by the next token's probability: label A or label B.

    This is SLiC-HF's pairwise ranker (§3.2), whose input is the prompt and both answers and whose output is "A" or
    "B". Equal probabilities mean that it cannot tell.

    Args:
        model_name_or_path (`str`): a folder or Hub id.
        template (`str`, defaults to `DEFAULT_TEMPLATE`):
            The text shown to the model, with the fields `{prompt}`, `{first}` and `{second}`; the label comes right
            behind it. For a model that was tuned on conversations write its marks (`<|im_start|>user` and so on) into
            the template. Prompts and completions made of messages are filled in as text, with the roles if there are
            several messages.
        labels (`tuple[str, str]`, defaults to `("A", "B")`): one token each, for the first and the second.
        batch_size (`int`, defaults to 8): comparisons at a time; batches are of like length.
        dtype (`str`, defaults to `"auto"`): of the weights; `"auto"` is the checkpoint's.
        max_length (`int`, *optional*): longest text in tokens, cut on the left; by default what the model can take.
        revision (`str`, *optional*), trust_remote_code (`bool`, defaults to `False`): as in transformers.

    Raises:
        ValueError: a field is missing in the template, a label is not one token, there is no such model, or
            `max_length` exceeds what it can take.
    """

    def __init__(
        self,
        model_name_or_path: str,
        *,
        template: str = DEFAULT_TEMPLATE,
        labels: tuple[str, str] = DEFAULT_LABELS,
        batch_size: int = 8,
        dtype: str = "auto",
        max_length: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        path = str(model_name_or_path)
        _check_batch_size(batch_size)
        wanted, fields = {"prompt", "first", "second"}, {name for _, name, _, _ in string.Formatter().parse(template)}
        if fields - {None} != wanted:
            raise ValueError(
                "The judge's template must have the fields {prompt}, {first} and {second}, got "
                f"{sorted(fields - {None})}. Add what is missing; write other braces twice."
            )
        self.template, self.batch_size, self.__name__ = template, batch_size, Path(path).name
        self.counts: Counter[str] = Counter()
        kwargs = {"revision": revision, "trust_remote_code": trust_remote_code}
        config, self.tokenizer, self.max_length = _read_judge(path, max_length, **kwargs)
        self.label_ids = _label_ids(self.tokenizer, template, labels)
        self.identity = [*_model_identity(path, revision, dtype, self.max_length), template, list(labels)]
        self.model = _load(AutoModelForCausalLM, path, "judge", config=config, dtype=dtype, **kwargs)
        for_inference(self.model, process_state().device)
        # logits at the last tokens only, where the model offers that: all of them would be much the largest tensor
        self._can_keep_logits = "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def __call__(self, prompts: list, completions: list[list]) -> list[int]:
        """
        Compare the two completions of each prompt.

        Args:
            prompts (`list`): texts or lists of messages.
            completions (`list[list]`): two for each prompt.

        Returns:
            `list[int]`: for each prompt 0 if the first is better, 1 if the second is, -1 if they are equal.
        """
        sequences = []
        for prompt, (first, second) in zip(prompts, completions, strict=True):
            text = self.template.format(prompt=as_text(prompt), first=as_text(first), second=as_text(second))
            ids = _text_token_ids(self.tokenizer, text)
            sequences.append(_cut_left(ids, self.max_length, self.tokenizer))
            if len(sequences[-1]) < len(ids):
                self.counts[f"texts cut on the left at max_length={self.max_length}"] += 1
        verdicts = [-1] * len(sequences)
        batches = _padded_batches(sequences, self.batch_size, self.tokenizer.pad_token_id, self.model.device)
        for indices, input_ids, attention_mask in batches:
            logps = self._label_logps(input_ids, attention_mask)  # (batch_size, 2)
            for index, (first, second) in zip(indices, logps.tolist(), strict=True):
                verdicts[index] = -1 if first == second else int(second > first)
        return verdicts

    @torch.inference_mode()
    def _label_logps(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        last = attention_mask.sum(dim=1) - 1  # (batch_size,)
        kwargs, place = {}, last
        if self._can_keep_logits:
            kwargs["logits_to_keep"], place = torch.unique(last, return_inverse=True)
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).logits
        logits = logits[torch.arange(len(last), device=logits.device), place]  # (batch_size, vocabulary)
        return logits.float().log_softmax(dim=-1)[:, self.label_ids]


def _label_ids(tokenizer: PreTrainedTokenizerBase, template: str, labels: Sequence[str]) -> list[int]:
    """The token each label adds to the end of the template, where it may be another than the label's alone."""
    text = template.format(prompt="", first="", second="")
    before, label_ids = _text_token_ids(tokenizer, text), []
    for label in labels:
        after = _text_token_ids(tokenizer, text + label)
        if after[:-1] != before:
            raise ValueError(
                f"The judge's label {label!r} must be one token after the template's end {text[-20:]!r}, got "
                f"{tokenizer.convert_ids_to_tokens(after[-4:])}. Choose labels of one token. If a space belongs to "
                "them, move it from the template's end to the labels."
            )
        label_ids.append(after[-1])
    if len(label_ids) != 2 or label_ids[0] == label_ids[1]:
        raise ValueError(f"`labels` must be two different ones, for the first and the second, got {tuple(labels)!r}.")
    return label_ids


def _text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = text_ids(tokenizer, text)
    # some tokenizers put an end token behind every text; the label has to come behind the template
    return ids[:-1] if ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id) else ids
