"""The training set: what is taken, what is left out, and that a build repeats to the byte."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from hat_video.errors import OutputError, SourceError, UsageError
from hat_video.model.resample import resize
from hat_video.training.build import BuildReport, build_tiles, choose_packages
from hat_video.training.harvest import distance, fingerprint, orientations, sharpness_map
from hat_video.training.sources import Package, fetch
from hat_video.training.tiles import TILE, TileRecord, TileSet, TileWriter, orient


def photograph(seed: int, width: int = 640, height: int = 512) -> Image.Image:
    """Clouds with edges and grain: as much detail as a sharp photograph has."""
    rng = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for octave in (4, 16, 64, 256):
        small = torch.from_numpy(rng.random((1, 3, octave, octave)))
        picture += resize(small, (height, width), antialias=False)[0].permute(1, 2, 0).numpy() * (1.2 / octave**0.35)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    picture[(picture[..., 0] > 0.5)] *= 0.7
    return Image.fromarray((picture * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(3):
        photograph(number).save(folder / f"sharp{number}.png")
    first = photograph(0)
    first.resize((480, 384), Image.Resampling.LANCZOS).save(folder / "the_same_smaller.png")
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(folder / "the_same_mirrored.png")
    blurred = photograph(7).resize((40, 32), Image.Resampling.BICUBIC).resize((640, 512), Image.Resampling.BICUBIC)
    blurred.save(folder / "blurred.png")
    photograph(8).save(folder / "crushed.jpg", quality=40)
    photograph(9).resize((200, 160)).save(folder / "small.png")
    photograph(10).convert("RGBA").resize((320, 320)).rotate(30).save(folder / "transparent.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("no picture")
    return folder


def build(folder: Path, output: Path, **options: object) -> BuildReport:
    return build_tiles(output, packages=[], images=[folder], downloads=output.parent, **options)  # type: ignore[arg-type]


def files_of(path: Path) -> set[str]:
    return {record["file"] for record in json.loads(path.with_suffix(".json").read_text())["tiles"]}


def test_takes_sharp_pictures_once(folder: Path, tmp_path: Path) -> None:
    report = build(folder, tmp_path / "tiles.npy")
    names = files_of(tmp_path / "tiles.npy")
    assert {"sharp1.png", "sharp2.png"} < names
    assert not names & {"blurred.png", "crushed.jpg", "small.png", "transparent.png", "broken.jpg"}
    # The picture, its smaller copy and its mirror image count once.
    assert len(names & {"sharp0.png", "the_same_smaller.png", "the_same_mirrored.png"}) == 1
    assert report.duplicates == 2
    tiles = np.load(tmp_path / "tiles.npy", mmap_mode="r")
    assert tiles.shape == (report.tiles.total(), TILE, TILE, 3)
    assert tiles.dtype == np.uint8


def test_tiles_are_cut_from_where_the_index_says(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "tiles.npy")
    tiles = np.load(tmp_path / "tiles.npy", mmap_mode="r")
    records = json.loads((tmp_path / "tiles.json").read_text())["tiles"]
    at = next(i for i, record in enumerate(records) if record["file"] == "sharp1.png")
    record = records[at]
    picture = photograph(1)
    if record["factor"] != 1:
        size = (round(picture.width / record["factor"]), round(picture.height / record["factor"]))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    expected = np.asarray(picture)[record["y"] : record["y"] + TILE, record["x"] : record["x"] + TILE]
    assert (tiles[at] == expected).all()


def test_a_build_repeats_to_the_byte_on_any_number_of_processes(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "a.npy")
    build(folder, tmp_path / "b.npy", jobs=2)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_evaluation_pictures_are_kept_out(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    # Another size, compressed: no hash of the file would tell.
    photograph(2).resize((512, 410)).save(tmp_path / "evaluation" / "e.jpg", quality=60)
    report = build(folder, tmp_path / "tiles.npy", keep_out=[tmp_path / "evaluation"])
    assert [Path(path).name for path in report.kept_out] == ["sharp2.png"]
    assert "sharp2.png" not in files_of(tmp_path / "tiles.npy")


def test_drawings_are_rendered(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    from hat_video.training.harvest import Task, harvest

    lines = "".join(f'<path d="M {i} 0 L {300 - i} 300" stroke="#{i:02x}2040"/>' for i in range(0, 256, 7))
    drawing = tmp_path / "lines.svg"
    drawing.write_text(f'<svg xmlns="http://www.w3.org/2000/svg" width="300" height="300">{lines}</svg>')
    found = harvest(Task(drawing, "vector", "test"))
    assert 1 <= len(found.tiles) <= 3, found.why_none
    assert all(18 <= record.sharpness_db < 34 for _, record in found.tiles)
    drawing.write_text("<svg")
    assert "unreadable" in harvest(Task(drawing, "vector", "test")).why_none


def test_fingerprints_survive_what_happens_to_pictures() -> None:
    picture, other = photograph(1), photograph(2)
    hashes = [fingerprint(picture), fingerprint(other)]
    assert distance(fingerprint(picture.resize((320, 256))), hashes)[0] < 16
    # Flat parts have no direction, so that of a mirror image cannot be had from the picture's own.
    flat = Image.new("L", (400, 300), 255)
    flat.paste(picture.convert("L").resize((120, 90)), (200, 40))
    for one in (picture, flat):
        for turn in Image.Transpose:
            assert distance(orientations(one.transpose(turn)), [fingerprint(one)])[0] < 16, turn
    assert distance(orientations(picture), hashes)[1] > 60
    assert distance(orientations(picture), []).size == 0


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_deeper_pictures_are_left_and_the_reason_is_told(mode: str, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    values = np.asarray(photograph(1).convert("L"), np.uint16 if mode == "I;16" else np.float32)
    Image.fromarray(values).save(tmp_path / "deep" / "deep.tif")
    with pytest.raises(SourceError, match=f"no tile in 1 files .1: is of {mode}"):
        build(tmp_path / "deep", tmp_path / "tiles.npy")
    assert not list(tmp_path.glob("tiles*"))


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_what_cannot_be_compared_cannot_be_kept_out(mode: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    values = np.asarray(photograph(1).convert("L"), np.uint16 if mode == "I;16" else np.float32)
    Image.fromarray(values).save(tmp_path / "out" / "deep.tif")
    with pytest.raises(SourceError, match=rf"deep\.tif: is of {mode}.*, so it cannot be kept out"):
        build(folder, tmp_path / "tiles.npy", keep_out=[tmp_path / "out"])
    (tmp_path / "out" / "deep.tif").unlink()
    with pytest.raises(UsageError, match=r"--keep-out .*out: has no pictures"):
        build(folder, tmp_path / "tiles.npy", keep_out=[tmp_path / "out"])


def test_a_folder_that_is_called_as_a_package_joins_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("things", "photo", ("img",), "MIT", "npm", "1.0.0")
    for number, name in enumerate(("downloads/things-1.0.0/img", "things")):
        (tmp_path / name).mkdir(parents=True)
        photograph(number).save(tmp_path / name / "a.png")
    monkeypatch.chdir(tmp_path)
    report = build_tiles(
        tmp_path / "t.npy", packages=[package], images=[Path("things")], downloads=tmp_path / "downloads"
    )
    assert report.files_used == {"things": 1, str(tmp_path / "things"): 1}
    assert set(report.tiles) == {"photo", "images"}


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no Debian")
def test_packages_are_unpacked_and_damaged_ones_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("things", "photo", ("usr/share/things",), "public domain")
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: things\nVersion: 1\nArchitecture: all\nMaintainer: a <a@example.org>\nDescription: pictures\n"
    )
    (root / "usr/share/things").mkdir(parents=True)
    photograph(1).save(root / "usr/share/things/a.png")
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        subprocess.run(["dpkg-deb", "-b", root, tmp_path / name / "things_1_all.deb"], check=True, capture_output=True)
    assert (fetch(package, Path("whole"))[0] / "a.png").is_file()
    archive = tmp_path / "cut" / "things_1_all.deb"
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(SourceError, match="`dpkg -x` failed"):
        fetch(package, Path("cut"))
    assert not list((tmp_path / "cut").iterdir()), "what is damaged is fetched anew"
    with pytest.raises(SourceError, match="`apt-get -q=2` failed"):
        fetch(replace(package, name="no-such-package-anywhere"), Path("cut"))
    assert not list((tmp_path / "cut").iterdir())
    archive.parent.rmdir()
    archive.parent.write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be made"):
        fetch(package, Path("cut"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="no Node.js")
def test_packages_of_npm_are_unpacked_without_their_first_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package("@some/things", "photo", ("img",), "MIT", "npm", "1.2.3")
    root = tmp_path / "root"
    (root / "img").mkdir(parents=True)
    (root / "package.json").write_text('{"name": "@some/things", "version": "1.2.3"}')
    photograph(1).save(root / "img/a.png")
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        subprocess.run(["npm", "pack", "--silent", root], check=True, capture_output=True, cwd=tmp_path / name)
    (found,) = fetch(package, Path("whole"))
    assert found == tmp_path / "whole/some-things-1.2.3/img"
    assert [path.name for path in found.iterdir()] == ["a.png"]
    archive = tmp_path / "cut" / "some-things-1.2.3.tgz"
    archive.write_bytes(archive.read_bytes()[:-5000])
    with pytest.raises(SourceError, match=r"some-things-1\.2\.3\.tgz cannot be unpacked"):
        fetch(package, Path("cut"))
    assert not list((tmp_path / "cut").iterdir()), "what is damaged is fetched anew"
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    # No version of it is this one, whether the registry is within reach or not.
    with pytest.raises(SourceError, match="`npm pack` failed: npm error"):
        fetch(replace(package, version="0.0.0-no-such-version"), Path("cut"))
    assert not list((tmp_path / "cut").iterdir())


def test_what_a_registrys_archive_holds_stays_in_its_folder(tmp_path: Path) -> None:
    package = Package("things", "photo", ("img",), "MIT", "npm", "1.0.0")
    with tarfile.open(tmp_path / "things-1.0.0.tgz", "w:gz") as tar:
        member = tarfile.TarInfo("package/../../../outside.png")
        tar.addfile(member, io.BytesIO(b""))
    with pytest.raises(SourceError, match="cannot be unpacked"):
        fetch(package, tmp_path / ".")
    assert not list(tmp_path.parent.rglob("outside.png"))


@pytest.mark.parametrize(("registry", "client"), [("debian", "apt-get and dpkg"), ("npm", "npm")])
def test_a_registry_without_its_client_is_told(
    registry: Literal["debian", "npm"], client: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=f"needs {client} .*--only"):
        fetch(Package("things", "photo", ("img",), "MIT", registry, "1.0.0"), tmp_path / "downloads")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk."""
    words = ["train-data", "--only", "none", "--images", str(folder), "-o", str(tmp_path / "tiles.npy"), "--jobs", "1"]
    code = (
        "import resource, signal, sys; from hat_video.cli import main;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)); sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "tiles.npy: cannot be written: File too large" in done.stderr
    assert not list(tmp_path.glob("tiles*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_an_interrupted_build(number: signal.Signals, folder: Path, tmp_path: Path) -> None:
    for copy in range(40):
        for path in list(folder.glob("sharp*.png")):
            (tmp_path / "many").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "many" / f"{copy:02d}{path.name}")
    words = ["train-data", "--only", "none", "--images", str(tmp_path / "many"), "-o", str(tmp_path / "tiles.npy")]
    child = subprocess.Popen(
        [sys.executable, "-m", "hat_video", *words, "--jobs", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    part = tmp_path / "tiles.npy.part"
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 10 * TILE**2) and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(number)
    _, errors = child.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert (child.returncode, errors) == (130, "hat-video: interrupted\n")
        assert not list(tmp_path.glob("tiles*"))
    deadline = time.monotonic() + 20
    while members(child.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not members(child.pid)


def members(group: int) -> list[str]:
    """The processes of a session that still live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            if int(rest.split()[3]) == group and rest.split()[0] != "Z":
                found.append(name)
    return found


def test_sharpness_tells_a_picture_from_its_enlargement() -> None:
    picture = photograph(3)
    enlarged = picture.resize((320, 256), Image.Resampling.BICUBIC).resize(picture.size, Image.Resampling.BICUBIC)
    assert sharpness_map(picture).mean() > 8 * sharpness_map(enlarged).mean()


def test_the_mix_is_kept_and_crops_are_in_every_orientation(tmp_path: Path) -> None:
    with TileWriter(tmp_path / "tiles.npy") as writer:
        ramp = np.arange(TILE, dtype=np.uint8)
        for number, group in enumerate(["photo"] * 3 + ["vector"] * 2 + ["validation"]):
            tile = np.zeros((TILE, TILE, 3), np.uint8)
            tile[..., 0], tile[..., 1] = ramp[None, :], ramp[:, None]
            tile[..., 2] = 40 * number
            writer.add(tile, TileRecord(group, "test", f"{number}.png", 1.0, 0, 0, 20.0 + number))
    tiles = TileSet(tmp_path / "tiles.npy", {"photo": 3.0, "vector": 1.0})
    crops = tiles.crops(2000, 8, np.random.default_rng(0))
    which = crops[:, 2, 0, 0] // 40
    assert 0.72 < (which < 3).mean() < 0.78
    assert set(which) == {0, 1, 2, 3, 4}
    horizontal = {tuple(np.sign(np.diff(crop.astype(int), axis=2)[:2, 0, 0])) for crop in crops}
    assert horizontal == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    assert set(
        TileSet(tmp_path / "tiles.npy", {"photo": 1.0}, 21.5).crops(99, 8, np.random.default_rng(0))[:, 2, 0, 0]
    ) == {0, 40}
    assert tiles.held_out().shape == (1, TILE, TILE, 3)


def test_orientations_are_the_eight_of_a_square() -> None:
    square = np.arange(9, dtype=np.uint8).reshape(1, 3, 3)
    assert len({orient(square, which).tobytes() for which in range(8)}) == 8


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: build_tiles(p / "t.npz", packages=[], images=[p], downloads=p), UsageError, "must end in .npy"),
        (lambda p: build_tiles(p / "t.npy", packages=[], downloads=p), UsageError, "nothing to build from"),
        (lambda p: build_tiles(p / "t.npy", packages=[], images=[p / "no"], downloads=p), UsageError, "no such folder"),
        (
            lambda p: build_tiles(p / "t.npy", packages=[], images=[p], downloads=p),
            UsageError,
            "--images .* no pictures",
        ),
        (lambda p: choose_packages("scratch,wallpaper"), UsageError, "wallpaper: must be all, none or of"),
        (lambda p: TileSet(p / "t.npy", {"photo": 1}), SourceError, "hat-video train-data"),
        (lambda p: TileWriter(Path("/proc/t.npy")).__enter__(), OutputError, "cannot be written"),
    ],
)
def test_errors_say_what_to_do(call, error, message, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing stays behind"


def test_a_mix_of_groups_that_are_not_there(folder: Path, tmp_path: Path) -> None:
    build(folder, tmp_path / "tiles.npy")
    with pytest.raises(UsageError, match=r"vector.*has: images \(\d+\)"):
        TileSet(tmp_path / "tiles.npy", {"images": 1, "vector": 1})
