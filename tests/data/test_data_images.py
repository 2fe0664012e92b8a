"""Images of rows: what is left out, what is changed, that nothing else is, and that no bytes do harm."""

import io
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps
from qwen_vl_utils.vision_process import to_rgb
from support.pictures import dropped, encoded, kept, picture, png_header, translucent
from support.refusals import refusal

from sayo_verl.data.images import ImageRules, Stored, store_image


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)


def seen_by_verl(data: bytes) -> np.ndarray:
    """The pixels that verl's loader hands to the processor, before its resize."""
    return np.asarray(to_rgb(Image.open(io.BytesIO(data))))


# -------------------------------------------------------------------------------------------------------- left as it is


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_bytes_stay_where_nothing_has_to_change(mode, kind, options):
    data = encoded(picture(mode), kind, **options)
    out = kept(data)
    assert out == Stored(data, 60, 40, 60, 40, 1, ())


def test_metadata_without_an_orientation_is_no_reason_to_encode_again():
    exif = Image.Exif()
    exif[0x010E] = "a description"
    assert kept(encoded(picture(), "JPEG", exif=exif)).changed == ()


@pytest.mark.parametrize("orientation", [0, 1, 9, 77])
def test_an_orientation_that_means_nothing_changes_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert kept(encoded(picture(), "JPEG", exif=exif)).orientation == 1


def test_rgba_without_a_transparent_pixel_stays_for_verl_sees_the_same():
    data = encoded(picture("RGBA"))
    assert kept(data).changed == ()
    assert np.array_equal(seen_by_verl(data), pixels(encoded(picture())))


@pytest.mark.parametrize(("mode", "key"), [("RGB", (0, 0, 0)), ("L", 0)])
def test_a_colour_key_is_ignored_as_verl_ignores_it(mode, key):
    data = encoded(picture(mode), transparency=key)
    assert kept(data).changed == ()
    assert np.array_equal(seen_by_verl(data), np.asarray(picture(mode).convert("RGB")))


# --------------------------------------------------------------------------------------------------------- left out


def test_an_image_of_no_bytes():
    assert dropped(b"") == "image_empty"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_is_cut_short(kind):
    data = encoded(picture(size=(200, 150)), kind)
    for share in (0.1, 0.5, 0.9):
        assert dropped(data[: int(len(data) * share)]) == "image_unreadable"


def test_refuses_to_work_where_cut_images_are_filled_up(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with refusal("D46", "truncated"):
        store_image(encoded(picture()), where="here")


def test_text_named_jpg_is_no_image():
    assert dropped(b"<html>not found</html>" * 9) == "image_format"


@pytest.mark.parametrize("size", [(20000, 20000), (9000, 9999), (7072, 7072), (2**31 - 1, 2**31 - 1)])
def test_an_image_of_too_many_pixels_by_its_header(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dropped(png_header(*size)) == "image_too_large"


def test_pillows_own_limit_holds_where_ours_is_raised(monkeypatch):
    assert dropped(png_header(10000, 10000), max_pixels=10**9) == "image_too_large"  # Pillow would only warn
    assert dropped(png_header(20000, 20000), max_pixels=10**9) == "image_too_large"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert dropped(encoded(picture())) == "image_too_large"


def test_the_size_is_judged_before_decoding(monkeypatch):
    def load(self):
        raise AssertionError("decoded")

    data = encoded(picture(size=(300, 300)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert dropped(data, max_pixels=300 * 300 - 1) == "image_too_large"


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PPM", "ICO"])
def test_other_image_formats(kind):
    assert dropped(encoded(picture(), kind)) == "image_format"


def test_other_image_formats_by_text():
    assert dropped(b'<svg xmlns="http://www.w3.org/2000/svg"/>') == "image_format"
    assert dropped(b"SIMPLE  =                    T") == "image_format"


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animated_image(kind):
    frames = [picture(), ImageOps.invert(picture())]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert dropped(data) == "image_format"


@pytest.mark.parametrize(
    ("size", "rules", "reason"),
    [
        ((1, 1), {}, "image_too_small"),
        ((27, 300), {}, "image_too_small"),
        ((300, 27), {}, "image_too_small"),
        ((28, 28), {}, ""),
        ((31, 40), {"min_side": 32}, "image_too_small"),
        ((2, 455), {"min_side": 1}, "image_too_long"),
        ((2, 401), {"min_side": 1}, "image_too_long"),
        ((2, 400), {"min_side": 1}, ""),
        ((28, 5601), {}, "image_too_long"),
        ((5600, 28), {}, ""),
        ((40, 90), {"max_ratio": 2.0}, "image_too_long"),
    ],
)
def test_sides_that_are_too_short_or_too_unequal(size, rules, reason):
    data = encoded(Image.new("L", size))
    assert (dropped(data, **rules) if reason else "".join(kept(data, **rules).changed)) == reason


@pytest.mark.parametrize("rules", [{"max_pixels": 0}, {"min_side": 0}, {"max_ratio": 0.5}, {"max_ratio": float("nan")}])
def test_rules_out_of_range(rules):
    with refusal("D46"):
        ImageRules(**rules)


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize(
    ("mode", "kind", "changed"),
    [
        ("CMYK", "JPEG", "from CMYK"),
        ("P", "PNG", "from P"),
        ("1", "PNG", "from 1"),
        ("LA", "PNG", "from LA"),
    ],
)
def test_modes_become_rgb_as_verl_sees_them(mode, kind, changed):
    image = picture("L").convert("LA") if mode == "LA" else picture(mode)
    data = encoded(image, kind)
    out = kept(data)
    assert out.changed == (changed,)
    difference = np.abs(seen_by_verl(out.data).astype(int) - seen_by_verl(data))
    assert difference.max() <= (8 if kind == "JPEG" else 0)
    assert out.data.startswith(b"\xff\xd8" if kind == "JPEG" else b"\x89PNG")


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_transparent_pixels_over_white_as_verl_sees_them(kind, options):
    data = encoded(translucent(), kind, **options)
    out = kept(data)
    assert out.changed == ("from RGBA over white",)
    assert np.array_equal(seen_by_verl(out.data), seen_by_verl(data))
    assert pixels(out.data)[0, 0].tolist() == [255, 255, 255]


def test_a_palette_or_grey_with_alpha_over_white():
    palette = Image.new("P", (40, 40), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20, 9, 9, 9])
    palette.paste(2, (0, 0, 10, 40))
    out = kept(encoded(palette, transparency=b"\xff\xff\x00"))
    assert out.changed == ("from P over white",)
    assert pixels(out.data)[0, 0].tolist() == [255, 255, 255]
    assert pixels(out.data)[0, 39].tolist() == [200, 10, 20]

    grey = Image.merge("LA", (Image.new("L", (40, 40), 30), Image.new("L", (40, 40), 0)))
    grey.putpixel((3, 3), (30, 255))
    out = kept(encoded(grey))
    assert out.changed == ("from LA over white",)
    assert pixels(out.data)[0, 0].tolist() == [255] * 3
    assert pixels(out.data)[3, 3].tolist() == [30] * 3


def test_16_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60)
    out = kept(encoded(Image.fromarray(grey)))
    assert out.changed == ("from I;16",)
    stored = pixels(out.data)
    assert stored.shape == (40, 60)
    assert np.abs(stored - grey / 257).max() <= 0.5
    assert (stored.min(), stored.max()) == (0, 255)


def test_a_jpeg_of_several_pictures_is_its_first():
    data = encoded(picture(), "MPO", save_all=True, append_images=[ImageOps.invert(picture())])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    out = kept(data)
    assert out.changed == ("first of 2 pictures",)
    assert np.abs(pixels(out.data).astype(int) - pixels(data)).max() <= 8
    assert Image.open(io.BytesIO(out.data)).format == "JPEG"


# ------------------------------------------------------------------------------------------------------- orientation


def turned(kind: str, orientation: int, mode: str = "RGB", **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a description"
    return encoded(picture(mode), kind, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(2, 9))
@pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})])
def test_orientation_is_baked_in(kind, options, orientation):
    data = turned(kind, orientation, **options)
    out = kept(data)
    assert out.changed == ("upright",)
    assert out.orientation == orientation
    assert (out.raw_width, out.raw_height) == (60, 40)
    with Image.open(io.BytesIO(data)) as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.abs(pixels(out.data).astype(int) - wanted).max() <= (8 if kind == "JPEG" else 0)
    with Image.open(io.BytesIO(out.data)) as image:
        assert image.format == ("JPEG" if kind == "JPEG" else "PNG")
        assert not image.getexif()
        if kind == "JPEG":
            assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # no chroma subsampling


def test_grey_stays_grey_and_modes_are_told_with_it():
    out = kept(turned("JPEG", 6, "L"))
    assert out.changed == ("upright",)
    assert pixels(out.data).shape == (60, 40)
    assert kept(turned("JPEG", 6, "CMYK")).changed == ("upright", "from CMYK")
    assert kept(turned("PNG", 3, "RGBA")).changed == ("upright",)


def test_nothing_else_of_the_file_is_carried_over():
    exif = Image.Exif()
    exif[0x0112] = 3
    extra = {"exif": exif, "comment": b"a comment", "icc_profile": b"a profile", "dpi": (300, 300)}
    out = kept(encoded(picture(), "JPEG", **extra))
    assert b"a comment" not in out.data
    assert b"a profile" not in out.data


@pytest.mark.parametrize("data", [turned("JPEG", 6), turned("PNG", 5), encoded(translucent()), encoded(picture("P"))])
def test_equal_bytes_in_equal_bytes_out(data):
    assert kept(data).data == kept(data).data


def test_pillow_and_warnings_are_left_as_they_were():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    kept(turned("JPEG", 6))
    dropped(png_header(20000, 20000))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
