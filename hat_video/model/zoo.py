"""The models that have names: what each is for, where it is from, and how to load it."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
from pathlib import Path

from hat_video.errors import ModelError, UsageError
from hat_video.model.checkpoint import load_network, read_checkpoint
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAT, HATConfig

__all__ = ["Model", "ModelFacts", "default_model_name", "list_models", "load_model"]

_RELEASES = "weights by XPixelGroup/HAT (their releases); give the file: --model FILE.pth"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a named model without loading it."""

    name: str
    scales: tuple[int, ...]
    purpose: str
    parameters: int
    """At x2 for those that are included; the tails of other scales differ a little."""
    licence: str
    where: str
    sha256: dict[int, str] = field(default_factory=dict)
    """Of the file, by scale, where it is known."""
    is_included: bool = False
    """True where the weights come with the package, or none are needed."""
    is_rung: bool = False
    """Whether a camera falls back on it; those that are included stand in the order from the best to the fastest."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model, and the facts that a caller would otherwise guess."""

    name: str
    scale: int
    purpose: str
    licence: str
    sha256: str
    """Of its file; for a resampler, of its name and version."""
    parameters: int
    config: HATConfig | CNNConfig | None
    """None for a resampler."""
    network: HAT | CNN | None
    """fp32 on the CPU, in evaluation mode; None for a resampler."""
    kernel: str | None = None
    """`bicubic` or `lanczos` for a resampler."""

    def pooled(self, box: int) -> Model:
        """The same model with another `HATConfig.attention_pool`; what has no such attention stays as it is.

        Raises:
            ValueError: not 0 and no multiple of the window.
        """
        if not isinstance(self.network, HAT):
            return self
        network = copy.deepcopy(self.network)
        network.pool_over(box)
        return replace(self, network=network, config=network.config)


_SHIPPED = (
    ModelFacts(
        "hat-nano-video",
        (2, 3, 4),
        "real footage, quickly on a CPU: compression is not sharpened; the default",
        324_600,
        "Apache-2.0",
        "included",
        {
            2: "e127ab2d04d5167b580d2af9e7d105511ed5b4c0ad7ae15bbb7c48134b776b3a",
            3: "36c468d77452d5a283780e873ed8cfa63889a322e671b03920e374a94bdea4fe",
            4: "0d22340bacbd0f0814ac4dae3a25e6fa74f619cc1a73fa54fa2c022be3ed81d6",
        },
        is_included=True,
    ),
    ModelFacts(
        "hat-nano",
        (2, 3, 4),
        "clean pictures, quickly on a CPU",
        324_600,
        "Apache-2.0",
        "included",
        {
            2: "f8a30485499711f93c70e5a640042933dbe4c3f161c0280132a3c42761633d30",
            3: "4b50033562c7173cc83d5e137b2d18208761e2a2c63f47d7ebf2b26d3afd80f4",
            4: "1d27ba65de36d53cdf7e33e50d5f90c2c5ff16d0b085c6eae88980afdd51a7f2",
        },
        is_included=True,
    ),
    ModelFacts(
        "hat-pico",
        (2,),
        "clean pictures, in 40 % of hat-nano's time",
        97_878,
        "Apache-2.0",
        "included",
        {2: "fb66bd20085b20aeb892e2d5b286b0c1ca3590339b123a65d6661459da0a10e7"},
        is_included=True,
    ),
    ModelFacts(
        "cnn-pico",
        (2,),
        "clean pictures, nearly hat-pico's quality in two thirds of its time; a convolutional network, no HAT",
        97_196,
        "Apache-2.0",
        "included",
        {2: "81f6c6095fec7a04e5855aaa4bd109000ea1f2870357ff6247f9b8ee5a3d6243"},
        is_included=True,
    ),
    ModelFacts(
        "cnn-pico-video",
        (2,),
        "real footage, for cameras on plain CPUs; a convolutional network, no HAT",
        97_196,
        "Apache-2.0",
        "included",
        {2: "d0f30605b8dd457c93e0081194bef942ed22fd7282392599b27bdd0305180898"},
        is_included=True,
        is_rung=True,
    ),
)
_RESAMPLERS = tuple(
    ModelFacts(name, (1, 2, 3, 4), purpose, 0, "Apache-2.0", "included", is_included=True)
    for name, purpose in (
        ("bicubic", "the baseline of the literature (Keys, a = -0.5); no network"),
        ("lanczos", "the usual resampler of editors (3 lobes); no network"),
    )
)
_RELEASED = (
    ModelFacts(
        "HAT-S",
        (2, 3, 4),
        "clean pictures; the small one of the paper",
        9_621_183,
        "Apache-2.0",
        _RELEASES,
        {4: "a92f81bd2c0c1aaa371a6e4d6cac69e749fde2e36196885ee47a4a3667542c9a"},
    ),
    ModelFacts(
        "HAT",
        (2, 3, 4),
        "clean pictures; with ImageNet pre-training where there is a choice",
        20_772_507,
        "Apache-2.0",
        _RELEASES,
        {4: "4ee053c42461187846dc0e93aa5abd34591c0725a8e044a59000e92ee215e833"},
    ),
    ModelFacts(
        "HAT-L",
        (2, 3, 4),
        "clean pictures; the best and slowest",
        40_846_575,
        "Apache-2.0",
        _RELEASES,
        {4: "5992bd38522f2b8faf11ea4bd8ee08de92465bb66892166576999afc36d60043"},
    ),
    ModelFacts("Real_HAT_GAN", (4,), "real, damaged pictures; true to the source", 20_772_507, "Apache-2.0", _RELEASES),
    ModelFacts(
        "Real_HAT_GAN_sharper",
        (4,),
        "real, damaged pictures; sharper",
        20_772_507,
        "Apache-2.0",
        _RELEASES,
        {4: "5800b67136006eb8cab3b4ed7c8d73b6a195bb18e6cc709b674f9aa069c00271"},
    ),
)


def list_models() -> list[ModelFacts]:
    """Every model that has a name: the included ones first."""
    return [*_SHIPPED, *_RESAMPLERS, *_RELEASED]


def default_model_name(scale: int) -> str:
    """The included network of a scale.

    Raises:
        UsageError: there is none; the message says what there is.
    """
    for facts in _SHIPPED:
        if scale in facts.scales:
            return facts.name
    has = "; ".join(f"{facts.name} has {_scales(facts)}" for facts in (*_SHIPPED, *_RESAMPLERS))
    raise UsageError(
        f"--scale {scale}: no network of that scale is included; {has}; or give a checkpoint with --model FILE"
    )


def _scales(facts: ModelFacts) -> str:
    return ", ".join(f"x{scale}" for scale in facts.scales)


def load_model(name_or_path: str | Path, *, scale: int | None = None) -> Model:
    """Loads a model by its name, or a checkpoint from a file.

    Args:
        name_or_path: a name that `list_models` gives with `is_included`, or a .pth, .pt or .safetensors file.
        scale: 1 to 4; a checkpoint has its own, a named model defaults to 2.

    Raises:
        ModelError: no such model or file, another scale, or a file that cannot be used.
    """
    name = str(name_or_path)
    for facts in (*_SHIPPED, *_RESAMPLERS):
        if name == facts.name:
            wanted = scale or 2
            if wanted not in facts.scales:
                raise ModelError(f"--scale {wanted}: {name} has {_scales(facts)}")
            return _included(facts, wanted)
    path = Path(name)
    if not path.is_file():
        if any(name == facts.name for facts in _RELEASED):
            raise ModelError(f"--model {name}: not included; {_RELEASES}")
        names = ", ".join(facts.name for facts in (*_SHIPPED, *_RESAMPLERS))
        raise ModelError(f"--model {name}: no such file, nor a model that is included ({names})")
    return _from_file(path, scale, ModelFacts(path.stem, (), "a checkpoint of yours", 0, "unknown", str(path)))


def _included(facts: ModelFacts, scale: int) -> Model:
    if facts in _RESAMPLERS:
        version = hashlib.sha256(f"{facts.name} 1".encode()).hexdigest()
        return Model(facts.name, scale, facts.purpose, facts.licence, version, 0, None, None, kernel=facts.name)
    resource = files("hat_video.model") / "weights" / f"{facts.name.replace('-', '_')}_x{scale}.safetensors"
    with as_file(resource) as path:
        return _from_file(path, scale, facts)


def _from_file(path: Path, scale: int | None, facts: ModelFacts) -> Model:
    checkpoint = read_checkpoint(path)
    network = load_network(checkpoint, path)
    mine = checkpoint.config.upscale
    if scale is not None and scale != mine:
        raise ModelError(f"--scale {scale}: {path} is trained for x{mine}; leave --scale out")
    for known in (*_SHIPPED, *_RELEASED):
        if checkpoint.sha256 in known.sha256.values():
            facts = known
    return Model(
        name=facts.name,
        scale=mine,
        purpose=facts.purpose,
        licence=facts.licence,
        sha256=checkpoint.sha256,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        config=checkpoint.config,
        network=network,
    )
