"""Two jobs on one Ray cluster have two TransferQueues."""

import importlib
from types import SimpleNamespace

import pytest
import ray
import transfer_queue.interface

from sayo_verl.hooks.contract import RUN_TOKEN
from sayo_verl.hooks.queue_name import separate_queues


class Cluster:
    """Ray's named actors, over a dict."""

    def __init__(self):
        self.actors = {}

    def get_actor(self, name, namespace=None):
        if (name, namespace) not in self.actors:
            raise ValueError(name)
        return self.actors[name, namespace]

    def options(self, name, namespace, **more):
        def remote(*args, **kwargs):
            return self.actors.setdefault((name, namespace), SimpleNamespace())

        return SimpleNamespace(remote=remote)


@pytest.fixture
def jobs(monkeypatch):
    """``jobs(token)``: TransferQueue's module as processes of the job with that token see it, on one cluster."""
    cluster = Cluster()

    def of(token):
        monkeypatch.delenv(RUN_TOKEN, raising=False)
        if token:
            monkeypatch.setenv(RUN_TOKEN, token)
        module = SimpleNamespace(ray=cluster, TransferQueueController=cluster)
        separate_queues(module)
        return module

    return of


def create(module):
    return module.TransferQueueController.options(name="TransferQueueController", namespace="transfer_queue").remote()


def look_up(module):
    return module.ray.get_actor("TransferQueueController", namespace="transfer_queue")


def test_processes_of_a_job_find_its_queue_and_those_of_another_job_do_not(jobs):
    queue = create(jobs("a"))
    assert look_up(jobs("a")) is queue
    with pytest.raises(ValueError, match="TransferQueueController"):
        look_up(jobs("b"))
    assert create(jobs("b")) is not queue


def test_without_a_token_the_name_is_transfer_queues(jobs):
    queue = create(jobs(None))
    assert jobs(None).ray.__wrapped__.get_actor("TransferQueueController", "transfer_queue") is queue


def test_the_module_of_transfer_queue_is_guarded_in_this_process():
    importlib.import_module("sayo_verl.plugin")
    assert type(transfer_queue.interface.ray).__name__ == "_Ray"
    assert type(transfer_queue.interface.TransferQueueController).__name__ == "_Named"
    assert transfer_queue.interface.ray.get is ray.get
