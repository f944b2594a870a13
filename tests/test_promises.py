"""The promises, over config × architecture × dtype × selection kind: one matrix, real steps, every bit compared."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_isolate import CoFiTuneConfig, CoreIsolationConfig, HalfFTConfig, plan
from peft_isolate.deltas import DeltaLayer
from peft_isolate.errors import BaseMismatchError
from peft_isolate.regions import base_parameters
from peft_isolate.regions.selection import KINDS
from tests.compare import bits, logits
from tests.given import GivenConfig
from tests.importances import importance
from tests.models import ARCHITECTURES, MORE_ARCHITECTURES, tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the adapter will take")

CONFIGS = {
    "half": HalfFTConfig,
    **{kind: functools.partial(GivenConfig, kind=kind) for kind in KINDS},
    "layers": functools.partial(HalfFTConfig, granularity="layer"),
    "model, a third, balanced": functools.partial(
        HalfFTConfig, granularity="model", fraction=0.33, balance="parameters"
    ),
}
DRAWS = list(CONFIGS)[-2:]
# With an importance of the model's own.
MASKED = {
    f"cofitune, {damps}": functools.partial(CoFiTuneConfig, layer_range=(0, 1), modules="MHA+FFN", soft_mask=damps)
    for damps in ("update", "gradient")
}
# Around a random part of the matrices, and that part alone.
CORES = {
    "core isolation, complement": lambda core: CoreIsolationConfig(frozen=core),
    "core isolation, core": lambda core: CoreIsolationConfig(train="core", core=core),
}
CASES = [(architecture, config) for architecture in ARCHITECTURES for config in CONFIGS if config not in DRAWS] + [
    (architecture, config) for architecture in ("llama", "gpt2", "gpt_neox") for config in DRAWS
]
CASES += [(architecture, "cofitune, update") for architecture in (*ARCHITECTURES, "t5", "qwen3_next")]
CASES += [(architecture, "cofitune, gradient") for architecture in ("llama", "gpt2", "mixtral")]
AROUND = ("llama", "gemma2", "gpt2", "phi3", "gpt_neox", "bert", "mixtral", "t5", "qwen3_next", "mamba")
CASES += [(architecture, "core isolation, complement") for architecture in AROUND]
CASES += [(architecture, "core isolation, core") for architecture in ("llama", "gpt2", "mixtral")]
CASES += [(architecture, "half") for architecture in MORE_ARCHITECTURES] + [("t5", kind) for kind in KINDS]


def config_of(config: str, architecture: str):
    if config in CORES:
        return CORES[config](GivenConfig(share=0.1).choose(tiny(architecture)))
    return MASKED[config](importance=importance(architecture)) if config in MASKED else CONFIGS[config]()


def train(model: PeftModel, steps: int = 12) -> None:
    """Everything that leaks through a gradient mask: weight decay, clipping, accumulation, momentum."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    for step in range(steps):
        model(tokens(seed=step), labels=tokens(seed=step)).loss.backward()
        if step % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def assert_same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    assert torch.equal(bits(left), bits(right))


# Of the half-precision formats bf16 is the one that is trained in; fp16 takes the same path, and its time.
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("architecture", "config"), CASES)
def test_promises(architecture, config, dtype, tmp_path):
    """Isolation, exactness, size and safety (promises 1 to 4) on one trained adapter."""
    # Frozen, as PEFT freezes it: for some layouts (Mamba) torch takes another kernel where a weight wants a gradient.
    base = tiny(architecture, dtype).requires_grad_(False)
    before = logits(base)
    region = plan(base, config_of(config, architecture)).region
    model = get_peft_model(copy.deepcopy(base), config_of(config, architecture))
    assert_same_bits(logits(model), before)  # begins as the base
    train(model)
    adapted = logits(model)
    assert not torch.equal(adapted, before)

    # 1. Isolation: the base did not move at all, and the merged model differs from it on the region only.
    for name, parameter in base_parameters(model).items():
        assert_same_bits(parameter, base.get_parameter(name))
    merged = copy.deepcopy(model).merge_and_unload()
    for name, parameter in merged.named_parameters():
        w0 = base.get_parameter(name)
        moved = parameter.detach() != w0
        if name in region:
            inside = region[name].mask().to(moved.device)
            # Short texts have few of T5's distances.
            least = 0.3 if "relative_attention_bias" in name else 0.5
            assert moved[inside].float().mean() >= least, f"{name} hardly learned"
            moved = moved & ~inside
        assert not moved.any(), f"{name} moved outside the region"

    # 2. Exactness: merged, merged again, unmerged, disabled.
    assert_same_bits(logits(merged), adapted)
    for _ in range(2):
        model.merge_adapter()
        assert_same_bits(logits(model), adapted)
        model.unmerge_adapter()
        assert_same_bits(logits(model), adapted)
    with model.disable_adapter():
        assert_same_bits(logits(model), before)

    # 3. Small: the region's difference and nothing else, and it gives the same model elsewhere.
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    dense = sum(s.numel - s.count for s in region.values() if s.kind == "all_but")  # their holes are saved as zeros
    numbers = {name: tensor for name, tensor in saved.items() if not name.endswith(("_codes", "importance"))}
    assert sum(tensor.numel() for tensor in numbers.values()) == region.count + dense
    assert any(name.endswith("importance") for name in saved) == (config in MASKED)
    assert not any("base_layer" in name for name in saved)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_bits(logits(loaded), adapted)
    assert_same_bits(logits(model.unload()), before)

    # 4. Safe to apply: another base of the same shapes is refused, and nothing of it was touched.
    other = tiny(architecture, dtype, seed=1).requires_grad_(False)
    untouched = logits(other)
    with pytest.raises(BaseMismatchError, match="this is another base than the adapter's"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not any(isinstance(module, DeltaLayer) for module in other.modules())
    assert_same_bits(logits(other), untouched)
