"""A model as an ONNX file: the way to AMD, Intel and other runtimes."""

from __future__ import annotations

import io
import json
import logging
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from hat_video.errors import ModelError, OutputError, UsageError
from hat_video.files import write_atomically
from hat_video.model.cnn import CNN, CNNConfig
from hat_video.model.hat import HAT, HATConfig
from hat_video.model.zoo import Model

__all__ = ["OPSET", "export_onnx"]

OPSET = 18
"""ONNX operator set of the files."""

_METADATA_KEY = "hat_video"


def export_onnx(model: Model, path: Path) -> dict[str, Any]:
    """Writes a network as ONNX, with any batch, height and width.

    The input `image` is (batch, 3, H, W) float32 R'G'B' in [0, 1], H and W multiples of the window; the output `large`
    is (batch, 3, scale * H, scale * W), not clamped. What a program must know beyond that is in the file's metadata, as
    JSON under `hat_video`, and is returned.

    Args:
        model: from `load_model`; not a resampler.
        path: the file to write, whole or not at all.

    Raises:
        UsageError: the exporter is not installed, or the model is a resampler.
        ModelError: the network cannot be exported for any size.
        OutputError: the file cannot be written.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise UsageError(
            f"export to ONNX needs {error.name}, which is not installed; pip install hat-video[export]"
        ) from None
    network = model.network
    if network is None:
        raise UsageError(f"{model.name}: is a resampler and no network; every runtime has one of its own")
    if isinstance(network, HAT) and network.config.ape_size:
        raise ModelError(f"{model.name}: has an absolute position embedding and takes pictures of one size only")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: cannot be written: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path}: cannot be written: it is a folder or a device, and no file")
    facts = _facts(model, network.config)
    proto = _proto(network)
    onnx.helper.set_model_props(proto, {_METADATA_KEY: json.dumps(facts)})
    write_atomically(path, proto.SerializeToString())
    return facts


def _facts(model: Model, config: HATConfig | CNNConfig) -> dict[str, Any]:
    own = (
        {"window": config.window_size, "attention_pool": config.attention_pool} if isinstance(config, HATConfig) else {}
    )
    return {
        **own,
        "name": model.name,
        "scale": model.scale,
        "multiple": config.multiple,
        "padding": "right and bottom, by reflection without the edge, to the next multiple; cut scale times that away",
        "colour": "R'G'B', of whatever primaries and transfer the source has; nothing is linearised",
        "range": "0 is black, 1 is white; clamp the output",
        "opset": OPSET,
        "licence": model.licence,
        "sha256": model.sha256,
    }


def _proto(network: HAT | CNN) -> Any:
    """The network with symbols for its sizes."""
    multiple = network.config.multiple
    rows, columns = torch.export.Dim("rows", min=1, max=4096), torch.export.Dim("columns", min=1, max=4096)
    shape = {0: torch.export.Dim("batch"), 2: multiple * rows, 3: multiple * columns}
    # Sizes of its own for each axis: the tracer takes equal ones, and those of 1, for a rule.
    example = torch.rand(2, network.config.in_chans, 3 * multiple, 5 * multiple)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=(shape,),
                opset_version=OPSET,
                input_names=["image"],
                output_names=["large"],
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = " ".join(str(error).split("\n", 1)[0].split())
        raise ModelError(f"cannot be exported to ONNX: {first}") from error
    finally:
        logger.setLevel(level)
    return program.model_proto  # type: ignore[union-attr]
