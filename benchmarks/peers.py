"""The model that all benchmarks of training share, and what a user might train of it: our methods and their peers.

Each function takes a fresh base, wraps or freezes it in place, and returns the model to train. Wherever a peer leaves
embeddings and head frozen, ours does: LoRA, SHiRA, Super-Tuning, OSF, and our elements and all-but train the seven
linear layers of each block, and nothing else. Over a bf16 base the numbers that are trained are fp32 in ours and in
the other adapters (PEFT's `autocast_adapter_dtype`, its default); full fine-tuning and plain freezing train the bf16
weights themselves: half the bytes, and most of what a small rate changes is rounded away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from peft import LoraConfig, OSFConfig, ShiraConfig, SupertuningConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_isolate import CoFiTuneConfig, CoreIsolationConfig, HalfFTConfig, Region, plan
from peft_isolate.methods.cofitune import Importance
from peft_isolate.methods.cofitune.importance.sites import unit_shapes
from peft_isolate.regions import Selection

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# SHiRA trains rank · (rows + columns) of a matrix: of the shapes of the bars this rank comes nearest to 1 %.
SHIRA_RANK = 5
VOCABULARY = 8192

Make = Callable[[nn.Module], nn.Module]


def llama(hidden: int = 768, layers: int = 8, dtype: str = "float32", device: str = "cpu") -> LlamaForCausalLM:
    """A Llama shape with random weights: 69 M parameters by default, heads of 64, an MLP of 8/3 the width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=VOCABULARY,
    )
    with torch.device(device):
        return LlamaForCausalLM(config).to(getattr(torch, dtype))


class Stack(nn.Module):
    """The linear layers of such a Llama and hardly anything else: no attention, no norm, no head.

    Their sums keep the order in which a Llama's gradients come: every layer but the first ones passes a gradient on to
    its input.
    """

    def __init__(self, hidden: int = 768, layers: int = 8) -> None:
        super().__init__()
        inner = hidden * 8 // 3 // 64 * 64
        shapes = {"gate_proj": (hidden, inner), "up_proj": (hidden, inner), "down_proj": (inner, hidden)}
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*shapes.get(name, (hidden, hidden)), bias=False) for name in LINEARS})
            for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, hidden) to (tokens, hidden)."""
        for layer in self.layers:
            x = x + layer["o_proj"](layer["q_proj"](x) + layer["k_proj"](x) + layer["v_proj"](x))
            x = x + layer["down_proj"](layer["gate_proj"](x) + layer["up_proj"](x))
        return x


def stack(hidden: int = 768, layers: int = 8, dtype: str = "float32", device: str = "cpu") -> Stack:
    """A `Stack` with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        return Stack(hidden, layers).to(getattr(torch, dtype))


def matrices(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the weights of the seven linear layers of each block."""
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name.split(".")[-2] in LINEARS and name.endswith(".weight")
    }


def drawn(shapes: Mapping[str, tuple[int, ...]], counts: Mapping[str, int]) -> Region:
    """So many random elements of each matrix, the same ones for the same shapes and counts."""
    random = np.random.default_rng(0)
    return Region(
        {
            name: Selection.elements(shape, np.sort(random.choice(np.prod(shape), counts[name], replace=False)))
            for name, shape in shapes.items()
        }
    )


def share_of(shapes: Mapping[str, tuple[int, ...]], share: float) -> dict[str, int]:
    """{name: how many scalars that share of each matrix is}."""
    return {name: max(1, round(share * float(np.prod(shape)))) for name, shape in shapes.items()}


def shira_counts(shapes: Mapping[str, tuple[int, ...]], rank: int = SHIRA_RANK) -> dict[str, int]:
    """{name: how many scalars SHiRA trains of each matrix}."""
    return {name: rank * sum(shape) for name, shape in shapes.items()}


def importance(base: nn.Module) -> Importance:
    """A random importance of every unit there is."""
    torch.manual_seed(0)
    return Importance({key: torch.rand(shape) for key, shape in unit_shapes(base).items()}, "absolute", 1, 1)


def full(base: nn.Module) -> nn.Module:
    """Full fine-tuning: every parameter."""
    return base


def freezing(base: nn.Module, region: Region) -> nn.Module:
    """Plain freezing: the tensors of a region learn in place, by `requires_grad_`; there is no way back to the base.

    The ideal of a region of whole tensors: the same numbers learn, and no delta is added to anything.
    """
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in region)
    return base


def full_matrices(base: nn.Module) -> nn.Module:
    """Full fine-tuning of the seven matrices of each block, the rest frozen."""
    return freezing(base, Region({name: Selection.whole(shape) for name, shape in matrices(base).items()}))


def freezing_half(base: nn.Module) -> nn.Module:
    """Plain freezing of what HFT leaves alone."""
    return freezing(base, plan(base, HalfFTConfig()).region)


def freezing_cofitune(base: nn.Module) -> nn.Module:
    """Plain freezing of what CoFiTune leaves alone."""
    return freezing(base, plan(base, CoFiTuneConfig(soft_mask=None)).region)


def lora(base: nn.Module, rank: int = 16) -> nn.Module:
    """LoRA: two thin matrices beside each of the seven."""
    return get_peft_model(base, LoraConfig(r=rank, target_modules=LINEARS))


def shira(base: nn.Module, rank: int = SHIRA_RANK) -> nn.Module:
    """SHiRA: random elements, rank · (rows + columns) of each of the seven matrices."""
    return get_peft_model(base, ShiraConfig(r=rank, random_seed=0, target_modules=LINEARS))


def super_tuning(base: nn.Module, share: float = 0.01) -> nn.Module:
    """Super-Tuning: the elements of largest magnitude, a share of each of the seven matrices."""
    return get_peft_model(base, SupertuningConfig(sparsity=1 - share, target_modules=LINEARS))


def osf(base: nn.Module) -> nn.Module:
    """OSF: the lower half of the singular vectors and values of each of the seven matrices, its default."""
    return get_peft_model(base, OSFConfig(target_modules=LINEARS))


def half(base: nn.Module) -> nn.Module:
    """HFT."""
    return get_peft_model(base, HalfFTConfig())


def cofitune(base: nn.Module, masked: bool = False) -> nn.Module:
    """CoFiTune's default region, with or without a soft mask on the update."""
    config = CoFiTuneConfig(importance=importance(base)) if masked else CoFiTuneConfig(soft_mask=None)
    return get_peft_model(base, config)


def cofitune_masked(base: nn.Module) -> nn.Module:
    """CoFiTune's default region, with a soft mask on the update."""
    return cofitune(base, masked=True)


def elements(base: nn.Module, share: float | None = None) -> nn.Module:
    """Random elements of the seven matrices: a share of each, or by default exactly as many as SHiRA's."""
    shapes = matrices(base)
    core = drawn(shapes, shira_counts(shapes) if share is None else share_of(shapes, share))
    return get_peft_model(base, CoreIsolationConfig(train="core", core=core, target_modules=LINEARS))


def all_but(base: nn.Module, share: float = 0.01) -> nn.Module:
    """A stage of CPI-FT: the seven matrices but for the core of an earlier task, a share of random elements."""
    shapes = matrices(base)
    frozen = drawn(shapes, share_of(shapes, share))
    return get_peft_model(base, CoreIsolationConfig(frozen=[frozen], target_modules=LINEARS))


def trained(model: nn.Module) -> int:
    """How many scalars learn."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def step_of(model: nn.Module, inputs: torch.Tensor) -> Callable[[], None]:
    """One whole training step with AdamW, as a function without arguments.

    Args:
        model: A causal model, or a `Stack`, whose loss is the mean square of its output; adapted or not.
        inputs: Token numbers (batch, length), or floats (tokens, hidden) for a `Stack`.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        if inputs.is_floating_point():
            model(inputs).float().square().mean().backward()
        else:
            model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inputs_of(base: nn.Module, batch: int = 4, length: int = 256) -> torch.Tensor:
    """What `step_of` takes for a base, drawn at random."""
    like = next(base.parameters())
    if isinstance(base, Stack):
        return torch.randn(batch * length, base.layers[0]["q_proj"].in_features, device=like.device, dtype=like.dtype)
    return torch.randint(0, VOCABULARY, (batch, length), device=like.device)
