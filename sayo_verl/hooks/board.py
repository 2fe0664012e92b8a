"""What the processes of a run tell its launcher: the phase of the trainer, and what went wrong where.

It is Ray's own key-value store, because workers may be on other nodes and share no disk with the launcher. Keys begin
with the run's token, so that two jobs on one cluster do not read each other's. A process outside Ray (vLLM's engine)
cannot write here.
"""

import json
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from ray.experimental import internal_kv

from sayo_verl.hooks.contract import RUN_TOKEN

NAMESPACE = "sayo_verl"


def put(topic: str, message: Mapping[str, Any]) -> None:
    """Set the one message of ``topic``; an earlier one is replaced. Adds ``time`` (seconds since the epoch)."""
    _write(_key(topic), message)


def post(topic: str, message: Mapping[str, Any]) -> None:
    """Add a message to ``topic``. Adds ``time`` and ``pid``."""
    _write(f"{_key(topic)}/{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", {"pid": os.getpid(), **message})


def read(topic: str, *, token: str | None = None) -> list[dict[str, Any]]:
    """The messages of ``topic``, in the order of time; empty if there is none.

    Args:
        topic: as of ``put`` or ``post``.
        token: of the run; None: of this process. The launcher's own environment has none.
    """
    keys = sorted(internal_kv._internal_kv_list(_key(topic, token), namespace=NAMESPACE))
    values = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return [json.loads(value) for value in values if value is not None]


def _key(topic: str, token: str | None = None) -> str:
    return f"{token or os.environ.get(RUN_TOKEN, '')}/{topic}"


def _write(key: str, message: Mapping[str, Any]) -> None:
    value = json.dumps({"time": time.time(), **message})
    internal_kv._internal_kv_put(key, value, overwrite=True, namespace=NAMESPACE)
