"""The settings of sampling."""

import json
from dataclasses import dataclass, field

from ..runtime.settings import check_field_types

ENGINES = ("transformers", "vllm")


# options that change the distribution that tokens are drawn from, each with the value at which it changes nothing.
# vLLM and RLOO have them by the same names. A new option has this value as its default: older runs can be resumed
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


# options that change the speed and not the answers; `vllm_args` are looked at one by one
WITHOUT_EFFECT = ("sampling_batch_size", "vllm_python", "vllm_args")


VLLM_ARGS_WITHOUT_EFFECT = (
    "block_size", "cpu_offload_gb", "disable_custom_all_reduce", "disable_log_stats", "distributed_executor_backend",
    "download_dir", "enable_chunked_prefill", "enable_prefix_caching", "enforce_eager", "gpu_memory_utilization",
    "kv_cache_memory_bytes", "max_num_batched_tokens", "max_num_seqs", "num_gpu_blocks_override",
    "pipeline_parallel_size", "swap_space", "tensor_parallel_size",
)  # fmt: skip


@dataclass
class SamplingOptions:
    """
    How answers are sampled, for candidates and for SPIN's opponent. Names that would clash with a trainer's begin with
    `sampling_`.

    Parameters:
        temperature (`float`, *optional*, defaults to `0.8`):
            0 is greedy, and then one candidate is all there is. RRHF 0.8, SLiC-HF 0.7, CLICK 1. Held-out prompts are
            answered at 1 without the following filters, whatever these are.
        top_p (`float`, *optional*, defaults to `1.0`): in (0, 1]; 1 switches it off. CLICK 0.9.
        top_k (`int`, *optional*, defaults to `0`): 0 switches it off. SLiC-HF 40.
        min_p (`float`, *optional*, defaults to `0.0`):
            In [0, 1]; 0 switches it off. Tokens less likely than `min_p` times the most likely one are not drawn. With
            either engine it applies after the temperature and before `top_k` and `top_p`.
        max_new_tokens (`int`, *optional*, defaults to `128`): longest answer in tokens, its end token included.
        stop_strings (`list[str]`, *optional*): an answer ends before the first of them.
        sampling_seed (`int`, *optional*, defaults to `42`): of the random numbers.
        sampling_engine (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"`, in the processes of the run; or `"vllm"`, in a process and an environment of its own,
            for each of them. Both compute each prompt once for all its candidates. Their texts differ: vLLM draws its
            random numbers in its own way.
        sampling_batch_size (`int`, *optional*, defaults to `64`): candidates in the making at a time, per process,
            with `"transformers"`; vLLM decides for itself.
        vllm_python (`str`, *optional*): the Python interpreter of an environment with vLLM.
        vllm_args (`dict` or `str`, *optional*): further options of `vllm serve`, a dict or JSON, such as
            `gpu_memory_utilization`. With `max_model_len`, prompts are skipped that do not fit into it with an answer.
    """

    temperature: float = field(default=0.8, metadata={"help": "Of the sampling; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling; 1 switches it off."})
    top_k: int = field(default=0, metadata={"help": "Sample among the k most likely tokens; 0 switches it off."})
    min_p: float = field(
        default=0.0,
        metadata={"help": "Leave out tokens less likely than this share of the most likely one; 0 switches it off."},
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Longest sampled answer in tokens."})
    stop_strings: list[str] | None = field(
        default=None, metadata={"help": "An answer ends before the first of these strings."}
    )
    sampling_seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    sampling_engine: str = field(
        default="transformers",
        metadata={
            "help": "'transformers', in this process, or 'vllm', in a process and environment of its own.",
            "choices": list(ENGINES),
        },
    )
    sampling_batch_size: int = field(default=64, metadata={"help": "Candidates in the making at a time, per process."})
    vllm_python: str | None = field(
        default=None, metadata={"help": "Python interpreter of an environment with vLLM, for sampling_engine='vllm'."}
    )
    vllm_args: dict | str | None = field(
        default=None, metadata={"help": "Further options of vllm serve, as JSON: '{\"gpu_memory_utilization\": 0.8}'."}
    )


@dataclass
class SamplingConfig(SamplingOptions):
    """
    How candidates are sampled: the fields of [`SamplingOptions`], and

    Parameters:
        num_candidates (`int`, *optional*, defaults to `4`):
            Candidates per prompt. RRHF samples 4 (and adds the two of the dataset), SLiC-HF 8, CLICK 20.
        role_markers (`list[str]`, *optional*):
            Where the model begins to speak for somebody else; the answer is cut there, and the cut is counted. The
            default is `"\\n\\nHuman:"` and `"\\n\\nAssistant:"`, the markers of the HH dialogues. RRHF's authors saw
            models win reward with such text.
        keep_duplicates (`bool`, *optional*, defaults to `False`): keep equal answers to a prompt.

    Raises:
        ValueError: a value out of its range.
    """

    num_candidates: int = field(default=4, metadata={"help": "Candidates sampled per prompt."})
    role_markers: list[str] | None = field(
        default_factory=lambda: ["\n\nHuman:", "\n\nAssistant:"],
        metadata={"help": "An answer is cut where it begins to speak for somebody else, and the cut is counted."},
    )
    keep_duplicates: bool = field(default=False, metadata={"help": "Keep equal answers to the same prompt."})

    def __post_init__(self):
        check_field_types(self)

        def refuse(name: str, must_be: str, advice: str = "") -> None:
            raise ValueError(f"`{name}` must be {must_be}, got {getattr(self, name)!r}.{advice}")

        for name in ("stop_strings", "role_markers"):
            if isinstance(getattr(self, name), str):  # a string is a sequence of strings, of its letters
                setattr(self, name, [getattr(self, name)])
            if "" in (getattr(self, name) or ()):
                refuse(name, "without empty strings", " They would cut every answer to nothing. Remove them.")
        for name in ("num_candidates", "max_new_tokens", "sampling_batch_size"):
            if getattr(self, name) < 1:
                refuse(name, "at least 1")
        if not 0 <= self.temperature < float("inf"):
            refuse("temperature", "0 (greedy) or a positive number")
        if not 0 < self.top_p <= 1:
            refuse("top_p", "above 0 and at most 1 (1 switches it off)")
        if self.top_k < 0:
            refuse("top_k", "at least 0 (0 switches it off)")
        if not 0 <= self.min_p <= 1:
            refuse("min_p", "from 0 to 1 (0 switches it off)")
        if self.temperature == 0 and self.num_candidates > 1:
            refuse("num_candidates", "1 where `temperature` is 0 (greedy)", " Raise `temperature`, or set it to 1.")
        if self.sampling_engine not in ENGINES:
            refuse("sampling_engine", f"one of {', '.join(ENGINES)}")
        if self.sampling_engine == "vllm" and self.vllm_python is None:
            refuse(
                "vllm_python",
                "set where `sampling_engine` is 'vllm'",
                " Set it to the interpreter of an environment in which `pip install vllm` was run.",
            )
        if self.sampling_engine != "vllm" and (self.vllm_python or self.vllm_args):
            refuse("sampling_engine", "'vllm' where `vllm_python` or `vllm_args` is set", " Set it, or remove them.")
        if isinstance(self.vllm_args, str):
            try:
                self.vllm_args = json.loads(self.vllm_args)
            except json.JSONDecodeError as error:
                refuse("vllm_args", "JSON", f" {error}. Write it like '{{\"gpu_memory_utilization\": 0.8}}'.")
        if not isinstance(self.vllm_args, dict | None):
            refuse("vllm_args", "values by name", " Write it like '{\"gpu_memory_utilization\": 0.8}'.")
        longest = (self.vllm_args or {}).get("max_model_len")
        if longest is not None and (not isinstance(longest, int) or longest <= self.max_new_tokens):
            raise ValueError(
                "`max_model_len` in `vllm_args` must be a number of tokens above `max_new_tokens` "
                f"({self.max_new_tokens}), got {longest!r}. It limits prompt and answer together."
            )
