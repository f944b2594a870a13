"""What does a training step cost beside full fine-tuning, and beside plain freezing of the same matrices?

Of HFT, and of CoFiTune without and with a soft mask. Plain freezing (`requires_grad_(False)` on everything outside the
region, in-place training of the rest) is the ideal: it trains the same numbers but keeps no base, so nothing can be
unmerged, disabled or shared as a difference. A Llama shape, AdamW, forward, backward and step; medians of interleaved
steps.
"""

from __future__ import annotations

import argparse
import copy
import resource

import torch
from common import interleaved, report
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_isolate import CoFiTuneConfig, HalfFTConfig, plan
from peft_isolate.methods.cofitune import Importance
from peft_isolate.methods.cofitune.importance.sites import unit_shapes


def step_of(model: torch.nn.Module, tokens: torch.Tensor):
    """One whole training step, as a function without arguments."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3 // 64 * 64,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        vocab_size=8192,
    )
    base = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype))
    tokens = torch.randint(0, config.vocab_size, (args.batch, args.length), device=args.device)
    importance = Importance({key: torch.rand(shape) for key, shape in unit_shapes(base).items()}, "absolute", 1, 1)
    configs = {
        "HFT": HalfFTConfig(),
        "CoFiTune": CoFiTuneConfig(soft_mask=None),
        "CoFiTune, soft mask": CoFiTuneConfig(importance=importance),
    }
    # {run: the plain freezing that it is compared with}
    ideals = {"HFT": "plain freezing of HFT's half"}
    ideals |= {run: "plain freezing of CoFiTune's region" for run in configs if run != "HFT"}
    models = {"full": copy.deepcopy(base)}
    for run, ideal in ideals.items():
        if ideal not in models:
            models[ideal] = copy.deepcopy(base)
            region = plan(base, configs[run]).region
            for name, parameter in models[ideal].named_parameters():
                parameter.requires_grad_(name in region)
        models[run] = get_peft_model(copy.deepcopy(base), configs[run])
    seconds = interleaved({name: step_of(model, tokens) for name, model in models.items()}, args.rounds)
    n = sum(parameter.numel() for parameter in base.parameters())
    rows = [
        {
            "model": f"{n / 1e6:.0f}M {args.dtype} {args.batch}x{args.length} {args.device}",
            "run": name,
            "s a step": f"{s:.3f}",
            "of full": f"{s / seconds['full']:.3f}",
            "of plain freezing": f"{s / seconds[ideals.get(name, name)]:.3f}" if name != "full" else "",
            "tokens a second": f"{tokens.numel() / s:.0f}",
        }
        for name, s in seconds.items()
    ]
    report("step" if args.device == "cpu" else f"step_{args.device}_{args.dtype}", rows)
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
