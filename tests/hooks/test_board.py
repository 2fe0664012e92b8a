import pytest
import ray

from sayo_verl.hooks import board
from sayo_verl.hooks.contract import RUN_TOKEN


@pytest.fixture
def ray_cluster():
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000, log_to_driver=False)
    yield
    ray.shutdown()


def test_messages_of_a_worker_reach_the_process_that_knows_the_token_and_no_other(ray_cluster):
    @ray.remote(num_cpus=0, runtime_env={"env_vars": {RUN_TOKEN: "mine"}})
    def work():
        board.put("phase", {"name": "rollout"})
        board.put("phase", {"name": "update"})
        board.post("trouble", {"row": 1})
        board.post("trouble", {"row": 2})

    ray.get(work.remote())
    assert [message["name"] for message in board.read("phase", token="mine")] == ["update"]
    assert [message["row"] for message in board.read("trouble", token="mine")] == [1, 2]
    assert board.read("trouble", token="other") == []
