"""Two LoRA adapters on a real MiniLM, trained, switched, merged, unmerged, saved and loaded (`make demo`)."""

# %% [markdown]
# # One small model, two adapters
#
# all-MiniLM-L6-v2 (22 million weights) turns text into vectors. Two LoRA adapters teach it two different searches in
# Python's own standard library:
#
# * **finder**: a description finds its function: *"Load cookies from a string"* finds
#   `http.cookies.BaseCookie.load(rawdata)`
# * **locator**: a signature finds its module: `IPv4Interface(address)` finds *"ipaddress: A fast, lightweight ..."*
#
# Recall is measured on pairs that are never trained on, before and after.

# %%
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent if "__file__" in globals() else Path.cwd()
sys.path.insert(0, str(HERE))

import stdlib_search as search  # noqa: E402
import torch  # noqa: E402

from peft_c import LoraConfig, get_peft_model  # noqa: E402

began = time.perf_counter()
out = HERE.parent / "out"
out.mkdir(exist_ok=True)
torch.manual_seed(0)

tasks = finder, locator = search.build_tasks()
for task in tasks:
    query, answer = task.held_out[0]
    print(f"{task.name:<8} {task.title}: {len(task.train)} pairs to train on, {len(task.held_out)} held out")
    print(f"         {query!r}\n         -> {task.documents[answer]!r}")

# %% [markdown]
# ## Before: the model as it is

# %%
model, tokenizer = search.load_minilm()
before = {task.name: search.recall(model, tokenizer, task) for task in tasks}
for task in tasks:
    print(f"{task.name:<8} recall@1 {before[task.name][1]:6.1%}   recall@10 {before[task.name][10]:6.1%}")

# %% [markdown]
# ## Train one adapter for each task
#
# The base model is frozen; both adapters live in the same model, one is active at a time.

# %%
targets = ["query", "key", "value", "dense"]
config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="FEATURE_EXTRACTION")
model = get_peft_model(model, config, adapter_name="finder")
model.add_adapter("locator", config)
model.print_trainable_parameters()

losses, after = {}, {}
for task in tasks:
    model.set_adapter(task.name)
    losses[task.name] = search.train(model, tokenizer, task)
    after[task.name] = search.recall(model, tokenizer, task)

# %% [markdown]
# ## After
#
# Switching the adapter switches what the model is good at: each row is one task, each column the same model with
# another adapter.

# %%
table = {task.name: {"no adapter": before[task.name]} for task in tasks}
for adapter in tasks:
    start = time.perf_counter()
    model.set_adapter(adapter.name)
    switched = time.perf_counter() - start
    for task in tasks:
        # What was just measured with a task's own adapter is not measured again.
        known = after[task.name] if adapter is task else search.recall(model, tokenizer, task)
        table[task.name][adapter.name] = known
print(f"{'recall@1 / recall@10':<34}" + "".join(f"{name:>16}" for name in ("no adapter", "finder", "locator")))
for task in tasks:
    cells = "".join(f"{100 * r[1]:>9.1f} /{100 * r[10]:5.1f}" for r in table[task.name].values())
    print(f"{task.name + ': ' + task.title:<34}{cells}")
print(f"the last switch took {1e6 * switched:.0f} microseconds")

# %% [markdown]
# ## Merge: the same answers, faster
#
# Merging folds an adapter into the weights, so that it costs nothing any more. Unmerging takes it out again and leaves
# the weights as they were, to the last bit. The first merge is slower: until then the weights are pages of the file
# that they were loaded from, and the operating system copies each page that is written.

# %%
model.set_adapter("finder")
base_weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
queries = [query for query, _ in finder.held_out]


def encode():
    return search.encode(model, tokenizer, queries)


unmerged_vectors, unmerged_time = encode(), search.fastest(encode)
first_merge = search.fastest(model.merge_adapter, repeats=1)
merged_vectors, merged_time = encode(), search.fastest(encode)
merged_recall = search.recall(model, tokenizer, finder)
model.unmerge_adapter()
cycles = [
    [search.fastest(step, repeats=1) for step in (model.merge_adapter, model.unmerge_adapter)] for _ in range(20)
]
merge_time, unmerge_time = map(min, zip(*cycles, strict=True))

restored = all(torch.equal(p, base_weights[name]) for name, p in model.named_parameters() if name in base_weights)
rate = len(queries) / torch.tensor([unmerged_time, merged_time])
print(f"adapter active   recall@1 {after['finder'][1]:6.1%}   {rate[0]:7.0f} queries/s")
print(f"adapter merged   recall@1 {merged_recall[1]:6.1%}   {rate[1]:7.0f} queries/s", end="")
print(f"   largest difference of a vector {(merged_vectors - unmerged_vectors).abs().max():.1e}")
print(f"merge {1e3 * merge_time:.1f} ms (the first {1e3 * first_merge:.0f} ms), unmerge {1e3 * unmerge_time:.1f} ms")
words = "every weight has its original bits" if restored else "unmerging did NOT restore the weights"
print(f"after merging and unmerging {1 + len(cycles)} times {words}")

# %% [markdown]
# ## Save, and load elsewhere
#
# A fresh process loads each adapter with `import peft`: once under `python -m peft_c`, where that name means peft_c,
# and once with the installed PEFT. Both give this process's vectors.

# %%
saved = out / "adapters"
model.save_pretrained(saved)
probe = queries[:64]
(saved / "probe.json").write_text(json.dumps(probe))


def elsewhere(package: str, adapter: str) -> float | None:
    """The largest difference to this process's vectors, from a fresh one; None where the package is not installed."""
    if find_spec(package) is None:
        return None
    runner = ["-m", "peft_c"] if package == "peft_c" else []
    result = saved / f"{package}_{adapter}.pt"
    files = [HERE / "encode.py", saved / adapter, saved / "probe.json", result]
    command = [sys.executable, *runner, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    model.set_adapter(adapter)
    return (torch.load(result) - search.encode(model, tokenizer, probe)).abs().max().item()


differences = {}
for package in ("peft_c", "peft"):
    for task in tasks:
        difference = differences[package, task.name] = elsewhere(package, task.name)
        words = "not installed, skipped" if difference is None else f"largest difference of a vector {difference:.1e}"
        print(f"{task.name:<8} in a fresh process with {package:<7} {words}")

# %% [markdown]
# ## The picture

# %%
search.plot(tasks, losses, before, after, out / "demo.png")
if "get_ipython" in globals():
    from IPython.display import Image, display

    display(Image(str(out / "demo.png")))
else:
    print(f"{out.name}/demo.png written; {time.perf_counter() - began:.0f} s in all")

# %%
failures = [f"{t.name}: recall did not improve" for t in tasks if after[t.name][1] <= before[t.name][1]]
failures += [] if merged_recall == after["finder"] else ["merging changed the recall"]
failures += [] if restored else ["unmerging did not restore the weights"]
failures += [f"{key}: vectors differ by {d:.1e}" for key, d in differences.items() if d is not None and d > 1e-5]
if failures:
    sys.exit("\n".join(failures))
