"""Nothing computed twice, and the same bits: tiles, unchanged frames and unchanged parts of frames."""

from __future__ import annotations

import gc
import json
import random
import weakref
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from hat_video.errors import OptionError
from hat_video.frames import ColorInfo, FrameBatch, PixelFormat, VideoInfo
from hat_video.inference.optimize import optimize
from hat_video.inference.regions import Reach, Rectangle, compute_region, tiled_exactly
from hat_video.inference.unchanged import changed_cells, parts_to_compute
from hat_video.inference.upscaler import Upscaler
from hat_video.jobs.options import UpscaleOptions
from hat_video.jobs.picture import FrameUpscaler, Upscaled
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAT, ChannelAttention, HATConfig
from hat_video.model.zoo import Model, load_model
from hat_video.training.export import save_tensors
from tests.clips import make_clip
from tests.command import sidecars, upscale
from tests.reference import scramble

CPU = torch.device("cpu")
SMALL = HATConfig(
    embed_dim=16, depths=(2,), num_heads=(2,), window_size=8, compress_ratio=2, squeeze_factor=4, upscale=2,
    num_feat=8, attention_pool=8,
)  # fmt: skip
SHAPES = {
    "plain": SMALL,
    "boxes of 16": replace(SMALL, attention_pool=16),
    "three blocks": replace(SMALL, depths=(3,), attention_pool=16),
    "two groups": replace(SMALL, depths=(1, 1), num_heads=(1, 2)),
    "x3": replace(SMALL, upscale=3),
    "x4": replace(SMALL, upscale=4, depths=(1,)),
    "x1": replace(SMALL, upscale=1),
    "windows of 4": replace(SMALL, window_size=4, attention_pool=12, depths=(3,)),
    "no last convolutions": replace(SMALL, resi_connection="identity"),
    "unshuffled": replace(SMALL, unshuffle=2, depths=(1,)),
    "wide overlap": replace(SMALL, overlap_ratio=1.0),
    "no overlap": replace(SMALL, overlap_ratio=0.0),
}


def network(config: HATConfig) -> HAT:
    return scramble(HAT(config), 1).eval().requires_grad_(False)


def model(config: HATConfig) -> Model:
    return replace(load_model("hat-nano", scale=2), network=network(config), config=config, scale=config.upscale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_parts_equal_the_whole_to_the_bit(name: str, dtype: torch.dtype) -> None:
    config = SHAPES[name]
    fast = optimize(network(config), dtype=dtype, device=CPU)
    reach, scale = Reach(config), config.upscale
    height, width = 19 * config.multiple, 27 * config.multiple
    frame = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    rng = random.Random(name)
    with torch.inference_mode():
        whole = fast(frame)
        for _ in range(8):
            top, left = rng.randrange(height), rng.randrange(width)
            part = Rectangle(top, rng.randint(top + 1, height), left, rng.randint(left + 1, width))
            assert torch.equal(compute_region(fast, frame, part, reach, scale), part.cut(whole, scale))
        for corner in (Rectangle(0, 3, 0, 3), Rectangle(height - 3, height, width - 3, width)):
            assert reach.region(corner, height, width).area < height * width
            assert torch.equal(compute_region(fast, frame, corner, reach, scale), corner.cut(whole, scale))
        assert torch.equal(tiled_exactly(fast, frame, 40, reach, scale), whole)


@pytest.mark.parametrize("name", SHAPES)
def test_the_reach_is_no_wider_than_it_must_be(name: str) -> None:
    """The input that a part depends on, by its gradient, ends within one step of the grid before the region does."""
    config = SHAPES[name]
    net = network(config).double()
    for module in net.modules():
        if isinstance(module, ChannelAttention):
            module.attention[1].bias.data.fill_(3.0)  # or its ReLU might pass no gradient
    reach = Reach(config)
    size = -(-200 // reach.grid) * reach.grid
    frame = torch.rand(1, 3, reach.grid * 2, size, dtype=torch.float64, requires_grad=True)
    part = Rectangle(0, frame.shape[2], size // 2 // reach.grid * reach.grid, size // 2 // reach.grid * reach.grid + 4)
    part.cut(net(frame), config.upscale).sum().backward()  # type: ignore[no-untyped-call]
    assert frame.grad is not None
    columns = frame.grad.abs().sum((0, 1, 2)).nonzero().flatten()
    low, high = reach.along(part.left, part.right, size)
    assert low <= int(columns[0]) < low + reach.grid
    assert high - reach.grid <= int(columns[-1]) < high


def test_a_tile_no_longer_changes_the_picture() -> None:
    frames = torch.rand(1, 3, 102, 121, generator=torch.Generator().manual_seed(0))
    boxed = load_model("hat-nano", scale=2).pooled(16)
    whole = Upscaler(boxed)(frames)
    for tile in (16, 50, 64, 102):
        assert torch.equal(Upscaler(boxed, tile=tile)(frames), whole)
    assert not torch.equal(Upscaler(boxed.pooled(0), tile=64)(frames), whole)


def info(name: str, width: int, height: int) -> VideoInfo:
    fmt = PixelFormat.parse(name)
    color = ColorInfo(0 if fmt.kind == "rgb" else 1, 1, 1, fmt.kind == "rgb")
    return VideoInfo(width, height, Fraction(1, 25), Fraction(25), fmt, color)


def film(facts: VideoInfo, changes: list[tuple[int, int, int, int]], seed: int = 0) -> list[FrameBatch]:
    """Noise, and frames that differ from the one before in a rectangle each: top, left, height, width."""
    generator = torch.Generator().manual_seed(seed)
    fmt = facts.pixel_format

    def noise(height: int, width: int) -> torch.Tensor:
        values = torch.randint(0, 1 << fmt.bit_depth, (1, height, width), generator=generator, dtype=torch.int32)
        return values.to(fmt.dtype)

    planes = [noise(*size) for size in fmt.plane_sizes(facts.width, facts.height)]
    frames = [FrameBatch(tuple(planes), (0,))]
    for number, (top, left, height, width) in enumerate(changes, 1):
        planes = [plane.clone() for plane in planes]
        for k, plane in enumerate(planes):
            # Of two chroma planes one changes: luma alone would hide what chroma does.
            down = fmt.log2_chroma_h if k in (1, 2) and fmt.kind == "yuv" else 0
            across = fmt.log2_chroma_w if k in (1, 2) and fmt.kind == "yuv" else 0
            if (k + number) % 3 == 0:
                continue
            place = plane[:, top >> down : (top + height) >> down, left >> across : (left + width) >> across]
            place.copy_(noise(*place.shape[1:]))
        frames.append(FrameBatch(tuple(planes), (number,)))
    return frames


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("yuv420p", SMALL),
        ("yuv420p10le", SHAPES["boxes of 16"]),
        ("yuv422p", SHAPES["x3"]),
        ("yuv411p", SHAPES["x4"]),
        ("yuv444p", SHAPES["two groups"]),
        ("gray", replace(SMALL, depths=(3,))),
        ("gbrp", SHAPES["unshuffled"]),
        ("yuv420p", SHAPES["x1"]),
    ],
)
@pytest.mark.parametrize("size", [(318, 244), (421, 331)])
def test_a_changed_part_gives_the_same_bits(name: str, config: HATConfig, size: tuple[int, int]) -> None:
    width, height = size
    small = info(name, width, height)
    large = replace(small, width=width * config.upscale, height=height * config.upscale)
    rng = random.Random(0)
    changes = [(rng.randrange(height), rng.randrange(width), rng.randint(1, 24), rng.randint(1, 24)) for _ in range(5)]
    changes += [(height - 2, width - 2, 2, 2), (0, 0, 1, 1), (0, 0, height, width), (50, 50, 0, 0)]
    frames = film(small, changes)
    upscaler = Upscaler(model(config), precision="fp32")
    whole, parts = (FrameUpscaler(upscaler, small, large, reuse=reuse) for reuse in ("same", "changed"))  # type: ignore[arg-type]
    patched = 0
    for batch in frames:
        expected = whole(whole.look(batch))
        task = parts.look(batch)
        patched += task.parts is not None
        made = parts(task)
        for a, b in zip(made.planes, expected.planes, strict=True):
            assert torch.equal(a, b)
    assert patched >= 2
    assert parts.pixels_computed < 0.95 * whole.pixels_computed
    assert whole.same == parts.same == sum(all(map(torch.equal, a.planes, b.planes)) for a, b in pairwise(frames))


@pytest.mark.parametrize("change", [(0, 0, 0, 0), (8, 8, 4, 4)])
def test_no_thread_waits_for_the_frame_before(change: tuple[int, int, int, int]) -> None:
    """The second frame needs the first, which is made after it here, by the same thread."""
    small = info("yuv420p", 320, 240)
    upscaler = Upscaler(model(replace(SMALL, attention_pool=8)), precision="fp32")
    frames = FrameUpscaler(upscaler, small, replace(small, width=640, height=480), reuse="changed")
    first, second = film(small, [change])
    tasks = [frames.look(first), frames.look(second)]
    assert tasks[1].takes == (-1,) if change == (0, 0, 0, 0) else tasks[1].parts
    later = frames(tasks[1])
    assert not later.made.done()
    made = frames(tasks[0])
    assert later.made.done()
    frames.forget()
    alone = frames(frames.look(second))
    assert all(map(torch.equal, later.planes, alone.planes))
    assert all(map(torch.equal, later.planes, made.planes)) == (change == (0, 0, 0, 0))


def test_an_error_of_the_frame_before_is_told() -> None:
    small = info("yuv420p", 64, 48)
    # The output's size is not what the network makes, and the format has no such planes.
    frames = FrameUpscaler(Upscaler(load_model("bicubic", scale=2)), small, replace(small, width=128, height=96))
    first, second = film(small, [(0, 0, 0, 0)])
    tasks = [frames.look(first), frames.look(second)]
    later = frames(tasks[1])
    broken = replace(tasks[0], batch=FrameBatch(first.planes[:1], first.pts))
    with pytest.raises((IndexError, ValueError)):
        frames(broken)
    with pytest.raises((IndexError, ValueError)):
        _ = later.planes


def test_frames_are_let_go() -> None:
    """What is put together later must not tie frames into circles that only the collector of garbage finds."""
    small = info("yuv420p", 64, 48)
    frames = FrameUpscaler(Upscaler(load_model("bicubic", scale=2)), small, replace(small, width=128, height=96))
    kept: list[weakref.ref[torch.Tensor]] = []
    gc.disable()
    try:
        for batch in film(small, [(0, 0, 0, 0), (8, 8, 4, 4), (0, 0, 0, 0), (4, 4, 2, 2)]):
            kept.append(weakref.ref(frames(frames.look(batch)).planes[0]))
        assert sum(one() is not None for one in kept) <= 1
    finally:
        gc.enable()


@pytest.mark.parametrize("sizes", [(6,), (4, 2), (1, 5), (2, 2, 2)])
def test_batches_give_equal_frames_once(sizes: tuple[int, ...]) -> None:
    """A A B B B C, in batches of any size."""
    small = info("yuv420p", 64, 48)
    large = replace(small, width=128, height=96)
    a, b, c = (film(small, [], seed)[0] for seed in range(3))
    shown = [a, a, b, b, b, c]
    upscaler = Upscaler(load_model("bicubic", scale=2))
    frames, plain = FrameUpscaler(upscaler, small, large), FrameUpscaler(upscaler, small, large)
    made: list[Upscaled] = []
    for size in sizes:
        start = sum(len(batch.pts) for batch in made)
        group = shown[start : start + size]
        planes = tuple(torch.cat(same) for same in zip(*(batch.planes for batch in group), strict=True))
        made.append(frames(frames.look(FrameBatch(planes, tuple(range(start, start + size))))))
    assert frames.same == 3
    assert frames.pixels_computed * 2 == frames.pixels
    for k, plane in enumerate(zip(*(batch.planes for batch in made), strict=True)):
        expected = torch.cat([plain(plain.look(batch)).planes[k] for batch in shown])
        assert torch.equal(torch.cat(plane), expected)


def test_an_error_reaches_those_who_wait_for_it() -> None:
    small = info("yuv420p", 64, 48)
    broken = model(replace(SMALL, attention_pool=0))
    assert broken.network is not None
    broken.network.conv_last.bias.data.fill_(float("nan"))
    frames = FrameUpscaler(Upscaler(broken, precision="fp32"), small, replace(small, width=128, height=96))
    first, second = (frames(frames.look(batch)) for batch in film(small, [(0, 0, 0, 0)]))
    assert not bool(first.is_finite)
    assert not bool(second.is_finite), "a copy of rubbish is rubbish"


@pytest.mark.parametrize("name", ["yuv420p", "yuv444p", "yuv422p10le", "yuv410p", "gbrp", "gray"])
def test_no_changed_pixel_is_overlooked(name: str) -> None:
    """Against the plain rule: a cell has changed if any sample that colours one of its pixels has."""
    facts = info(name, 100, 77)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        before = [torch.zeros(size, dtype=facts.pixel_format.dtype) for size in facts.pixel_format.plane_sizes(100, 77)]
        after = [plane.clone() for plane in before]
        expected = np.zeros((10, 13), bool)
        for plane in after:
            y, x = (int(torch.randint(length, (), generator=generator)) for length in plane.shape)
            plane[y, x] = 1
            down, across = -(-77 // plane.shape[0]), -(-100 // plane.shape[1])
            reach = 0 if (down, across) == (1, 1) else 3
            rows = {row // 8 for row in range(77) if abs(row // down - y) <= reach}
            columns = {column // 8 for column in range(100) if abs(column // across - x) <= reach}
            expected[np.ix_(sorted(rows), sorted(columns))] = True
        assert np.array_equal(changed_cells(before, after, 8), expected)
    assert changed_cells(before, after, 8, most=0).sum() <= expected.sum()


def test_the_cells_that_a_chroma_sample_colours() -> None:
    facts = info("yuv420p", 64, 64)
    before = [torch.zeros(size, dtype=torch.uint8) for size in facts.pixel_format.plane_sizes(64, 64)]
    after = [plane.clone() for plane in before]
    after[1][8, 8] = 9  # pixels 16 and 17, and through the filter up to 10 and 23
    assert np.argwhere(changed_cells(before, after, 8)).tolist() == [[y, x] for y in (1, 2) for x in (1, 2)]


def test_a_change_everywhere_is_a_whole_picture() -> None:
    reach = Reach(SMALL)
    assert parts_to_compute(np.ones((30, 40), bool), 240, 320, reach) is None
    assert parts_to_compute(np.zeros((30, 40), bool), 240, 320, reach) == []


def blinking(count: int) -> list[np.ndarray]:
    """RGB pictures: a still scene in which a small square comes and goes, and every picture stands for two frames."""
    rng = np.random.default_rng(0)
    scene = np.kron(rng.integers(40, 200, (20, 30, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
    pictures = []
    for number in range(count // 2):
        picture = scene.copy()
        picture[8:16, 8 + 4 * (number % 5) : 16 + 4 * (number % 5)] = 250
        pictures += [picture, picture]
    return pictures


@pytest.mark.parametrize("kind", ["hat", "cnn"])
def test_the_command_gives_the_same_file(kind: str, tmp_path: Path) -> None:
    save_tensors(CNN(CNNConfig(8, 4, 2)).state_dict(), tmp_path / "cnn.safetensors", {})
    model = ("--attention-pool", "box:8") if kind == "hat" else ("--model", tmp_path / "cnn.safetensors")
    clip = make_clip(
        tmp_path / "clip.mkv", width=480, height=320, frames=12, pictures=blinking(12), codec="ffv1", bframes=0
    )
    files = {}
    for reuse in ("same", "changed"):
        out = tmp_path / f"{reuse}.mp4"
        words = (clip, "-o", out, *model, "--precision", "fp32", "--reuse", reuse, "--keep-work")
        assert upscale(*words, "--report", tmp_path / f"{reuse}.json") == 0
        files[reuse] = out.read_bytes()
        report = json.loads((tmp_path / f"{reuse}.json").read_text())
        assert report["clips"][0]["frames"]["same"] == 6 if "clips" in report else report["frames"]["same"] == 6
    assert files["same"] == files["changed"]
    computed = [json.loads(path.read_text())["computed"] for path in sidecars(tmp_path / "changed.mp4")]
    assert all(0 < share < 0.5 for share in computed)


@pytest.mark.parametrize("pool", ["box", "box:0", "box:-8", "box:x", "16", "windows"])
def test_a_bad_box_is_refused(pool: str) -> None:
    with pytest.raises(OptionError, match="--attention-pool"):
        UpscaleOptions(attention_pool=pool)


def test_a_box_that_is_not_made_of_windows_is_refused(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=2)
    assert upscale(clip, "-o", tmp_path / "out.mp4", "--attention-pool", "box:12") == 2
