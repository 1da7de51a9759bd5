"""The shape of the house: who may import whom, what the package shows, and what it must not need."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hat_video
from hat_video.model.zoo import list_models

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hat_video"

# Arrows point down only. A room may use those that are named here, and itself.
MAY_USE = {
    "errors": set(),
    "files": {"errors"},
    "paths": set(),
    "presets": {"errors"},
    "frames": {"errors"},
    "color": {"frames", "errors"},
    "model": {"files", "frames", "errors"},
    "media": {"color", "files", "frames", "paths", "errors"},
    "inference": {"model", "color", "frames", "errors"},
    "jobs": {"inference", "live", "media", "model", "color", "files", "frames", "paths", "presets", "errors"},
    "live": {"media", "color", "frames", "errors"},
    "analysis": {"jobs", "inference", "media", "model", "color", "files", "frames", "errors"},
    "training": {"analysis", "inference", "model", "color", "files", "frames", "presets", "errors"},
    "cli": {
        "live",
        "training",
        "analysis",
        "jobs",
        "inference",
        "media",
        "model",
        "color",
        "files",
        "frames",
        "paths",
        "presets",
        "errors",
    },
}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    if room in ("__init__", "__main__"):
        return
    used = {room_of(name) for name in imports_of(path) if name.startswith("hat_video")} - {room, ""}
    assert used <= MAY_USE[room], f"{path} uses {used - MAY_USE[room]}"


def test_only_the_cli_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "cli":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
            assert not any(isinstance(call, ast.Name) and call.id == "print" for call in calls), path


def test_public_names_are_few_and_there() -> None:
    assert len(hat_video.__all__) <= 15
    assert all(hasattr(hat_video, name) for name in hat_video.__all__)
    assert "UpscaleOptions" in hat_video.__all__


def test_import_needs_no_optional_package() -> None:
    code = (
        "import sys; import hat_video, hat_video.cli;"
        "unwanted = ('nvidia.dali', 'openvino', 'ray', 'ffmpeg', 'PIL', 'spandrel', 'torchvision',"
        "            'matplotlib', 'resvg_py', 'pyvips', 'fastapi', 'uvicorn', 'websockets', 'prometheus_client');"
        "bad = [name for name in unwanted if name in sys.modules];"
        "sys.exit(str(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_only_one_file_knows_dali() -> None:
    users = {path.name for path in PACKAGE.rglob("*.py") if any(name.startswith("nvidia") for name in imports_of(path))}
    assert users == {"dali_source.py"}
    # By no other way than an import, either: a module that names it in a string could load it.
    named = {path.name for path in PACKAGE.rglob("*.py") if "nvidia.dali" in path.read_text(encoding="utf-8")}
    assert named == {"dali_source.py"}


def test_the_readme_says_what_was_measured_of_what_is_shipped() -> None:
    from benchmarks.quality import README, RESULT, readme_with

    result = json.loads(RESULT.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    assert text == readme_with(text, result), "python benchmarks/quality.py"
    measured = {scale: found["candidates"] for scale, found in result["scores"].items()}
    for model in list_models():
        for scale, sha256 in model.sha256.items() if model.is_included else ():
            assert measured[f"x{scale}"][model.name] == sha256, f"make quality: {model.name} x{scale}"
