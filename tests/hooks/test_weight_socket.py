"""Weights of two jobs on one machine stay apart, shown with verl's own sender and receiver."""

import asyncio
import tempfile
import threading

import pytest
import torch
from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender

from sayo_verl import main_ppo
from sayo_verl.hooks.contract import RUN_TOKEN

JOB_ID = "01000000"  # of every job that starts a Ray of its own


@pytest.fixture
def address():
    with tempfile.TemporaryDirectory() as folder:  # a socket's path has 107 characters at most: too few for tmp_path
        yield f"ipc://{folder}/rl-colocate-zmq-{JOB_ID}-replica-0-rank-0.sock"


@pytest.fixture
def ends(address, monkeypatch):
    """``ends(token)``: a sender and a receiver of the job with that token."""

    def make(token):
        if token is None:
            monkeypatch.delenv(RUN_TOKEN, raising=False)
        else:
            monkeypatch.setenv(RUN_TOKEN, token)
        sender = BucketedWeightSender(zmq_handle=address, bucket_size_mb=1, use_shm=True)
        return sender, BucketedWeightReceiver(zmq_handle=address, device=torch.device("cpu"), use_shm=True)

    return make


def test_rollouts_get_the_weights_of_their_own_job(ends):
    jobs, got, threads = {"a": 1.0, "b": 2.0}, {}, []
    for job, value in jobs.items():
        sender, receiver = ends(job)
        weights = [("w", torch.full((4,), value))]
        threads.append(threading.Thread(target=asyncio.run, args=(sender.async_send_weights(weights),), daemon=True))

        def keep(bucket, is_last, job=job):
            got[job] = {name: tensor.clone() for name, tensor in bucket}

        threads.append(threading.Thread(target=receiver.receive_weights, args=(keep,), daemon=True))
    # both senders first, as when one job starts while the other waits for its rollouts
    for thread in threads[0::2] + threads[1::2]:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads), f"a job hangs; got {got}"
    assert {job: tensors["w"].tolist() for job, tensors in got.items()} == {"a": [1.0] * 4, "b": [2.0] * 4}


def test_both_ends_of_a_job_have_one_address_and_two_jobs_have_two(ends):
    (sender_a, receiver_a), (sender_b, receiver_b) = ends("a"), ends("b")
    assert sender_a.zmq_handle == receiver_a.zmq_handle
    assert sender_b.zmq_handle == receiver_b.zmq_handle
    assert sender_a.zmq_handle != sender_b.zmq_handle


def test_without_a_launcher_of_ours_the_address_is_verls(ends, address):
    assert {end.zmq_handle for end in ends(None)} == {address}


def test_every_launch_has_a_token_of_its_own_in_all_its_processes():
    assert main_ppo.worker_variables()[RUN_TOKEN] != main_ppo.worker_variables()[RUN_TOKEN]


def test_verl_deletes_the_socket_of_another_job_still_needed(ends):
    """Without the guard the second sender takes the first one's place."""
    (first, _), (second, _) = ends(None), ends(None)
    path = first.zmq_handle.removeprefix("ipc://")
    first._init_socket()
    with open("/proc/net/unix") as sockets:
        assert path in sockets.read()
    second._init_socket()  # no "address in use": the first is deaf now
    for end in (first, second):
        end.socket.close(linger=0)
