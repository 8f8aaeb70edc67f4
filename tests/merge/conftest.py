"""The merge tests use the layer cases of tests/lora_layer."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "lora_layer"))
