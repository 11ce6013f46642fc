"""The layers that can be sharded: their checks, the distribution of their tensors, and their forward on a rank."""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.nn import functional

from peftk.adapters import activations, checks
from peftk.adapters.adapter import Adapter
from peftk.adapters.dropout import dropout_of, seeds_agreed
from peftk.distributed import mixed
from peftk.distributed.bank import ShardedBank
from peftk.distributed.layout import (
    COLWISE,
    ROWWISE,
    Layout,
    Range,
    bias_after_sum,
    check_splits,
    complete,
    distribute,
    local,
    range_of,
    role_of,
)
from peftk.distributed.view import is_sharded, view
from peftk.nn.attached import Attached
from peftk.nn.frozen_linear import FrozenLinear
from peftk.nn.lora_linear import LoRALinear
from peftk.nn.multi_lora_linear import MultiLoRALinear
from peftk.nn.parallel_adapter import ParallelAdapterLinear
from peftk.ops import layer_calls
from peftk.reference import philox
from peftk.reference.lora_linear import accumulate_dtype
from peftk.system import autocast

_KEY = "_tensor_parallel"  # peftk.decelerate deletes what begins with _peftk


class Sharding(NamedTuple):
    """How a layer is sharded. input, output: placements of x and y as the layer's callers see them; whole: y stays a
    DTensor."""

    mesh: DeviceMesh
    layout: Layout
    input: Placement
    output: Placement
    whole: bool
    sizes: tuple[int, int]  # N, K of the whole layer

    def replace(self, tensor: Tensor, name: str) -> Tensor | None:
        """What the forward reads for a Parameter. The base layer's bias of a rowwise layer is added after the sum."""
        role = role_of(name)
        return None if role == "bias" and self.layout is ROWWISE else local(tensor, self.layout, role)

    @property
    def columns(self) -> Range:
        """This rank's columns of x, if the layer splits K."""
        return range_of(self.sizes[1], self.mesh)


def is_ours(module: nn.Module) -> bool:
    """Whether it is a layer of peftk, or a LoRA Linear of HF PEFT."""
    return isinstance(module, FrozenLinear) or _is_peft(module)


def _is_peft(module: nn.Module) -> bool:
    layer = sys.modules.get("peft.tuners.lora.layer")
    return layer is not None and isinstance(module, layer.Linear)


def check(module: nn.Module, name: str, mesh: DeviceMesh, layout: Layout, output: Placement) -> None:
    """Raises TypeError, ValueError or NotImplementedError if this layer cannot be sharded so. Nothing has changed then.

    name: of the layer, for the error.
    """
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, got {mesh.ndim}; pass mesh['tp']")
    if _KEY in module.__dict__ or is_sharded(module):
        raise ValueError(f"{name}: expected a layer that is not sharded, got one with DTensors")
    if getattr(module, "merged", False):
        raise ValueError(f"{name}: expected an unmerged layer, got a merged one; unmerge it first")
    attached = next((child for child in module.children() if isinstance(child, Attached)), None)
    if attached is not None:
        raise NotImplementedError(
            f"{name}: expected no adapter attached to the linear, where it sees a part of the input or output, got "
            f"one with a {type(attached).__name__}; attach it to the block"
        )
    if _is_peft(module) and (variants := getattr(module, "lora_variant", None)):
        raise NotImplementedError(f"{name}: expected plain LoRA, got {type(next(iter(variants.values()))).__name__}")
    if isinstance(module, ParallelAdapterLinear) and layout is ROWWISE and not output.is_replicate():
        raise NotImplementedError(f"{name}: expected output_layouts=Replicate() beside an activation, got {output}")
    N, K = _sizes(module)
    check_splits(f"{name}: {'out' if layout is COLWISE else 'in'}_features", N if layout is COLWISE else K, mesh)


def check_plain(linear: nn.Linear, name: str, mesh: DeviceMesh, colwise: bool) -> None:
    """The same for an nn.Linear, which torch's own styles shard."""
    if isinstance(linear.weight, DTensor):
        raise ValueError(f"{name}: expected a layer that is not sharded, got one with DTensors")
    size = linear.out_features if colwise else linear.in_features
    check_splits(f"{name}: {'out' if colwise else 'in'}_features", size, mesh)


def _sizes(module: Any) -> tuple[int, int]:
    return module.out_features, module.in_features


def _transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [K, N]."""
    if isinstance(module, FrozenLinear):
        return module.fan_in_fan_out
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    base: Any = module._modules["base_layer"]
    return pytorch_utils is not None and isinstance(base, pytorch_utils.Conv1D)


def shard(
    module: nn.Module,
    mesh: DeviceMesh,
    layout: Layout,
    *,
    input: Placement,
    output: Placement,
    whole: bool,
    source: int | None,
) -> None:
    """Makes the layer's Parameters DTensors and gives it the forward of a rank. `check` must have passed."""
    sizes = _sizes(module)
    if isinstance(module, MultiLoRALinear):
        module.bank = ShardedBank(module, mesh, layout, source)  # distributes what trains
    for path, owner in list(module.named_modules()):
        for name, parameter in owner._parameters.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            role = role_of(f"{path}.{name}" if path else name)
            dim = layout.dims[role]
            if role == "weight" and dim is not None and _transposed(module):
                dim = 1 - dim
            owner._parameters[name] = distribute(parameter, mesh, dim, source)
    module.__dict__[_KEY] = Sharding(mesh, layout, input, output, whole, sizes)
    # a bound method: a deep copy of the layer gets one that is bound to the copy
    module.__dict__["forward"] = types.MethodType(_colwise if layout is COLWISE else _rowwise, module)


def _colwise(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y of this rank's rows of W, from all of x."""
    sharding: Sharding = module.__dict__[_KEY]
    x = _arrived(x, sharding, Replicate())
    with _shared_masks(module):
        y = _run(module, x, *args, **kwargs)
    if not sharding.whole and sharding.output == Shard(-1):
        return y
    shape = torch.Size((*y.shape[:-1], sharding.sizes[0]))
    stride = torch.empty(shape, device="meta").stride()
    found = DTensor.from_local(y, sharding.mesh, [Shard(y.dim() - 1)], run_check=False, shape=shape, stride=stride)
    return _left(found, sharding, y.dim())


def _rowwise(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y from this rank's columns of x and W, summed over the ranks."""
    sharding: Sharding = module.__dict__[_KEY]
    x = _arrived(x, sharding, Shard(-1))
    if isinstance(module, ParallelAdapterLinear):
        return _rowwise_with_activation(module, x, sharding)
    if isinstance(module, MultiLoRALinear) and (adapters := mixed.by_number(module)):
        return _rowwise_with_activations(module, x, adapters, *args, **kwargs)
    with _shared_masks(module):
        y = _run(module, x, *args, **kwargs)
    return _left(_summed(y, sharding), sharding, y.dim(), _base_bias(module))


def _run(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own forward, on what this rank has."""
    sharding: Sharding = module.__dict__[_KEY]
    seen: Any = view(module, sharding.replace)
    if sharding.layout is ROWWISE and module.training:
        if isinstance(module, LoRALinear) and module.lora_dropout:
            return _with_dropout(seen, x, sharding.columns)
        if _is_peft(module):
            _replace_dropouts(seen, sharding.columns)
    if isinstance(module, MultiLoRALinear):
        return _run_multi(module, seen, x, *args, **kwargs)
    y: Tensor = type(module).forward(seen, x, *args, **kwargs)
    return y


def _run_multi(module: MultiLoRALinear, seen: MultiLoRALinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The same for a layer of a server, which a checkpoint's recomputation must find again under the same identity."""
    kept = module.__dict__.setdefault("_tensor_parallel_view", seen)
    seen.out_features, seen.in_features = seen.bank.shape
    kept.__dict__.update({**seen.__dict__, "_tensor_parallel_view": None})
    y = type(module).forward(kept, x, *args, **kwargs)
    module.row_order_checked = kept.row_order_checked
    return y


def _arrived(x: Any, sharding: Sharding, wanted: Placement) -> Tensor:
    """This rank's x. In the backward its gradient is summed over the ranks, if each has a part of it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not isinstance(x, DTensor):
        K = sharding.sizes[1]
        split = sharding.input in (Shard(-1), Shard(x.dim() - 1))
        here = sharding.columns.last - sharding.columns.first if split else K
        if x.dim() == 0 or x.shape[-1] != here:
            raise ValueError(f"x: expected shape [..., {here}], this rank's part of {K}, got {list(x.shape)}")
        if sharding.input == wanted and not (torch.is_grad_enabled() and x.requires_grad and wanted.is_replicate()):
            return x
        shape = torch.Size((*x.shape[:-1], K))
        if split:
            stride = torch.empty(shape, device="meta").stride()
            x = DTensor.from_local(x, sharding.mesh, [Shard(x.dim() - 1)], run_check=False, shape=shape, stride=stride)
        else:
            x = DTensor.from_local(x, sharding.mesh, [sharding.input], run_check=False)
    elif x.device_mesh != sharding.mesh:
        raise ValueError(f"x: expected a DTensor on the layer's mesh {sharding.mesh}, got one on {x.device_mesh}")
    target: Placement = Shard(x.dim() - 1) if wanted.is_shard() else wanted
    x = x.redistribute(placements=[target])
    local_x: Tensor = x.to_local(grad_placements=[Partial() if wanted.is_replicate() else target])
    return local_x


def _summed(y: Tensor, sharding: Sharding) -> DTensor:
    return DTensor.from_local(y, sharding.mesh, [Partial()], run_check=False)


def _left(y: DTensor, sharding: Sharding, dims: int, bias: Tensor | None = None) -> Tensor:
    """y as the layer's callers want it, with a bias that is added after the sum."""
    output = sharding.output
    if isinstance(output, Shard) and output.dim < 0:
        output = Shard(output.dim + dims)
    y = y.redistribute(placements=[output])
    if bias is not None:
        here = y.to_local()
        here = (here + bias_after_sum(bias, output)).to(here.dtype)
        if not sharding.whole:
            return here
        return DTensor.from_local(here, sharding.mesh, [output], run_check=False, shape=y.shape, stride=y.stride())
    return y if sharding.whole else y.to_local()


def _base_bias(module: nn.Module) -> Tensor | None:
    owner = module if isinstance(module, FrozenLinear) else module.get_submodule("base_layer")
    return owner._parameters.get("bias")


def _rowwise_with_activation(module: ParallelAdapterLinear, x: Tensor, sharding: Sharding) -> Tensor:
    """y = Σ xWᵀ + bias + s·act(Σ xAᵀ + a)Bᵀ + β, with both sums over the ranks: z is small, and reduced by itself.

    What follows the sums is the same on every rank, in fp32, so the gradients of B, a and β are complete.
    """
    plain = complete(sharding.layout)
    weight, A, B, a, beta = (
        local(module._parameters[name], plain, role_of(name))  # type: ignore[arg-type]
        for name in ("weight", "lora_A", "lora_B", "bias_A", "bias_B")
    )
    y = layer_calls.base_linear(x, weight.t() if module.fan_in_fan_out else weight, None)
    acc = accumulate_dtype(x, weight, A)
    with autocast.off(x.device):
        z = functional.linear(x.to(acc), A.to(acc))
        y, z = (_summed(t, sharding).redistribute(placements=[Replicate()]).to_local() for t in (y, z))
        v = activations.apply(module.activation, z + a)
        total = y.to(acc) + module.scaling * functional.linear(v, B.to(acc)) + beta
        bias = _base_bias(module)
        if bias is not None:
            total = total + bias_after_sum(bias, Replicate())
        total = total.to(y.dtype)
    if not sharding.whole:
        return total
    return DTensor.from_local(total, sharding.mesh, [Replicate()], run_check=False)


def _rowwise_with_activations(
    module: MultiLoRALinear, x: Tensor, adapters: dict[int, Adapter], ids: Tensor | None = None
) -> Tensor:
    """The same for a mixed batch: base layer and linear adapters by the kernels, the others after sums of xAᵀ."""
    sharding: Sharding = module.__dict__[_KEY]
    if ids is None and module.server_key is None:
        return _left(_summed(_run(module, x), sharding), sharding, x.dim(), _base_bias(module))
    if ids is None or sharding.whole or not sharding.output.is_replicate():
        raise NotImplementedError(
            "activation: expected 'identity' for all adapters of a row-parallel layer with routes, or whose output is "
            "not a plain, replicated tensor, got others; pass ids, or split the layer by columns"
        )
    checks.ids(ids, x)
    y = _run(module, x, mixed.without(ids, adapters))
    y = _left(_summed(y, sharding), sharding, y.dim(), _base_bias(module))
    term = mixed.added(
        x, ids, adapters, sharding.sizes[0], lambda part: _left(_summed(part, sharding), sharding, part.dim())
    )
    return (y.to(term.dtype) + term).to(y.dtype)


def _shared_masks(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Seeds of dropout are the first rank's, so all ranks drop the same elements, as one process would."""
    if not module.training:
        return contextlib.nullcontext()
    return seeds_agreed(functools.partial(_from_first, module.__dict__[_KEY].mesh))


def _from_first(mesh: DeviceMesh, seed: Tensor) -> Tensor:
    group = mesh.get_group()
    dist.broadcast(seed, dist.get_global_rank(group, 0), group=group)
    return seed


class _Columns(nn.Module):
    """Dropout of this rank's columns of x, with the mask that one process draws for all of x."""

    def __init__(self, p: float, columns: Range) -> None:
        super().__init__()
        self.p, self.columns = p, columns

    def forward(self, x: Tensor) -> Tensor:
        dropout = dropout_of(self.p, None, x.device)
        if dropout is None:
            return x
        size, first, last = self.columns
        rows = x.numel() // max(x.shape[-1], 1)
        keep = philox.keep_mask_of_columns(rows, size, first, last, dropout.p, dropout.seed).reshape(x.shape)
        return torch.where(keep, x / (1.0 - dropout.p), 0.0)


def _with_dropout(seen: LoRALinear, x: Tensor, columns: Range) -> Tensor:
    """A LoRALinear's part of y with dropout. The kernels' masks go by the columns that they see, so the adapter of the
    dropped x is plain torch here, in fp32."""
    y = layer_calls.base_linear(x, seen.matrix, None)
    A, B, b = (seen._parameters[name] for name in ("lora_A", "lora_B", "lora_bias"))
    assert A is not None
    assert B is not None
    acc = accumulate_dtype(x, seen.matrix, A)
    with autocast.off(x.device):
        v = functional.linear(_Columns(seen.lora_dropout, columns)(x.to(acc)), A.to(acc))
        added = seen.scaling * functional.linear(v, B.to(acc), None if b is None else b.to(acc))
        return (y.to(acc) + added).to(y.dtype)


def _replace_dropouts(seen: Any, columns: Range) -> None:
    """Gives a view of a PEFT layer dropouts of columns. PEFT's own code computes such a call."""
    dropouts = seen._modules["lora_dropout"]
    found = {
        name: _Columns(float(child.p), columns) if type(child) is nn.Dropout and child.training and child.p else child
        for name, child in dropouts._modules.items()
    }
    if any(found[name] is not child for name, child in dropouts._modules.items()):
        copy = object.__new__(type(dropouts))
        copy.__dict__.update({**dropouts.__dict__, "_modules": found})
        seen._modules["lora_dropout"] = copy
