"""The real stack end to end: a launch script with verl's trainer, Ray, TransferQueue, FSDP2 and a vLLM server."""

import json
import math
import os
import re
import signal
import subprocess
import time

import numpy as np
import pytest

from sayo_verl.launch.reaper import end_processes, processes_with
from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.prepared import prepare_scenes
from sayo_verl.view.store import read_steps

pytestmark = pytest.mark.e2e


def metrics(out):
    return [json.loads(line)["data"] for line in (out / "metrics.jsonl").read_text().splitlines()]


OVERRIDES = [
    "algorithm.adv_estimator=attn_mix",
    "algorithm.attn.mix=[region,faithful,anchor,dual]",
    "algorithm.attn.dual.intra=False",
    "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
    "data.train_batch_size=4",
    "data.max_response_length=12",
    "actor_rollout_ref.rollout.n=4",
]


def kept_rollouts(folder):
    """verl writes the rollouts of a first run into the folder, and takes them from there in the next."""
    return (
        "trainer.experiment_name=rollouts",
        "skip.rollout_tq.enable=True",
        "skip.rollout_tq.steps=[1,2]",
        f"skip.rollout_tq.dump_dir={folder}/rollouts",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("e2e")


def train(repo, folder, out, policy, *more, script="run_sayo_tiny.sh"):
    """Two steps from random weights with every signal there is.

    SAYO's and Faithful-MR1's rewards, AT-RL's token weights and VGPO's trajectory weights.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAY_", "TRANSFER_QUEUE"))}
    scenes = prepare_scenes(folder / "scenes", SceneConfig()).path
    done = subprocess.run(
        ["bash", str(repo / "scripts" / script), *OVERRIDES, *more],
        env={**inherited, "OUT": str(out), "MODEL_PATH": str(policy), "DATA": str(scenes)},
        capture_output=True,
        text=True,
        check=False,
        timeout=420,
    )
    log = out / "train.log"
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + log.read_text()[-4000:]
    return out, done


@pytest.fixture(scope="module")
def mixed_run(repo, random_policy, folder):
    return train(repo, folder, folder / "mix", random_policy, *kept_rollouts(folder))


def test_all_methods_train_together_on_stock_verl(mixed_run):
    out, _ = mixed_run
    steps = metrics(out)
    assert len(steps) == 2
    for step in steps:
        assert step["sayo/rows_with_region_share"] == 1.0
        assert -1 < step["sayo/region_reward/mean"] < 1
        assert step["sayo/target_attention/mean"] > 0
        assert 0 < step["sayo/region_mass/mean"] < step["sayo/image_mass/mean"] < 1
        assert step["sayo/probe_seconds"] > 0
        assert 0 < step["sayo/probe_share_of_log_prob"] < 1
        assert math.isfinite(step["actor/grad_norm"])
        assert step["actor/grad_norm"] > 0
        # vLLM starts from dummy weights, so agreement can only come from verl's weight sync. The counterfactual pass
        # came after these log-probs and changed nothing of them.
        assert step["training/rollout_probs_diff_mean"] < 1e-3
        assert step["sayo/counterfactual_effect/mean"] > 0
        assert step["sayo/counterfactual_seconds"] > 0
        assert step["sayo/partition_failed_rows"] == 0
        assert step["sayo/anchor_weight/max"] > 1 > step["sayo/anchor_weight/min"]
        assert step["sayo/token_weight/mean"] == pytest.approx(1.0, abs=1e-5)
        assert step["sayo/trajectory_weight/mean"] == pytest.approx(1.0, abs=1e-5)
        assert step["sayo/dual_trajectory_factor/max"] > 1
        attention = step["sayo/region_reward/mean"] + step["sayo/faithful_reward/mean"]
        assert step["critic/rewards/mean"] == pytest.approx(step["critic/score/mean"] + attention, abs=1e-4)
    assert steps[0]["sayo/region_mass/mean"] != steps[1]["sayo/region_mass/mean"]


def test_the_run_names_its_results(mixed_run):
    out, done = mixed_run
    for file in ("curves.png", "metrics.jsonl", "report.html", "run.json", "train.log"):
        assert (out / file).stat().st_size > 0
    for file in ("curves.png", "metrics.jsonl", "report.html"):
        assert str(out / file) in done.stdout
    assert "pooled R_a" in done.stdout
    card = json.loads((out / "run.json").read_text())
    assert card["estimator"] == "attn_mix"
    assert card["versions"]["verl"] == "0.9.1"
    assert "handshake with 1 worker(s), engine SayoFSDPEngine" in (out / "train.log").read_text()


def test_the_run_records_rollouts_before_training_and_after_the_last_step(mixed_run):
    out, _ = mixed_run
    first, last = read_steps(out)
    assert (first.step, last.step) == (0, len(metrics(out)))
    for step in (first, last):
        assert len(step.prompts) == 2
        for prompt, responses in step.prompts:
            assert prompt.region_tokens > 0
            for response in responses:
                image_mass_T = response.values["image_mass"]
                total = float(response.maps[0].total.unpack().sum())
                assert total == pytest.approx(float(image_mass_T.mean()), rel=0.02)  # codes of 255 levels
                assert np.isfinite(response.values["effect"]).all()
                assert np.isfinite(response.values["advantage"]).all()


SAME = re.compile(r"(sayo|critic|actor|rollout_corr|response_length|training/rollout)\b")
TIMES = re.compile(r"seconds|probe_share_of_log_prob|/perf/")


def test_two_nodes_train_on_the_same_rollouts_with_the_same_statistics(mixed_run, repo, random_policy, folder):
    """Two ranks add rows in another order than one: float32 sums differed by up to 2e-6 in both steps."""
    out, _ = train(repo, folder, folder / "two", random_policy, *kept_rollouts(folder), script="two_nodes_tiny.sh")
    log = (out / "train.log").read_text()
    nodes = re.search(r"handshake with 2 worker\(s\), .*, on 2 nodes: (.*)", log)
    assert nodes
    assert sorted(re.findall(r"127\.0\.0\.\d, node-\d", nodes[1])) == ["127.0.0.2, node-1", "127.0.0.3, node-2"]
    assert "num_cpus, num_gpus, object_store_memory" in log, "sizes of a machine are not for a cluster"
    assert log.count("Injected 16 cached trajectories") == 2
    for one, two in zip(metrics(mixed_run[0]), metrics(out), strict=True):
        assert one.keys() == two.keys()
        compared = {key: one[key] for key in one if SAME.match(key) and not TIMES.search(key)}
        assert len(compared) > 70
        assert {key: two[key] for key in compared} == pytest.approx(compared, rel=1e-5, abs=1e-5)


def test_two_updates_of_a_step_train_on_rollouts_of_other_devices(repo, random_policy, folder):
    mode = ("+mode=separate_async_cpu", "actor_rollout_ref.actor.ppo_mini_batch_size=2")
    out, _ = train(repo, folder, folder / "separate", random_policy, *mode)
    first, second = metrics(out)
    # A mean over both updates of the first step: the second agrees with its rollouts if the old policy was restored.
    # Rollouts of the policy itself differ by 2e-5: vLLM samples no image placeholder. Those of the last one by 2e-3.
    assert first["training/rollout_probs_diff_mean"] < 1e-4 < 5e-4 < second["training/rollout_probs_diff_mean"]
    assert first["sayo/staleness/max"] == first["sayo/partial_rollouts"] == 0
    assert second["sayo/staleness/max"] == 1, "rollouts did not continue during the first step"
    for step in (first, second):
        assert step["actor/grad_norm"] > 0
        assert step["sayo/counterfactual_effect/mean"] > 0
        assert step["sayo/staleness/max"] == step["training/off_policy/trajectory_staleness_worst/max"]


def test_a_worker_that_hangs_ends_the_run_with_its_name_and_nothing_is_left(repo, random_policy, folder):
    out, scenes = folder / "hung", prepare_scenes(folder / "scenes", SceneConfig()).path
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAY_", "TRANSFER_QUEUE"))}
    script = subprocess.Popen(
        ["bash", str(repo / "scripts/run_tiny.sh"), *OVERRIDES[4:], "sayo.step_limit=15"],
        env={**inherited, "OUT": str(out), "MODEL_PATH": str(random_policy), "DATA": str(scenes)},
        stdout=subprocess.DEVNULL,
    )
    mark, end = f"OUT={out}", time.monotonic() + 300
    try:
        while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 2:
            assert script.poll() is None
            assert time.monotonic() < end
            time.sleep(0.2)
        (worker,) = (pid for pid, name in processes_with(mark).items() if "WorkerDict" in name)
        os.kill(worker, signal.SIGSTOP)
        assert script.wait(60) == 1
        assert not processes_with(mark)
    finally:
        end_processes(mark)
        script.wait()
    last = (out / "train.log").read_text().splitlines()[-1]
    assert re.match(rf"SAYO-X11: .* of step \d+ .*WorkerDict\S* \(pid {worker} on .*\): stopped", last)
