"""The whole stack on one card: 20 steps of GRPO and of ``attn_region`` with the project's GPU scripts and vLLM.

The task is the drawn scenes. The rehearsal composes and checks both jobs, but does not run them.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cost.cells import duration

from gpu.report import Stage

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 20
SCRIPTS = {"grpo": "scripts/run_grpo_qwen3vl_8b.sh", "attn_region": "scripts/run_sayo_qwen3vl_8b.sh"}
SHOWN = ("timing_s/step", "timing_s/old_log_prob", "sayo/probe_share_of_log_prob")


def run(stage: Stage, model: str) -> None:
    """``model`` is a Qwen3-VL folder or hub name; empty: the warmed-up tiny policy."""
    if not stage.tiny and importlib.util.find_spec("vllm") is None:
        raise RuntimeError("the stage 'train' needs vLLM: pip install 'sayo-verl[gpu]'")
    if stage.tiny:
        stage.stood_in["training"] = "the jobs are composed and checked, not run"
    implementation = []
    if importlib.util.find_spec("flash_attn") is None:
        stage.stood_in["flash-attn"] = "attn_implementation=sdpa"
        implementation = ["+actor_rollout_ref.model.override_config.attn_implementation=sdpa"]
    held: dict[str, Path] = {}
    if stage.run("scenes and policy", _prepare, stage, model, held, needs=10) is None:
        return
    for name, script in SCRIPTS.items():
        base = model or str(held["policy"])
        stage.run(name, _job, stage, script, base, held["scenes"], bool(model), implementation, needs=20)


def _prepare(stage: Stage, model: str, held: dict[str, Path]) -> dict[str, Any]:
    from sayo_verl.scenes import SceneConfig
    from sayo_verl.tiny.policy import TinyPolicyConfig, build_model, build_processor
    from sayo_verl.tiny.prepared import prepare_scenes
    from sayo_verl.tiny.warmup import WarmupConfig, prepare_policy

    # a model of the hub must be asked for the rewarded form, the tiny policy was warmed up to it
    prompt = "instruction" if model else "question"
    config = SceneConfig(n_train=64, n_val=16) if stage.tiny else SceneConfig()
    held["scenes"] = prepare_scenes(stage.out / "data", config, prompt).path
    if stage.tiny:
        held["policy"] = stage.out / "untrained_policy"
        processor = build_processor(TinyPolicyConfig())
        for part in (build_model(TinyPolicyConfig(), processor), processor):
            part.save_pretrained(held["policy"])
    elif not model:
        held["policy"] = prepare_policy(stage.out / "data", TinyPolicyConfig(), WarmupConfig(), config).path
    return {name: str(path) for name, path in held.items()}


def _job(stage: Stage, script: str, model: str, scenes: Path, lora: bool, more: list[str]) -> dict[str, Any]:
    """Run a script; its folder is below the output folder."""
    out = stage.out / "runs" / f"{Path(script).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        "MODEL_PATH": model,
        "DATA": scenes,
        "OUT": out,
        "NGPUS_PER_NODE": 1,
        "DRY_RUN": int(stage.tiny),
    }
    # the scripts use the active Python if it has the package
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **{name: str(value) for name, value in settings.items()}, "PATH": path}
    environment.pop("TRITON_INTERPRET", None)
    overrides = [
        "actor_rollout_ref.rollout.n=8",
        "data.train_batch_size=16",
        "reward.custom_reward_function.reward_kwargs.accuracy_weight=1",
        "trainer.total_epochs=1000",
        f"data.max_prompt_length={512 if lora else 32}",
        f"data.max_response_length={128 if lora else 24}",
        f"actor_rollout_ref.model.lora_rank={16 if lora else 0}",
        "trainer.save_freq=-1",
        "trainer.test_freq=-1",
        "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=False",
        *more,
    ]
    done = subprocess.run(
        ["bash", script, *overrides],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=stage.left(),
        check=False,
    )
    lines = (done.stdout + done.stderr).strip().splitlines()
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}: {' / '.join(lines[-3:])}")
    if stage.tiny:
        return {"checked": [line for line in done.stdout.splitlines() if line.strip()][-3:]}
    return {"folder": str(out), **_measured(stage, out, Path(script).stem)}


def _measured(stage: Stage, out: Path, title: str) -> dict[str, Any]:
    """Medians over the steps, without the first two, which compile and warm up."""
    from sayo_verl.report.runs import load_run

    training = load_run(out)
    facts: dict[str, Any] = {"steps": len(training.steps), "wrong": max(training.steps) < STEPS}
    for name in SHOWN:
        if values := [value for step, value in training.training(name) if step > 2]:
            facts[name] = statistics.median(values)
            shown = f"{100 * facts[name]:.2f} %" if "share" in name else duration(facts[name])
            stage.figure(f"{title}, {name}", shown)
    return facts
