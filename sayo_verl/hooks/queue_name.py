"""A TransferQueue for each job of a Ray cluster.

TransferQueue 0.1.11 looks its controller up by a fixed name in a fixed namespace, and joins one that exists. So the
second job on a Ray cluster puts its prompts into the first job's queue. Both trainers then sample each other's
rollouts, and the job that ends first closes the queue of the other. Here the run's token is added to the namespace. The
launcher creates it and passes it to all processes of the run. Without a token the name stays TransferQueue's.
"""

import os
from types import ModuleType
from typing import Any

import wrapt

from sayo_verl.hooks.contract import RUN_TOKEN


def _own(namespace: str) -> str:
    token = os.environ.get(RUN_TOKEN)
    return f"{namespace}-{token}" if token else namespace


class _Ray(wrapt.ObjectProxy):
    """Ray, whose named actors of another namespace are looked up in the run's."""

    def get_actor(self, name: str, namespace: str | None = None) -> Any:
        return self.__wrapped__.get_actor(name, namespace and _own(namespace))


class _Named(wrapt.ObjectProxy):
    """A class of actors that are created under a name in the run's namespace."""

    def options(self, *, namespace: str, **options: Any) -> Any:
        return self.__wrapped__.options(namespace=_own(namespace), **options)


def separate_queues(module: ModuleType) -> None:
    """Add the run's token to the names of ``transfer_queue.interface`` or ``storage.clients.ray_storage_client``."""
    for name in ("TransferQueueController", "RayObjectRefStorage"):
        if hasattr(module, name):
            setattr(module, name, _Named(getattr(module, name)))
    module.ray = _Ray(module.ray)  # type: ignore[attr-defined]
