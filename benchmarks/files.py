"""Saving and loading an adapter of 224 layers."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from models import PACKAGES, stack, with_lora
from timing import Case, Step


def _save_and_load() -> dict[str, list[Step]]:
    base = stack(32, 128, 256)
    room = Path(tempfile.mkdtemp(prefix="bench"))
    atexit.register(shutil.rmtree, room, ignore_errors=True)

    def cycle(name):
        model, folder = with_lora(name, base), str(room / name)
        return [
            ("save_pretrained", lambda: model.save_pretrained(folder)),
            ("load_adapter", lambda: model.load_adapter(folder, "loaded")),
            (None, lambda: model.delete_adapter("loaded")),
        ]

    cycles = {name: cycle(name) for name in PACKAGES}
    try:
        from safetensors.torch import load_file, save_file
    except ImportError:
        return cycles
    model = with_lora(PACKAGES[0], base)
    state = {key: p.detach().clone() for key, p in model.named_parameters() if "lora_" in key}
    file, pickled = str(room / "floor.safetensors"), str(room / "torch.pt")
    cycles["floor"] = [("save_pretrained", lambda: save_file(state, file)), ("load_adapter", lambda: load_file(file))]
    cycles["torch"] = [
        ("save_pretrained", lambda: torch.save(state, pickled)),
        ("load_adapter", lambda: torch.load(pickled)),
    ]
    return cycles


def cases(quick: bool) -> Iterator[Case]:
    """The cases of this theme."""
    yield Case("save load", _save_and_load, note="224 layers, r=16; floor: the file alone", seconds=3)
