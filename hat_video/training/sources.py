"""Where training pictures come from: packages that anyone can install by name."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hat_video.errors import OutputError, SourceError, UsageError

__all__ = ["PACKAGES", "Package", "fetch"]


@dataclass(frozen=True, slots=True)
class Package:
    """A Debian package with pictures in it."""

    name: str
    group: str
    """`photo` or `vector`."""
    roots: tuple[str, ...]
    """Folders inside the package."""
    licence: str
    """As its copyright file says."""


_WALLPAPERS = (
    "Autumn",
    "BytheWater",
    "ColorfulCups",
    "EveningGlow",
    "FallenLeaf",
    "Grey",
    "OneStandsOut",
    "Path",
    "SafeLanding",
)

PACKAGES = (
    Package(
        "endless-sky-high-dpi",
        "photo",
        ("usr/share/games/endless-sky/plugins/endless-sky-high-dpi/images/land",),
        "public domain; some CC-BY-SA-3.0, CC-BY-SA-4.0",
    ),
    Package("lomiri-wallpapers-16.04", "photo", ("usr/share",), "CC-BY-4.0, CC-BY-SA-3.0, CC-BY-SA-4.0"),
    Package("scratch", "photo", ("usr/share/scratch/Media/Backgrounds",), "CC-BY-SA-3.0"),
    Package(
        "forensics-samples-files",
        "photo",
        ("usr/share/forensics-samples/original-files/pic1", "usr/share/forensics-samples/original-files/pic2"),
        "CC-BY-SA-4.0",
    ),
    Package(
        "mate-backgrounds",
        "photo",
        ("usr/share/backgrounds/mate/nature", "usr/share/backgrounds/mate/abstract"),
        "GPL-2+, CC-BY-SA-4.0",
    ),
    Package(
        "plasma-workspace-wallpapers",
        "photo",
        tuple(f"usr/share/wallpapers/{name}/contents/images" for name in _WALLPAPERS),
        "GPL-2+",
    ),
    Package("openclipart-svg", "vector", ("usr/share/openclipart",), "public domain"),
)
"""Most wallpaper packages are blur and gradients, and are left out. Textures of games taught small networks nothing."""


def fetch(package: Package, folder: Path) -> list[Path]:
    """Downloads and unpacks a package below `folder`, unless it is there; needs no root.

    Returns:
        Its roots.

    Raises:
        UsageError: this is not a Debian system.
        SourceError: the package cannot be had; the message says why.
        OutputError: the folder cannot be made.
    """
    # Commands run in it.
    folder = folder.absolute()
    unpacked = folder / package.name
    if not unpacked.is_dir():
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise UsageError(
                f"{package.name}: its download needs apt-get and dpkg (Debian, Ubuntu); "
                "elsewhere train on your own photographs with --only none --images DIR"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
        archive = next(iter(sorted(folder.glob(f"{package.name}_*.deb"))), None) or _download(package, folder)
        part = folder / f"{package.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            _run(["dpkg", "-x", str(archive), str(part)], folder, package)
        except SourceError:
            # Damaged: the next run shall download it anew.
            archive.unlink(missing_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            raise
        part.rename(unpacked)
    roots = [unpacked / root for root in package.roots]
    missing = [root for root in roots if not root.is_dir()]
    if missing:
        raise SourceError(
            f"{package.name}: no {missing[0].relative_to(unpacked)} in it; another version than is known here"
        )
    return roots


def _download(package: Package, folder: Path) -> Path:
    """The archive, which gets into `folder` when it is whole: apt writes under its last name from the start."""
    part = folder / f"{package.name}.download"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _run(["apt-get", "-q=2", "download", package.name], part, package)
        (archive,) = part.glob("*.deb")
        return archive.rename(folder / archive.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _run(command: list[str], folder: Path, package: Package) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise SourceError(
            f"{package.name}: `{' '.join(command[:2])}` failed: {' '.join(why)}; "
            "try `apt-get update`, or name the packages you can get with --only"
        )
