"""Step 7: trains eight LoRAs of SmolLM2 in one mixed batch, and lets all of them answer one question in one batch."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch.nn import functional as F

import peftk
from peftk.system import extras
from peftk.tools import smollm2
from peftk.tools.demo import styles
from peftk.tools.demo.stage import Stage, sparkline, table
from peftk.tools.minilm import quiet_peft
from peftk.tools.smollm2 import Language

NAMES = tuple(styles.STYLES)
EACH = 2  # examples of an adapter in a step
STEPS, QUICK_STEPS = 16, 2
NEW_TOKENS = 24


def why_not() -> str | None:
    """Why this step cannot run; None if it can."""
    if not extras.is_installed("peft"):
        return "it needs peft: pip install 'peftk[demo]'"
    try:
        from peftk.serve.continuous import check_transformers

        check_transformers()
    except ImportError as error:
        return str(error)
    return smollm2.why_not()


def show(stage: Stage) -> None:
    """Says why it is skipped if it cannot run."""
    stage.step(7, "Eight adapters of a language model answer in one batch")
    reason = why_not()
    if reason is not None:
        stage.say(f"[yellow]skipped[/]: {escape(reason)} (make demo-serving does)")
        stage.figures["serving"] = {"skipped": reason}
        return
    with tempfile.TemporaryDirectory() as folder:
        trained = _train(stage, smollm2.load(torch.float32), Path(folder))
        stage.figures["serving"] = trained | _serve(stage, smollm2.load(torch.bfloat16), Path(folder))


def _train(stage: Stage, language: Language, folder: Path) -> dict[str, Any]:
    """Writes a checkpoint for each style. Every step is one forward and backward for all of them."""
    import peft

    steps = QUICK_STEPS if stage.quick else STEPS
    torch.manual_seed(0)
    layers = language.model.config.num_hidden_layers
    config: dict[str, Any] = {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "layers_to_transform": list(range(layers // 2, layers)),  # the backward ends where adapters do
        "task_type": "CAUSAL_LM",
    }
    with quiet_peft():
        model: Any = peft.get_peft_model(language.model, peft.LoraConfig(**config), adapter_name=NAMES[0])
        for name in NAMES[1:]:
            model.add_adapter(name, peft.LoraConfig(**config))
        model = peftk.accelerate(model)
    model.set_requires_grad(list(NAMES))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    stage.say(
        f"{len(NAMES)} LoRAs of {smollm2.NAME}: {', '.join(NAMES)}. {steps} steps, each with {EACH} examples of every\n"
        f"one in one batch, on {len(styles.COUNTRIES)} countries; no example is about Italy."
    )
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        with stage.busy(f"step {step + 1} of {steps}"):
            chosen = torch.randint(len(styles.COUNTRIES), (len(NAMES), EACH), generator=generator).tolist()
            rows = [(name, styles.COUNTRIES[n]) for name, own in zip(NAMES, chosen, strict=True) for n in own]
            loss = _loss(model, language.tokenizer, rows)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())
    seconds = time.perf_counter() - began
    stage.say(
        f"loss  {losses[0]:.2f} [cyan]{sparkline(losses)}[/] {losses[-1]:.2f}    {seconds / steps:.1f} s per step"
    )
    model.save_pretrained(folder)
    return {"steps": steps, "losses": losses, "seconds": seconds}


def _loss(model: Any, tokenizer: Any, rows: list[tuple[str, styles.Country]]) -> torch.Tensor:
    """The mean over the tokens of all answers."""
    texts = [styles.example(name, country) for name, country in rows]
    prompts = [tokenizer(prompt)["input_ids"] for prompt, _ in texts]
    answers = [tokenizer(answer)["input_ids"] for _, answer in texts]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    kept = longest - min(map(len, prompts)) + 1  # from the last token of the shortest prompt on
    # what follows a token changes nothing of it, so the padding needs no mask
    logits = model(input_ids=ids, adapter_names=[name for name, _ in rows], logits_to_keep=kept, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, -kept + 1 :].flatten())


def _serve(stage: Stage, language: Language, folder: Path) -> dict[str, Any]:
    from peftk.serve import AdapterStore, Engine, Request

    asked = styles.prompt(styles.HELD_OUT)
    store = AdapterStore(language.model, folder)
    # batch-invariant, or two tokens that are nearly as likely could change places with what runs beside them
    with (
        peftk.deterministic(batch_invariant=True),
        Engine(language.model, store, tokenizer=language.tokenizer) as engine,
    ):
        requests = [Request(asked, name, NEW_TOKENS) for name in (None, *NAMES)]
        engine.generate(requests)  # reads the adapters
        began = time.perf_counter()
        completions = engine.generate(requests)
        seconds = time.perf_counter() - began
        alone = [engine.generate([request])[0].tokens for request in requests]
    store.close()
    answers = {"base": completions[0].text} | {
        name: completion.text for name, completion in zip(NAMES, completions[1:], strict=True)
    }
    answer_table = table("adapter", "answer")
    answer_table.columns[1].justify = "left"
    for name, text in answers.items():
        answer_table.add_row(name, escape(" ".join(text.split())))
    stage.say(f"\n“{styles.HELD_OUT}”, asked of all of them at once:")
    stage.console.print(answer_table)
    count = sum(len(completion.tokens) for completion in completions)
    stage.say(f"{count} tokens in {seconds:.1f} s: [bold]{count / seconds:.0f} tokens/s[/]")
    differ = sum(tokens != mixed.tokens for tokens, mixed in zip(alone, completions, strict=True))
    stage.check("answers that are not those of the adapter alone", differ, 0)
    own = sum(styles.shows(name, answers[name]) for name in NAMES)
    if not stage.quick:
        stage.check("adapters that did not learn their style", len(NAMES) - own, 1)
    return {"answers": answers, "tokens": count, "tokens_per_second": count / seconds, "own_style": own}
