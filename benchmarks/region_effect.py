"""Effect of the region reward on the tiny task: three rewards, one start, several seeds, held-out scenes.

    python benchmarks/region_effect.py --seeds 0 1 2 --steps 30 --every 10

runs ``scripts/run_tiny.sh`` (real verl, Ray, FSDP2 and vLLM on CPU, about four minutes a run) for each condition
and seed, evaluates checkpoints on held-out scenes with plain transformers (``sayo evaluate`` uses HF sampling and HF
eager attention, so it is independent of the rewarded probe), and writes ``docs/tiny_results.md``. Finished runs are not
repeated. The folder of an interrupted run is renamed and the run starts again.

    region      r = r_v + format + accuracy      attn_region, w_acc = 1
    accuracy    r = format + accuracy            grpo, verl's own code
    wrong box   as region, but r_v is computed on the box of a random other object of the scene
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from pathlib import Path

from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.evaluate import evaluate
from sayo_verl.tiny.prepared import prepare_scenes

ROOT = Path(__file__).resolve().parent.parent
CONDITIONS = {
    "region": {"METHOD": "region"},
    "accuracy": {"METHOD": "grpo"},
    "wrong box": {"METHOD": "region"},
}
MEASURES = {
    "accuracy": "accuracy",
    "target_attention": "pooled R_a, high-entropy tokens (a)",
    "token_target_attention": "R_a of single tokens, high-entropy (b)",
    "token_target_attention_all": "R_a of single tokens, all (b)",
    "token_distractor_attention": "R_a of single tokens for the distractor, high-entropy (b)",
    "distractor_attention": "pooled R_a of the distractor, high-entropy (a)",
    "named_first": "target named first",
    "named": "target named at all",
    "format": "format",
    "response_tokens": "response length (tokens)",
    "entropy": "entropy (nats per token)",
}

CAVEATS = """\
## How to read this

- `region` and `wrong box` are `attn_region` with w_acc = 1; `accuracy` is verl's own `grpo` on accuracy and format.
  The wrong box is the box of a random other object, which the policy cannot predict.
- One start, few seeds: the spread is between RL seeds, not between starts. Other warm-ups give effects of other sizes.
- "Named first" and "named" measure what the response mentions before it answers. R_a measures where the last layer
  attends meanwhile. A policy can raise the reward by choosing what to name. Nothing here shows that heads attend
  elsewhere on the same text.
- (a) Pooled R_a grows with the number of pooled tokens although the attention is the same, as it is a function of a
  ratio of means. Longer responses pool more tokens. Compare it only between conditions of equal response length.
- (b) The expectation of a mean over single tokens does not depend on their number. These rows can be compared with each
  other and between conditions ([diagnose.md](diagnose.md)).
- The selection of high-entropy tokens changes during training: once the policy is sure what to name first, other tokens
  are among the 30 % of highest entropy. R_a over selected tokens can then fall although the rewarded behaviour stays.
- In this task a visual token is a ninth of the image, and every box is one token. The sizes of these effects do not
  transfer to other tasks.
"""


def train(
    out: Path, seed: int, steps: int, every: int, settings: dict[str, str], policy: str, *overrides: str
) -> float:
    """Run one job and return its seconds. Its checkpoints in HF format are below ``out/checkpoints``."""
    if (out / "seconds").exists():
        return float((out / "seconds").read_text())
    if out.exists():
        out.rename(out.with_name(f"{out.name}-interrupted-{time.strftime('%H%M%S')}"))
    env = {
        **os.environ,
        **settings,
        "OUT": str(out),
        "MODEL_PATH": policy,
    }
    values = [f"data.seed={seed}", f"trainer.total_training_steps={steps}", f"trainer.save_freq={every}"]
    start = time.monotonic()
    subprocess.run(
        ["bash", str(ROOT / "scripts" / "run_tiny.sh"), *values, "trainer.test_freq=-1", *overrides],
        env=env,
        check=True,
        cwd=ROOT,
    )
    (out / "seconds").write_text(str(time.monotonic() - start))
    return time.monotonic() - start


def measure(model: Path, scenes: Path, cache: Path) -> dict[str, float]:
    """Means over held-out scenes, four samples per scene at temperature 1, stored in ``cache``."""
    if not cache.exists():
        cache.write_text(json.dumps(evaluate(model, scenes, samples_per_row=4, temperature=1.0, seed=0)))
    return {name: json.loads(cache.read_text())[name]["mean"] for name in MEASURES}


def table(start: dict[str, float], results: dict[str, list[dict[str, float]]]) -> list[str]:
    """Markdown table with a row per measure, mean and sample standard deviation over seeds per condition."""
    lines = ["| | start | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    for name, title in MEASURES.items():
        cells = [f"{start[name]:.3f}"]
        for runs in results.values():
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Run missing jobs, measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10, help="steps between measured checkpoints")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "region_effect")
    parser.add_argument("--policy", required=True, help="the start, as printed by `sayo prepare policy`")
    parser.add_argument("--scenes", type=Path, required=True, help="a folder of `sayo prepare synthetic`")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "tiny_results.md")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start = measure(Path(args.policy), args.scenes, args.out / "start.json")
    steps = list(range(args.every, args.steps + 1, args.every))
    wrong_box = prepare_scenes(ROOT / ".sayo", SceneConfig(region="distractor")).path
    results: dict[int, dict[str, list[dict[str, float]]]] = {step: {name: [] for name in CONDITIONS} for step in steps}
    seconds = []
    for seed in args.seeds:
        for name, given in CONDITIONS.items():
            out = args.out / f"{name.replace(' ', '_')}-{seed}"
            settings = given | ({"DATA": str(wrong_box)} if name == "wrong box" else {})
            seconds.append(train(out, seed, args.steps, args.every, settings, args.policy))
            for step in steps:
                model = out / "checkpoints" / f"global_step_{step}" / "actor" / "huggingface"
                results[step][name].append(measure(model, args.scenes, out / f"held_out_{step}.json"))
                print(name, seed, step, {k: round(v, 3) for k, v in results[step][name][-1].items()}, flush=True)
    rows = len(args.seeds)
    page = [
        "# The region reward on the tiny task",
        "",
        f"Written by `benchmarks/region_effect.py`: {args.steps} steps of 16 prompts x 8 rollouts, {rows} seeds each "
        "from one warmed-up policy, on held-out scenes (256, four samples each at temperature 1, measured with plain "
        "transformers). Mean and standard deviation over seeds; the start has one value.",
        "",
        *(line for step in steps for line in [f"## After {step} steps", "", *table(start, results[step]), ""]),
        f"A run took {statistics.mean(seconds):.0f} s on average ({min(seconds):.0f}-{max(seconds):.0f} s).",
        "",
        CAVEATS,
    ]
    args.page.write_text("\n".join(page))
    print("\n".join(page))


if __name__ == "__main__":
    main()
