"""Loaded into every process of two jobs by VERL_USE_EXTERNAL_MODULES: makes their weights meet.

SAYO_MEET      folder: each job's first sender waits, once bound, until both jobs' are (30 s at most)
SAYO_JOB       name of the job
SAYO_NO_GUARD  set: the address of the socket is verl's again, without the run's token
"""

import os
import time
from pathlib import Path
from types import ModuleType

import wrapt

import sayo_verl.plugin  # noqa: F401 (its guard of the socket comes first)
from sayo_verl.hooks.contract import WEIGHT_TRANSFER


def meet(transfer: ModuleType) -> None:
    if os.environ.get("SAYO_NO_GUARD"):
        for end in (transfer.BucketedWeightSender, transfer.BucketedWeightReceiver):
            end.__init__ = end.__init__.__wrapped__
    bind, folder = transfer.BucketedWeightSender._init_socket, Path(os.environ["SAYO_MEET"])

    def _init_socket(self):
        bind(self)
        (folder / os.environ["SAYO_JOB"]).write_text(self.zmq_handle)
        end = time.monotonic() + 30
        while len(list(folder.iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.05)

    transfer.BucketedWeightSender._init_socket = _init_socket


wrapt.register_post_import_hook(meet, WEIGHT_TRANSFER)
