"""What all tests share: no network, the same random numbers, a fair share of the processor, tiny models."""

import os
import signal
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # for subprocesses
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let what runs in the background ignore Ctrl-C

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402


def pytest_configure(config):
    """Under pytest-xdist, each worker takes its share of the processors."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def peft():
    """The installed PEFT, the reference; tests that need it are skipped where it is not installed."""
    return pytest.importorskip("peft")


class MLP(nn.Module):
    """Embedding, two hidden layers and a head: (batch, length) token ids to (batch, length, 11) logits."""

    def __init__(self, hidden: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(19, hidden)
        self.up = nn.Linear(hidden, 40)
        self.down = nn.Linear(40, hidden)
        self.head = nn.Linear(hidden, 11)

    def forward(self, ids):
        h = self.embed(ids)
        return self.head(torch.relu(h + self.down(torch.tanh(self.up(h)))))


@pytest.fixture
def mlp():
    """A function that returns the same small network at each call."""

    def build(dtype=torch.float32):
        torch.manual_seed(7)
        return MLP().to(dtype)

    return build


@pytest.fixture
def llama():
    """A function that returns the same tiny Llama at each call."""
    transformers = pytest.importorskip("transformers")

    def build(dtype=torch.float32):
        torch.manual_seed(7)
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return transformers.LlamaForCausalLM(config).to(dtype).eval()

    return build
