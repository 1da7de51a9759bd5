"""The training loop: one global batch an iteration, drawn from nothing but the seed and the iteration's number.

So a run that was killed and resumed, and one that is spread over several processes, see the same data as an unbroken
run in one process; the former ends with the same bits, the latter with the same weights but for rounding.
"""

from __future__ import annotations

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
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
from hat_video.analysis.stills import evaluate_stills
from hat_video.errors import CancelledError, ModelError, OutputError, UsageError
from hat_video.inference.optimize import optimize
from hat_video.inference.upscaler import choose_device
from hat_video.model.checkpoint import load_network, read_checkpoint
from hat_video.model.cnn import CNN
from hat_video.model.hat import HAT, HATConfig
from hat_video.training.degrade import VideoDegradation, degrade_bicubic
from hat_video.training.export import body_of, save_network, save_tensors
from hat_video.training.log import TrainLog
from hat_video.training.networks import BranchedCNN, build_network
from hat_video.training.recipe import Stage, TrainRecipe
from hat_video.training.tiles import TileSet

__all__ = ["TrainProgress", "Training"]

_TELL_EVERY = 50
_SHOT = 4
"""Crops that one encoded shot gives: compressing is what costs."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Where a training stands."""

    stage: str
    iteration: int
    iterations: int
    loss: float
    rate: float
    seconds: float
    """Of computing, over all sessions."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Y-PSNR by set, when it was just evaluated."""


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Item i is this process's share of the global batch of iteration i: (HR uint8 or float, LR)."""

    def __init__(self, recipe: TrainRecipe, tiles: dict[str, TileSet], rank: int, world: int) -> None:
        self._recipe, self._tiles, self._rank, self._world = recipe, tiles, rank, world

    def __len__(self) -> int:
        return self._recipe.iterations

    def __getitem__(self, iteration: int) -> tuple[Tensor, Tensor]:
        stage, _ = self._recipe.stage_at(iteration)
        tiles = self._tiles[stage.name]
        if self._recipe.degradation == "video":
            return self._shots(stage, tiles, iteration)
        side = stage.patch * self._recipe.scale
        crops = [
            tiles.crops(1, side, self._rng(iteration, sample)) for sample in range(self._rank, stage.batch, self._world)
        ]
        hr = torch.from_numpy(np.concatenate(crops)).float() / 255
        return hr, degrade_bicubic(hr, self._recipe.scale)

    def _shots(self, stage: Stage, tiles: TileSet, iteration: int) -> tuple[Tensor, Tensor]:
        degradation = VideoDegradation(self._recipe.scale)
        pairs = []
        for shot in range(self._rank, stage.batch // _SHOT, self._world):
            rng = self._rng(iteration, shot)
            picture = torch.from_numpy(tiles.crops(1, tiles.tiles.shape[1], rng)[0])
            pairs.append(degradation.make(picture, stage.patch, _SHOT, rng))
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

    Raises:
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
    ) -> None:
        self.recipe, self.folder, self.stills, self.workers = recipe, folder, stills, workers
        if threads:
            torch.set_num_threads(threads)
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.world > 1 and device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        self.device = choose_device(device)
        for stage in recipe.stages:
            units = stage.batch // (_SHOT if recipe.degradation == "video" else 1)
            if units % self.world or not units or (recipe.degradation == "video" and stage.batch % _SHOT):
                raise UsageError(f"batch {stage.batch}: cannot be shared between {self.world} processes in whole parts")
        self._tiles = {stage.name: TileSet(tiles, stage.mix, stage.richest_db) for stage in recipe.stages}
        torch.manual_seed(recipe.seed)
        self.network = build_network(recipe.network, recipe.scale)
        start = self._take_over_body()
        self.network.to(self.device)
        self.ema = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.teacher, teacher = self._load_teacher()
        # Files are known by what is in them: where they lie may change from one session to the next.
        self._identity = {
            "recipe": asdict(recipe) | {"start": start, "teacher": teacher},
            "tiles": next(iter(self._tiles.values())).sha256,
        }
        self.iteration = 0
        self.seconds = 0.0
        self._stage_name = ""
        self._optimizer = self._new_optimizer()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"-o {folder}: cannot be made: {error.strerror}") from None
        self._load_state()

    # --- what it starts from

    def _take_over_body(self) -> str:
        """`start`: tensors of another checkpoint, where the shapes agree. Returns the sha256 of its file."""
        if not self.recipe.start:
            return ""
        path = Path(self.recipe.start)
        checkpoint = read_checkpoint(path)
        mine = self.network.state_dict()
        theirs = checkpoint.state_dict
        if isinstance(checkpoint.config, HATConfig):
            theirs = body_of(theirs, checkpoint.config)
        fitting = {name: value for name, value in theirs.items() if name in mine and mine[name].shape == value.shape}
        if not any(name.startswith("layers.") and value.ndim == 4 for name, value in fitting.items()):
            raise ModelError(f"start = {path}: none of its blocks has the shape of this network's")
        self.network.load_state_dict(mine | fitting)
        return checkpoint.sha256

    def _load_teacher(self) -> tuple[nn.Module | None, str]:
        """`teacher`, and the sha256 of its file."""
        if not self.recipe.teacher:
            return None, ""
        path = Path(self.recipe.teacher)
        checkpoint = read_checkpoint(path)
        network = load_network(checkpoint, path)
        if not isinstance(network, HAT):
            raise ModelError(f"teacher = {path}: is no HAT")
        if network.config.upscale != self.recipe.scale:
            raise ModelError(f"teacher = {path}: is x{network.config.upscale}; must be x{self.recipe.scale}")
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

    def _load_state(self) -> None:
        path = self.folder / "state.pt"
        if not path.exists():
            return
        state = torch.load(path, map_location=self.device, weights_only=True)
        theirs = state["identity"]
        # A state of an older version lacks what had no choice then.
        theirs["recipe"] = asdict(TypeAdapter(TrainRecipe).validate_python(theirs["recipe"]))
        if theirs != self._identity:
            differs = [name for name, value in self._identity["recipe"].items() if theirs["recipe"].get(name) != value]  # type: ignore[attr-defined]
            what = ", ".join(differs) or "tiles"
            raise UsageError(
                f"-o {self.folder}: holds a training with other {what}; go on with its own, or give a new folder"
            )
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds, self._stage_name = state["iteration"], state["seconds"], state["stage"]

    def save_state(self) -> None:
        """Writes `state.pt`, whole or not at all."""
        if self.rank:
            return
        path = self.folder / "state.pt"
        part = path.with_suffix(".part")
        torch.save(
            {
                "identity": self._identity,
                "network": self.network.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "iteration": self.iteration,
                "seconds": self.seconds,
                "stage": self._stage_name,
            },
            part,
        )
        part.replace(path)

    # --- the loop

    def run(self, *, on_progress: Callable[[TrainProgress], None], cancel: threading.Event) -> None:
        """Trains to the end of the recipe and writes the model.

        Args:
            on_progress: called every 50 iterations, and with scores after each evaluation; in the first process only.
            cancel: set it to stop after the current iteration.

        Raises:
            CancelledError: `cancel` was set; the state is saved.
            ModelError: the loss is no longer finite.
        """
        recipe = self.recipe
        log = TrainLog(self.folder, self.iteration)
        module = self._shared_out()
        loader = DataLoader(
            _Batches(recipe, self._tiles, self.rank, self.world),
            batch_size=None,
            sampler=range(self.iteration, recipe.iterations),
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        began = saved = time.monotonic()
        before = self.seconds
        losses: list[Tensor] = []
        for hr, lr in loader:
            stage, number = recipe.stage_at(self.iteration)
            rate = self._enter(stage, number)
            losses.append(self._step(module, stage, hr.to(self.device), lr.to(self.device)))
            self.iteration += 1
            self.seconds = before + time.monotonic() - began
            is_due = self.iteration % recipe.evaluate_every == 0 or self.iteration == recipe.iterations
            if self.rank == 0 and (is_due or self.iteration % _TELL_EVERY == 0):
                loss = float(torch.stack(losses).mean())
                losses.clear()
                if not math.isfinite(loss):
                    raise ModelError(
                        f"the loss is {loss} by iteration {self.iteration}: it diverged; lower rate {stage.rate}"
                    )
                scores = self.evaluate() if is_due else {}
                progress = TrainProgress(
                    stage.name, self.iteration, recipe.iterations, loss, rate, self.seconds, scores
                )
                if is_due:
                    log.add(stage.name, self.iteration, loss, rate, self.seconds, scores)
                    self.export(self.folder / "model.safetensors", scores)
                on_progress(progress)
            if is_due or time.monotonic() - saved > recipe.save_every_seconds or cancel.is_set():
                self.save_state()
                saved = time.monotonic()
            if cancel.is_set():
                raise CancelledError(f"saved at iteration {self.iteration}; the same command goes on from there")

    def _shared_out(self) -> nn.Module:
        """The network, with its gradients averaged over the processes that torchrun has started."""
        module = _Mixed(self.network, self.device.type, is_half=self.recipe.precision == "bf16")
        if self.world == 1:
            return module
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        return DistributedDataParallel(module)

    def _enter(self, stage: Stage, number: int) -> float:
        """Sets the rate of an iteration; a new stage has a new optimiser."""
        if stage.name != self._stage_name:
            if self._stage_name:
                # What the averaging has gained is where the next stage begins.
                self.network.load_state_dict(self.ema.state_dict())
            self._optimizer = self._new_optimizer()
            self._stage_name = stage.name
        for network in (self.network, self.ema):
            if isinstance(network, HAT) and network.config.attention_pool != stage.attention_pool:
                network.pool_over(stage.attention_pool)
        rising = min(1.0, (number + 1) / stage.warmup) if stage.warmup else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * number / stage.iterations))
        rate = stage.rate * rising * (stage.final_rate + (1 - stage.final_rate) * cosine)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        return rate

    def _step(self, module: nn.Module, stage: Stage, hr: Tensor, lr: Tensor) -> Tensor:
        sr = module(lr)
        loss = _distance(sr, hr, stage)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(lr).clamp(0, 1)
            share = self.recipe.teacher_share
            loss = (1 - share) * loss + share * _distance(sr, taught, stage)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip)
        self._optimizer.step()
        decay = min(self.recipe.ema, (self.iteration + 1) / (self.iteration + 10))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.detach()

    # --- what comes out

    def evaluate(self) -> dict[str, float]:
        """Y-PSNR in dB of the EMA: on held-out tiles, and on the sets that were asked for."""
        scores = {"held out": self._held_out()}
        for folder in self.stills:
            scores[folder.name] = evaluate_stills(self._upscale, folder, self.recipe.scale, with_ssim=False).psnr
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
        """The EMA as a model file; a network for comparison keeps its own names, and nothing reads it."""
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


def _distance(sr: Tensor, hr: Tensor, stage: Stage) -> Tensor:
    difference = sr - hr
    loss = _mean(difference, stage)
    if stage.luma:
        weights = torch.tensor([0.299, 0.587, 0.114], device=sr.device)
        y = _mean(torch.einsum("bchw,c->bhw", difference, weights), stage)
        loss = (1 - stage.luma) * loss + stage.luma * y
    if stage.frequency:
        spectra = torch.fft.rfft2(difference, norm="ortho")
        loss = loss + stage.frequency * spectra.abs().mean()
    return loss


def _mean(difference: Tensor, stage: Stage) -> Tensor:
    return difference.abs().mean() if stage.loss == "l1" else difference.square().mean()
