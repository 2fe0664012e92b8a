"""A trial of a user's own method at launch, so that a mistake in it is found before models are loaded."""

import contextlib
import importlib.util
import inspect
import traceback
from collections.abc import Collection, Iterator

import torch

from sayo_verl.errors import SayoError
from sayo_verl.methods import Method, Mix, advantages, own_methods
from sayo_verl.methods.base import Credit, finite_metrics
from sayo_verl.methods.random_signals import random_signals

# Rows, response tokens and a seed: two groups of two rows; three rows have an image, and two of these a box.
ROWS, TOKENS, SEED = 4, 8, 109


def check_method(method: Method) -> None:
    """Check the packages of the run's method, and call a user's own method once on a small random batch.

    A built-in method is not called: the tests of sayo-verl do that. In a mix it is called beside a user's own, because
    two methods may log one metric; a built-in one with packages of its own is left out, because it may start processes.

    Raises:
        SayoError: L28 for a package that is not installed, L72 for any other exception in a user's own method, A21 for
            credit that ``gives`` does not name, and what the method itself or ``advantages`` raises.
    """
    parts = method.methods if isinstance(method, Mix) else (method,)
    own = [part for part in parts if type(part) in own_methods().values()]
    with own_code([type(part) for part in own], "in needs() or gives"):
        packages, _ = method.needs().packages, method.gives
    for module, line in packages:
        if importlib.util.find_spec(module) is None:
            raise SayoError(
                "L28",
                f"{method.name} needs {module}, which is not installed",
                where="algorithm.adv_estimator",
                got=f"no module {module}",
                fix=line,
            )
    for part in own:
        _try(part)
    if own and isinstance(method, Mix):  # two metrics of one name
        _try(Mix(tuple(part for part in parts if part in own or not part.needs().packages)))


def describe_passes(method: Method) -> str:
    """A line for the plan about the passes with a changed image; for a method that needs one."""
    keys = [intervention.key for intervention in method.needs().interventions]
    passes = "a further log-prob pass" if len(keys) == 1 else f"{len(keys)} further log-prob passes"
    return f"{passes} of the same responses in every update, without gradient: {', '.join(keys)}"


def _try(method: Method) -> None:
    parts = method.methods if isinstance(method, Mix) else (method,)
    signals = random_signals(method.needs(), SEED, ROWS, TOKENS, unread=0.0)  # as verl pads
    with own_code([type(part) for part in parts], "on a random batch"):
        credit = method.credit(signals)
        advantages(torch.arange(ROWS) % 3 / 2, signals.response_mask, signals.uid, credit)
        finite_metrics(credit.metrics, method.name)
        given = _kinds(credit)
    if given - method.gives:
        raise SayoError(
            "A21",
            "credit() returns a part that the method's gives does not name",
            where=method.name,
            got=sorted(given),
            wanted=sorted(method.gives) or "nothing, as at strength zero",
            fix="name the part in gives, or leave it out of Credit",
        )


def _kinds(credit: Credit) -> set[str]:
    kinds = {"reward"} if any(term.weight for term in credit.terms) else set()
    kinds |= {"token"} if credit.token_weight is not None else set()
    kinds |= {"bonus"} if credit.bonuses else set()
    return kinds | ({"trajectory"} if credit.trajectory_weight is not None else set())


@contextlib.contextmanager
def own_code(classes: Collection[type], when: str) -> Iterator[None]:
    """Make one line of an exception in a user's own methods.

    Args:
        classes: the methods that run meanwhile.
        when: the end of "the method fails ...".

    Raises:
        SayoError: L72 for any exception but a ``SayoError``, with the last line of a method's file that took part.
    """
    try:
        yield
    except SayoError:
        raise
    except Exception as error:
        own = [cls for cls in classes if cls in own_methods().values()]
        if not own:
            raise
        files = [inspect.getfile(cls) for cls in own]
        lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
        raise SayoError(
            "L72",
            f"the method fails {when}",
            where=lines[-1] if lines else f"{files[-1]}, what {own[-1].__name__} returns",
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            fix="correct the method; docs/add_a_method.md shows how to call it by hand (Testing it)",
        ) from error
