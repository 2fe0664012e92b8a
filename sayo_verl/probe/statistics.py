"""Names, shapes, units and ranges of what the probe measures: the one place where they are written down.

Per response token (float32, detached, on the wire one value per token of the whole sequence):

    image_mass    [0, 1]   attention probability on all visual tokens of the row, mean over heads and asked layers
    region_mass   [0, 1]   the part of it on the visual tokens of the target region

Per row:

    image_tokens   number of visual tokens (0: the row has no image)
    region_tokens  number of visual tokens of the target region (0: the row has no box)
    probe_seconds  wall time the probe took for this row's micro-batch, divided by the rows of the micro-batch

Row convention. A statistic of response token y_t is read from one row of the attention matrix. With prompt length P and
t = 0, 1, ... the row is

    input        P + t      the position where y_t is the *input* (SAYO: "attention of the generated token")
    predicting   P + t - 1  the position whose logits *sampled* y_t (verl's log_probs and entropy belong to this row)

verl slices every per-token output with ``response_from_nested``, which reads position P + t - 1 for token t. The wire
layout absorbs the difference: the value of token t always lies at position P + t - 1, whichever row it was read from.
Positions that describe no response token hold NaN, so that reading a wrong slice cannot pass for a measurement.
"""

PER_TOKEN = ("image_mass", "region_mass")
PER_ROW = ("image_tokens", "region_tokens", "probe_seconds")

# Keys under which they travel beside log_probs and entropy.
WIRE_PREFIX = "sayo_"
# Key of the per-call request in the batch's extra information; without it the engine mixin is inert.
REQUEST_KEY = "sayo_probe"
