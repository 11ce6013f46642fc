"""torch's ColwiseParallel and RowwiseParallel, which take our layers and LoRA Linears of HF PEFT too."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate
from torch.distributed.tensor import parallel as torch_styles

from peftk.distributed import layers
from peftk.distributed.layout import COLWISE, ROWWISE, Layout


class ColwiseParallel(torch_styles.ColwiseParallel):
    """Splits a linear with its adapters by its output: W Shard(0), bias Shard(0), A Replicate, B Shard(0).

    Takes what torch's class of this name takes, with the same arguments (nn.Linear, nn.Embedding), and LoRALinear,
    MultiLoRALinear, ParallelAdapterLinear, BitFitLinear, FrozenLinear and LoRA Linears of HF PEFT, accelerated or not.
    x is replicated and y is split in its last dimension, unless input_layouts or output_layouts say otherwise.
    Forward: nothing is sent. Backward: the gradients of x and of A are summed over the ranks.

    Raises ValueError, TypeError or NotImplementedError for a layer that cannot be split; it is unchanged then.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not layers.is_ours(module):
            return super()._apply(module, device_mesh)
        return _sharded(self, module, device_mesh, COLWISE)


class RowwiseParallel(torch_styles.RowwiseParallel):
    """Splits a linear with its adapters by its input: W Shard(1), A Shard(1), B and the biases Replicate.

    Takes the same layers as `ColwiseParallel`. x is split in its last dimension and y is replicated, unless
    input_layouts or output_layouts say otherwise. Forward: one sum over the ranks, of the base layer's part and the
    adapter's together; the base layer's bias is added after it. A ParallelAdapterLinear sums xA too, before its
    activation. Backward: the gradient of B is summed over the ranks.

    Raises ValueError, TypeError or NotImplementedError for a layer that cannot be split; it is unchanged then.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not layers.is_ours(module):
            return super()._apply(module, device_mesh)
        return _sharded(self, module, device_mesh, ROWWISE)


Style = ColwiseParallel | RowwiseParallel


def check(style: Style, module: nn.Module, name: str, mesh: DeviceMesh) -> None:
    """Raises what applying the style to the module would raise, if it is ours."""
    if layers.is_ours(module):
        layers.check(module, name, mesh, _layout(style), _only(style.output_layouts))


def _sharded(style: Style, module: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    output = _only(style.output_layouts)
    layers.check(module, type(module).__name__, mesh, layout, output)
    layers.shard(
        module,
        mesh,
        layout,
        input=_only(style.input_layouts),
        output=output,
        whole=not style.use_local_output,
        source=style.src_data_rank,
    )
    return module


def _layout(style: Style) -> Layout:
    return COLWISE if isinstance(style, ColwiseParallel) else ROWWISE


def _only(layouts: tuple[Placement, ...]) -> Placement:
    return layouts[0] if layouts else Replicate()
