"""What will run: arguments, checks that need nothing built or loaded, and the commands.

Error codes: E06 vLLM without a GPU, E08 an option that does not fit, E11 no judge.
"""

import argparse
import datetime
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sayo_verl.errors import Rule, raise_first
from sayo_verl.evaluation.model import Model, find_model
from sayo_verl.evaluation.sets import PROMPTS, BenchmarkSet, read_set

ROOT = Path(__file__).resolve().parents[2]
HARNESS = "lmms-eval==0.7.3"
KERNELS = {"flash_attention_2": "FLASH_ATTN", "sdpa": None, "eager": None}  # -> vLLM's name


@dataclass(frozen=True)
class Plan:
    """What will run; everything that is printed, and logged beside the result."""

    model: Model
    benchmarks: BenchmarkSet
    options: argparse.Namespace
    stack: str
    model_class: str
    attention: str
    out: Path

    @property
    def venv(self) -> Path:
        """The harness's environment."""
        given = Path(os.environ.get("SAYO_EVAL_VENV") or f".venv-eval{'-gpu' if self.stack == 'gpu' else ''}")
        return ROOT / given

    @property
    def merged(self) -> Path | None:
        """Where verl's merger puts the model."""
        return self.out / "model" if self.model.shards else None

    @property
    def merging(self) -> Path:
        """Where the merger writes; it is renamed to ``merged`` at the end, so an interrupted merge is not used."""
        return self.out / "model.part"

    def merge(self) -> list[str]:
        """The command of verl's merger."""
        flags = ["--backend", "fsdp", "--local_dir", str(self.model.shards), "--target_dir", str(self.merging)]
        return ["python3", "-m", "verl.model_merger", "merge", *flags]

    def generation(self, sample: int) -> str:
        """Generation settings that replace those of the tasks. vLLM starts each run alike unless it gets a seed."""
        given: dict[str, object] = {"temperature": 0, "do_sample": False}
        if self.options.sampled:
            given = {"temperature": self.options.temperature, "top_p": 1.0, "do_sample": True}
            given |= {"seed": sample} if self.model_class == "vllm" else {}
        given |= {"max_new_tokens": self.options.max_new_tokens} if self.options.max_new_tokens else {}
        return ",".join(f"{key}={value}" for key, value in given.items())

    def harness(self, sample: int = 0) -> list[str]:
        """The command of the harness for one sample of every question."""
        where = str(self.merged or self.model.source or self.model.name)
        if self.model_class == "vllm":
            arguments = {"model": where, "tensor_parallel_size": self.options.gpus, "dtype": "bfloat16"}
            arguments |= {"attention_backend": KERNELS[self.attention]}
        else:
            device = "cuda" if self.stack == "gpu" else "cpu"
            arguments = {"pretrained": where, "device": device, "device_map": device}
            arguments |= {"attn_implementation": self.attention}
            if self.model.pixels and self.model_class != "internvl_hf":  # the harness would use limits of its own
                arguments |= dict(zip(("min_pixels", "max_pixels"), self.model.pixels, strict=True))
        command = [str(self.venv / "bin" / "python"), "-m", "lmms_eval", "eval", "--model", self.model_class]
        command += ["--model_args", ",".join(f"{key}={value}" for key, value in arguments.items())]
        command += ["--tasks", ",".join(self.benchmarks.tasks), "--include_path", str(self.out / "tasks")]
        command += ["--batch_size", "256" if self.model_class == "vllm" else "1", "--seed", str(sample)]
        command += ["--gen_kwargs", self.generation(sample), "--log_samples"]
        command += ["--limit", str(self.options.limit)] if self.options.limit else []
        return [*command, "--output_path", str(self.out / "harness" / str(sample))]

    def facts(self) -> dict[str, object]:
        """What decides the scores, in words; printed, and kept beside them."""
        n, pixels = self.options.sampled, self.model.pixels
        seen = f"{pixels[0]} to {pixels[1]}, of the model's own processor" if pixels else "limits of the harness"
        return {
            "model": self.model.name,
            "harness": f"{HARNESS}, class {self.model_class}, on {self.stack}",
            "attention kernel": self.attention,
            "number format": "bfloat16 (fixed by the harness)",
            "pixels of an image": seen if self.model_class != "vllm" else "limits of the model's own processor",
            "sampling": f"avg@{n}, temperature {self.options.temperature}" if n else "greedy",
            **({"sampling of the paper": self.benchmarks.sampling} if self.benchmarks.paper else {}),
            "tokens of an answer": self.options.max_new_tokens or "limits of the tasks (direct prompts: often 16)",
            "questions": f"the first {self.options.limit} of each task" if self.options.limit else "all",
            **({"rows": " ".join(self.options.files)} if self.options.files else {}),
        }


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of the script."""
    parser = argparse.ArgumentParser("eval_lmms.sh", description="see bash scripts/eval_lmms.sh --help")
    parser.add_argument("model")
    parser.add_argument("set")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--prompt", choices=PROMPTS, default=PROMPTS[0])
    parser.add_argument("--attention", choices=KERNELS)
    parser.add_argument("--model-class")
    parser.add_argument("--sampled", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--no-judged", action="store_true")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def make_plan(argv: Sequence[str], environment: Mapping[str, str]) -> Plan:
    """Everything that can be known, and refused, before anything is built or loaded.

    Raises:
        SayoError: E01 to E08, E11.
    """
    options = parse(argv)
    listed = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    )
    gpu = listed is not None and listed.stdout.startswith("GPU")
    benchmarks = read_set(options.set, prompt=options.prompt, judged=not options.no_judged)
    model = find_model(options.model)
    model_class = options.model_class or ("vllm" if gpu else model.harness_class())
    attention = options.attention or ("flash_attention_2" if gpu else "sdpa")
    rows = options.set == "scenes"
    folder = options.data if options.data and options.data.is_dir() else None
    options.files = sorted(folder.glob("val-*.parquet")) if folder else [options.data] if options.data else []
    options.files = [str(file.absolute()) for file in options.files if file.is_file()]
    counts = [options.gpus, *(n for n in (options.limit, options.max_new_tokens) if n is not None)]
    judges = {v: b.name for b in benchmarks.benchmarks if not b.left_out for v in b.judge if not environment.get(v)}
    raise_first(
        [
            Rule(
                "E06",
                model_class == "vllm" and not gpu,
                "vLLM runs the harness on GPUs, and nvidia-smi lists none",
                "--model-class",
                "leave it out: transformers runs the model on a CPU",
            ),
            Rule(
                "E08",
                model_class == "vllm" and not KERNELS[attention],
                "vLLM has no such attention kernel",
                "--attention",
                "leave it out, or name a class: --model-class qwen3_vl",
                got=attention,
                wanted="flash_attention_2",
            ),
            Rule(
                "E08",
                not gpu and attention == "flash_attention_2",
                "FlashAttention needs a GPU",
                "--attention",
                "leave it out, or give sdpa",
            ),
            Rule(
                "E08",
                rows != bool(options.data),
                "--data and the set scenes belong together",
                "--data",
                "give the parquet file of a split, or the folder of `sayo prepare`, with SET scenes and with no other",
            ),
            Rule(
                "E08",
                bool(options.data) and not options.files,
                "there is no such parquet file",
                "--data",
                "give a file, or a folder with val-*.parquet",
                got=options.data,
            ),
            Rule(
                "E08",
                options.sampled < 0 or min(counts) < 1 or options.temperature <= 0,
                "a number is out of range",
                "--sampled, --limit, --gpus, --max-new-tokens, --temperature",
                "give whole numbers of at least 1, and a temperature above 0; leave --sampled out for greedy answers",
            ),
            Rule(
                "E11",
                bool(judges),
                "an LLM judges these benchmarks, and it is not configured",
                "environment",
                "set them for an OpenAI-compatible server, or leave these benchmarks out: --no-judged",
                got=f"not set: {', '.join(judges)}",
                wanted=f"for {', '.join(sorted(set(judges.values())))}",
            ),
        ]
    )
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out = (options.out or ROOT / "outputs" / "eval" / f"{options.set.split(',')[0]}-{stamp}").expanduser().absolute()
    return Plan(model, benchmarks, options, "gpu" if gpu else "cpu", model_class, attention, out)


def show(plan: Plan) -> None:
    """Print the plan."""
    print(f"{plan.benchmarks.title}\n")
    for name, value in plan.facts().items():
        print(f"  {name:<22} {value}")
    print("\nbenchmarks")
    for b in plan.benchmarks.benchmarks:
        judged = f", judged by an LLM ({' '.join(b.judge)})" if b.judge else ", judged by a rule" if b.prompt else ""
        how = f"left out: {b.left_out}" if b.left_out else f"{' '.join(b.tasks)} {b.metric}"
        print(f"  {b.name:<28} {how}" + ("" if b.left_out else f" ({b.prompt or 'as named'}{judged})"))
        if b.note and not b.left_out:
            print(f"  {'':<28} {b.note}")
    print(f"\nenvironment of the harness: {plan.venv} ({constraints(plan.stack).relative_to(ROOT)})")
    if plan.model.shards:
        print(f"merge: {shlex.join(plan.merge())}")
    for sample in range(max(plan.options.sampled, 1)):
        print(f"run: {shlex.join(plan.harness(sample))}")
    print(f"result: {plan.out}/results.md and results.json")


def constraints(stack: str) -> Path:
    """The pinned versions of the harness's environment."""
    return ROOT / "configs" / f"constraints-eval-{stack}.txt"
