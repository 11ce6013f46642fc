"""The inference engines that a whole model is compared with: ONNX Runtime and OpenVINO, running the plain model.

Both run the same ONNX graph, exported for the shape of the input, with as many threads as torch has. Their threads do
not spin between calls: they would take the cores from the side whose turn is next. Extra: peftk[engines].
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftk.system import extras

ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"
EXTRA = "engines"
_EXPORT = ("onnx", "onnxscript")

Engine = Callable[[], Tensor]


def installed(model: nn.Module, ids: Tensor) -> dict[str, Engine]:
    """The engines that are installed, each as a function that computes `model(ids)` for these token ids [B, T].

    model: takes the ids alone, and returns one tensor.
    """
    makers = {ONNX_RUNTIME: ("onnxruntime", _onnx_runtime), OPENVINO: ("openvino", _openvino)}
    usable = {name: make for name, (module, make) in makers.items() if extras.is_installed(module)}
    if not usable or not all(map(extras.is_installed, _EXPORT)):
        return {}
    graph = _exported(model, ids)
    return {name: make(graph, ids) for name, make in usable.items()}


def _exported(model: nn.Module, ids: Tensor) -> bytes:
    """The ONNX graph of the model, weights included."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, (ids,), dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    return graph


def _onnx_runtime(graph: bytes, ids: Tensor) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: ids.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def _openvino(graph: bytes, ids: Tensor) -> Engine:
    import openvino

    core = openvino.Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(core.read_model(io.BytesIO(graph)), "CPU", options).create_infer_request()
    inputs = [ids.numpy()]
    return lambda: torch.from_numpy(request.infer(inputs, share_inputs=True)[0])
