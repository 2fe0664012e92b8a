"""Before a run trusts the fast path: it must agree with the reference path on this device, at the model's head shape.

Kernels are compiled for the device they run on, so no test made elsewhere can vouch for them.

Shape suffixes: B rows, H query heads, G key heads, S tokens, D head dimension.
"""

import torch

from sayo_verl.errors import SayoError
from sayo_verl.probe import reference
from sayo_verl.probe.measure import kernels
from sayo_verl.probe.reference import Span

TOLERANCE = 1e-4  # of masses and profiles, which lie in [0, 1], and relative to the spread of the log-sum-exp


def check_path(path: str, *, heads: int, key_heads: int, head_dim: int, device: torch.device) -> tuple[str, float]:
    """Compare the path's functions with the reference on random bfloat16 queries and keys.

    Args:
        path: as in ``StatisticsRequest``.
        heads, key_heads, head_dim: of the model's text attention.
        device: where it will run.

    Returns:
        The module that runs and its largest difference from the reference (0 for the reference itself).

    Raises:
        SayoError: P16 and P17 when the path cannot run here, P24 when it does not agree.
    """
    chosen = kernels(path, device)
    name = chosen.__name__.rsplit(".", 1)[-1]
    if chosen is reference:
        return name, 0.0
    generator = torch.Generator().manual_seed(0)
    # two sequences, longer than a tile and not a multiple of one, in a packed row with other tokens around them
    spans = [Span(0, 90, 70, 85, 0, 5, 155), Span(0, 170, 131, 10, 0, 160, 141)]
    query, key = (
        torch.randn(1, n, 320, head_dim, generator=generator).to(device, torch.bfloat16) for n in (heads, key_heads)
    )
    sets = torch.randint(0, 8, (1, 320), generator=generator, dtype=torch.int32).to(device)
    columns = torch.randperm(155, generator=generator)[:50].to(device)
    scale = 3 * head_dim**-0.5  # sharper than random heads are
    found, expected = (m.attention_masses(query, key, spans, sets, 3, scale=scale) for m in (chosen, reference))
    profiles = [
        m.attention_profile(query, key, spans[0], expected.lse[:70], columns, scale=scale) for m in (chosen, reference)
    ]
    differences = [found.mass - expected.mass, found.lse - expected.lse, profiles[0] - profiles[1]]
    # NaN must not pass: max() of a comparison with it is false
    largest = max(float(d.abs().nan_to_num(float("inf")).max()) for d in differences)
    if not largest <= TOLERANCE:
        raise SayoError(
            "P24",
            f"the {name} path of the probe does not agree with the reference path on this device",
            where="sayo.probe_path",
            got=f"largest difference {largest:.1e} ({heads} heads, {key_heads} key heads of {head_dim}, {device})",
            wanted=f"at most {TOLERANCE:.0e}",
            fix="set sayo.probe_path=reference and report it with the device, torch and triton versions",
        )
    return name, largest
