"""Plain-text and conversational rows: splitting off a shared prompt, template arguments, answers as text."""

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .columns import without_nulls
from .row_error import RowError

# of `apply_chat_template`: which template is applied to what, and how
RESERVED_TEMPLATE_KWARGS = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    *("processing_class", "input", "prompt", "completions", "eos_token"),
} - {"documents", "kwargs", "tools"}


def extract_shared_prompt(completions: list) -> tuple[Any, list]:
    """
    Split off the longest common beginning (of characters or of messages) as the prompt.

    For two completions this is `trl.extract_prompt`; here it takes any number. A space before the split goes with the
    completions.

    Returns:
        `tuple`: the prompt, and the completions without it.
    """
    shortest = min(len(completion) for completion in completions)
    split = max(shortest - 1, 0)  # every completion keeps something
    for position in range(split):
        if any(completion[position] != completions[0][position] for completion in completions):
            split = position
            break
    if split and completions[0][split - 1] == " ":
        split -= 1
    return completions[0][:split], [completion[split:] for completion in completions]


def _split_text(prompt: Any, candidates: list[str], reference: str | None, columns: list[str]):
    """Prompt, candidates and reference of a plain-text row, whose prompt may be implicit."""
    if prompt is None:
        if len(candidates) == 1:
            raise RowError("ambiguous", columns[0], "is the only one, so that nothing tells where its prompt ends")
        prompt, candidates = extract_shared_prompt(candidates)
        if reference is not None:
            if not _begins_with(reference, prompt):
                # it may lack the prompt, or share less of the answer than the candidates do: we cannot tell
                raise RowError("ambiguous", "reference", f"does not begin with {prompt!r:.60}, as all candidates do")
            reference = reference[len(prompt) :]
    elif not isinstance(prompt, str):
        raise RowError("mixed", "prompt", f"is {type(prompt).__name__} while {columns[0]!r} is str")
    return prompt, candidates, reference


def _split_messages(prompt: Any, candidates: list[list], reference: list | None, columns: list[str]):
    """
    Prompt, candidates and reference of a conversational row.

    The prompt may be implicit, and may be repeated in front of every candidate.
    """
    if isinstance(prompt, str):
        # the text of the first user message, which all conversations repeat
        if not all(_first_user_text(messages) == prompt for messages in candidates):
            raise RowError("mixed", "prompt", f"is str while {columns[0]!r} is list")
        prompt = None
    if prompt is None:
        prompt, candidates = extract_shared_prompt(candidates)
        if not prompt:
            raise RowError("missing", "prompt", "is missing, and the completions share no first message")
    else:
        if all(_begins_with(messages, prompt) for messages in candidates):
            candidates = [messages[len(prompt) :] for messages in candidates]
    if reference is not None and _begins_with(reference, prompt):
        reference = reference[len(prompt) :]
    for messages, column in zip([*candidates, *([reference] if reference else [])], columns, strict=False):
        if messages and messages[0]["role"] in ("user", "system"):
            raise RowError(
                "not an answer",
                column,
                f"begins with a message of the {messages[0]['role']} and does not continue the prompt",
            )
    return prompt, candidates, reference


def _first_user_text(messages: list[Mapping]) -> str | None:
    content = next((message.get("content") for message in messages if message["role"] == "user"), None)
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return content


def _begins_with(text: str | list, beginning: str | list) -> bool:
    return bool(beginning) and without_nulls(text[: len(beginning)]) == without_nulls(beginning)


def template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    """
    What a row has to say to the chat template: `tools`, which may be JSON, and `chat_template_kwargs`.

    Raises:
        RowError: they are no such thing, or would say how the template is applied, or which one.
    """
    tools, kwargs = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise RowError("not renderable", "tools", f"holds {tools!r:.40}, which is not JSON ({error})") from None
    if not isinstance(tools, list | None):
        raise RowError("not renderable", "tools", f"is {type(tools).__name__}, not a list of tools")
    if kwargs is not None and (not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs)):
        raise RowError("not renderable", "chat_template_kwargs", f"is {type(kwargs).__name__}, not names with values")
    # `None` is what a table fills in
    kwargs = {k: v for k, v in (kwargs or {}).items() if v is not None or k not in RESERVED_TEMPLATE_KWARGS}
    reserved = sorted(RESERVED_TEMPLATE_KWARGS & set(kwargs))
    if reserved:
        raise RowError(
            "not renderable", "chat_template_kwargs",
            f"must not have {', '.join(reserved)}, which the tokenizer and the trainer set",
        )  # fmt: skip
    return {"tools": tools, **kwargs}


def as_text(messages: str | Sequence[Mapping[str, Any]] | None) -> str:
    """
    Text or messages as text: what they say, with the roles in front if there are several. Content may be text, a list
    of parts, of which the text counts, or `None`.
    """
    if messages is None or isinstance(messages, str):
        return messages or ""
    contents = []
    for message in messages:
        content = message.get("content") or ""
        if not isinstance(content, str):
            parts = [part if isinstance(part, str) else part.get("text") for part in content]
            content = "".join(part or "" for part in parts)
        contents.append(content)
    if len(messages) == 1:
        return contents[0]
    return "\n\n".join(f"{m.get('role')}: {content}" for m, content in zip(messages, contents, strict=True))


def same_answer(real: str | list, generated: str | list) -> bool:
    """Whether two answers, text or messages, have the same text but for white space around it."""
    return as_text(real).strip() == as_text(generated).strip()
