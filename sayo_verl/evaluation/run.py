"""The whole of ``scripts/eval_lmms.sh``: plan, environment, names, merge, harness, table.

Error codes: E05 the harness lacks a task, E06 vLLM without a GPU, E08 an option that does not fit, E09 a step failed, E11 no
judge, E12 a data set that cannot be fetched. ``model``, ``sets`` and ``table`` have the others.
"""

import argparse
import datetime
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sayo_verl.errors import Rule, SayoError, did_you_mean, raise_first
from sayo_verl.evaluation.model import Model, find_model
from sayo_verl.evaluation.sets import PROMPTS, BenchmarkSet, read_set
from sayo_verl.evaluation.table import report

ROOT = Path(__file__).resolve().parents[2]
HARNESS = "lmms-eval==0.7.3"
KERNELS = {"flash_attention_2": "FLASH_ATTN", "sdpa": None, "eager": None}  # -> vLLM's name
# Tries the names of tasks in the harness; prints as JSON what it lacks, and the data set of each.
NAMES = """
import json, sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
index = TaskManager(include_path=sys.argv[1]).task_index
sets = {t: load_yaml_config(index[t]["yaml_path"], mode="simple").get("dataset_path") for t in sys.argv[2:] if t in index}
print("NAMES" + json.dumps({"known": sorted(index), "sets": sets}))
"""


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

    def merge(self) -> list[str]:
        """The command of verl's merger."""
        flags = ["--backend", "fsdp", "--local_dir", str(self.model.shards), "--target_dir", str(self.merged)]
        return ["python3", "-m", "verl.model_merger", "merge", *flags]

    def generation(self, sample: int) -> str:
        """Generation settings that replace those of the tasks. vLLM starts each run alike unless it gets a seed."""
        given = {"temperature": 0, "do_sample": False}
        if self.options.sampled:
            given = {"temperature": self.options.temperature, "top_p": 1.0, "do_sample": True}
            given |= {"seed": sample} if self.model_class == "vllm" else {}
        given |= {"max_new_tokens": self.options.max_new_tokens} if self.options.max_new_tokens else {}
        return ",".join(f"{key}={value}" for key, value in given.items())

    def harness(self, sample: int = 0) -> list[str]:
        """The command of the harness for one sample of every question."""
        where = str(self.merged or self.model.name)
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
            "sampling of the paper": self.benchmarks.sampling,
            "length of an answer": f"{self.options.max_new_tokens or 'limits of the tasks (direct prompts: often 16)'} tokens",
            "rows": self.options.limit or "all",
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
    if options.data and options.data.is_dir():
        options.data = next(iter(sorted(options.data.glob("val-*.parquet"))), options.data)
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
                bool(options.data) and not options.data.is_file(),
                "there is no such parquet file",
                "--data",
                "give a file, or a folder with val-*.parquet",
                got=options.data,
            ),
            Rule(
                "E08",
                min(options.sampled, (options.limit or 1) - 1, options.gpus - 1) < 0 or options.temperature <= 0,
                "a number is out of range",
                "--sampled, --limit, --gpus, --temperature",
                "--sampled at least 1 (greedy without it), --limit and --gpus at least 1, --temperature above 0",
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
    model = replace(model, name=str(model.source.absolute())) if model.source and not model.shards else model
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
    print(f"\nenvironment of the harness: {plan.venv} ({constraints(plan).relative_to(ROOT)})")
    if plan.model.shards:
        print(f"merge: {shlex.join(plan.merge())}")
    for sample in range(max(plan.options.sampled, 1)):
        print(f"run: {shlex.join(plan.harness(sample))}")
    print(f"result: {plan.out}/results.md and results.json")


def constraints(plan: Plan) -> Path:
    """The pinned versions of the harness's environment."""
    return ROOT / "configs" / f"constraints-eval-{plan.stack}.txt"


def build(plan: Plan) -> None:
    """The environment of the harness, unless it is there with these versions."""
    pins, stamp, python = constraints(plan), plan.venv / ".sayo-eval", str(plan.venv / "bin" / "python")
    key = hashlib.sha256(pins.read_bytes() + Path(__file__).read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text() == key:
        return
    if plan.venv.exists() and not (plan.venv / ".sayo-eval-begun").exists():
        fix = "move it away, or name another folder in SAYO_EVAL_VENV"
        raise SayoError("E09", "the folder was not made by this script", where=str(plan.venv), fix=fix)
    if sys.version_info[:2] != (3, 11):
        got = f"Python {sys.version.split()[0]}"
        raise SayoError(
            "E09",
            "the harness's versions are pinned for Python 3.11",
            where="PATH",
            got=got,
            fix="put python3.11 on PATH",
        )
    print(f"building {plan.venv} (2 minutes and 2.4 GB on a CPU)", flush=True)
    step(plan, "environment", [sys.executable, "-m", "venv", "--clear", str(plan.venv)])
    (plan.venv / ".sayo-eval-begun").touch()
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    versions = dict(line.split("==") for line in pins.read_text().split() if "==" in line)
    if plan.stack == "cpu":
        index = ["--extra-index-url", os.environ.get("SAYO_TORCH_INDEX_URL") or "https://download.pytorch.org/whl/cpu"]
        wanted = [f"torch=={versions['torch']}+cpu", f"torchvision=={versions['torchvision']}"]
        step(plan, "environment", [*pip, "--no-deps", *index, *wanted])
    wheels = [HARNESS, "decord"] + (["vllm"] if plan.stack == "gpu" else [])
    step(plan, "environment", [*pip, "--constraint", str(pins), *wheels])
    if plan.stack == "cpu":
        step(plan, "environment", [python, str(ROOT / "scripts" / "cpu_stack_fixups.py")])
    stamp.write_text(key)


def step(plan: Plan, name: str, command: Sequence[str], **environment: str) -> str:
    """Run a command with its output in a log, and return the output.

    Raises:
        SayoError: E09.
    """
    log = plan.out / f"{name}.log"
    with log.open("a+", encoding="utf-8") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        start = file.tell()
        status = subprocess.run(
            command, stdout=file, stderr=file, env={**os.environ, **environment}, cwd=ROOT
        ).returncode
        file.seek(start)
        said = file.read()
    if status:
        print("\n".join(said.splitlines()[-20:]), file=sys.stderr)
        fix = "the lines above are its last; then run the same command again"
        raise SayoError("E09", f"the step '{name}' failed", where=str(log), got=f"exit status {status}", fix=fix)
    return said


def check_names(plan: Plan) -> None:
    """Ask the installed harness for its tasks before a model is loaded: E05, E12."""
    python = str(plan.venv / "bin" / "python")
    said = step(plan, "names", [python, "-c", NAMES, str(plan.out / "tasks"), *plan.benchmarks.tasks])
    found = json.loads(next(line for line in said.splitlines() if line.startswith("NAMES"))[5:])
    for task in plan.benchmarks.tasks:
        if task not in found["known"]:
            what = f"{HARNESS} has no such task{did_you_mean(task, found['known'])}"
            fix = "name a task of `python -m lmms_eval tasks`, or a set"
            raise SayoError("E05", what, where="SET", got=task, fix=fix)
    if any(os.environ.get(name) == "1" for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")):
        home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
        for task, source in found["sets"].items():
            places = (
                home / "datasets" / str(source).replace("/", "___"),
                home / "hub" / f"datasets--{source}".replace("/", "--"),
            )
            if source and "/" in source and not any(place.exists() for place in places):
                fix = "unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE once, or copy the data set into HF_HOME"
                raise SayoError(
                    "E12",
                    f"the task {task} needs a data set that is not on this machine, and the hub is off",
                    where=str(home),
                    got=source,
                    fix=fix,
                )


def run(plan: Plan) -> None:
    """Build, check, merge, answer, report."""
    plan.out.mkdir(parents=True, exist_ok=True)
    tasks = plan.out / "tasks"
    shutil.copytree(
        ROOT / "configs" / "eval" / "scenes", tasks, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    task = tasks / "sayo_rows.yaml"
    task.write_text(task.read_text().replace("@DATA@", str(plan.options.data and plan.options.data.absolute())))
    build(plan)
    print("asking the harness for the tasks", flush=True)
    check_names(plan)
    if plan.merged is not None and not (plan.merged / "config.json").is_file():
        print(f"merging {plan.model.shards}", flush=True)
        prefix = ["bash", "-c", 'source scripts/lib.sh && ready_python sayo_verl verl && exec "$@"', "merge"]
        step(plan, "merge", [*prefix, *plan.merge()], VERL_PLATFORM="cpu" if plan.stack == "cpu" else "")
    local = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    local |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if plan.options.data else {}
    for sample in range(max(plan.options.sampled, 1)):
        print(f"answering (progress: {plan.out}/harness.log)", flush=True)
        step(plan, "harness", plan.harness(sample), **local)
    print()
    report(plan.benchmarks, plan.facts(), plan.out)


def main() -> int:
    """Entry point; 2 for an error."""
    try:
        plan = make_plan(sys.argv[1:], os.environ)
        show(plan)
        if os.environ.get("DRY_RUN", "0") not in ("1", "true", "yes"):
            run(plan)
    except SayoError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
