"""Two jobs at once on one machine, each compared with its run alone. Two runs take 11 GB."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.equal_runs import first_difference, wait_for_end

from sayo_verl.scenes import SceneConfig
from sayo_verl.tiny.policy import TinyPolicyConfig, build_model, build_processor
from sayo_verl.tiny.prepared import prepare_scenes

pytestmark = pytest.mark.nightly

SUPPORT = Path(__file__).with_name("support")
OVERRIDES = (
    "sayo.repeatable_rollouts=True",
    "actor_rollout_ref.rollout.max_num_seqs=1",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
    f"sayo.modules=[{SUPPORT}/observed_run.py]",
    "sayo.viz_every=0",
    "trainer.total_training_steps=2",
    "trainer.test_freq=-1",
    "data.train_batch_size=4",
    "data.max_response_length=12",
    "actor_rollout_ref.rollout.n=4",
)


@pytest.fixture(scope="module")
def policies(tmp_path_factory, random_policy):
    """Two policies of one shape with different weights, so that weights of the wrong job fit."""
    config = TinyPolicyConfig(seed=1)
    processor = build_processor(config)
    other = tmp_path_factory.mktemp("other_policy")
    build_model(config, processor).save_pretrained(other)
    processor.save_pretrained(other)
    return {"a": random_policy, "b": other}


@pytest.fixture(scope="module")
def start(repo, policies, tmp_path_factory):
    """``start(folder, job, guarded)``: the process of a script that trains the job's policy.

    Each job's first weights wait on the socket until the other job's are there too, as in ``support.same_moment``.
    """
    scenes = prepare_scenes(tmp_path_factory.mktemp("scenes"), SceneConfig()).path
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "RAY_", "TRANSFER_QUEUE"))}

    def of(folder, job, *, guarded=True, meet=None):
        out = folder / job
        meeting = {
            "VERL_USE_EXTERNAL_MODULES": "support.same_moment",
            "PYTHONPATH": f"{repo}:{repo / 'tests'}",
            "SAYO_MEET": str(meet),
            "SAYO_JOB": job,
            **({} if guarded else {"SAYO_NO_GUARD": "1"}),
        }
        return subprocess.Popen(
            ["bash", str(repo / "scripts" / "run_sayo_tiny.sh"), *OVERRIDES],
            env={
                **inherited,
                "OUT": str(out),
                "MODEL_PATH": str(policies[job]),
                "DATA": str(scenes),
                "SAYO_OBSERVED": str(out / "observed"),
                **(meeting if meet else {}),
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    return of


def end(processes, folder, seconds):
    """Exit codes; None for a job that had to be ended after the time."""
    codes = {}
    for job, process in processes.items():
        try:
            codes[job] = process.wait(seconds)
        except subprocess.TimeoutExpired:
            codes[job] = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        wait_for_end(folder / job / "observed", 0 if codes[job] is None else 30)
    return codes


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for job in ("a", "b"):
        assert end({job: start(folder, job)}, folder, 420) == {job: 0}, (folder / job / "train.log").read_text()[-4000:]
    return folder


def together(start, folder, *, guarded):
    meet = folder / "meet"
    meet.mkdir()
    jobs = {job: start(folder, job, guarded=guarded, meet=meet) for job in ("a", "b")}
    codes = end(jobs, folder, 600 if guarded else 300)
    assert {file.name for file in meet.iterdir()} == {"a", "b"}, "the weights of the jobs did not meet"
    return codes, {file.read_text() for file in meet.iterdir()}


def difference(alone, folder, job):
    return first_difference(alone / job / "observed" / "run", folder / job / "observed" / "run", after=0)


def test_two_jobs_of_different_policies_do_what_each_does_alone(start, alone, tmp_path):
    assert difference(alone, alone, "a") is None
    crossed = first_difference(alone / "a" / "observed" / "run", alone / "b" / "observed" / "run", after=0)
    assert crossed == "step 1: rollout tokens", "the policies sample different tokens"
    codes, addresses = together(start, tmp_path, guarded=True)
    assert codes == {"a": 0, "b": 0}
    assert len(addresses) == 2
    assert {job: difference(alone, tmp_path, job) for job in codes} == {"a": None, "b": None}


def test_without_the_guard_of_the_socket_two_jobs_hang_or_mix(start, alone, tmp_path):
    codes, addresses = together(start, tmp_path, guarded=False)
    assert len(addresses) == 1, "both jobs wait on one socket"
    harmed = [job for job, code in codes.items() if code != 0 or difference(alone, tmp_path, job) is not None]
    assert harmed, "both jobs did what they do alone"
