"""Still pictures: depth, transparency, profile and EXIF stay; what a format cannot hold is said or refused."""

from __future__ import annotations

import errno
import json
import resource
import signal
import struct
import zlib
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

from hat_video.cli import main
from hat_video.jobs.report import Progress
from tests.clips import make_clip, moving_picture

pyvips = pytest.importorskip("pyvips")
from PIL import Image, ImageCms, PngImagePlugin  # noqa: E402

FAST = ("--model", "bicubic", "--scale", "2")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def upscale(*words: object) -> int:
    return main(["upscale", *map(str, words), *FAST])


def picture(bands: int, depth: int) -> np.ndarray:
    rgb = moving_picture(3, 40, 30).astype(np.uint32)
    alpha = np.linspace(0, 255, 40).astype(np.uint32)[None, :, None].repeat(30, 0)
    whole = {1: rgb[..., :1], 2: np.concatenate([rgb[..., :1], alpha], 2), 3: rgb, 4: np.concatenate([rgb, alpha], 2)}
    return (whole[bands] * (257 if depth == 16 else 1)).astype(np.uint16 if depth == 16 else np.uint8)


def save(path: Path, pixels: np.ndarray, **facts: object) -> Path:
    kind = {(1, 8): "b-w", (2, 8): "b-w", (1, 16): "grey16", (2, 16): "grey16", (3, 16): "rgb16", (4, 16): "rgb16"}
    depth = 16 if pixels.dtype == np.uint16 else 8
    image = pyvips.Image.new_from_array(pixels, interpretation=kind.get((pixels.shape[2], depth), "srgb"))
    image.write_to_file(str(path), **facts)
    return path


@pytest.mark.parametrize(
    ("suffix", "bands", "depth"),
    [(s, b, d) for s in (".png", ".tif") for b in (1, 2, 3, 4) for d in (8, 16)]
    + [(".jpg", 1, 8), (".jpg", 3, 8), (".webp", 3, 8), (".webp", 4, 8)],
)
def test_depth_bands_and_place_stay(tmp_path: Path, suffix: str, bands: int, depth: int) -> None:
    pixels = picture(bands, depth)
    source = save(tmp_path / f"a{suffix}", pixels)
    assert upscale(source, "-o", tmp_path / f"b{suffix}") == 0
    before, after = (pyvips.Image.new_from_file(str(tmp_path / f"{name}{suffix}")) for name in "ab")
    assert (after.width, after.height) == (80, 60)
    assert after.format == before.format
    # Gray with alpha has no planar format of its own, and comes out as RGB with alpha.
    assert after.bands == (4 if bands == 2 else before.bands)
    large = after.numpy().reshape(60, 80, -1).astype(float)
    back = large.reshape(30, 2, 40, 2, -1).mean((1, 3))
    small = before.numpy().reshape(30, 40, -1).astype(float)
    if bands == 2:
        small = small[..., [0, 0, 0, 1]]
    assert np.abs(back - small).mean() < 0.02 * (65535 if depth == 16 else 255)


def test_sixteen_bits_are_really_sixteen(tmp_path: Path) -> None:
    ramp = np.linspace(1000, 1800, 64).astype(np.uint16)[None, :, None].repeat(32, 0).repeat(3, 2)
    assert upscale(save(tmp_path / "a.png", ramp), "-o", tmp_path / "b.png") == 0
    values = np.unique(pyvips.Image.new_from_file(str(tmp_path / "b.png")).numpy())
    assert len(values) > 100
    assert values.min() >= 950


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_profile_and_exif_stay(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    Image.fromarray(picture(3, 8)).save(tmp_path / f"a{suffix}", icc_profile=PROFILE, exif=exif)
    assert upscale(tmp_path / f"a{suffix}", "-o", tmp_path / f"b{suffix}") == 0
    with Image.open(tmp_path / f"b{suffix}") as made:
        assert made.info["icc_profile"] == PROFILE
        found = made.getexif()
        assert found[0x010E] == "a description"
        assert found[0x0112] == 6, "the pixels lie as they lay, so the note on how to turn them stays true"
        assert sorted(made.size) == [60, 80]  # Pillow turns a TIFF by its note


def test_what_a_format_cannot_hold_is_said_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep, clear = save(tmp_path / "deep.png", picture(3, 16)), save(tmp_path / "clear.png", picture(4, 8))
    for source, word in ((deep, "8 bits"), (clear, "transparency")):
        assert upscale(source, "-o", tmp_path / "out.jpg", "--overwrite") == 0
        assert word in capsys.readouterr().err
        (tmp_path / "out.jpg").unlink()
        assert upscale(source, "-o", tmp_path / "out.jpg", "--strict") == 1
        assert "--strict refuses" in capsys.readouterr().err
        assert not (tmp_path / "out.jpg").exists()


def test_only_what_was_written_is_said_to_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a description", 6
    Image.fromarray(picture(3, 8)).save(tmp_path / "a.jpg", exif=exif, icc_profile=PROFILE)
    assert upscale(tmp_path / "a.jpg", "-o", tmp_path / "b.tif", "--report", tmp_path / "b.json") == 0
    out, err = capsys.readouterr()
    assert "with icc-profile, orientation\n" in out
    assert "note: not kept in .tif: exif\n" in err
    (made,) = json.loads((tmp_path / "b.json").read_text())
    assert (made["kept"], made["notes"]) == (["icc-profile-data", "orientation"], ["not kept in .tif: exif"])
    assert upscale(tmp_path / "a.jpg", "-o", tmp_path / "new" / "b.tif", "--strict") == 1
    assert "--strict refuses to drop exif" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert upscale(tmp_path / "a.jpg", "-o", tmp_path / "b.png", "--strict") == 0
    assert "with exif, icc-profile, orientation\n" in capsys.readouterr().out


def test_texts_of_a_png_stay_or_are_missed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = PngImagePlugin.PngInfo()
    for word, text in (("Title", "one"), ("Comment", "more " * 99), ("Title", "two")):
        texts.add_text(word, text)
    Image.fromarray(picture(3, 8)).save(tmp_path / "a.png", pnginfo=texts)
    assert upscale(tmp_path / "a.png", "-o", tmp_path / "b.png", "--strict") == 0
    assert "with text Comment, text Title\n" in capsys.readouterr().out
    image = pyvips.Image.new_from_file(str(tmp_path / "b.png"))
    assert [image.get(name) for name in sorted(image.get_fields()) if name.startswith("png-comment-")] == [
        "one", "more " * 99, "two",
    ]  # fmt: skip
    # libvips would write it so that every reader shows something else.
    texts.add_itxt("Author", "J\u00fcrgen")
    Image.fromarray(picture(3, 8)).save(tmp_path / "c.png", pnginfo=texts)
    for output, lost in (("d.png", "text Author"), ("d.jpg", "text Author, text Comment, text Title")):
        assert upscale(tmp_path / "c.png", "-o", tmp_path / output, "--strict") == 1
        assert f"--strict refuses to drop {lost}, not kept in {output[1:]}\n" in capsys.readouterr().err
        assert not (tmp_path / output).exists()
        assert upscale(tmp_path / "c.png", "-o", tmp_path / output) == 0
        assert f"note: not kept in {output[1:]}: {lost}\n" in capsys.readouterr().err
    with Image.open(tmp_path / "d.png") as made:
        assert made.text.keys() == {"Title", "Comment"}


def test_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.png", picture(3, 8))
    assert upscale(source) == 0
    assert (tmp_path / "a_x2.png").exists()
    assert upscale(source) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert upscale(source, "-o", source, "--overwrite") == 1
    assert "is the input itself" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no picture")
    assert upscale(source, tmp_path / "bad.png", "-o", tmp_path / "many") == 1
    assert "bad.png" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "many").iterdir()] == ["a.png"]
    assert upscale(source, "-o", tmp_path / "a.bmp") == 2
    assert "use .png .jpg" in capsys.readouterr().err
    assert upscale(source, "-o", tmp_path / "new" / "a.png") == 0
    assert (tmp_path / "new" / "a.png").is_file()
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_bad_one_is_told_as_a_bad_clip_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, report = save(tmp_path / "a.png", picture(3, 8)), tmp_path / "bad.png", tmp_path / "report.json"
    bad.write_bytes(b"\x89PNG no picture")
    words = (good, bad, "-o", tmp_path / "many", "--report", report, "--progress", "json")
    assert upscale(*words) == 1
    lines = capsys.readouterr().err.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert [event["event"] for event in events] == ["progress", "progress", "done", "progress", "failed"]
    assert events[0].keys() == {"event", *(field.name for field in fields(Progress))}
    assert [(event["clip"], event["clips"]) for event in events if event["event"] == "progress"] == [
        (1, 2), (1, 2), (2, 2),
    ]  # fmt: skip
    assert events[2]["frames"] == {"in": 1, "out": 1, "lost": 0, "corrupt": 0, "reused": 0}
    assert events[-1]["source"] == str(bad)
    assert "not a picture that can be read" in events[-1]["error"]
    one, two = json.loads(report.read_text())
    assert (one["status"], one["error"], one["size"]) == ("done", None, [80, 60])
    assert (two["status"], two["source"], two["output"]) == ("failed", str(bad), str(tmp_path / "many" / "bad.png"))
    assert upscale(bad, "--report", report) == 1
    assert [made["status"] for made in json.loads(report.read_text())] == ["failed"]


def test_where_nothing_can_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "a.png", picture(3, 8))
    assert upscale(source, "-o", "/proc/a.png") == 1
    assert capsys.readouterr().err == "hat-video: /proc/a.png: cannot be written: No such file or directory\n"
    # A file system that is read-only does not even let a missing file be removed.
    refusal = OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(Path, "replace", Mock(side_effect=refusal))
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=refusal))
    assert upscale(source) == 1
    assert capsys.readouterr().err == f"hat-video: {tmp_path / 'a_x2.png'}: cannot be written: Read-only file system\n"


def test_a_disk_that_fills_up_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        assert upscale(source) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "a_x2.png: cannot be written: File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_kinds_that_are_not_upscaled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(picture(4, 8), "CMYK").save(tmp_path / "cmyk.jpg")
    assert upscale(tmp_path / "cmyk.jpg") == 1
    assert "cmyk" in capsys.readouterr().err
    pages = [Image.fromarray(picture(3, 8))] * 2
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert upscale(tmp_path / "pages.tif") == 1
    assert "2 pages" in capsys.readouterr().err


def test_a_cut_off_file_is_no_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "a.jpg", picture(3, 8))
    source.write_bytes(source.read_bytes()[:-400])
    assert upscale(source) == 1
    assert "a.jpg" in capsys.readouterr().err
    assert not (tmp_path / "a_x2.jpg").exists()


def test_an_animated_png_is_a_clip(tmp_path: Path) -> None:
    from hat_video.media.stills import is_still

    clip = make_clip(
        tmp_path / "moving.png", codec="apng", pix_fmt="rgb24", frames=3, audio=(), container_format="apng"
    )
    assert not is_still(clip)
    assert is_still(save(tmp_path / "still.png", picture(3, 8)))
    # The letters alone, inside the picture's data, do not make it move.
    data = (tmp_path / "still.png").read_bytes()
    text = b"tEXta\0acTL"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    (tmp_path / "named.png").write_bytes(data[:-12] + chunk + data[-12:])
    assert is_still(tmp_path / "named.png")
