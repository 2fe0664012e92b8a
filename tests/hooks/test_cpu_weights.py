"""The weight transfer of separate_async on the CPU stack, as verl's manager calls it in several processes."""

import asyncio

import torch
from verl.checkpoint_engine import CheckpointEngineRegistry

from sayo_verl.hooks.cpu import weights

WEIGHTS = {"a.weight": torch.arange(12, dtype=torch.bfloat16).view(3, 4), "b": torch.tensor([0.1, float("nan")])}


def engines(trainers, rollouts):
    """Built as verl's workers build them, and connected."""
    new = CheckpointEngineRegistry.new
    actors = [new("cpu_file", is_master=rank == 0, bucket_size=1) for rank in range(trainers)]
    readers = [new("cpu_file", bucket_size=1) for _ in range(rollouts)]
    folders = [engine.prepare() for engine in (*actors, *readers)]
    of_actors, of_readers = weights.CPUFileEngine.build_topology(trainers, rollouts, folders)
    for engine, folder in zip([*actors, *readers], [*of_actors["folder"], *of_readers["folder"]], strict=True):
        engine.init_process_group(folder=folder)
    return actors, readers


async def transfer(actors, readers, sent):
    async def read(engine):
        return {name: value.clone() async for name, value in engine.receive_weights(global_steps=1)}

    # readers first: they wait
    results = await asyncio.gather(*map(read, readers), *(actor.send_weights(iter(sent.items())) for actor in actors))
    return results[: len(readers)]


def test_every_rollout_process_gets_the_weights_of_each_transfer_and_no_file_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path)
    for scale in (1, 3):
        sent = {name: value * scale for name, value in WEIGHTS.items()}
        actors, readers = engines(2, 2)
        for got in asyncio.run(transfer(actors, readers, sent)):
            assert list(got) == list(sent)
            for name, value in sent.items():
                assert got[name].dtype == value.dtype
                assert torch.equal(got[name].nan_to_num(), value.nan_to_num())
        for engine in (*actors, *readers):
            engine.finalize()
        assert not list(tmp_path.iterdir())


def test_every_trainer_process_walks_through_the_weights(tmp_path, monkeypatch):
    """Gathering a weight is collective: a process that did not would leave the others waiting."""
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path)
    actors, _ = engines(2, 1)
    for actor in actors:
        walked = []
        asyncio.run(actor.send_weights((walked.append(name) or (name, value)) for name, value in WEIGHTS.items()))
        assert walked == list(WEIGHTS)
