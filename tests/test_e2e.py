"""The real stack end to end: a launch script with verl's trainer, Ray, TransferQueue, FSDP2 and a vLLM server."""

import json
import math
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.equal_runs import first_difference, tampered, wait_for_end

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
    "actor_rollout_ref.actor.optim.lr_warmup_steps=6",
]
# Rollouts repeat bit for bit if vLLM computes one at a time, from its first token.
REPEATED = (
    "sayo.repeatable_rollouts=True",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    "trainer.total_training_steps=4",
    "trainer.save_freq=2",
    "data.train_max_samples=12",  # 3 steps are an epoch, so the last one is in the next
    f"sayo.modules=[{Path(__file__).with_name('support')}/observed_run.py]",
)


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


def train(repo, folder, out, policy, *more, script="run_sayo_tiny.sh", killed=False, **variables):
    """Steps from random weights with every signal there is.

    SAYO's and Faithful-MR1's rewards, AT-RL's token weights and VGPO's trajectory weights.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAY_", "TRANSFER_QUEUE"))}
    scenes = prepare_scenes(folder / "scenes", SceneConfig()).path
    place = {} if "RESUME" in variables else {"OUT": str(out)}
    done = subprocess.run(
        ["bash", str(repo / "scripts" / script), *OVERRIDES, *more],
        env={**inherited, **place, "MODEL_PATH": str(policy), "DATA": str(scenes), **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=420,
    )
    log = out / "train.log"
    assert (done.returncode != 0) == killed, (
        done.stdout[-4000:] + done.stderr[-4000:] + (log.read_text()[-4000:] if log.exists() else "")
    )
    return out, done


@pytest.fixture(scope="module")
def mixed_run(repo, random_policy, folder):
    """Four steps, observed: also what a run that is killed and resumed has to equal."""
    observed = {"SAYO_OBSERVED": str(folder / "mix" / "observed")}
    return train(repo, folder, folder / "mix", random_policy, *REPEATED, *kept_rollouts(folder), **observed)


def test_all_methods_train_together_on_stock_verl(mixed_run):
    out, _ = mixed_run
    steps = metrics(out)
    assert len(steps) == 4
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
    for one, two in zip(metrics(mixed_run[0])[:2], metrics(out), strict=True):
        assert one.keys() - {"timing_s/save_checkpoint"} == two.keys()
        compared = {key: one[key] for key in one if SAME.match(key) and not TIMES.search(key)}
        assert len(compared) > 70
        assert {key: two[key] for key in compared} == pytest.approx(compared, rel=1e-5, abs=1e-5)


def test_two_updates_of_a_step_train_on_rollouts_of_other_devices(repo, random_policy, folder):
    mode = (
        "+mode=separate_async_cpu",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=-1",  # none: an update has to change the policy visibly
    )
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


def observed_of(folder, label="run"):
    return folder / "observed" / label


@pytest.fixture(scope="module")
def killed_run(repo, random_policy, folder):
    """``killed_run(point)``: the run of ``mixed_run`` again, ended by kill -9 in step 3 or while it saves step 4."""

    def run(point):
        out = folder / f"killed-{point}"
        observed = {"SAYO_OBSERVED": str(out / "observed")}
        train(repo, folder, out, random_policy, *REPEATED, killed=True, SAYO_KILLED=point, **observed)
        assert (out / "observed" / "killed").read_text().startswith(point)
        seconds, left = wait_for_end(out / "observed", 60)
        assert not left, f"after {seconds:.0f} s these processes of the killed run were left: {left}"
        return out

    return run


@pytest.fixture(scope="module")
def resume(repo, random_policy, folder):
    """``resume(run, controls)``: the killed run to its end, then from each of the control checkpoints."""

    def run(killed, controls=()):
        again = killed.with_name(f"{killed.name}-resumed")
        variables = {"SAYO_OBSERVED": str(again / "observed"), "SAYO_CONTROLS": json.dumps(controls)}
        train(repo, folder, killed, random_policy, *REPEATED, RESUME=str(killed), **variables)
        return again

    return run


CONTROLS = {
    "data position": "step 3: prompts",
    "step number": "step 3: step number",
    "worker RNG": "checkpoint: worker RNG (/cpu)",
    "optimizer": "step 4: ",
    "LR schedule": "step 3: metrics: actor/lr",
    "one weight": "step 3: ",
    "a box": "step 3: boxes and other extra_info of the rows",
}


def of_controls(whole, killed, names):
    """[label, checkpoint, changed row] of ``observed_run``."""
    copies = tampered(
        killed / "checkpoints" / "global_step_2",
        whole / "checkpoints" / "global_step_4" / "data.pt",
        killed.with_name(f"{killed.name}-controls"),
    )
    step_3 = torch.load(observed_of(whole) / "step_3.pt", weights_only=False)
    index = min(row["index"] for row in step_3["rows"].values())
    copies["a box"] = copies["nothing"]
    return [[name, str(copies[name]), index if name == "a box" else None] for name in ("nothing", *names)]


@pytest.mark.parametrize(
    ("point", "names"),
    [
        ("update", ["data position", "optimizer"]),
        pytest.param("save", list(CONTROLS), marks=pytest.mark.nightly),
        pytest.param("rollout", [], marks=pytest.mark.nightly),
    ],
)
def test_a_killed_run_resumes_to_the_very_numbers_of_one_that_was_not(mixed_run, killed_run, resume, point, names):
    """Prompts, tokens, rewards, statistics, advantages, metrics of steps 3 and 4, then weights, moments, LR and RNG.

    The controls show that the comparison finds what a resume can lose. "nothing" is the same checkpoint untouched: the
    way in which controls are run is not the cause of a difference.
    """
    whole = mixed_run[0]
    killed = killed_run(point)
    steps = sorted(file.name for file in (killed / "checkpoints").glob("global_step_*"))
    assert steps == (["global_step_2", "global_step_4"] if point == "save" else ["global_step_2"])
    assert (killed / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    again = resume(killed, of_controls(whole, killed, names))
    last, start = whole / "checkpoints" / "global_step_4", killed / "checkpoints" / "global_step_2"

    def difference(folder, checkpoints):
        compared = (last, checkpoints / last.name, start)
        return first_difference(observed_of(whole), folder, after=2, checkpoints=compared)

    assert first_difference(observed_of(whole), observed_of(killed), after=0) == "number of steps", "the first two"
    assert difference(observed_of(again), killed / "checkpoints") is None
    for name in ("nothing", *names):
        found = difference(observed_of(again, name), observed_of(again, name) / "checkpoints")
        assert (found is None) if name == "nothing" else found.startswith(CONTROLS[name]), f"{name}: {found}"


@pytest.mark.nightly
def test_a_run_that_is_repeated_has_the_very_same_numbers(mixed_run, repo, random_policy, folder):
    out = folder / "again"
    train(repo, folder, out, random_policy, *REPEATED, SAYO_OBSERVED=str(out / "observed"))
    last = [run / "checkpoints" / "global_step_4" for run in (mixed_run[0], out)]
    assert first_difference(observed_of(mixed_run[0]), observed_of(out), after=0, checkpoints=last) is None


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
