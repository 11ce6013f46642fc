"""What a method trains, counted and from closed forms: |Φ| of |Θ|, by method, layer and module; bytes that it saves."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from peftk.methods.bitfit import ALL, BitFitConfig
from peftk.methods.layers import FullConfig, HeadConfig, TopLayersConfig
from peftk.methods.lora import LoraConfig
from peftk.methods.plan import adapter_parameters, injections
from peftk.nn import LlamaAdapter, LoRALinear, ParallelAdapter, ParallelAdapterLinear, SeriesAdapter
from peftk.nn.placed_adapters import NormAdapter, StreamAdapter

if TYPE_CHECKING:
    from rich.table import Table

# ---------------------------------------------------------------------------------------------------------------------
# Closed forms. d: width of the model; K, N: inputs and outputs of a linear; all give numbers of parameters.


def lora_parameters(K: int, N: int, r: int) -> int:
    """r·(K + N) for a linear K → N; 2·d·r where it is square. Hu et al. 2021, section 4.2."""
    return r * (K + N)


def bottleneck_parameters(d: int, a: int) -> int:
    """2·d·a + a + d for an adapter of bottleneck a on a stream of width d. Houlsby et al. 2019, section 2.1."""
    return parallel_parameters(d, d, a)


def parallel_parameters(K: int, N: int, a: int) -> int:
    """a·(K + N) + a + N for an adapter of bottleneck a beside K → N. He et al. 2021."""
    return a * (K + N) + a + N


def bitfit_parameters(n_layers: int, d: int) -> int:
    """11·n·d: in each layer the biases of four projections (4·d), of the MLP (4·d and d) and of two LayerNorms (2·d).

    Ben Zaken et al. 2021. It leaves out what lies outside of the layers (the embeddings' LayerNorm, a pooler).
    """
    return 11 * n_layers * d


def prompt_parameters(length: int, d: int, gates: int = 0) -> int:
    """L·d for a prompt of L vectors in one layer, and its gates. Zhang et al. 2023 (LLaMA-Adapter)."""
    return length * d + gates


def transformer_parameters(n_layers: int, d: int) -> int:
    """12·n·d²: in each layer four projections d → d (4·d²) and an MLP d → 4·d → d (8·d²). O(n_layers·d²).

    It leaves out embeddings, biases and LayerNorms. Kaplan et al. 2020, table 1.
    """
    return 12 * n_layers * d * d


# ---------------------------------------------------------------------------------------------------------------------
# Counting

# tensors of a parameter's shape and dtype that torch.optim's optimizers keep for it (besides one step count, 4 bytes)
OPTIMIZER_TENSORS = {"adam": 2, "adamw": 2, "nadam": 2, "rmsprop": 1, "adagrad": 1, "sgd_momentum": 1, "sgd": 0}


@dataclasses.dataclass(frozen=True)
class Part:
    """What trains in one module, counted. method: "LoRA", "BitFit", …; module: its dotted name.

    added: whether the method added these parameters to the model, or trains the model's own in place. nbytes: theirs.
    formula, closed_form: the closed form for this module and what it gives; "" and None for parameters in place.
    """

    method: str
    module: str
    parameters: int
    nbytes: int
    added: bool
    formula: str = ""
    closed_form: int | None = None

    @property
    def layer(self) -> str:
        """The numbered layer that the module is or lies in, "encoder.layer.3"; "" outside of all."""
        found = re.match(r"(.*?\.)?\d+(?=\.|$)", self.module)
        return found[0] if found else ""


@dataclasses.dataclass(frozen=True)
class MethodCount:
    """All parts of one method. closed_form None: there is none; formula names it."""

    parameters: int
    modules: int
    nbytes: int
    formula: str = ""
    closed_form: int | None = None

    @property
    def difference(self) -> int | None:
        """Counted − closed form."""
        return None if self.closed_form is None else self.parameters - self.closed_form


class Bytes(NamedTuple):
    """Bytes that training needs, and that full fine-tuning of the same model would need."""

    needed: int
    full: int

    @property
    def saved(self) -> int:
        return self.full - self.needed


class _Totals(NamedTuple):
    trainable: int
    total: int


class ParameterCount(_Totals):
    """|Φ| parameters are trained, of |Θ| in all (adapters included); ratio = |Φ|/|Θ|. A pair (trainable, total).

    parts: what trains, module by module. base_parameters, base_bytes: of the model without what methods added.
    n_layers, width: the model's, None where it has no transformers config that says them.
    """

    parts: tuple[Part, ...] = ()
    base_parameters: int = 0
    base_bytes: int = 0
    n_layers: int | None = None
    width: int | None = None

    @property
    def ratio(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"|Φ| = {self.trainable:,} trainable of |Θ| = {self.total:,} parameters ({100 * self.ratio:.3f} %)"

    @property
    def closed_form(self) -> int | None:
        """N ≈ 12·n_layers·d² of the base model (`transformer_parameters`), beside `base_parameters` counted."""
        return (
            None if self.n_layers is None or self.width is None else transformer_parameters(self.n_layers, self.width)
        )

    def by_method(self) -> dict[str, MethodCount]:
        """|Φ| by method, with the closed form beside the count."""
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.method, []).append(part)
        return {method: self._method(method, parts) for method, parts in found.items()}

    def by_layer(self) -> dict[str, int]:
        """|Φ| by numbered layer ("encoder.layer.3"), "" for what lies outside of all."""
        return _sums((part.layer, part.parameters) for part in self.parts)

    def by_module(self) -> dict[str, int]:
        """|Φ| by module, dotted names."""
        return _sums((part.module, part.parameters) for part in self.parts)

    def gradients(self) -> Bytes:
        """Bytes of gradients, which have their parameters' dtype."""
        return Bytes(sum(part.nbytes for part in self.parts), self.base_bytes)

    def optimizer_state(self, optimizer: str = "adam") -> Bytes:
        """Bytes of optimizer state, as torch.optim keeps it: in the parameters' dtype, Adam 2 tensors a parameter.

        optimizer: one of OPTIMIZER_TENSORS. The step counts (4 bytes a tensor) and any fp32 copies that a framework for
        mixed precision makes are not in it. Raises ValueError for another optimizer.
        """
        if optimizer not in OPTIMIZER_TENSORS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZER_TENSORS)}, got {optimizer!r}")
        tensors = OPTIMIZER_TENSORS[optimizer]
        gradients = self.gradients()
        return Bytes(tensors * gradients.needed, tensors * gradients.full)

    def as_dict(self, optimizer: str = "adam") -> dict[str, Any]:
        """Everything as plain numbers and names, ready for json."""
        return {
            "trainable": self.trainable,
            "total": self.total,
            "ratio": self.ratio,
            "base_parameters": self.base_parameters,
            "base_closed_form": self.closed_form,
            "methods": {
                name: {**dataclasses.asdict(method), "difference": method.difference}
                for name, method in self.by_method().items()
            },
            "layers": self.by_layer(),
            "modules": self.by_module(),
            "gradient_bytes": _as_dict(self.gradients()),
            "optimizer": optimizer,
            "optimizer_bytes": _as_dict(self.optimizer_state(optimizer)),
        }

    def table(self, optimizer: str = "adam") -> Table:
        """A rich table, for `rich.print`: each method, counted and from its closed form, and the bytes it saves."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=str(self), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, collapse_padding=True
        )
        table.show_edge = table.pad_edge = False
        for column in ("method", "modules", "counted", "closed form", "gives", "difference"):
            table.add_column(column, justify="left" if column in ("method", "closed form") else "right")
        for name, method in self.by_method().items():
            counted = (name, f"{method.modules:,}", f"{method.parameters:,}")
            table.add_row(*counted, *_formula(method.formula, method.parameters, method.closed_form))
        table.add_section()
        base = ("base model", "", f"{self.base_parameters:,}")
        table.add_row(*base, *_formula("12·n·d²", self.base_parameters, self.closed_form))
        for what, memory in (("gradients", self.gradients()), (optimizer, self.optimizer_state(optimizer))):
            saved = f"−{_size(memory.saved)}" if memory.saved else "0"
            table.add_row(what, "", _size(memory.needed), "full", _size(memory.full), saved)
        return table

    def _method(self, name: str, parts: list[Part]) -> MethodCount:
        formula, closed_form = "", None
        if all(part.closed_form is not None for part in parts):
            formula = " + ".join(dict.fromkeys(part.formula for part in parts))
            closed_form = sum(part.closed_form or 0 for part in parts)
        elif self.width is not None and name in _IN_PLACE:
            formula, of_layers = _IN_PLACE[name]
            closed_form = of_layers(len({part.layer for part in parts} - {""}), self.width)
        parameters, nbytes = sum(part.parameters for part in parts), sum(part.nbytes for part in parts)
        return MethodCount(parameters, len({part.module for part in parts}), nbytes, formula, closed_form)


# Methods that train the model's own parameters, whose number depends on how many layers n they train
_IN_PLACE = {
    "BitFit": ("11·n·d", bitfit_parameters),
    "top layers": ("12·n·d²", transformer_parameters),
    "full": ("12·n·d²", transformer_parameters),
}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts what trains and what there is, each parameter once, however many modules share it.

        count = peftk.count_parameters(model)
        print(count)                        # |Φ| = … trainable of |Θ| = … parameters (… %)
        rich.print(count.table())           # by method, beside the closed forms, with the bytes saved
        count.by_layer(), count.optimizer_state("adamw").saved, count.as_dict()

    |Φ|: whatever requires a gradient. A parameter belongs to the method whose module added it, or to the config that
    trains it in place, or else to "other". Works on a model on the meta device, which takes no memory.
    """
    named = dict(model.named_parameters())  # each once
    added: dict[int, tuple[str, str, str, int | None]] = {}
    for name, module in model.named_modules():
        own = adapter_parameters(module).values()
        if own:
            method, formula, closed_form = _added_by(module)
            added.update({id(p): (name, method, formula, closed_form) for p in own})
    for name, p in named.items():
        layer = _of_peft(name)
        if layer is not None and id(p) not in added:
            added[id(p)] = (layer, "LoRA of HF PEFT", "", None)
    every = dict(model.named_parameters(remove_duplicate=False))
    in_place: dict[int, str] = {}
    for record in injections(model):
        method = _in_place(record.config)
        for name in record.trained:
            in_place.setdefault(id(every[name]), method)
    parts: dict[tuple[str, str], Part] = {}
    for name, p in named.items():
        if not p.requires_grad:
            continue
        if id(p) in added:
            module_name, method, formula, closed = added[id(p)]
            part = Part(method, module_name, p.numel(), p.nbytes, True, formula, closed)
        else:
            part = Part(in_place.get(id(p), "other"), name.rpartition(".")[0], p.numel(), p.nbytes, False)
        before = parts.get((part.method, part.module))
        if before is not None:
            part = dataclasses.replace(
                part, parameters=before.parameters + part.parameters, nbytes=before.nbytes + part.nbytes
            )
        parts[part.method, part.module] = part
    count = ParameterCount(
        trainable=sum(p.numel() for p in named.values() if p.requires_grad),
        total=sum(p.numel() for p in named.values()),
    )
    base = [p for p in named.values() if id(p) not in added]
    count.parts = tuple(parts.values())
    count.base_parameters, count.base_bytes = sum(p.numel() for p in base), sum(p.nbytes for p in base)
    config = getattr(model, "config", None)
    count.n_layers, count.width = (_size_of(config, name) for name in ("num_hidden_layers", "hidden_size"))
    return count


def _added_by(module: nn.Module) -> tuple[str, str, int | None]:
    """Method, closed form and what it gives, for a module that adds parameters."""
    match module:
        case LoRALinear(in_features=K, out_features=N, r=r):
            if module.lora_bias is not None:
                return "LoRA", "r·(K + N) + N", lora_parameters(K, N, r) + N
            return "LoRA", "r·(K + N)", lora_parameters(K, N, r)
        case (
            SeriesAdapter(in_features=d, bottleneck=a)
            | NormAdapter(in_features=d, bottleneck=a)
            | StreamAdapter(in_features=d, bottleneck=a)
        ):
            return "series adapter", "2·d·a + a + d", bottleneck_parameters(d, a)
        case ParallelAdapter(in_features=K, out_features=N, bottleneck=a):
            return "parallel adapter", "a·(K + N) + a + N", parallel_parameters(K, N, a)
        case ParallelAdapterLinear(in_features=K, out_features=N, bottleneck=a):
            return "parallel adapter", "a·(K + N) + a + N", parallel_parameters(K, N, a)
        case LlamaAdapter(num_heads=heads):
            length, d = module.prompt.shape
            return "LLaMA-Adapter", "L·d + heads", prompt_parameters(length, d, heads)
    return "of a bank", "", None  # MultiLoRALinear's, of any kind


def _in_place(config: object) -> str:
    """The method of a config that trains parameters of the model's own."""
    match config:
        case LoraConfig():
            return "LoRA, in place"
        case BitFitConfig(biases=biases) if biases != ALL:
            return f"BitFit of {biases if isinstance(biases, str) else ', '.join(biases)}"
        case BitFitConfig():
            return "BitFit"
        case HeadConfig():
            return "head"
        case TopLayersConfig():
            return "top layers"
        case FullConfig():
            return "full"
    return type(config).__name__


def _of_peft(parameter: str) -> str | None:
    """The layer that HF PEFT gave this parameter to, by the parameter's name; None for any other parameter."""
    found = re.match(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.", parameter)
    return found and found[1]


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, number in pairs:
        sums[key] = sums.get(key, 0) + number
    return sums


def _size_of(config: object, name: str) -> int | None:
    """A number of a transformers config, under the name that its attribute_map gives to the model's own."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _formula(formula: str, counted: int, closed_form: int | None) -> tuple[str, str, str]:
    """The cells of a row that compare a count with its closed form."""
    if closed_form is None:
        return formula, "", ""
    return formula, f"{closed_form:,}", f"{counted - closed_form:+,}" if counted != closed_form else "0"


def _size(nbytes: int) -> str:
    """12.3 MB, in decimal units, three digits."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _as_dict(memory: Bytes) -> dict[str, int]:
    return {"needed": memory.needed, "full": memory.full, "saved": memory.saved}
