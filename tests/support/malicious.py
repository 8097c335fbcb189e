"""Files that would run code, were they trusted."""

import json
import os
import shutil
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig

from tests.support.data import PAIRS
from tests.support.stage_functions import look_around
from trl_ext import SLiCConfig, SLiCTrainer, SPINConfig, SPINTrainer
from trl_ext.runs.evaluation import answer_logps
from trl_ext.runs.run import Run
from trl_ext.runs.stages import merge_stage
from trl_ext.runtime.models import context_window, load_causal_lm, load_tokenizer
from trl_ext.sampling.candidates import sample_candidates
from trl_ext.sampling.config import SamplingConfig
from trl_ext.scoring.build import build_scorers, check_scorers

PROMPTS = [{"prompt": "a? "}, {"prompt": "b? "}]
SFT = [{"prompt": f"{number}? ", "completion": str(number)} for number in range(8)]


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def adapter_on(base: str, folder: Path) -> Path:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clean = Path(base).with_name("clean")
    shutil.copytree(base, clean)
    for name in ("config.json", "tokenizer_config.json"):
        content = {k: v for k, v in json.loads((clean / name).read_text()).items() if k != "auto_map"}
        content |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} if name == "config.json" else {}
        content.pop("tokenizer_class", None)
        (clean / name).write_text(json.dumps(content))
    (clean / "processor_config.json").unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(clean)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(folder)
    AutoTokenizer.from_pretrained(clean).save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder


def trained(name, folder, **settings):
    args = SLiCConfig(str(folder / "out"), use_cpu=True, report_to="none", **settings)
    SLiCTrainer(model=name, args=args, train_dataset=Dataset.from_list(PAIRS))


def played(name, folder, model_dir, ref_model=False):
    config = {"use_cpu": True, "report_to": "none", "max_steps": 1, "num_watched_prompts": 0, "bf16": False}
    args = SPINConfig(str(folder / "out"), **config)
    if ref_model:
        rows, args = Dataset.from_list(PAIRS), SPINConfig(str(folder / "out"), **config, reference="initial")
        SPINTrainer(model=model_dir, ref_model=name, args=args, train_dataset=rows).train()
    else:
        SPINTrainer(model=name, args=args, train_dataset=Dataset.from_list(SFT))


ROUTES = {
    "trainer": lambda name, folder, model: trained(name, folder),
    "config for prefix sharing": lambda name, folder, model: trained(name, folder, prefix_sharing=True),
    "config for parts": lambda name, folder, model: trained(name, folder, max_completions_per_forward=2),
    "reference by name": lambda name, folder, model: played(name, folder, model, ref_model=True),
    "self-play": lambda name, folder, model: played(name, folder, model),
    "sampling": lambda name, folder, model: sample_candidates(
        name, PROMPTS, SamplingConfig(max_new_tokens=2), folder / "sampled"
    ),
    "weights for sampling": lambda name, folder, model: load_causal_lm(name),
    "window": lambda name, folder, model: context_window(name),
    "tokenizer": lambda name, folder, model: load_tokenizer(name),
    "evaluation": lambda name, folder, model: answer_logps(name, [{"prompt": "a ", "completions": ["b"]}]),
    "reward model": lambda name, folder, model: build_scorers([name]),
    "judge": lambda name, folder, model: build_scorers(judge=name),
    "check of a judge": lambda name, folder, model: check_scorers(judge=name),
    "merged adapter": lambda name, folder, model: merge_stage(
        folder, adapter=adapter_on(name, folder / "adapter"), trust_remote_code=False
    ),
    "sampling from an adapter": lambda name, folder, model: load_causal_lm(adapter_on(name, folder / "adapter")),
}


def resume(folder):
    run = Run(folder, {"seed": 1}, resume=True)
    run.keep("rows", {"train.jsonl": "other"})
    return [run.stage(n, look_around, inputs={"rows": folder / "rows" / "train.jsonl"}) for n in ("one", "two")]
