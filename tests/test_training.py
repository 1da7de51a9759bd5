"""Training for real: small networks, killed and resumed, spread over processes, exported and used."""

import csv
import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from hat_video import Upscaler, load_model
from hat_video.analysis.metrics import psnr
from hat_video.errors import CancelledError, ModelError, OptionError, SourceError, UsageError
from hat_video.model.cnn import CNN
from hat_video.model.hat import HAT
from hat_video.training.export import body_of, fold_conv_scale
from hat_video.training.loop import Training, TrainProgress, _distance
from hat_video.training.networks import build_network
from hat_video.training.recipe import NetworkShape, Stage, TrainRecipe, load_recipe, read_changes
from hat_video.training.tiles import TILE, TileRecord, TileWriter
from tests.live.leftovers import free_port
from tests.test_tiles import photograph

TINY = NetworkShape(embed_dim=8, depths=(2,), squeeze_factor=4, num_feat=8)
STAGE = Stage("pretrain", iterations=12, rate=2e-3, batch=4, patch=16, warmup=3)
RECIPE = TrainRecipe("tiny", 2, (STAGE,), network=TINY, evaluate_every=6)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles") / "tiles.npy"
    with TileWriter(path) as writer:
        for number, group in enumerate(["photo"] * 4 + ["vector"] * 2 + ["validation"]):
            tile = np.asarray(photograph(number, TILE, TILE))
            writer.add(tile, TileRecord(group, "test", f"{number}.png", 1.0, 0, 0, 20.0 + number))
    return path


def train(recipe: TrainRecipe, tiles: Path, folder: Path, **options: object) -> list[TrainProgress]:
    told: list[TrainProgress] = []
    training = Training(recipe, tiles, folder, device="cpu", threads=1, **options)  # type: ignore[arg-type]
    training.run(on_progress=told.append, cancel=threading.Event())
    return told


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        if tolerance:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=tolerance)
        else:
            assert torch.equal(one[name], other[name]), name


def command(tiles: Path, folder: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "hat_video", "train", "--config", "smoke", "--tiles", str(tiles), "-o", str(folder)),
        *("--device", "cpu", "--threads", "1", *more),
    ]


def test_killed_and_resumed_is_the_same_to_the_bit(tiles: Path, tmp_path: Path) -> None:
    """kill -9 at moments that nobody chose, until it is done; over two stages."""
    options = ("--set", "save_every_seconds=0.2")
    subprocess.run(command(tiles, tmp_path / "unbroken", *options, "-q"), check=True)
    kills = 0
    while True:
        child = subprocess.Popen(command(tiles, tmp_path / "broken", *options, "-q"))
        try:
            assert child.wait(timeout=4.0 + 0.9 * kills) == 0
            break
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            kills += 1
    assert kills >= 1
    assert_same(weights(tmp_path / "unbroken"), weights(tmp_path / "broken"))
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("unbroken", "broken")]
    for one, other in zip(*logs, strict=True):
        assert {k: v for k, v in one.items() if k not in ("seconds", "loss")} == {
            k: v for k, v in other.items() if k not in ("seconds", "loss")
        }
    assert [row["stage"] for row in logs[0]] == ["pretrain"] * 3 + ["finetune"] * 2
    assert (tmp_path / "broken" / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "broken").glob("*.part"))


def test_the_averages_hold_no_graph(tiles: Path, tmp_path: Path) -> None:
    """Held from one iteration to the next, it grew for as long as a training ran."""
    training = Training(RECIPE, tiles, tmp_path, device="cpu", threads=1)
    training.run(on_progress=lambda _: None, cancel=threading.Event())
    assert all(value.grad_fn is None and not value.requires_grad for value in training.ema.parameters())


def test_compile_without_a_compiler_is_refused(tiles: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PATH": str(tmp_path), "CXX": "none"}
    result = subprocess.run(
        command(tiles, tmp_path / "run", "--compile"), env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "--compile: needs a C++ compiler" in result.stderr
    assert not (tmp_path / "run").exists()


def test_interrupt_saves_and_says_how_to_go_on(tiles: Path, tmp_path: Path) -> None:
    # More than any machine does in the time.
    options = ("--set", "stages.0.iterations=100000", "--set", "evaluate_every=100000")
    child = subprocess.Popen(
        command(tiles, tmp_path / "run", *options, "--set", "save_every_seconds=1e9"),
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1.5)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "goes on from there" in errors
    assert (tmp_path / "run" / "state.pt").exists()


def test_two_processes_learn_what_one_does(tiles: Path, tmp_path: Path) -> None:
    options = ("--set", "precision=fp32", "--set", "stages.0.iterations=8", "--set", "stages.1.iterations=4", "-q")
    subprocess.run(command(tiles, tmp_path / "one", *options), check=True)
    words = command(tiles, tmp_path / "two", *options)
    words[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hat_video"]
    result = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    # Adam divides by the root of the squared gradient, which blows up the rounding of tiny gradients.
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=5e-3)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_interrupt_of_one_process_stops_all_of_them_together(rank: int, tiles: Path, tmp_path: Path) -> None:
    options = ("--set", "stages.0.iterations=100000", "--set", "evaluate_every=100000")
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    children = [
        subprocess.Popen(
            command(tiles, tmp_path / "run", *options, "--set", "save_every_seconds=0.2"),
            env=environment | {"RANK": str(number), "LOCAL_RANK": str(number), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    state = tmp_path / "run" / "state.pt"
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    children[rank].send_signal(signal.SIGINT)
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 130, errors
        assert "saved at iteration" in errors
        assert "Traceback" not in errors


def test_a_finished_training_has_nothing_left_to_do(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path)
    before = (tmp_path / "model.safetensors").stat().st_mtime_ns
    assert train(RECIPE, tiles, tmp_path) == []
    assert (tmp_path / "model.safetensors").stat().st_mtime_ns == before


def test_what_changes_no_weights_may_change(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path)
    assert train(replace(RECIPE, name="b", purpose="c", save_every_seconds=7.0), tiles, tmp_path) == []


@pytest.mark.parametrize("is_logged", [False, True])
def test_a_kill_before_the_last_evaluation_is_made_up_for(is_logged: bool, tiles: Path, tmp_path: Path) -> None:
    told = train(RECIPE, tiles, tmp_path)
    before = weights(tmp_path)
    rows = (tmp_path / "log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "log.csv").write_text("".join(rows if is_logged else rows[:-1]))
    again = train(RECIPE, tiles, tmp_path)
    assert [progress.scores for progress in again] == [told[-1].scores]
    assert_same(weights(tmp_path), before)
    assert (tmp_path / "log.csv").read_text() == "".join(rows)


class _Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


TWO_STAGES = replace(
    RECIPE,
    stages=(
        replace(STAGE, iterations=6),
        replace(STAGE, name="finetune", iterations=6, warmup=0, attention_pool=16),
    ),
)


@pytest.mark.parametrize("is_done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("which", range(8))
def test_a_kill_between_two_files_is_made_up_for(
    which: int, is_done: bool, tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before or after each file that the ends of two stages write: state, model, curve and log."""
    train(TWO_STAGES, tiles, tmp_path / "unbroken")
    replace_file, written = Path.replace, []

    def killing(path: Path, target: Path) -> Path:
        written.append(target.name)
        is_hit = len(written) == which + 1
        if is_hit and not is_done:
            raise _Killed
        there = replace_file(path, target)
        if is_hit:
            raise _Killed
        return there

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killing)
        with pytest.raises(_Killed):
            train(TWO_STAGES, tiles, tmp_path / "broken")
    assert written == (["state.pt", "model.safetensors", "curve.png", "log.csv"] * 2)[: which + 1]
    train(TWO_STAGES, tiles, tmp_path / "broken")
    one, other = tmp_path / "unbroken", tmp_path / "broken"
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    rows = [[{**row, "seconds": ""} for row in csv.DictReader((name / "log.csv").open())] for name in (one, other)]
    assert rows[0] == rows[1]
    assert sorted(path.name for path in other.iterdir()) == sorted(path.name for path in one.iterdir())


@pytest.mark.parametrize("damage", [b"", b"nonsense", "cut", "foreign"])
def test_a_damaged_state_is_named(damage: bytes | str, tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path)
    path = tmp_path / "state.pt"
    if damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(damage if isinstance(damage, bytes) else path.read_bytes()[:-500])
    with pytest.raises(ModelError, match=r"state\.pt: cannot be gone on from .*; remove it to begin anew"):
        Training(RECIPE, tiles, tmp_path, device="cpu")


def test_a_diverged_training_keeps_its_good_state(tiles: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, stages=(replace(STAGE, iterations=60),), evaluate_every=2, save_every_seconds=0)
    training = Training(recipe, tiles, tmp_path, device="cpu", threads=1)

    def spoil(progress: TrainProgress) -> None:
        if progress.iteration == 4:
            next(training.network.parameters()).data.fill_(float("nan"))

    with pytest.raises(ModelError, match=r"it diverged by iteration 5, .*; lower rate"):
        training.run(on_progress=spoil, cancel=threading.Event())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["iteration"] == 4
    assert all(value.isfinite().all() for value in state["network"].values())


def test_whoever_is_told_may_stop_it(tiles: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    recipe = replace(RECIPE, stages=(replace(STAGE, iterations=60),), evaluate_every=1000, save_every_seconds=1e9)
    with pytest.raises(CancelledError, match="saved at iteration 51"):
        Training(recipe, tiles, tmp_path, device="cpu", threads=1).run(
            on_progress=lambda _: cancel.set(), cancel=cancel
        )
    assert torch.load(tmp_path / "state.pt", weights_only=True)["iteration"] == 51


def test_a_killed_training_with_workers_can_go_on_at_once(tiles: Path, tmp_path: Path) -> None:
    options = ("--set", "stages.0.iterations=100000", "--set", "evaluate_every=100000")
    words = command(tiles, tmp_path / "run", "--workers", "1", *options, "--set", "save_every_seconds=0.1", "-q")
    child = subprocess.Popen(words)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "state.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    child.kill()
    child.wait()
    handle = os.open(tmp_path / "run", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def test_two_trainings_do_not_share_a_folder(tiles: Path, tmp_path: Path) -> None:
    def meanwhile(progress: TrainProgress) -> None:
        with pytest.raises(UsageError, match="another training is running in it"):
            train(RECIPE, tiles, tmp_path)

    training = Training(RECIPE, tiles, tmp_path, device="cpu", threads=1)
    training.run(on_progress=meanwhile, cancel=threading.Event())


def test_bad_stills_are_found_at_once(tiles: Path, tmp_path: Path) -> None:
    for name, message in (("nothing", "has no pictures in"), ("loss", "cannot head a column"), ("held out", "column")):
        with pytest.raises(UsageError, match=message):
            Training(RECIPE, tiles, tmp_path / "run", device="cpu", stills=(tmp_path / name,))
    (tmp_path / "a" / "Set" / "HR").mkdir(parents=True)
    with pytest.raises(UsageError, match="'Set' would head two columns"):
        Training(RECIPE, tiles, tmp_path / "run", device="cpu", stills=(tmp_path / "a" / "Set", tmp_path / "b" / "Set"))
    from PIL import Image

    photograph(1, 48, 48).save(tmp_path / "a" / "Set" / "HR" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "Set" / "HR" / "b.png")
    with pytest.raises(SourceError, match=r"b\.png: 8x8 is too small"):
        Training(RECIPE, tiles, tmp_path / "run", device="cpu", stills=(tmp_path / "a" / "Set",))
    assert not (tmp_path / "run").exists()


def test_a_set_that_joins_later_is_evaluated_and_drawn(
    tiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    (tmp_path / "Set" / "HR").mkdir(parents=True)
    photograph(1, 48, 48).save(tmp_path / "Set" / "HR" / "a.png")
    train(RECIPE, tiles, tmp_path / "run")
    drawn: list[str] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *a, **k: drawn.append(k["label"]) or plot(self, *a, **k))
    # As seen from inside of it the folder has no name.
    monkeypatch.chdir(tmp_path / "Set")
    told: list[TrainProgress] = []
    training = Training(RECIPE, tiles, tmp_path / "run", device="cpu", threads=1, stills=(Path(),))
    training.run(on_progress=told.append, cancel=threading.Event())
    assert [set(progress.scores) for progress in told] == [{"held out", "Set"}]
    assert drawn == ["loss", "held out", "Set"]
    rows = list(csv.DictReader((tmp_path / "run" / "log.csv").open()))
    assert [bool(row["Set"]) for row in rows] == [False] * (len(rows) - 1) + [True]


@pytest.mark.parametrize("key", ["start", "teacher"])
def test_a_checkpoint_that_the_recipe_names_is_told_as_such(key: str, tiles: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, **{key: str(tmp_path / "none.safetensors")})
    with pytest.raises(ModelError, match=rf"^{key} = .*none.* cannot be read: No such file.*--set {key}=FILE$"):
        Training(recipe, tiles, tmp_path / "run", device="cpu")
    with pytest.raises(
        UsageError, match=r"^stage 'pretrain': mix .*: no tile of 'photo' is as sharp as richest_db = 1;"
    ):
        Training(
            replace(RECIPE, stages=(replace(STAGE, name="pretrain", mix={"photo": 1.0}, richest_db=1.0),)),
            tiles,
            tmp_path / "run",
            device="cpu",
        )
    assert not (tmp_path / "run").exists()


def test_changed_tiles_are_seen(tiles: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiles.npy"
    shutil.copy(tiles, path)
    shutil.copy(tiles.with_suffix(".json"), path.with_suffix(".json"))
    with path.open("r+b") as file:
        file.seek(100_000)
        file.write(b"x" * 100)
    with pytest.raises(SourceError, match="its pixels are not those of its index"):
        train(RECIPE, path, tmp_path / "run")
    shutil.copy(tiles, path)
    train(RECIPE, path, tmp_path / "run")
    index = json.loads(path.with_suffix(".json").read_text())
    index["tiles"][0]["group"] = "vector"
    path.with_suffix(".json").write_text(json.dumps(index))
    with pytest.raises(UsageError, match="holds a training with other tiles"):
        train(RECIPE, path, tmp_path / "run")
    path.write_bytes(b"")
    with pytest.raises(SourceError, match=r"no tile file \(damaged\); make one with"):
        train(RECIPE, path, tmp_path / "run")
    shutil.copy(tiles, path)
    path.with_suffix(".json").write_text('{"tiles": [{}]}')
    with pytest.raises(SourceError, match=r"tiles\.json: is not the index of a tile file"):
        train(RECIPE, path, tmp_path / "run")


def test_another_recipe_does_not_touch_a_training(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path)
    with pytest.raises(UsageError, match="holds a training with other clip, seed; go on"):
        Training(replace(RECIPE, seed=1, clip=2.0), tiles, tmp_path, device="cpu")


@pytest.mark.parametrize("network", [TINY, replace(TINY, unshuffle=2, embed_dim=16)])
@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_untrained_network_is_bilinear_interpolation(scale: int, network: NetworkShape) -> None:
    if scale == 3 and network.unshuffle == 2:
        pytest.skip("unshuffle 2 goes with x1, x2 and x4")
    built = build_network(network, scale).eval()
    frame = torch.rand(1, 3, 32, 32)
    expected = frame
    for factor in {1: (), 2: (2,), 3: (3,), 4: (2, 2)}[scale]:
        expected = F.interpolate(expected, scale_factor=factor, mode="bilinear")
    with torch.no_grad():
        difference = (built(frame) - expected)[..., 8:-8, 8:-8].abs().max()
    assert difference < 1e-5


@pytest.mark.parametrize("network", [TINY, replace(TINY, unshuffle=2, embed_dim=16)])
def test_the_exported_model_is_the_one_that_was_trained(network: NetworkShape, tiles: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, network=network, precision="fp32")
    training = Training(recipe, tiles, tmp_path, device="cpu", threads=1)
    training.run(on_progress=lambda _: None, cancel=threading.Event())
    model = load_model(tmp_path / "model.safetensors")
    assert model.scale == 2
    frame = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        expected = training.ema(frame).clamp(0, 1)
    torch.testing.assert_close(Upscaler(model, precision="fp32")(frame), expected, rtol=0, atol=1e-5)


def test_upstream_tools_load_the_exported_model(tiles: Path, tmp_path: Path) -> None:
    from tests.reference import reference_of

    training = Training(replace(RECIPE, precision="fp32"), tiles, tmp_path, device="cpu", threads=1)
    training.run(on_progress=lambda _: None, cancel=threading.Event())
    reference = reference_of(weights(tmp_path))
    frame = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(reference(frame), training.ema(frame), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "goal",
    [{"frequency": 0.02, "luma": 0.5}, {"loss": "l2", "luma": 1.0}, {"loss": "psnr", "luma": 0.75}],
    ids=["l1", "l2", "psnr"],
)
def test_training_makes_it_better(tiles: Path, tmp_path: Path, goal: dict[str, Any]) -> None:
    stage = replace(STAGE, iterations=100, **goal)
    told = train(replace(RECIPE, stages=(stage,), evaluate_every=10), tiles, tmp_path)
    scores = [progress.scores["held out"] for progress in told if progress.scores]
    assert scores[-1] > scores[0] + 0.05


def test_every_picture_contributes_alike_to_psnr() -> None:
    hr = torch.rand(2, 3, 24, 24) * 0.5 + 0.25
    error = torch.randn_like(hr) * torch.tensor([0.1, 0.01])[:, None, None, None]
    sr = (hr + error).requires_grad_()
    loss = _distance(sr, hr, replace(STAGE, loss="psnr"))
    mean = np.mean([psnr(mine * 255, theirs * 255) for mine, theirs in zip(sr.detach(), hr, strict=True)])
    assert float(loss.detach()) == pytest.approx(-mean / 10 * math.log(10) / 100, rel=1e-3)
    (gradient,) = torch.autograd.grad(loss, sr)
    # As far to go, by steps as much smaller as the error is.
    pulls = (gradient * error).flatten(1).sum(1)
    assert float(pulls[0] / pulls[1]) == pytest.approx(1, rel=0.05)


def test_x4_starts_from_the_body_of_x2(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path / "x2")
    recipe = replace(RECIPE, scale=4, start=str(tmp_path / "x2" / "model.safetensors"))
    training = Training(recipe, tiles, tmp_path / "x4", device="cpu")
    x2, x4 = body_of_file(tmp_path / "x2"), training.network.state_dict()
    shared = [name for name in x4 if name.startswith(("layers.", "conv_first."))]
    assert shared
    for name in shared:
        torch.testing.assert_close(x4[name], x2[name])
    with pytest.raises(ModelError, match="none of its blocks has the shape"):
        Training(replace(recipe, network=replace(TINY, embed_dim=16)), tiles, tmp_path / "other", device="cpu")


def test_a_training_goes_on_wherever_its_start_lies(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path / "x2")
    start = tmp_path / "x2" / "model.safetensors"
    recipe = replace(RECIPE, scale=4, start=str(start))
    train(recipe, tiles, tmp_path / "x4")
    moved = start.rename(tmp_path / "moved.safetensors")
    assert train(replace(recipe, start=str(moved)), tiles, tmp_path / "x4") == []
    train(replace(RECIPE, seed=1), tiles, tmp_path / "other")
    other = str(tmp_path / "other" / "model.safetensors")
    with pytest.raises(UsageError, match="holds a training with other start; go on"):
        Training(replace(recipe, start=other), tiles, tmp_path / "x4", device="cpu")


def test_what_starts_from_a_file_makes_the_same_picture(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path / "first")
    path = tmp_path / "first" / "model.safetensors"
    second = Training(replace(RECIPE, start=str(path)), tiles, tmp_path / "second", device="cpu")
    model = load_model(path)
    assert model.network is not None
    frame = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(second.network.eval()(frame), model.network(frame), rtol=0, atol=1e-5)


def test_a_deeper_network_starts_as_the_same_function(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path / "first")
    path = tmp_path / "first" / "model.safetensors"
    shape = replace(TINY, depths=(*TINY.depths, TINY.depths[-1], TINY.depths[-1]))
    recipe = replace(RECIPE, start=str(path), network=shape)
    deeper = Training(recipe, tiles, tmp_path / "deeper", device="cpu")
    model = load_model(path)
    assert model.network is not None
    frame = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(deeper.network.eval()(frame), model.network(frame), rtol=0, atol=1e-5)
    before = {name: value.clone() for name, value in deeper.network.state_dict().items() if value.is_floating_point()}
    train(recipe, tiles, tmp_path / "deeper")
    after = body_of_file(tmp_path / "deeper")
    new = [name for name in before if name.startswith("layers.1.") and name.endswith(".weight")]
    assert new
    # All of what is new learns, though at the first step only the convolution can.
    assert all(not torch.equal(before[name], after[name]) for name in new)


def body_of_file(folder: Path) -> dict[str, torch.Tensor]:
    model = load_model(folder / "model.safetensors")
    assert model.network is not None
    assert model.config is not None
    return body_of(model.network.state_dict(), model.config)


def test_folding_the_scale_changes_no_pixel() -> None:
    network = HAT(TINY.hat_config(2)).eval()
    folded = HAT(replace(TINY.hat_config(2), conv_scale=0.01)).eval()
    folded.load_state_dict(fold_conv_scale(network.state_dict(), network.config))
    frame = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(network(frame), folded(frame), rtol=0, atol=1e-5)


def test_a_teacher_teaches(tiles: Path, tmp_path: Path) -> None:
    train(RECIPE, tiles, tmp_path / "teacher")
    teacher = str(tmp_path / "teacher" / "model.safetensors")
    taught = replace(
        RECIPE, teacher=teacher, teacher_share=1.0, stages=(replace(STAGE, iterations=40),), precision="fp32"
    )
    told = train(replace(taught, evaluate_every=5), tiles, tmp_path / "pupil")
    losses = [progress.loss for progress in told if progress.scores]
    assert losses[-1] < losses[0]
    with pytest.raises(ModelError, match="is x2; must be x4"):
        Training(replace(taught, scale=4), tiles, tmp_path / "x4", device="cpu")
    narrow = replace(taught, network=replace(TINY, window_size=4), stages=(replace(STAGE, patch=20),))
    with pytest.raises(UsageError, match="takes multiples of 8, and stage pretrain has patch 20"):
        Training(narrow, tiles, tmp_path / "narrow", device="cpu")
    train(replace(RECIPE, seed=1), tiles, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", teacher)
    with pytest.raises(UsageError, match="holds a training with other teacher"):
        Training(replace(taught, evaluate_every=5), tiles, tmp_path / "pupil", device="cpu")


@pytest.mark.parametrize("kind", ["compact", "rcan"])
def test_networks_to_compare_with(kind: str, tiles: Path, tmp_path: Path) -> None:
    network = NetworkShape(kind=kind, embed_dim=8, depths=(2,), squeeze_factor=4)  # type: ignore[arg-type]
    train(replace(RECIPE, network=network), tiles, tmp_path)
    with pytest.raises(ModelError):
        load_model(tmp_path / "model.safetensors")


def test_a_convolutional_network_trains_and_loads(tiles: Path, tmp_path: Path) -> None:
    network = NetworkShape(kind="cnn", embed_dim=8, depths=(2,))
    training = Training(replace(RECIPE, network=network, precision="fp32"), tiles, tmp_path, device="cpu", threads=1)
    frame = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(training.network(frame), F.interpolate(frame, scale_factor=2.0, mode="nearest"))
    training.run(on_progress=lambda _: None, cancel=threading.Event())
    loaded = load_model(tmp_path / "model.safetensors").network
    assert isinstance(loaded, CNN)
    with torch.no_grad():
        torch.testing.assert_close(loaded(frame), training.ema(frame), rtol=0, atol=1e-5)


@pytest.mark.parametrize("without", [("cab",), ("ocab",), ("cab", "ocab")])
def test_ablations_train(without: tuple[str, ...], tiles: Path, tmp_path: Path) -> None:
    network = replace(TINY, without=without)
    told = train(replace(RECIPE, network=network), tiles, tmp_path)  # type: ignore[arg-type]
    assert np.isfinite(told[-1].loss)
    names = weights(tmp_path).keys()
    assert any("conv_block" in name for name in names) is ("cab" not in without)
    assert any("overlap_attn" in name for name in names) is ("ocab" not in without)


def test_compressed_shots_train(tiles: Path, tmp_path: Path) -> None:
    stage = replace(STAGE, iterations=3, batch=8, patch=32)
    told = train(replace(RECIPE, degradation="video", stages=(stage,), evaluate_every=3), tiles, tmp_path)
    assert np.isfinite(told[-1].scores["held out"])


def test_cancelled_goes_on(tiles: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    training = Training(RECIPE, tiles, tmp_path, device="cpu", threads=1)
    with pytest.raises(CancelledError, match="saved at iteration 1;"):
        training.run(on_progress=lambda _: None, cancel=stop)
    assert Training(RECIPE, tiles, tmp_path, device="cpu", threads=1).iteration == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'a'\nscale = 2", "stages: is missing"),
        ("name = 'a'\nscale = 2\n[[stage]]\nname = 's'", "stage: no such key; there are name, scale, stages, network"),
        ("name = 'a'\nscale = 2\n[stages]\nname = 's'", "r.toml: stages: input should be a valid list$"),
        ("name = 'a'\nscale = 2\nstages = []", "stages: list should have at least 1 item"),
        ("name = 'a'\nscale = 1\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3", 'degradation = "video"'),
        (
            "name = 'a'\nscale = 5\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3",
            "scale = 5.*less than or equal to 4",
        ),
        ("name = 'a'\nscale = 2\nsped = 2\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3", "sped: no such key"),
        (
            "name = 'a'\nscale = 2\n[[stages]]\nname = 's'\niterations = 0\nrate = 1e-3",
            "iterations = 0.*greater than or equal to 1",
        ),
        (
            "name = 'a'\nscale = 2\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3\npatch = 200",
            "at most 128 at x2",
        ),
        ("name = 'a'\nscale = 2\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3\npatch = 20", "multiple of 8"),
        ("name = ", "not a TOML file"),
        *(
            (
                "name = 'a'\nscale = 2\n[network]\n" + line + "\n[[stages]]\nname = 's'\niterations = 1\nrate = 1e-3",
                message,
            )
            for line, message in (
                ("depths = []", "network.depths"),
                ("depths = [0]", "network.depths.0 = 0"),
                ("heads = 0", "network.heads = 0"),
                ("heads = 3", "network.heads = 3: must divide network.embed_dim, 32"),
                ("squeeze_factor = 100", "squeeze_factor = 100: must be at most"),
                ("compress_ratio = 100", "compress_ratio = 100: must be at most"),
                ("window_size = 0", "network.window_size = 0"),
                ("unshuffle = 3", "network.unshuffle = 3"),
                ("overlap_ratio = -1", "network.overlap_ratio = -1"),
            )
        ),
    ],
)
def test_bad_recipes(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        load_recipe(path)


def test_values_can_be_changed_from_the_command_line() -> None:
    recipe = load_recipe("smoke", read_changes(["network.embed_dim=16", "stages.1.rate = 0.5", "name=other"]))
    assert (recipe.network.embed_dim, recipe.stages[1].rate, recipe.name) == (16, 0.5, "other")
    for word, message in (
        ("rate", "KEY=VALUE"),
        ("stages.7.rate=1", "'7' must be 0 to 1"),
        ("colour=1", "colour: no such key; there are name"),
        ("stages.0.rat=1", "stages.0.rat: no such key; there are name, iterations, rate"),
        ("network.embed=1", "network.embed: no such key; there are kind, embed_dim"),
        ("network.depths.0=0", "network.depths.0 = 0"),
        ("network.depths.x=1", "'x' must be 0 to"),
        ("name.x.y=1", "no such key"),
        ("seed=1\nscale=3", "must be one KEY=VALUE"),
        ("scale=true", "scale = True"),
        ("seed=-1", "seed = -1"),
        ("clip=-1", "clip = -1"),
        ("ema=2", "ema = 2"),
        ("evaluate_every=0", "evaluate_every = 0"),
        ("teacher_share=5", "teacher_share = 5"),
        ("stages.0.warmup=-1", "warmup = -1"),
        ("stages.0.rate=inf", "rate = inf"),
        ("stages.0.mix={photo=nan}", "photo = nan"),
        ("stages.0.mix={validation=1}", "is held out"),
        ("stages.1.name=pretrain", "each must have a name of its own"),
        ("stages.0.attention_pool=-8", "attention_pool = -8"),
    ):
        with pytest.raises(OptionError, match=message):
            load_recipe("smoke", read_changes([word]))
