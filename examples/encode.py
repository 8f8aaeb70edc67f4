"""Encode texts with a saved adapter; says `import peft`, so `python -m peft_c encode.py ...` runs it with peft_c."""

import json
import sys

import peft
import torch
from stdlib_search import encode, load_minilm


def main(adapter: str, texts: str, result: str) -> None:
    """Write the vectors of the texts in a JSON file, (len(texts), hidden), with torch.save."""
    torch.manual_seed(0)
    model, tokenizer = load_minilm()
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with open(texts) as file:
        torch.save(encode(model, tokenizer, json.load(file)), result)


if __name__ == "__main__":
    main(*sys.argv[1:])
