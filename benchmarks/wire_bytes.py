"""Measure the bytes that each method adds to what a worker sends through TransferQueue, and write the page's section.

    python benchmarks/wire_bytes.py               # benchmarks/results/wire.json, docs/benchmarks.md
    python benchmarks/wire_bytes.py --raw F.json  # measure only, into another file

A training worker of verl with the engine mixin runs the log-prob pass (and the passes with a changed image) over rows
of several lengths with a tiny random Qwen3-VL. It takes a minute on a CPU.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cost.store import Store
from cost.wire import Row, declared, methods

from sayo_verl.methods import Needs
from sayo_verl.probe.statistics import INTERVENTION_KEY, WIRE_PREFIX

ROOT = Path(__file__).resolve().parent.parent
# (image width, image height, response length, boxes): each response with two sizes of an image
SHAPES: list[tuple[int, int, int, list[list[float]]]] = [
    (64, 64, 5, [[0.0, 0.0, 0.5, 0.5]]),
    (160, 128, 5, [[0.0, 0.0, 0.5, 0.5]]),
    (64, 64, 40, [[0.0, 0.0, 0.5, 0.5]]),
    (160, 128, 40, [[0.0, 0.0, 0.5, 0.5]]),
]


def sent(output: Any, row: int) -> dict[str, int]:
    """Bytes of one row in each of our keys of a worker's output."""
    values = {key: output[key].unbind()[row] for key in output.keys() if key.startswith(WIRE_PREFIX)}
    return {key: value.numel() * value.element_size() for key, value in values.items()}


def measure(built: Any, rows: list[dict[str, Any]], needs: Needs) -> list[dict[str, Any]]:
    """Lengths of each row, bytes sent and bytes declared."""
    from support.engine_rows import log_prob_pass

    outputs = [log_prob_pass(built, rows, needs.statistics.to_wire())]
    for intervention in needs.interventions:
        change = {**intervention.to_wire(), "coverage": needs.statistics.coverage, "step": 1}
        outputs.append(log_prob_pass(built, rows, None, calculate_entropy=False, **{INTERVENTION_KEY: change}))
    heads = built.engine.model_config.hf_config.get_text_config().num_attention_heads
    found = []
    for n, row in enumerate(rows):
        visual = int(outputs[0][WIRE_PREFIX + "image_tokens"].unbind()[n])
        lengths = Row(len(row["prompts"]), visual, len(row["responses"]))
        keys = {key: size for output in outputs for key, size in sent(output, n).items()}
        total = declared(needs, lengths, heads)
        found.append({**lengths._asdict(), "keys": keys, "bytes": sum(keys.values()), "declared": total})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, help="measure only, into this file")
    args = parser.parse_args()

    os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="sayo_verl.plugin", TORCHDYNAMO_DISABLE="1")
    sys.path.insert(0, str(ROOT / "tests"))  # the worker of the tests
    from support.engine_rows import make_rows, model_config, single_process_group, worker

    from sayo_verl.tiny.policy import TinyPolicyConfig, build_model, build_processor

    single_process_group()
    raw = args.raw or ROOT / "benchmarks" / "results" / "wire.json"
    with tempfile.TemporaryDirectory() as folder:
        processor = build_processor(TinyPolicyConfig())
        for part in (build_model(TinyPolicyConfig(), processor), processor):
            part.save_pretrained(folder)
        config = model_config(Path(folder), packed=True)
        built, rows = worker(config, dynamic=False), make_rows(config.processor, shapes=SHAPES)
        for name, needs in methods().items():
            entry = {
                "date": time.strftime("%Y-%m-%d"),
                "statistics": [statistic.key for statistic in needs.statistics.statistics],
                "rows": measure(built, rows, needs),
            }
            Store(raw).update("wire", name, entry, replace=True)
            print(f"{name}: {[(row['bytes'], row['declared']) for row in entry['rows']]}")
    if args.raw:
        return 0
    page = [sys.executable, str(ROOT / "benchmarks" / "probe_cost.py"), "--page-only"]
    return subprocess.run(page, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
