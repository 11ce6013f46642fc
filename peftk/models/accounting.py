"""Counts trainable parameters, next to closed forms from papers, and the bytes of gradients and optimizer state."""

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
# Closed forms for numbers of parameters. d: width of the model; K, N: inputs and outputs of a linear.


def lora_parameters(K: int, N: int, r: int) -> int:
    """r·(K + N) for a linear K → N; 2·d·r if it is square. Hu et al. 2021, section 4.2."""
    return r * (K + N)


def bottleneck_parameters(d: int, R: int) -> int:
    """2·d·R + R + d for an adapter with bottleneck R on hidden states of width d. Houlsby et al. 2019, section 2.1."""
    return parallel_parameters(d, d, R)


def parallel_parameters(K: int, N: int, R: int) -> int:
    """R·(K + N) + R + N for an adapter with bottleneck R beside a block K → N. He et al. 2021."""
    return R * (K + N) + R + N


def bitfit_parameters(n_layers: int, d: int) -> int:
    """11·n·d: in each layer the biases of four projections (4·d), of the MLP (4·d and d) and of two LayerNorms (2·d).

    Ben Zaken et al. 2021. It leaves out biases outside of the layers (the embeddings' LayerNorm, a pooler).
    """
    return 11 * n_layers * d


def prompt_parameters(length: int, d: int, gates: int = 0) -> int:
    """L·d for a prompt of L vectors in one layer, plus its gates. Zhang et al. 2023 (LLaMA-Adapter)."""
    return length * d + gates


def transformer_parameters(n_layers: int, d: int) -> int:
    """12·n·d²: in each layer four projections d → d (4·d²) and an MLP d → 4·d → d (8·d²). O(n_layers·d²).

    It leaves out embeddings, biases and LayerNorms. Kaplan et al. 2020, table 1.
    """
    return 12 * n_layers * d * d


# ---------------------------------------------------------------------------------------------------------------------
# Counting

# how many tensors with a parameter's shape and dtype torch.optim keeps per parameter (plus a step count of 4 bytes)
OPTIMIZER_TENSORS = {"adam": 2, "adamw": 2, "nadam": 2, "rmsprop": 1, "adagrad": 1, "sgd_momentum": 1, "sgd": 0}


@dataclasses.dataclass(frozen=True)
class Part:
    """The trainable parameters of one module, counted. method: "LoRA", "BitFit", …; module: its dotted name.

    added: whether the method added these parameters, or trains the model's own in place. nbytes: their size in bytes.
    formula, closed_form: the closed form for this module and its value; "" and None for parameters in place.
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
        """The numbered layer that the module is or belongs to, as in "encoder.layer.3"; "" if there is none."""
        found = re.match(r"(.*?\.)?\d+(?=\.|$)", self.module)
        return found[0] if found else ""


@dataclasses.dataclass(frozen=True)
class MethodCount:
    """The sums over all parts of one method. formula, closed_form: the closed form and its value; None for none."""

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
    """The bytes that training needs, and those that full fine-tuning of the same model would need."""

    needed: int
    full: int

    @property
    def saved(self) -> int:
        return self.full - self.needed


class _Totals(NamedTuple):
    trainable: int
    total: int


class ParameterCount(_Totals):
    """A pair (trainable, total): |Φ| parameters train, of |Θ| in all, adapters included. ratio = |Φ|/|Θ|.

    parts: the trainable parameters, module by module. base_parameters, base_bytes: of the model without what methods
    added. n_layers, width: from the model's transformers config; None if there is none or it lacks them.
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
        """12·n_layers·d² for the base model (`transformer_parameters`), to compare with `base_parameters`."""
        return (
            None if self.n_layers is None or self.width is None else transformer_parameters(self.n_layers, self.width)
        )

    def by_method(self) -> dict[str, MethodCount]:
        """|Φ| by method, with the closed forms."""
        found: dict[str, list[Part]] = {}
        for part in self.parts:
            found.setdefault(part.method, []).append(part)
        return {method: self._method(method, parts) for method, parts in found.items()}

    def by_layer(self) -> dict[str, int]:
        """|Φ| by numbered layer ("encoder.layer.3"); "" for parameters outside of all layers."""
        return _sums((part.layer, part.parameters) for part in self.parts)

    def by_module(self) -> dict[str, int]:
        """|Φ| by the module's dotted name."""
        return _sums((part.module, part.parameters) for part in self.parts)

    def gradients(self) -> Bytes:
        """Bytes of gradients, in the parameters' dtypes."""
        return Bytes(sum(part.nbytes for part in self.parts), self.base_bytes)

    def optimizer_state(self, optimizer: str = "adam") -> Bytes:
        """Bytes of optimizer state as torch.optim keeps it, in the parameters' dtypes; for Adam 2 tensors a parameter.

        optimizer: one of OPTIMIZER_TENSORS. Not counted are the step counts (4 bytes per tensor) and fp32 copies that a
        framework for mixed precision may make. Raises ValueError for any other optimizer.
        """
        if optimizer not in OPTIMIZER_TENSORS:
            raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZER_TENSORS)}, got {optimizer!r}")
        tensors = OPTIMIZER_TENSORS[optimizer]
        gradients = self.gradients()
        return Bytes(tensors * gradients.needed, tensors * gradients.full)

    def as_dict(self, optimizer: str = "adam") -> dict[str, Any]:
        """Everything as plain numbers and strings, for json."""
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
        """A rich table, for `rich.print`: each method's count and closed form, and the bytes saved.

        Raises ValueError for an unknown optimizer.
        """
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


# Closed forms, as functions of n layers and width d, for methods that train the model's own parameters.
_IN_PLACE = {
    "BitFit": ("11·n·d", bitfit_parameters),
    "top layers": ("12·n·d²", transformer_parameters),
    "full": ("12·n·d²", transformer_parameters),
}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts a model's parameters and its trainable ones. A parameter that several modules share counts once.

        count = peftk.count_parameters(model)
        print(count)                        # |Φ| = … trainable of |Θ| = … parameters (… %)
        rich.print(count.table())           # by method, beside the closed forms, with the bytes saved
        count.by_layer(), count.optimizer_state("adamw").saved, count.as_dict()

    |Φ| counts every parameter that requires a gradient. It belongs to the method whose module added it, or to the
    config that trains it in place, or else to "other". Works on a model on the meta device too, which takes no memory.
    """
    named = dict(model.named_parameters())  # shared parameters once
    added: dict[int, tuple[str, str, str, int | None]] = {}
    for name, module in model.named_modules():
        of_module = adapter_parameters(module).values()
        if of_module:
            method, formula, closed_form = _added_by(module)
            added.update({id(p): (name, method, formula, closed_form) for p in of_module})
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
    """The method, closed form and its value for a module that adds parameters."""
    match module:
        case LoRALinear(in_features=K, out_features=N, r=r):
            if module.lora_bias is not None:
                return "LoRA", "r·(K + N) + N", lora_parameters(K, N, r) + N
            return "LoRA", "r·(K + N)", lora_parameters(K, N, r)
        case (
            SeriesAdapter(in_features=d, bottleneck=R)
            | NormAdapter(in_features=d, bottleneck=R)
            | StreamAdapter(in_features=d, bottleneck=R)
        ):
            return "series adapter", "2·d·R + R + d", bottleneck_parameters(d, R)
        case ParallelAdapter(in_features=K, out_features=N, bottleneck=R):
            return "parallel adapter", "R·(K + N) + R + N", parallel_parameters(K, N, R)
        case ParallelAdapterLinear(in_features=K, out_features=N, bottleneck=R):
            return "parallel adapter", "R·(K + N) + R + N", parallel_parameters(K, N, R)
        case LlamaAdapter(num_heads=heads):
            length, d = module.prompt.shape
            return "LLaMA-Adapter", "L·d + heads", prompt_parameters(length, d, heads)
    return "of a bank", "", None  # trainable adapters of a MultiLoRALinear, of any kind


def _in_place(config: object) -> str:
    """The method of a config that trains the model's own parameters."""
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
    """The layer to which HF PEFT added this parameter, read from its name; None for any other parameter."""
    found = re.match(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.", parameter)
    return found and found[1]


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for key, number in pairs:
        sums[key] = sums.get(key, 0) + number
    return sums


def _size_of(config: object, name: str) -> int | None:
    """An integer of a transformers config; its attribute_map translates this name to the model's own."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else None


def _formula(formula: str, counted: int, closed_form: int | None) -> tuple[str, str, str]:
    """The cells of a table row that compare a count with its closed form."""
    if closed_form is None:
        return formula, "", ""
    return formula, f"{closed_form:,}", f"{counted - closed_form:+,}" if counted != closed_form else "0"


def _size(nbytes: int) -> str:
    """A size as in "12.3 MB": decimal units, three digits."""
    size, units = float(nbytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.3g} {units[0]}"


def _as_dict(memory: Bytes) -> dict[str, int]:
    return {"needed": memory.needed, "full": memory.full, "saved": memory.saved}
