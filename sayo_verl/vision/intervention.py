"""Counterfactual images: a row's pixels with part of the image removed.

The worker changes the processor's pixels, not the file. It replaces patches of the vision tower, so the number of
visual tokens, the prompt and the response do not change. Every rollout of a prompt gets the same mask.

PAPO (arXiv 2507.06448) and VPPO (arXiv 2510.09285) blacken 14 px patches of the picture with probability 0.6 and 0.5.
Their patches belong to the picture before its resize, ours to the vision tower after it.

Shape suffixes: N patches of all images of a row, K tiles of all images of a row, V visual tokens of one image, C colour
channels, F values of a patch, H and W pixels down and across.
"""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sayo_verl.errors import Rule, SayoError, raise_first

if TYPE_CHECKING:  # methods import settings from here and need only torch
    from sayo_verl.vision.grids import Tile

KINDS = ("patches", "blur", "grey", "region", "elsewhere")
OF_BOXES = ("region", "elsewhere")  # kinds that fill visual tokens, which depend on the row's boxes
FILLS = {"black": 0.0, "grey": 0.5}  # share of white; mid-grey is 127.5 of 255
TILE_MERGE = 2  # patches per side of InternVL's visual token (downsample_ratio 0.5, which its processor does not have)
BLUR_REACH = 3  # standard deviations from the centre of the kernel to its end


@dataclass(frozen=True, eq=False)
class Intervention:
    """Settings of the change to the image.

    Two interventions are equal if they change every image alike: a setting that the kind does not use does not count.

    Attributes:
        kind: ``patches`` (random patches are filled), ``blur`` (Gaussian), ``grey`` (the whole image is filled with
            mid-grey), ``region`` (the visual tokens of the row's boxes are filled), ``elsewhere`` (as many other visual
            tokens, a control for ``region``: ``sayo_verl.vision.control``). A row without boxes stays as it is under
            the last two. [precedent: PAPO, VPPO; Evidence-RL]
        share: probability that a patch is filled, for ``patches``. [precedent: VPPO; PAPO has 0.6]
        fill: ``black``, or ``grey`` (127.5 of 255), for ``patches``, ``region`` and ``elsewhere``. [precedent: PAPO,
            VPPO]
        sigma: standard deviation of the blur, in patches of the vision tower. [ours]
        seed: seed of the masks; a mask depends on it, the prompt, the step, ``draw`` and nothing else. [ours]
        draw: number of the control region, for ``elsewhere``; other numbers draw other regions. [ours]

    Raises:
        SayoError: A05 for a value out of range.
    """

    kind: str = "patches"
    share: float = 0.5
    fill: str = "black"
    sigma: float = 1.0
    seed: int = 0
    draw: int = 0

    def __post_init__(self) -> None:
        raise_first(
            Rule(
                "A05",
                not valid,
                f"{key} is not one of the choices" if isinstance(value, str) else f"{key} is out of range",
                where=f"the counterfactual image's {key}",
                got=value,
                wanted=wanted,
                fix=f"set it to {wanted}",
            )
            for key, (valid, wanted) in self.rules().items()
            for value in (getattr(self, key),)
        )

    def rules(self) -> dict[str, tuple[bool, str]]:
        """What each setting must be."""
        return {
            "kind": (self.kind in KINDS, " or ".join(KINDS)),
            "share": (0 < self.share <= 1, "a number in (0, 1]"),
            "fill": (self.fill in FILLS, " or ".join(FILLS)),
            "sigma": (0 < self.sigma < float("inf"), "a finite number > 0"),
            "seed": (self.seed >= 0, "a whole number >= 0"),
            "draw": (self.draw >= 0, "a whole number >= 0"),
        }

    @property
    def key(self) -> str:
        """The kind and the settings that it uses, such as ``region.grey``: names the pass."""
        used = {
            "patches": (f"{float(self.share)!r}", self.fill, f"s{self.seed}"),
            "blur": (f"{float(self.sigma)!r}",),
            "grey": (),
            "region": (self.fill,),
            "elsewhere": (self.fill, f"s{self.seed}", f"d{self.draw}"),
        }
        return ".".join((self.kind, *used[self.kind]))

    @property
    def of_boxes(self) -> bool:
        """Whether it changes only rows with boxes."""
        return self.kind in OF_BOXES

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intervention) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def to_wire(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Intervention":
        """The inverse of ``to_wire``; other keys of a call, such as ``step``, are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in wire.items() if name in names})


@dataclass(frozen=True)
class Pixels:
    """Pixel layout of the model's processor, the same for all rows of a run.

    Attributes:
        geometry: ``grid`` (Qwen: ``pixel_values`` [N, C * temporal * patch * patch], the merge_size x merge_size
            patches of a visual token side by side) or ``tiles`` (InternVL: ``pixel_values`` [K, C, H, W]).
        patch_size: pixels per side of a patch of the vision tower.
        merge_size: patches per side of a visual token.
        temporal_patch_size: copies of a still image in each patch; 1 for tiles.
        mean, std: C numbers each; a pixel of value x in [0, 1] is stored as (x - mean) / std.
    """

    geometry: str
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any, geometry: str) -> "Pixels":
        """Read the layout from the model's processor.

        Args:
            processor: with ``image_processor``, which has ``image_mean`` and ``image_std``, and for ``grid``
                ``patch_size``, ``merge_size`` and ``temporal_patch_size``. A tile has ``image_processor.size`` pixels
                and ``image_seq_length`` visual tokens.
            geometry: of the model's family, ``sayo_verl.models.families``.

        Raises:
            SayoError: V08 when it does not store pixels as (x - mean) / std, with x in [0, 1], or when a tile is not a
                square of whole visual tokens.
        """
        images = processor.image_processor
        scale = float(images.rescale_factor) if images.do_rescale else 1.0
        if not images.do_normalize or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
            raise SayoError(
                "V08",
                "the processor does not rescale and normalise pixels, so the value of black is unknown",
                where=type(images).__name__,
                got=f"do_normalize={images.do_normalize}, scale {scale:.6g}",
                wanted="do_rescale and do_normalize, rescale_factor 1/255",
                fix="use the model's own preprocessor_config.json",
            )
        mean, std = tuple(map(float, images.image_mean)), tuple(map(float, images.image_std))
        if geometry == "grid":
            return cls(
                geometry, int(images.patch_size), int(images.merge_size), int(images.temporal_patch_size), mean, std
            )
        side, tokens = int(images.size["height"]), int(processor.image_seq_length)
        patches = math.isqrt(tokens) * TILE_MERGE
        if images.size["width"] != side or patches**2 != tokens * TILE_MERGE**2 or side % patches:
            raise SayoError(
                "V08",
                "a tile is not a square of whole visual tokens",
                where=type(processor).__name__,
                got=f"{tokens} visual tokens for {images.size}",
                wanted="for example 256 for 448 x 448",
                fix="use the processor of the model's own folder",
            )
        return cls(geometry, side // patches, TILE_MERGE, 1, mean, std)

    @property
    def patch_values(self) -> int:
        """F: numbers in a row of ``pixel_values``, for ``grid``."""
        return len(self.mean) * self.temporal_patch_size * self.patch_size**2


def prompt_key(prompt_ids: torch.Tensor, step: int) -> int:
    """Return a number below 2**63 for a prompt at a step, equal in all processes and runs.

    Args:
        prompt_ids: [P] token ids of the prompt, without padding and without the response.
        step: of training, so that a repeated prompt gets another mask.
    """
    return hash63(f"{int(step)}:" + ",".join(map(str, prompt_ids.tolist())))


def intervene(
    image: Mapping[str, Any],
    intervention: Intervention,
    layout: Pixels,
    *,
    tiles: "Sequence[Sequence[Tile]]",
    region: Sequence[Any] | None,
    key: int,
    where: str,
) -> dict[str, Any]:
    """Return the inputs of one row with a changed image.

    Args:
        image: the row's ``multi_modal_inputs``; never mutated. Without ``pixel_values`` the row has no image.
        intervention: what to change.
        layout: of ``pixel_values``.
        tiles: for each image its grids of visual tokens, ``sayo_verl.probe.plan.image_tiles``.
        region: for each image bool [V], the visual tokens to fill, ``sayo_verl.vision.control.filled_tokens``; used for
            kinds ``region`` and ``elsewhere``. None: nothing is filled.
        key: ``prompt_key`` of the row.
        where: names the row in errors.

    Returns:
        A new dict in which only ``pixel_values`` is another tensor, of the same shape, dtype and device. Patches that
        are not filled keep their bits. A row without image, and for a kind of boxes a row without region, is unchanged.

    Raises:
        SayoError: V07 when pixels and grids do not match, V09 when region and grids do not match.
    """
    out = dict(image)
    if "pixel_values" not in image and not tiles:
        return out
    if "pixel_values" not in image:
        raise _misfit(where, "no pixel_values", f"pixels for {len(tiles)} images")
    pixels = image["pixel_values"]
    sides = _sides(pixels, layout, tiles, where)
    if intervention.kind == "blur":
        out["pixel_values"] = _blurred(pixels, intervention.sigma, layout, sides)
        return out
    shade = FILLS["grey" if intervention.kind == "grey" else intervention.fill]
    fill_C = torch.tensor([(shade - mean) / std for mean, std in zip(layout.mean, layout.std, strict=True)])
    if intervention.kind == "grey":
        mask_N = torch.ones(sum(h * w for h, w in sides), dtype=torch.bool)
    elif intervention.kind == "patches":
        # the CPU generator uses 32 bits of its seed, so both numbers go into a hash instead of the seed's bits
        generator = torch.Generator().manual_seed(hash63(f"{intervention.seed}:{key}"))
        mask_N = torch.rand(sum(h * w for h, w in sides), generator=generator) < intervention.share
    elif region is None:
        return out
    else:
        mask_N = _region_patches(region, tiles, layout, where)
    out["pixel_values"] = _filled(pixels, mask_N.to(pixels.device), fill_C.to(pixels), layout)
    return out


def hash63(text: str) -> int:
    """A number below 2**63, equal in all processes and runs."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _misfit(where: str, got: str, wanted: str) -> SayoError:
    return SayoError(
        "V07",
        "the pixels of a row do not match its grids of visual tokens",
        where=where,
        got=got,
        wanted=wanted,
        fix="use the model's own processor, and the tiles of the same row",
    )


def _sides(
    pixels: torch.Tensor, layout: Pixels, tiles: "Sequence[Sequence[Tile]]", where: str
) -> list[tuple[int, int]]:
    """Patches down and across of each grid of the row, in the order of the pixels; V07 if they do not match."""
    merge, patch = layout.merge_size, layout.patch_size
    sides = [(tile.rows * merge, tile.cols * merge) for grids in tiles for tile in grids]
    if not torch.is_floating_point(pixels):
        raise _misfit(where, f"pixel_values of {pixels.dtype}", "normalised floating-point pixels")
    if layout.geometry == "grid":
        shape: tuple[int, ...] = (sum(h * w for h, w in sides), layout.patch_values)
    else:
        if len(set(sides)) > 1:
            raise _misfit(where, f"tiles of {sorted(set(sides))} patches", "tiles of one size")
        h, w = sides[0] if sides else (0, 0)
        shape = (len(sides), len(layout.mean), h * patch, w * patch)
    if tuple(pixels.shape) != shape or not sides:
        raise _misfit(
            where,
            f"pixel_values {tuple(pixels.shape)}",
            f"{shape}: {len(sides)} grids, {patch} px patches merged {merge} x {merge}",
        )
    return sides


def _region_patches(
    region: Sequence[Any], tiles: "Sequence[Sequence[Tile]]", layout: Pixels, where: str
) -> torch.Tensor:
    """bool [N]: patches of the marked visual tokens, in the order of ``_filled``; V09 if region and grids differ."""
    masks = [torch.as_tensor(mask_V) for mask_V in region]
    tokens = [sum(tile.tokens for tile in grids) for grids in tiles]
    if [tuple(mask_V.shape) for mask_V in masks] != [(n,) for n in tokens] or any(m.dtype != torch.bool for m in masks):
        raise SayoError(
            "V09",
            "the region does not have one mark per visual token",
            where=where,
            got=[(str(mask_V.dtype), tuple(mask_V.shape)) for mask_V in masks],
            wanted=[("torch.bool", (n,)) for n in tokens],
            fix="build it with sayo_verl.vision.control.filled_tokens from the same tiles",
        )
    merge = layout.merge_size
    marked = torch.cat(masks).cpu()
    if layout.geometry == "grid":  # the patches of a token lie side by side
        return marked.repeat_interleave(merge**2)
    tile = tiles[0][0]
    token_KHW = marked.view(-1, tile.rows, tile.cols)
    return token_KHW.repeat_interleave(merge, 1).repeat_interleave(merge, 2).flatten()


def _filled(pixels: torch.Tensor, mask_N: torch.Tensor, fill_C: torch.Tensor, layout: Pixels) -> torch.Tensor:
    """Fill the masked patches with one colour; for tiles, patches are row-major within each tile."""
    patch = layout.patch_size
    if layout.geometry == "grid":
        fill_F = fill_C.repeat_interleave(layout.patch_values // len(fill_C))
        return torch.where(mask_N[:, None], fill_F, pixels)
    K, _, H, W = pixels.shape
    mask_KHW = mask_N.view(K, H // patch, W // patch).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return torch.where(mask_KHW[:, None], fill_C[:, None, None], pixels)


def _blurred(pixels: torch.Tensor, sigma: float, layout: Pixels, sides: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Blur each image of a grid family as a whole, and each tile and thumbnail of a tile family separately.

    So no tile leaks into another, and the blur spans the same number of visual tokens in all tiles.
    """
    if layout.geometry == "tiles":
        return _gaussian(pixels, sigma * layout.patch_size)
    parts = pixels.split([h * w for h, w in sides])
    return torch.cat(
        [
            patchify(_gaussian(unpatchify(part, h, w, layout), sigma * layout.patch_size), layout)
            for part, (h, w) in zip(parts, sides, strict=True)
        ]
    )


def _gaussian(picture: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur [..., C, H, W] in float32, with reflection at the border.

    Reflection of an axis of L pixels reaches L - 1 pixels, which limits the kernel on a small image.
    """
    from torchvision.transforms.functional import gaussian_blur  # here, because methods import this file

    H, W = picture.shape[-2:]
    reach_x, reach_y = (min(math.ceil(BLUR_REACH * sigma), side - 1) for side in (W, H))
    # separate passes per axis give the same blur without a kernel as large as the image
    blurred_x = gaussian_blur(picture.float(), [2 * reach_x + 1, 1], [sigma, sigma])
    return gaussian_blur(blurred_x, [1, 2 * reach_y + 1], [sigma, sigma]).to(picture.dtype)


def unpatchify(patches_NF: torch.Tensor, h: int, w: int, layout: Pixels) -> torch.Tensor:
    """Convert rows [h * w, F] of ``pixel_values`` to the picture [temporal, C, H, W] of one image of a grid family.

    h and w are patches down and across. The copies of a still image are equal.
    """
    m, p, t = layout.merge_size, layout.patch_size, layout.temporal_patch_size
    split = patches_NF.reshape(h // m, w // m, m, m, len(layout.mean), t, p, p)
    return split.permute(5, 4, 0, 2, 6, 1, 3, 7).reshape(t, len(layout.mean), h * p, w * p)


def patchify(picture: torch.Tensor, layout: Pixels) -> torch.Tensor:
    """The inverse of ``unpatchify``: [temporal, C, H, W] to [h * w, F]."""
    m, p = layout.merge_size, layout.patch_size
    t, C, H, W = picture.shape
    split = picture.reshape(t, C, H // (m * p), m, p, W // (m * p), m, p)
    return split.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(-1, layout.patch_values)
