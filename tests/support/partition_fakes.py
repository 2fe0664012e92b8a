"""Partitioners that misbehave as METIS has been seen to; worker processes import them by name."""

import os
import signal
import time


def crash_on_five(offsets, neighbours, weights, parts, seed):
    """Dies in graphs of five nodes, like a C library does."""
    if len(offsets) == 6:
        os.kill(os.getpid(), signal.SIGSEGV)
    return halves(offsets, neighbours, weights, parts, seed)


def hang_on_five(offsets, neighbours, weights, parts, seed):
    if len(offsets) == 6:
        time.sleep(600)
    return halves(offsets, neighbours, weights, parts, seed)


def garbage_on_five(offsets, neighbours, weights, parts, seed):
    labels = halves(offsets, neighbours, weights, parts, seed)
    return [parts + 7, *labels[1:]] if len(offsets) == 6 else labels


def short_on_five(offsets, neighbours, weights, parts, seed):
    labels = halves(offsets, neighbours, weights, parts, seed)
    return labels[1:] if len(offsets) == 6 else labels


def halves(offsets, neighbours, weights, parts, seed):
    n = len(offsets) - 1
    return [i * parts // n for i in range(n)]


def always_crash(offsets, neighbours, weights, parts, seed):
    os.kill(os.getpid(), signal.SIGSEGV)
