"""The training loop: one global batch an iteration, drawn from nothing but the seed and the iteration's number.

So a run that was killed and resumed, and one that is spread over several processes, see the same data as an unbroken
run in one process; the former ends with the same bits, the latter with the same weights but for rounding.
"""

from __future__ import annotations

import copy
import fcntl
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from hat_video.analysis.metrics import crop_border, luma, psnr
from hat_video.analysis.stills import check_stills, evaluate_stills, set_name
from hat_video.errors import CancelledError, ModelError, OutputError, UsageError
from hat_video.files import remove_unfinished, write_atomically
from hat_video.inference.backends import as_compiler_error, prepare_compiler
from hat_video.inference.optimize import optimize
from hat_video.inference.upscaler import choose_device
from hat_video.model.checkpoint import Checkpoint, load_network, read_checkpoint
from hat_video.model.cnn import CNN
from hat_video.model.hat import HAT, HATConfig
from hat_video.training.degrade import VideoDegradation, degrade_bicubic
from hat_video.training.export import body_of, save_network, save_tensors
from hat_video.training.log import OTHER_COLUMNS, TrainLog, TrainProgress
from hat_video.training.networks import BranchedCNN, build_network, deepened
from hat_video.training.recipe import SHOT, Stage, TrainRecipe
from hat_video.training.recorded import RecordedGradients
from hat_video.training.tiles import TileSet

__all__ = ["TrainProgress", "Training"]

_TELL_EVERY = 50
_HELD_OUT = "held out"
_OF_NO_CONSEQUENCE = ("name", "purpose", "evaluate_every", "save_every_seconds")
"""Fields of a recipe that leave the weights as they are: they may change from one session to the next."""


class _Batches(Dataset[tuple[Tensor, ...]]):
    """Item i is this process's share of the global batch of iteration i: (HR uint8, LR), or HR alone.

    What is only made smaller is made smaller where the network is: on a GPU that takes no time.
    """

    def __init__(self, recipe: TrainRecipe, tiles: dict[str, TileSet], rank: int, world: int) -> None:
        self._recipe, self._tiles, self._rank, self._world = recipe, tiles, rank, world

    def __len__(self) -> int:
        return self._recipe.iterations

    def __getitem__(self, iteration: int) -> tuple[Tensor, ...]:
        stage, _ = self._recipe.stage_at(iteration)
        tiles = self._tiles[stage.name]
        if self._recipe.degradation == "video":
            return self._shots(stage, tiles, iteration)
        side = stage.patch * self._recipe.scale
        crops = [
            tiles.crops(1, side, self._rng(iteration, sample)) for sample in range(self._rank, stage.batch, self._world)
        ]
        return (torch.from_numpy(np.concatenate(crops)),)

    def _shots(self, stage: Stage, tiles: TileSet, iteration: int) -> tuple[Tensor, Tensor]:
        degradation = VideoDegradation(self._recipe.scale)
        pairs = []
        for shot in range(self._rank, stage.batch // SHOT, self._world):
            rng = self._rng(iteration, shot)
            picture = torch.from_numpy(tiles.crops(1, tiles.tiles.shape[1], rng)[0])
            pairs.append(degradation.make(picture, stage.patch, SHOT, rng))
        return torch.cat([hr for hr, _ in pairs]), torch.cat([lr for _, lr in pairs])

    def _rng(self, iteration: int, sample: int) -> np.random.Generator:
        return np.random.default_rng([self._recipe.seed, iteration, sample])


class _Mixed(nn.Module):
    """A network whose body computes in bf16, while what carries the picture itself, head and tail, stays in fp32.

    In bf16 throughout, rounding at the output is as large as what is left to learn, and training stalls a dB lower.
    """

    def __init__(self, network: nn.Module, device_type: str, *, is_half: bool) -> None:
        super().__init__()
        self.network, self._device_type, self._is_half = network, device_type, is_half

    def forward(self, lr: Tensor) -> Tensor:
        """(B, 3, H, W) fp32 to (B, 3, sH, sW) fp32."""
        if not isinstance(self.network, HAT | CNN):
            with torch.autocast(self._device_type, torch.bfloat16, enabled=self._is_half):
                out: Tensor = self.network(lr)
            return out.float()
        shallow = self.network.shallow_features(lr)
        with torch.autocast(self._device_type, torch.bfloat16, enabled=self._is_half):
            deep = self.network.deep_features(shallow)
        features = deep.float() + shallow
        if isinstance(self.network, CNN):
            return self.network.reconstruct(features, lr)
        return self.network.reconstruct(features)


class Training:
    """A training in a folder: `state.pt` to go on from, `log.csv`, `curve.png`, and `model.safetensors` with the EMA.

    Args:
        recipe: what to train.
        tiles: the tile file.
        folder: made if need be; if it holds a state of the same recipe and tiles, the training goes on from there.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        stills: sets of pictures to evaluate on besides the tiles that are held out; see `hat_video.analysis.stills`.
        threads: for a CPU; 0 leaves torch's own choice. Small networks learn no faster from a second one.
        workers: processes that prepare batches; 0 for none, the best on a CPU.
        compile: have torch's compiler join what a GPU computes between products and convolutions, which takes it a
            minute at first. Sums round otherwise then.

    Raises:
        OptionError: torch has no compiler for the device.
        UsageError: the folder holds another training, or the batch cannot be shared out.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        tiles: Path,
        folder: Path,
        *,
        device: str = "auto",
        stills: tuple[Path, ...] = (),
        threads: int = 0,
        workers: int = 0,
        compile: bool = False,  # noqa: A002 - torch's own word for it
    ) -> None:
        self.recipe, self.folder, self.stills, self.workers = recipe, folder, stills, workers
        self.compile = compile
        if threads:
            torch.set_num_threads(threads)
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = choose_device(device)
        if self.world > 1 and self.device == torch.device("cuda"):
            self.device = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        if compile:
            prepare_compiler(self.device)
            if self.world > 1:
                raise UsageError(f"--compile: is for one process, and there are {self.world}; leave it out")
        for stage in recipe.stages:
            units = stage.batch // (SHOT if recipe.degradation == "video" else 1)
            if units % self.world:
                raise UsageError(f"batch {stage.batch}: cannot be shared between {self.world} processes in whole parts")
        self._check_stills()
        self._tiles = {stage.name: self._tiles_of(stage, tiles) for stage in recipe.stages}
        state = self._read_state()
        next(iter(self._tiles.values())).check()
        torch.manual_seed(recipe.seed)
        self.network = build_network(recipe.network, recipe.scale)
        start = self._take_over_body(state)
        self.network.to(self.device)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.teacher, teacher = self._load_teacher()
        self._identity: dict[str, Any] = {
            "recipe": {name: value for name, value in asdict(recipe).items() if name not in _OF_NO_CONSEQUENCE},
            "start sha256": start,
            "teacher sha256": teacher,
            "tiles": next(iter(self._tiles.values())).sha256,
            "groups": next(iter(self._tiles.values())).groups_sha256,
        }
        self.iteration = 0
        self.seconds = 0.0
        self._stage_name = ""
        self._last = (0.0, 0.0)
        """Loss and rate of the last iterations, for the log."""
        self._optimizer = self._new_optimizer()
        if state is not None:
            self._go_on_from(state)

    @staticmethod
    def _tiles_of(stage: Stage, tiles: Path) -> TileSet:
        try:
            return TileSet(tiles, stage.mix, stage.richest_db)
        except UsageError as error:
            raise UsageError(f"stage {stage.name!r}: {error}") from None

    def _check_stills(self) -> None:
        """Now, and not at the first evaluation."""
        names = [set_name(folder) for folder in self.stills]
        for folder, name in zip(self.stills, names, strict=True):
            if name in (*OTHER_COLUMNS, _HELD_OUT, ""):
                raise UsageError(f"--stills {folder}: {name!r} cannot head a column of the log; rename the folder")
            if names.count(name) > 1:
                raise UsageError(
                    f"--stills {folder}: {name!r} would head two columns of the log; give it once, or rename one"
                )
            check_stills(folder, self.recipe.scale)

    @contextmanager
    def _alone(self) -> Iterator[int]:
        """Makes the folder of the training and keeps other processes, but for those of torchrun, out of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder, os.O_RDONLY)
        except OSError as error:
            raise OutputError(f"-o {self.folder}: cannot be made: {error.strerror}") from None
        try:
            if self.rank == 0:
                # The kernel lets go of it when the process ends, however it ends.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove_unfinished(self.folder)
            yield handle
        except BlockingIOError:
            raise UsageError(f"-o {self.folder}: another training is running in it; give a new folder") from None
        finally:
            os.close(handle)

    # --- what it starts from

    def _take_over_body(self, state: Mapping[str, Any] | None) -> str:
        """`start`: tensors of another checkpoint, where the shapes agree. Returns the sha256 of its file."""
        if not self.recipe.start:
            return ""
        path = Path(self.recipe.start)
        if state is not None and not path.exists():
            return str(state["identity"]["start sha256"])  # the state holds all that became of it
        checkpoint = _read_named("start", path)
        mine = self.network.state_dict()
        theirs = checkpoint.state_dict
        if isinstance(checkpoint.config, HATConfig):
            theirs = deepened(body_of(theirs, checkpoint.config), len(self.recipe.network.depths))
        elif isinstance(self.network, BranchedCNN):
            theirs = self.network.with_branches(theirs)
        fitting = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
        if not any(name.startswith(("layers.", "body.")) and value.ndim == 4 for name, value in fitting.items()):
            raise ModelError(f"start = {path}: none of its blocks has the shape of this network's")
        self.network.load_state_dict(mine | fitting)
        return checkpoint.sha256

    def _load_teacher(self) -> tuple[nn.Module | None, str]:
        """`teacher`, and the sha256 of its file."""
        if not self.recipe.teacher:
            return None, ""
        path = Path(self.recipe.teacher)
        checkpoint = _read_named("teacher", path)
        network = load_network(checkpoint, path)
        if not isinstance(network, HAT):
            raise ModelError(f"teacher = {path}: is no HAT")
        if network.config.upscale != self.recipe.scale:
            raise ModelError(f"teacher = {path}: is x{network.config.upscale}; must be x{self.recipe.scale}")
        multiple = network.config.multiple
        for stage in self.recipe.stages:
            if stage.patch % multiple:
                raise UsageError(
                    f"teacher = {path}: takes multiples of {multiple}, and stage {stage.name} has patch {stage.patch}"
                )
        dtype = torch.bfloat16 if self.recipe.precision == "bf16" else torch.float32
        return optimize(network, dtype=dtype, device=self.device), checkpoint.sha256

    def _new_optimizer(self) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if self.recipe.optimizer == "adamw" else torch.optim.Adam
        return kind(
            self.network.parameters(),
            lr=1e-3,
            betas=(0.9, 0.99),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )

    # --- the state on disk

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    def _read_state(self) -> dict[str, Any] | None:
        """What was saved, if anything."""
        path = self._state_path
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.device, weights_only=True)
            # A state of an older version lacks what had no choice then.
            theirs = {"name": "", **state["identity"]["recipe"]}
            theirs = asdict(TypeAdapter(TrainRecipe).validate_python(theirs))
            state["identity"]["recipe"] = {name: theirs[name] for name in theirs if name not in _OF_NO_CONSEQUENCE}
        except Exception as error:  # noqa: BLE001 - on damaged bytes torch's reader raises whatever it trips over
            kind = type(error).__name__
            raise ModelError(f"{path}: cannot be gone on from ({kind}); remove it to begin anew") from None
        return state

    def _go_on_from(self, state: Mapping[str, Any]) -> None:
        mine, theirs = self._identity, state["identity"]
        differs = [name for name, value in mine["recipe"].items() if theirs["recipe"].get(name) != value]
        for name in ("start", "teacher"):
            # The same file at another place.
            if name in differs and mine[f"{name} sha256"] == theirs.get(f"{name} sha256"):
                differs.remove(name)
        # Another file at the same place: what became of a start is in the state, a teacher is asked again.
        if "teacher" not in differs and mine["teacher sha256"] != theirs.get("teacher sha256"):
            differs.append("teacher")
        # A state of an older version knows only the pixels.
        if mine["tiles"] != theirs["tiles"] or mine["groups"] != theirs.get("groups", mine["groups"]):
            differs.append("tiles")
        if differs:
            raise UsageError(
                f"-o {self.folder}: holds a training with other {', '.join(differs)}; go on with its own, or give a new"
                " folder"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds, self._stage_name = state["iteration"], state["seconds"], state["stage"]
        # Not the stage that comes next: what is evaluated first may be the end of the one before.
        for stage in self.recipe.stages:
            if stage.name == self._stage_name:
                self._pool_as(stage)
        self._last = tuple(state.get("last", self._last))

    def save_state(self) -> None:
        """Writes `state.pt`, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        if self.rank:
            return
        state = {
            "identity": self._identity,
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "stage": self._stage_name,
            "last": self._last,
        }
        # Into memory first: torch's writer hides why a disk takes no more.
        buffer = BytesIO()
        torch.save(state, buffer)
        write_atomically(self._state_path, buffer.getbuffer())

    # --- the loop

    def run(self, *, on_progress: Callable[[TrainProgress], None], cancel: threading.Event) -> None:
        """Trains to the end of the recipe and writes the model.

        Args:
            on_progress: called every 50 iterations, and with scores after each evaluation; in the first process only.
            cancel: set it to stop after the current iteration.

        Raises:
            CancelledError: `cancel` was set; the state is saved.
            ModelError: it diverged; what was saved before is kept.
            UsageError: another process trains in the folder.
            OutputError: the folder cannot be written.
        """
        with self._alone() as handle:
            self._run(on_progress, cancel, handle)

    def _run(self, on_progress: Callable[[TrainProgress], None], cancel: threading.Event, handle: int) -> None:
        recipe = self.recipe
        log = TrainLog(self.folder, self.iteration)
        module = self._shared_out()
        loader = DataLoader(
            _Batches(recipe, self._tiles, self.rank, self.world),
            batch_size=None,
            sampler=range(self.iteration, recipe.iterations),
            num_workers=self.workers,
            # They outlive a killed training by some seconds, and must not hold its folder as long.
            multiprocessing_context="fork" if self.workers else None,
            worker_init_fn=partial(_let_go, handle),
            pin_memory=self.device.type == "cuda",
        )
        is_evaluated = log.has(self.iteration, map(set_name, self.stills)) and self._model.exists()
        if self.rank == 0 and self.iteration and self._is_due and not is_evaluated:
            # It was killed before it could be evaluated, or is to be evaluated on more.
            on_progress(self._evaluated(log))
        began = saved = time.monotonic()
        before = self.seconds
        losses: list[Tensor] = []
        entered: Stage | None = None
        for batch in loader:
            stage, number = recipe.stage_at(self.iteration)
            rate = self._enter(stage, number)
            if stage is not entered:
                entered, gradients = stage, self._gradients(module, stage)
            loss = self._step(gradients, batch)
            if self.rank == 0:
                losses.append(loss)
            self.iteration += 1
            self.seconds = before + time.monotonic() - began
            is_cancelled = self._any(cancel.is_set())
            is_told = self._is_due or self.iteration % _TELL_EVERY == 0
            is_saved = self._is_due or time.monotonic() - saved > recipe.save_every_seconds or is_cancelled
            if self.rank == 0 and (is_told or is_saved):
                self._last = (self._checked(losses, stage), rate)
                if is_told:
                    losses.clear()
            if is_saved:
                self.save_state()
                saved = time.monotonic()
            if self.rank == 0 and is_told:
                on_progress(self._evaluated(log) if self._is_due else self._progress())
            if is_cancelled:
                raise CancelledError(f"saved at iteration {self.iteration}; the same command goes on from there")

    @property
    def _is_due(self) -> bool:
        """Whether this iteration is evaluated."""
        return self.iteration % self.recipe.evaluate_every == 0 or self.iteration == self.recipe.iterations

    @property
    def _model(self) -> Path:
        return self.folder / "model.safetensors"

    def _checked(self, losses: list[Tensor], stage: Stage) -> float:
        """The mean loss; a training that diverged is not saved over what was good."""
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss) or not all(bool(value.isfinite().all()) for value in self.network.parameters()):
            raise ModelError(f"it diverged by iteration {self.iteration}, with loss {loss}; lower rate {stage.rate}")
        return loss

    def _progress(self, scores: Mapping[str, float] | None = None) -> TrainProgress:
        loss, rate = self._last
        return TrainProgress(
            self._stage_name,
            self.iteration,
            self.recipe.iterations,
            loss,
            rate,
            self.seconds,
            scores or {},
            is_evaluated=scores is not None,
        )

    def _evaluated(self, log: TrainLog) -> TrainProgress:
        """Evaluates, writes the model, and then the log: a row in it says that the model beside it is no older."""
        progress = self._progress(self.evaluate())
        self.export(self._model, progress.scores)
        log.add(progress)
        return progress

    def _shared_out(self) -> nn.Module:
        """The network, with its gradients averaged over the processes that torchrun has started."""
        module = _Mixed(self.network, self.device.type, is_half=self.recipe.precision == "bf16")
        if self.world == 1:
            return module
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        # A group for what is decided together: through it nothing waits for a GPU.
        self._together = torch.distributed.new_group(backend="gloo")
        return DistributedDataParallel(module)

    def _any(self, mine: bool) -> bool:
        """Whether it is so in any process: one that stopped alone would leave the others waiting for its gradients."""
        if self.world == 1:
            return mine
        flag = torch.tensor(int(mine))
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX, self._together)
        return bool(flag)

    def _pool_as(self, stage: Stage) -> None:
        for network in (self.network, self.ema):
            if isinstance(network, HAT) and network.config.attention_pool != stage.attention_pool:
                network.pool_over(stage.attention_pool)

    def _enter(self, stage: Stage, number: int) -> float:
        """Sets the rate of an iteration; a new stage has a new optimiser."""
        if stage.name != self._stage_name:
            if self._stage_name:
                # What the averaging has gained is where the next stage begins.
                self.network.load_state_dict(self.ema.state_dict())
            self._optimizer = self._new_optimizer()
            self._stage_name = stage.name
        self._pool_as(stage)
        rising = min(1.0, (number + 1) / stage.warmup) if stage.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * number / stage.iterations))
        rate = stage.rate * rising * (stage.final_rate + (1 - stage.final_rate) * cosine)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _pair(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(HR, LR) float32 in [0, 1], on the device, of what `_Batches` gives."""
        hr, *lr = (part.to(self.device, non_blocking=True) for part in batch)
        hr = hr.float() / 255 if hr.dtype == torch.uint8 else hr
        return hr, lr[0] if lr else degrade_bicubic(hr, self.recipe.scale)

    def _gradients(self, module: nn.Module, stage: Stage) -> Callable[[Tensor, Tensor], Tensor]:
        """What gives the loss of (HR, LR) and leaves its gradients, clipped, with the parameters."""

        def loss_of(hr: Tensor, lr: Tensor, taught: Tensor | None) -> Tensor:
            sr = module(lr)
            loss = _distance(sr, hr, stage)
            if taught is not None:
                share = self.recipe.teacher_share
                loss = (1 - share) * loss + share * _distance(sr, taught, stage)
            return loss

        if self.compile:
            loss_of = torch.compile(loss_of, dynamic=False)

        def compute(hr: Tensor, lr: Tensor) -> Tensor:
            self.network.zero_grad()
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = self.teacher(lr).clamp(0, 1)
            loss = loss_of(hr, lr, taught)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
            return loss.detach()

        if self.device.type == "cuda" and self.world == 1:
            return RecordedGradients(compute, self.device)
        return compute

    def _step(self, gradients: Callable[[Tensor, Tensor], Tensor], batch: Sequence[Tensor]) -> Tensor:
        hr, lr = self._pair(batch)
        try:
            loss = gradients(hr, lr)
        except Exception as error:
            if (known := as_compiler_error(error)) is None:
                raise
            raise known from error.__cause__
        self._optimizer.step()
        decay = min(self.recipe.ema, (self.iteration + 1) / (self.iteration + 10))
        # Else the averages would hold the graph of every iteration that they are of.
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)
        return loss

    # --- what comes out

    def evaluate(self) -> dict[str, float]:
        """Y-PSNR in dB of the EMA: on held-out tiles, and on the sets that were asked for."""
        scores = {} if math.isnan(held_out := self._held_out()) else {_HELD_OUT: held_out}
        for folder in self.stills:
            scores[set_name(folder)] = evaluate_stills(self._upscale, folder, self.recipe.scale, with_ssim=False).psnr
        return scores

    @torch.no_grad()
    def _upscale(self, rgb: Tensor) -> Tensor:
        """Any size, by the EMA, in fp32."""
        shape = self.recipe.network
        multiple = shape.window_size * shape.unshuffle if shape.kind == "hat" else 1
        height, width = rgb.shape[2:]
        mode = "reflect" if min(height, width) > multiple else "replicate"
        padded = F.pad(rgb, (0, -width % multiple, 0, -height % multiple), mode=mode).to(self.device)
        scale = self.recipe.scale
        sr: Tensor = self.ema(padded)
        return sr[:, :, : height * scale, : width * scale].clamp(0, 1).cpu()

    def _held_out(self) -> float:
        """The degradation that is trained for, from fixed random numbers."""
        tiles = next(iter(self._tiles.values())).held_out()
        if not len(tiles):
            return math.nan
        values = []
        scale = self.recipe.scale
        side = 256 // (scale * 8) * 8
        for number, tile in enumerate(tiles):
            picture = torch.from_numpy(np.ascontiguousarray(tile.transpose(2, 0, 1)))
            if self.recipe.degradation == "video":
                rng = np.random.default_rng([number])
                patch = min(64, side // 2)
                hr, lr = VideoDegradation(scale).make(picture, patch, 1, rng)
            else:
                hr = picture[None, :, : side * scale, : side * scale].float() / 255
                lr = degrade_bicubic(hr, scale)
            sr = (self._upscale(lr) * 255).round() / 255
            values.append(float(psnr(crop_border(luma(sr), scale), crop_border(luma(hr), scale))))
        return float(np.mean(values))

    def export(self, path: Path, scores: Mapping[str, float]) -> None:
        """The EMA as a model file; a network that is no HAT keeps its own names."""
        facts: dict[str, Any] = {
            "name": self.recipe.name,
            "purpose": self.recipe.purpose,
            "network": asdict(self.recipe.network),
            "iterations": self.iteration,
            "tiles": self._identity["tiles"],
            "scores": dict(scores),
        }
        if isinstance(self.ema, HAT) and not self.recipe.network.without:
            save_network(self.ema, path, facts)
        else:
            network = self.ema.folded() if isinstance(self.ema, BranchedCNN) else self.ema
            save_tensors(network.state_dict(), path, facts)


def _read_named(key: str, path: Path) -> Checkpoint:
    """A checkpoint that the recipe names: who did not write the recipe must learn where the path is from."""
    try:
        return read_checkpoint(path)
    except ModelError as error:
        raise ModelError(f"{key} = {error}; train that first, or give another with --set {key}=FILE") from None


def _let_go(handle: int, worker: int) -> None:
    """In a worker that was forked: closes what it has inherited."""
    del worker
    os.close(handle)


def _distance(sr: Tensor, hr: Tensor, stage: Stage) -> Tensor:
    difference = sr - hr
    loss = _mean(difference, stage)
    if stage.luma:
        red, green, blue = difference.unbind(1)
        y = _mean(0.299 * red + 0.587 * green + 0.114 * blue, stage)
        loss = (1 - stage.luma) * loss + stage.luma * y
    if stage.frequency:
        spectra = torch.fft.rfft2(difference, norm="ortho")
        loss = loss + stage.frequency * spectra.abs().mean()
    return loss


def _mean(difference: Tensor, stage: Stage) -> Tensor:
    """Over all, of (B, ...)."""
    if stage.loss == "l1":
        return difference.abs().mean()
    squares = difference.square()
    if stage.loss == "l2":
        return squares.mean()
    return _PSNR_UNIT * (squares.flatten(1).mean(1) + _ROUNDING).log().mean()


_ROUNDING = 1 / (12 * 255**2)
"""Mean square of what rounding to 8 bits adds: nothing better can be seen, and nothing is gained by being so."""
_PSNR_UNIT = 0.01
"""Gradients as long as those of `l1`, for which the clipping is meant."""
