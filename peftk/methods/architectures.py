"""The table of model families: the names of the parts of a transformer's layers.

A layer is recognised by its parts, not by its model's name, so every model that is built like one of these is known:

    bert        BERT, RoBERTa, XLM-R, ELECTRA, MiniLM
    gpt2        GPT-2
    llama       Llama, Mistral, Qwen 2 and 3, Gemma
    t5          T5, mT5: encoder and decoder, cross attention
    torch       nn.TransformerEncoderLayer

For any other model, give a config the names of the modules.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from peftk.methods.fields import Names
from peftk.methods.targets import target_modules
from peftk.nn.attached import Attached
from peftk.nn.llama_adapter import Projections
from peftk.nn.replace import fan_in_fan_out, is_linear

ATTENTION, MLP = "attention", "mlp"
ROLES = (ATTENTION, MLP)
_HEADS = ["classifier", "classification_head", "score", "qa_outputs", "lm_head", "head", "fc"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a layer with a skip around it: `source` gets its input x, `sink` returns what is added to the skip.

    Both are names relative to `owner`, which is a name relative to the layer; "" is the owner itself.
    """

    owner: str
    source: str = ""
    sink: str = ""


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a layer, as names relative to it.

    blocks: by role. linears: those that compute queries, keys and values. attention: the attention module. projections:
    its parts; None if it does not call them. scaling: the factor of q·k; None means the module's own. kind: the class
    of the layer, if its parts' names do not identify it.
    """

    blocks: Mapping[str, Block]
    linears: Mapping[str, str]
    attention: str = ""
    projections: Projections | None = None
    scaling: float | None = None
    kind: type[nn.Module] = nn.Module

    def fits(self, module: nn.Module) -> bool:
        if not isinstance(module, self.kind):
            return False
        names = [name for block in self.blocks.values() for name in _parts(block)] + list(self.linears.values())
        return all(_has_submodule(module, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a model: its dotted name, its number, the name of its stack (encoder or decoder), and its family.

    Numbers run through all stacks, the encoder's layers before the decoder's, as in AdapterHub.
    """

    name: str
    number: int
    stack: str
    family: Family

    def path(self, *names: str) -> str:
        return ".".join(name for name in (self.name, *names) if name)


def _family(
    attention: str, projections: Projections, blocks: Mapping[str, Block], *, scaling: float | None = None
) -> Family:
    parts = {role: getattr(projections, role) for role in ("query", "key", "value")}
    linears = {role: f"{attention}.{name}" for role, name in parts.items()}
    return Family(blocks, linears, attention, projections, scaling)


def _t5(decoder: bool) -> Family:
    block = "layer.2" if decoder else "layer.1"
    return _family(
        "layer.0.SelfAttention",
        Projections("q", "k", "v", "o"),
        {
            ATTENTION: Block("layer.0", "SelfAttention", "dropout"),
            MLP: Block(block, "DenseReluDense", "dropout"),
        },
        scaling=1.0,
    )


FAMILIES: dict[str, Family] = {
    "bert": _family(
        "attention",
        Projections("self.query", "self.key", "self.value", "output.dense"),
        {ATTENTION: Block("attention", "self", "output.dropout"), MLP: Block("", "intermediate", "output.dropout")},
    ),
    "gpt2": _family(
        "attn",
        Projections("c_attn", "c_attn", "c_attn", "c_proj"),
        {ATTENTION: Block("attn"), MLP: Block("mlp")},
    ),
    "llama": _family(
        "self_attn",
        Projections("q_proj", "k_proj", "v_proj", "o_proj", rotary=True),
        {ATTENTION: Block("self_attn"), MLP: Block("mlp")},
    ),
    "t5 decoder": _t5(decoder=True),
    "t5 encoder": _t5(decoder=False),
    "torch": Family(
        {ATTENTION: Block("self_attn"), MLP: Block("", "linear1", "dropout2")}, {}, kind=nn.TransformerEncoderLayer
    ),
}


def layers(model: nn.Module) -> list[Layer]:
    """The model's layers of known families, in order; empty for any other model."""
    found: list[Layer] = []
    for name, module in model.named_modules():
        stack, _, number = name.rpartition(".")
        if number.isdigit():
            family = next((family for family in FAMILIES.values() if family.fits(module)), None)
            if family is not None:
                found.append(Layer(name, len(found), stack, family))
    return found


def known_layers(model: nn.Module, field: str) -> list[Layer]:
    """`layers`, but raises ValueError if there are none. field: of the config, for the message."""
    found = layers(model)
    if not found:
        families = ", ".join(dict.fromkeys(name.partition(" ")[0] for name in FAMILIES))
        raise ValueError(
            f"{field}: expected a model with layers of a known family ({families}), got {type(model).__name__}; "
            "name its modules instead"
        )
    return found


def topmost(model_layers: Sequence[Layer], k: int | None, field: str) -> list[Layer]:
    """The k topmost layers of every stack; all for None. Raises ValueError if a stack has fewer than k."""
    stacks: dict[str, list[Layer]] = {}
    for layer in model_layers:
        stacks.setdefault(layer.stack, []).append(layer)
    for name, stack in stacks.items():
        if k is not None and k > len(stack):
            raise ValueError(f"{field}: expected at most the {len(stack)} layers of {name}, got {k}")
    return [layer for stack in stacks.values() for layer in (stack if k is None else stack[len(stack) - k :])]


def head_parameters(model: nn.Module, modules: Names | None, field: str = "modules") -> list[str]:
    """Names of the parameters of the model's head; empty if it has none.

    The head is given by `modules`. For None it is what a transformers model has beside its base model, or a top-level
    module with a usual name.

    Raises ValueError if a name matches nothing, or the base model shares a parameter (a tied embedding).
    """
    if modules is not None:
        heads = list(target_modules(model, field, modules))
    else:
        children = dict(model.named_children())
        base = getattr(model, "base_model_prefix", None)
        heads = [name for name in children if name != base] if base in children else []
        heads = heads or [name for name in _HEADS if name in children]
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = [name for name in names if any(f"{name}.".startswith(f"{head}.") for head in heads)]
    if modules is not None and not found:
        raise ValueError(f"{field}: expected modules that have parameters, got {modules!r}")
    others = {id(model.get_parameter(name)): name for name in names if name not in set(found)}
    for name in found:
        tied = others.get(id(model.get_parameter(name)))
        if tied is not None:
            raise ValueError(f"{field}: expected a head with parameters of its own, got {name}, which is also {tied}")
    return found


def layer_of(module: str, model_layers: Sequence[Layer]) -> Layer | None:
    """The layer to which a module belongs, or None."""
    return next((layer for layer in model_layers if f"{module}.".startswith(f"{layer.name}.")), None)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """N, K of any kind of linear (quantised ones are recognised by their attributes); None for any other module."""
    if isinstance(module, Attached):
        return None
    if is_linear(module) and fan_in_fan_out(module):
        rows, columns = module.get_parameter("weight").shape
        return columns, rows
    N, K = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (N, K) if isinstance(N, int) and isinstance(K, int) else None


def width_in(model: nn.Module, name: str) -> int:
    """K, the width of a module's input: that of its first linear."""
    return _width(model, name, first=True)[0]


def width_out(model: nn.Module, name: str) -> tuple[int, Tensor]:
    """N, the width of a module's output, and the weight that tells it: that of its last linear or of a LayerNorm.

    A module without linears (a Dropout) is taken to pass on the output of the last linear in its parent. Raises
    ValueError if there is none either.
    """
    return _width(model, name, first=False)


def _width(model: nn.Module, name: str, *, first: bool) -> tuple[int, Tensor]:
    module = model.get_submodule(name)
    if isinstance(module, nn.LayerNorm) and module.weight is not None:
        return module.normalized_shape[-1], module.weight
    for place in (module, model.get_submodule(name.rpartition(".")[0])):
        found = list(_linears(place))
        if found:
            linear, N, K = found[0] if first else found[-1]
            weight = next(linear.parameters(recurse=False))
            return (K if first else N), weight
    raise ValueError(f"where: expected a module with linears, which tell its width, got {name}, which has none")


def _linears(module: nn.Module) -> Iterator[tuple[nn.Module, int, int]]:
    for part in module.modules():
        shape = linear_shape(part)
        if shape is not None:
            yield part, *shape


def _parts(block: Block) -> list[str]:
    return [".".join(n for n in (block.owner, part) if n) for part in (block.source, block.sink)]


def _has_submodule(module: nn.Module, name: str) -> bool:
    for step in name.split("."):
        child = module._modules.get(step)
        if child is None:
            return False
        module = child
    return True
