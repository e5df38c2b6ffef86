"""Small models of every shipped architecture, and copies of them in another order."""

import torch
from torch import nn

from fusion_core.seeding import generator
from ot_fusion.spec.registry import spec_for
from ot_fusion.spec.verify import relabelled_model

TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": 30,
}
TEXT |= {"max_position_embeddings": 16}


class Block(nn.Module):
    def __init__(self, inner, width, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = None
        if stride > 1 or inner != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inner, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 6, 3, 1, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU()
        self.layer1 = nn.Sequential(Block(6, 6), Block(6, 6))
        self.layer2 = nn.Sequential(Block(6, 10, 2), Block(10, 10))
        self.fc = nn.Linear(10, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 5))


def convnet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


def hugging_face(name, **more):
    import transformers

    head, config = {
        "vit": ("ViTForImageClassification", "ViTConfig"),
        "bert": ("BertForMaskedLM", "BertConfig"),
        "bert-classifier": ("BertForSequenceClassification", "BertConfig"),
        "roberta": ("RobertaForMaskedLM", "RobertaConfig"),
        "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig"),
        "gpt2": ("GPT2LMHeadModel", "GPT2Config"),
        "llama": ("LlamaForCausalLM", "LlamaConfig"),
        "llama-mha": ("LlamaForCausalLM", "LlamaConfig"),
        "mistral": ("MistralForCausalLM", "MistralConfig"),
        "qwen2": ("Qwen2ForCausalLM", "Qwen2Config"),
        "qwen3": ("Qwen3ForCausalLM", "Qwen3Config"),
        "gemma": ("GemmaForCausalLM", "GemmaConfig"),
    }[name]
    settings = dict(TEXT)
    if name == "vit":
        settings = {k: v for k, v in TEXT.items() if k not in ("vocab_size", "max_position_embeddings")}
        settings |= {"image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
    if name == "gpt2":
        settings = {
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 30,
            "n_positions": 16,
            "bos_token_id": 1,
            "eos_token_id": 1,
        }
    if name == "distilbert":
        settings = {
            "dim": 16,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 24,
            "vocab_size": 30,
            "max_position_embeddings": 16,
        }
    if name in ("llama", "mistral", "qwen2", "qwen3", "gemma"):
        settings |= {"num_key_value_heads": 2}
    if name in ("qwen3", "gemma"):
        settings |= {"head_dim": 8}
    if name == "roberta":
        settings |= {"max_position_embeddings": 20, "pad_token_id": 1}
    if name in ("llama", "gpt2", "gemma"):
        settings |= {"tie_word_embeddings": True}
    if name in ("llama-mha", "mistral", "qwen3", "qwen2"):
        settings |= {"tie_word_embeddings": False}
    settings |= {"attn_implementation": "sdpa"}
    return getattr(transformers, head)(getattr(transformers, config)(**(settings | more)))


PLAIN = {"mlp": mlp, "convnet": convnet, "resnet": ResNet}
TEXTS = [
    "bert",
    "bert-classifier",
    "roberta",
    "distilbert",
    "gpt2",
    "llama",
    "llama-mha",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
]
NAMES = [*PLAIN, "vit", *TEXTS]


def make(name, seed=0, **more):
    """A model with random weights everywhere, norms and biases included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = PLAIN[name]() if name in PLAIN else hugging_face(name, **more)
        for key, value in (*model.named_parameters(), *model.named_buffers()):
            if key.endswith("running_var"):
                value.data = 0.5 + torch.rand_like(value)
            elif value.ndim == 1 and value.is_floating_point() and "inv_freq" not in key:
                value.data = torch.randn_like(value) * 0.3 + (
                    1.0 if "norm" in key.lower() or "ln_" in key or "bn" in key else 0.0
                )
            elif value.ndim > 1 and value.is_floating_point():
                value.data = torch.randn_like(value) * (
                    1.5 / value[0].numel() ** 0.5 if "embed" not in key and "wte" not in key else 0.5
                )
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model.double().eval()


def inputs(name, rows=6, seed=1):
    draws = generator(seed, name)
    if name in TEXTS:
        return {"input_ids": torch.randint(2, 30, (rows, 7), generator=draws)}
    shape = {"mlp": (8,), "convnet": (3, 8, 8), "resnet": (3, 8, 8), "vit": (1, 8, 8)}[name]
    return torch.randn(rows, *shape, generator=draws, dtype=torch.float64)


def shuffled(model, seed=0, rotate=False):
    """The same function with its neurons in a random legal order."""
    spec, draws = spec_for(model), generator(seed, "shuffle")
    elements = {}
    for name, space in spec.spaces.items():
        element = space.group.random(draws)
        if not rotate and any(index.is_floating_point() for index in element.values()):
            element = {view: _rounded(space.group, element, view) for view in element}
        elements[name] = element
    return relabelled_model(model, spec, elements), elements


def _rounded(group, element, view):
    """A rotated order without its rotation."""
    if not element[view].is_floating_point():
        return element[view]
    size = group.dim
    heads = len(element[view]) // size
    blocks = element[view].abs().view(heads, size, heads, size).sum((1, 3))
    return (blocks.argmax(0)[:, None] * size + torch.arange(size)).flatten()
