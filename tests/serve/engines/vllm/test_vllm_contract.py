"""What the plug-in takes for granted of the vLLM that is installed. A failure names what another version changed."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import types

import pytest
import torch

pytestmark = pytest.mark.engines
pytest.importorskip("vllm", reason="needs vLLM (docs/vllm.md)")

OURS = ["cpu.PeftkPunicaCPU", "gpu.PeftkPunicaGPU"]
OPERATIONS = [
    "update_metadata",
    "add_shrink",
    "add_expand",
    "add_lora_linear",
    "add_lora_embedding",
    "add_lora_logits",
    "apply_lora_full_linear",
]


def ours(name: str) -> type:
    module, cls = name.split(".")
    return getattr(importlib.import_module(f"peftk.serve.engines.vllm.{module}"), cls)


@pytest.mark.parametrize("name", OURS)
def test_every_abstract_operation_is_ours(name: str) -> None:
    from vllm.lora.punica_wrapper.punica_base import PunicaWrapperABC

    from peftk.serve.engines.vllm.punica import PeftkPunica

    assert sorted(PunicaWrapperABC.__abstractmethods__) == sorted(OPERATIONS)
    assert not inspect.isabstract(ours(name))
    assert all(getattr(ours(name), op) is getattr(PeftkPunica, op) for op in OPERATIONS)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("op", ["__init__", *OPERATIONS])
def test_arguments_are_vllms(name: str, op: str) -> None:
    """Each argument of vLLM's own class has its name, place, kind and default in ours."""
    theirs = inspect.signature(getattr(ours(name).__mro__[2], op)).parameters
    mine = inspect.signature(getattr(ours(name), op)).parameters
    keywords = any(p.kind is p.VAR_KEYWORD for p in mine.values())
    for place, (argument, wanted) in enumerate(theirs.items()):
        if wanted.kind in (wanted.VAR_KEYWORD, wanted.VAR_POSITIONAL):
            assert keywords, argument
        elif wanted.kind is wanted.KEYWORD_ONLY:
            assert argument in mine or keywords, argument
        else:
            assert list(mine)[place] == argument
            assert mine[argument].default == wanted.default


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(
    "op",
    ["moe_lora_align_block_size", "add_lora_fused_moe", "add_lora_w13", "add_lora_w2", "_select_full_linear_output"],
)
def test_mixtures_of_experts_stay_vllms(name: str, op: str) -> None:
    assert getattr(ours(name), op) is getattr(ours(name).__mro__[2], op)


def test_the_entry_point_is_declared_and_registers() -> None:
    from vllm.lora import utils
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    (point,) = importlib.metadata.entry_points(group="vllm.general_plugins", name="peftk")
    before = (
        type(current_platform).__dict__["get_punica_wrapper"],
        utils._all_lora_classes,
        utils.LogitsProcessorWithLoRA,
    )
    try:
        for _ in range(2):  # vLLM may load plug-ins several times
            point.load()()
            assert resolve_obj_by_qualname(current_platform.get_punica_wrapper()) is ours(
                OURS[current_platform.is_cuda()]
            )
            assert len(utils._all_lora_classes) == len(before[1])
            assert all(issubclass(new, old) for new, old in zip(utils._all_lora_classes, before[1], strict=True))
            assert utils.LogitsProcessorWithLoRA.__mro__.count(before[2]) == 1
            assert len(utils.LogitsProcessorWithLoRA.__mro__) == len(before[2].__mro__) + 2
    finally:
        type(current_platform).get_punica_wrapper, utils._all_lora_classes, utils.LogitsProcessorWithLoRA = before


def test_the_names_that_are_replaced_are_the_ones_vllm_reads() -> None:
    from vllm.lora import utils
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.layers.logits_processor import LogitsProcessorWithLoRA
    from vllm.model_executor.custom_op import PluggableLayer
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.utils import cpu_unquantized_gemm

    from peftk.serve.engines.vllm import layers

    assert "_all_lora_classes" in utils.from_layer.__code__.co_names
    assert "LogitsProcessorWithLoRA" in utils.from_layer_logits_processor.__code__.co_names
    assert "cpu_linear" in cpu_unquantized_gemm.__code__.co_names
    assert all(issubclass(cls, PluggableLayer) for cls in layers.BASE_LAYERS)
    assert "process_weights_after_loading" in vars(UnquantizedLinearMethod)
    assert list(inspect.signature(BaseLinearLayerWithLoRA._apply_sync).parameters) == ["self", "x", "bias"]
    assert "_apply_sync" in BaseLinearLayerWithLoRA.apply.__code__.co_names
    for cls in (BaseLinearLayerWithLoRA, LogitsProcessorWithLoRA):
        assert list(inspect.signature(cls.set_lora).parameters) == ["self", "index", "lora_a", "lora_b"]
        assert list(inspect.signature(cls.reset_lora).parameters) == ["self", "index"]


def mixed(cls: type) -> tuple[torch.Tensor, torch.Tensor]:
    """What a wrapper of vLLM's or ours makes of y = 0 for three tokens: adapter 7 in slot 0, the base model, slot 1."""
    from vllm.lora.layers import LoRAMapping

    torch.manual_seed(0)
    A, B, x = torch.randn(2, 1, 4, 16), torch.randn(2, 1, 8, 4), torch.randn(3, 16)
    wrapper = cls(8, max_batches=4, device="cpu", lora_config=types.SimpleNamespace(max_loras=2))
    wrapper.update_metadata(LoRAMapping((7, 0, 9), (7, 0, 9), is_prefill=False), [7, 9], 3, 100)
    y = torch.zeros(3, 8)
    wrapper.add_lora_linear(y, x, (A,), (B,), 1.0, (8,))
    wanted = torch.stack([x[0] @ A[0, 0].t() @ B[0, 0].t(), torch.zeros(8), x[2] @ A[1, 0].t() @ B[1, 0].t()])
    return y, wanted


def test_a_row_of_the_base_model_stays_one() -> None:
    torch.testing.assert_close(*mixed(ours(OURS[0])), rtol=1e-5, atol=1e-5)


def test_vllms_own_cpu_wrapper_gives_it_the_last_adapter() -> None:
    """docs/vllm.md says so. If this fails, vLLM has repaired it: say that there."""
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    y, wanted = mixed(PunicaWrapperCPU)
    torch.testing.assert_close(y[[0, 2]], wanted[[0, 2]], rtol=1e-5, atol=1e-5)
    assert y[1].abs().max() > 0.1
