"""Candidates to be scored."""


def chat(row):
    """The same row as a conversation."""
    return {
        **row,
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completions": [[{"role": "assistant", "content": text}] for text in row["completions"]],
    }


CANDIDATES = [
    {"prompt": "What is 2 + 2? ", "completions": ["4", "four, I think", "22"], "answer": "4"},
    {"prompt": "Say yes. ", "completions": ["yes", "no"], "answer": "yes"},
    {"prompt": "Go on: one, two, three, ", "completions": ["four", "", "5", "four five six seven"], "answer": "four"},
]
