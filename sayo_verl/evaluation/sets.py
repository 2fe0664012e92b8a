"""Sets of benchmarks: the files of configs/eval, or names of tasks of the harness.

Error code: E04 an unknown set, or a set without a task.
"""

from dataclasses import dataclass
from pathlib import Path

import tomllib

from sayo_verl.errors import SayoError, did_you_mean

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "eval"
PROMPTS = ("reasoning", "direct")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark as the harness will run it.

    Attributes:
        name: as the paper calls it.
        tasks: of the harness; the score is their mean. Empty if the benchmark is left out.
        metric: name of the score in the harness's result; empty for a task that was named by hand: all are shown.
        scale: factor to percent.
        prompt: "reasoning", "direct", or empty for a task that was named by hand.
        judge: variables that an LLM judge needs; empty if a rule judges.
        numbers: of the paper, in percent, in the order of ``BenchmarkSet.columns``.
        note: a remark on the comparison.
        left_out: why it is not run.
    """

    name: str
    tasks: tuple[str, ...] = ()
    metric: str = ""
    scale: float = 1.0
    prompt: str = ""
    judge: tuple[str, ...] = ()
    numbers: tuple[float, ...] = ()
    note: str = ""
    left_out: str = ""


@dataclass(frozen=True)
class BenchmarkSet:
    """Benchmarks with the models whose numbers the paper prints."""

    name: str
    title: str
    paper: str
    sampling: str
    columns: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]

    @property
    def tasks(self) -> list[str]:
        """Tasks that will run, each once."""
        return list(dict.fromkeys(task for b in self.benchmarks if not b.left_out for task in b.tasks))


def read_set(name: str, *, prompt: str, judged: bool) -> BenchmarkSet:
    """A set of configs/eval, or the tasks of a list separated by commas.

    Args:
        name: "sayo", "vgpo", "scenes", or task names of the harness.
        prompt: the prompt of a benchmark that has both; one that has only the other uses that.
        judged: whether benchmarks that need an LLM judge are run.

    Raises:
        SayoError: E04.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.toml"))
    if name not in known:
        near = did_you_mean(name, known)
        if near or not all(part.strip() for part in name.split(",")):
            fix = f"name a set ({', '.join(known)}) or tasks of lmms-eval with commas between them"
            raise SayoError("E04", f"unknown set{near}", where="SET", got=repr(name), fix=fix)
        tasks = tuple(Benchmark(part.strip(), (part.strip(),)) for part in name.split(","))
        return BenchmarkSet(name, f"tasks {name}", "", "Greedy unless --sampled is given.", (), tasks)
    content = tomllib.loads((FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    benchmarks = tuple(_benchmark(entry, prompt, judged) for entry in content.pop("benchmark"))
    if all(benchmark.left_out for benchmark in benchmarks):
        raise SayoError("E04", "no benchmark is left", where="SET", got=name, fix="leave out --no-judged")
    return BenchmarkSet(name, **{**content, "columns": tuple(content["columns"])}, benchmarks=benchmarks)


def known_tasks() -> list[str]:
    """Tasks of the harness that the files of configs/eval name."""
    contents = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.toml"))]
    hows = [entry[p] for content in contents for entry in content["benchmark"] for p in PROMPTS if p in entry]
    return sorted({task for how in hows for task in how["tasks"]})


def _benchmark(entry: dict, prompt: str, judged: bool) -> Benchmark:
    name, numbers, note = entry["name"], tuple(entry.get("numbers", ())), entry.get("note", "")
    if "missing" in entry:
        return Benchmark(name, numbers=numbers, left_out=entry["missing"])
    used = prompt if prompt in entry else next(p for p in PROMPTS if p in entry)
    how = entry[used]
    judge = tuple(how.get("judge", "").split())
    left_out = f"needs an LLM judge ({' '.join(judge)}), and --no-judged was given" if judge and not judged else ""
    return Benchmark(name, tuple(how["tasks"]), how["metric"], how["scale"], used, judge, numbers, note, left_out)
