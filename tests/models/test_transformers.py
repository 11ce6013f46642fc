"""Tests of peftk in transformers' workflows, on small random models of four architectures.

Training by hand and by Trainer, generate() with an adapter for each sequence, checkpoints, merging.
"""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftk
from peftk import (
    BitFitConfig,
    HeadConfig,
    LlamaAdapterConfig,
    LoraConfig,
    MultiAdapter,
    ParallelAdapterConfig,
    SeriesAdapterConfig,
)
from peftk.methods.inject import lora_layers

VOCABULARY, WIDTH = 64, 32
DISTINCT = {"initializer_range": 0.2}  # weights that give distinct tokens; the usual 0.02 repeats one token


def bert() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**DISTINCT, **sizes, intermediate_size=64)
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        **DISTINCT,
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        **DISTINCT, **sizes, num_key_value_heads=2, intermediate_size=64, max_position_embeddings=32
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    model = transformers.T5ForConditionalGeneration(config)
    # tied to the embeddings, it would repeat each token
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
    return model


Build = Callable[[], nn.Module]
BUILDS: list[Build] = [bert, gpt2, llama, t5]
each_model = pytest.mark.parametrize("build", BUILDS)
each_generator = pytest.mark.parametrize("build", [gpt2, llama, t5])

LORA = LoraConfig(r=4, lora_alpha=8)
METHODS: dict[str, Any] = {
    "lora": LORA,
    "series": SeriesAdapterConfig(bottleneck=8),
    "parallel": ParallelAdapterConfig(bottleneck=8),
    "bitfit": BitFitConfig(),
    "llama_adapter": LlamaAdapterConfig(adapter_len=4),
    "three": [LORA, SeriesAdapterConfig(bottleneck=8), LlamaAdapterConfig(adapter_len=4)],
}


def with_method(*default: tuple[Build, str], builds: Sequence[Build] = BUILDS) -> pytest.MarkDecorator:
    """Each method on each model that it fits (Llama and T5 have no biases); all but `default` in the full tier."""
    return pytest.mark.parametrize(
        ("build", "method"),
        [
            pytest.param(build, method, marks=() if (build, method) in default else pytest.mark.full)
            for build in builds
            for method in METHODS
            if method != "bitfit" or build in (bert, gpt2)
        ],
    )


def made(build: Build) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def one_batch(model: nn.Module) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids[:, 0] % 2 if isinstance(model, transformers.BertForSequenceClassification) else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**one_batch(model)).logits


def trained(model: nn.Module, steps: int = 6) -> list[float]:
    """The losses of some steps of AdamW on one batch, without dropout."""
    optimizer = torch.optim.AdamW([p for p in model.eval().parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**one_batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(autouse=True)
def _small_models_on_one_thread(threads: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        # transformers renames its own options: neither is ours to follow
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
        yield
    transformers.logging.enable_progress_bar()


@with_method((bert, "three"), (gpt2, "lora"), (gpt2, "bitfit"), (llama, "lora"), (t5, "series"))
def test_a_method_starts_as_the_identity_and_trains_alone(build: Build, method: str) -> None:
    model = made(build)
    before = logits(model)
    peftk.inject(model, METHODS[method])
    torch.testing.assert_close(logits(model), before)
    values = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = trained(model)
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, values[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    count = peftk.count_parameters(model)
    assert count.trainable == sum(values[name].numel() for name in moved)


def test_a_module_that_trains_in_full_gets_no_adapter() -> None:
    """LoRA on every linear leaves out a head that trains already; BitFit can be combined with it in either order."""
    model = made(bert)
    peftk.inject(model, [HeadConfig(), LORA])
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad
    assert peftk.count_parameters(model).by_method()["head"].parameters == 2 * WIDTH + 2
    for configs in ([HeadConfig(), BitFitConfig()], [BitFitConfig(), HeadConfig()]):
        model = made(bert)
        peftk.inject(model, configs)
        biases = sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))
        assert peftk.count_parameters(model).trainable == 2 * WIDTH + biases
    refused = made(bert)
    with pytest.raises(ValueError, match=r"^trained: expected classifier\.weight to be frozen"):
        peftk.inject(refused, [LORA, HeadConfig()])
    assert type(refused.classifier) is nn.Linear


@each_model
def test_saved_loaded_merged(build: Build, tmp_path: pathlib.Path) -> None:
    config = LoraConfig(r=4, lora_alpha=8, bias="none")
    model = made(build)
    peftk.inject(model, config)
    trained(model)
    expected = logits(model)
    assert (expected - logits(made(build))).abs().max() > 1e-2
    peftk.save_adapter(model, tmp_path)
    other = made(build)
    peftk.inject(other, config)
    peftk.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), expected)

    weights = {name: layer.weight.clone() for name, layer in lora_layers(other)}
    peftk.merge_adapter(other)
    assert all(not torch.equal(layer.weight, weights[name]) for name, layer in lora_layers(other))
    torch.testing.assert_close(logits(other), expected, rtol=1e-4, atol=1e-5)
    peftk.unmerge_adapter(other)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in lora_layers(other))
    assert torch.equal(logits(other), expected)


# ---------------------------------------------------------------------------------------------------------------------
# generate()

ROUTE = ["alice", None, "bob", "alice"]
GREEDY = {"do_sample": False}
DECODING = {
    "greedy": GREEDY,
    "greedy, no cache": {**GREEDY, "use_cache": False},
    "greedy, static cache": {**GREEDY, "cache_implementation": "static"},
    "beams": {**GREEDY, "num_beams": 3},
    "all beams": {**GREEDY, "num_beams": 3, "num_return_sequences": 3},
    "sampling": {"do_sample": True},
    "several samples": {"do_sample": True, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 2},
}
DEFAULT = {("gpt2", "sampling"), ("gpt2", "beams"), ("llama", "greedy"), ("llama", "sampled beams"), ("t5", "beams")}


def strong(model: nn.Module, r: int, seed: int) -> nn.Module:
    """An adapter on every linear, strong enough to change which tokens are generated."""
    peftk.inject(model, LoraConfig(r=r, lora_alpha=8))
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.5)
    return model


def serving(build: Build, folder: pathlib.Path) -> tuple[MultiAdapter, dict[str | None, nn.Module]]:
    """A server with alice and bob, and models that have only one of them, or none."""
    alone = {None: made(build), "alice": strong(made(build), 4, 1), "bob": strong(made(build), 5, 2)}
    server = MultiAdapter(made(build))
    for name in ("alice", "bob"):
        peftk.save_adapter(alone[name], folder / name)
        server.load(name, folder / name)
    return server, alone


def generated(model: nn.Module, prompts: Tensor, mask: Tensor, **decoding: Any) -> Tensor:
    torch.manual_seed(3)
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    return model.generate(input_ids=prompts, attention_mask=mask, **lengths, **decoding)


def padded_prompts() -> tuple[Tensor, Tensor]:
    """Four prompts, padded on the left; two of them are shorter."""
    prompts = torch.randint(3, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(prompts)
    mask[1, :3] = mask[3, :2] = 0
    return prompts * mask, mask


@pytest.mark.parametrize(
    ("build", "how"),
    [
        pytest.param(build, how, marks=() if (build.__name__, how) in DEFAULT else pytest.mark.full)
        for build in (gpt2, llama, t5)
        for how in DECODING
    ],
)
def test_generate_gives_each_sequence_its_adapter(build: Build, how: str, tmp_path: pathlib.Path) -> None:
    """The same tokens as with the adapter alone. Noise depends on the place in the batch, so the comparison is with a
    batch of four in which all sequences have the adapter."""
    server, alone = serving(build, tmp_path)
    decoding, (prompts, mask) = DECODING[how], padded_prompts()
    with server.route(ROUTE):
        found = generated(server.model, prompts, mask, **decoding).unflatten(0, (4, -1))
    outputs = {name: generated(model, prompts, mask, **decoding).unflatten(0, (4, -1)) for name, model in alone.items()}
    for i, name in enumerate(ROUTE):
        assert torch.equal(found[i], outputs[name][i])
    assert len({tuple(out.flatten().tolist()) for out in outputs.values()}) == 3  # the adapters change the output
    plain = generated(server.model, prompts, mask, **decoding).unflatten(0, (4, -1))
    assert torch.equal(plain, outputs[None])  # outside of the route


@each_generator
def test_generate_alone_is_generate_in_a_batch(build: Build, tmp_path: pathlib.Path) -> None:
    """Greedy: each prompt alone, unpadded, through its own model."""
    server, alone = serving(build, tmp_path)
    prompts, mask = padded_prompts()
    with server.route(ROUTE):
        found = generated(server.model, prompts, mask, **GREEDY)
    for i, name in enumerate(ROUTE):
        kept = mask[i].bool()
        by_itself = generated(alone[name], prompts[i : i + 1, kept], mask[i : i + 1, kept], **GREEDY)
        assert torch.equal(found[i, -6:], by_itself[0, -6:])


@with_method((gpt2, "three"), (t5, "three"), (llama, "llama_adapter"), builds=[gpt2, llama, t5])
def test_generate_with_a_cache_is_generate_without(build: Build, method: str) -> None:
    """Single steps with the cache give the same as the whole text at once, greedily and with beams."""
    model, (prompts, mask) = made(build), padded_prompts()
    plain = generated(model, prompts, mask, **GREEDY)
    peftk.inject(model, METHODS[method])
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.5 * torch.randn_like(p)
    for beams in (1, 2):
        decoding = {**GREEDY, "num_beams": beams}
        found = generated(model, prompts, mask, **decoding)
        assert torch.equal(found, generated(model, prompts, mask, **decoding, use_cache=False))
        assert not torch.equal(found, plain)


def test_generate_refuses_a_route_for_a_different_batch(tmp_path: pathlib.Path) -> None:
    server, _ = serving(llama, tmp_path)
    prompts, mask = padded_prompts()
    with (
        server.route(["alice", "bob", None]),
        pytest.raises(ValueError, match="the 3 routed sequences whole"),
    ):
        generated(server.model, prompts, mask, **GREEDY)
    assert generated(server.model, prompts, mask, **GREEDY).shape == (4, 13)


# ---------------------------------------------------------------------------------------------------------------------
# Trainer


def rows(model: nn.Module, number: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, VOCABULARY, (number, 8), generator=torch.Generator().manual_seed(1))
    ids[:, 1:] = ids[:, :1]  # easy to learn in a few steps
    labels = ids[:, 0] % 2 if isinstance(model, transformers.BertForSequenceClassification) else ids
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


def trainer(model: nn.Module, data: Sequence[Any], folder: pathlib.Path, **arguments: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=os.fspath(folder),
        max_steps=8,
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=8,
        learning_rate=2e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **arguments,
    )
    return transformers.Trainer(model=model, args=args, train_dataset=data)


def losses(made: Any) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


TRAINED = [
    pytest.param(build, method, checkpointing, marks=() if default else pytest.mark.full)
    for build, method, checkpointing, default in (
        (bert, "lora", False, True),
        (bert, "lora", True, False),
        (bert, "parallel", True, False),
        (gpt2, "lora", False, False),
        (gpt2, "lora", True, False),
        (bert, "bitfit", True, False),
        (llama, "lora", False, False),
        (llama, "three", True, True),
        (t5, "lora", True, False),
        (t5, "three", False, False),
        (t5, "parallel", True, False),
    )
]


@pytest.mark.parametrize(("build", "method", "checkpointing"), TRAINED)
def test_trainer_trains_and_resumes(build: Build, method: str, checkpointing: bool, tmp_path: pathlib.Path) -> None:
    """A run that is resumed from its checkpoint in the middle ends with the same bits as an uninterrupted run."""

    def injected() -> nn.Module:
        model = made(build)
        # the head first: a module that trains in full gets no adapter
        peftk.inject(model, [HeadConfig(), METHODS[method]] if build is bert else METHODS[method])
        return model

    model = injected()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = trainer(model, rows(model), tmp_path, gradient_checkpointing=checkpointing)
    whole.train()
    found = losses(whole)
    assert len(found) == 8
    assert sum(found[-2:]) < sum(found[:2])
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name

    other = injected()
    resumed = trainer(other, rows(other), tmp_path, gradient_checkpointing=checkpointing)
    resumed.train(resume_from_checkpoint=os.fspath(tmp_path / "checkpoint-4"))
    assert losses(resumed) == found
    after = dict(other.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in model.named_parameters())


def test_gradient_checkpointing_changes_no_bit_of_the_gradients() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = strong(made(llama), 4, 1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()(**one_batch(model)).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    assert all(torch.equal(gradient, again[name]) for name, gradient in plain.items())


def test_trainer_trains_an_accelerated_peft_model(tmp_path: pathlib.Path) -> None:
    import peft

    def adapted() -> nn.Module:
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(made(llama), config)

    model = peftk.accelerate(adapted())
    made_by_peftk = trainer(model, rows(model), tmp_path / "peftk")
    made_by_peftk.train()
    found = losses(made_by_peftk)
    assert sum(found[-2:]) < sum(found[:2])
    plain = adapted()
    made_by_peft = trainer(plain, rows(plain), tmp_path / "peft")
    made_by_peft.train()
    torch.testing.assert_close(torch.tensor(found), torch.tensor(losses(made_by_peft)), rtol=1e-3, atol=1e-3)
    # PEFT loads what Trainer saved of the accelerated model
    read = peft.PeftModel.from_pretrained(made(llama), os.fspath(tmp_path / "peftk" / "checkpoint-8"))
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Real weights


def test_minilm_with_real_weights(tmp_path: pathlib.Path) -> None:
    """Embeddings are unchanged at first; two tenants train on their own sentences and run in one batch."""
    from peftk.tools.minilm import MiniLM, embed

    minilm = MiniLM()
    batch = minilm.tokenize(["A kernel adds an adapter.", "The cat sat on the mat.", "Rain falls."])
    plain = embed(minilm.plain, batch)
    server = MultiAdapter(minilm.copy())
    alone = {}
    for name, target in (("alice", 0), ("bob", 1)):
        model = minilm.copy()
        peftk.inject(model, LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"]))
        torch.testing.assert_close(embed(model, batch), plain, rtol=0, atol=1e-5)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        goal, found = plain[target].detach(), []
        for _ in range(3):  # draw all sentences to one of them
            loss = (1 - embed(model, batch) @ goal).mean()
            found.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert found[-1] < found[0]
        peftk.save_adapter(model, tmp_path / name)
        server.load(name, tmp_path / name)
        alone[name] = embed(model.eval(), batch).detach()
    with server.route(["alice", None, "bob"]), torch.no_grad():
        mixed = embed(server.model, batch)
    expected = torch.stack([alone["alice"][0], plain[1], alone["bob"][2]])
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3
