"""What `merge` and `extract` take of memory: so many times the largest tensor, whatever the model has beside it.

Measured in a process of its own, as the growth of its peak since the library was imported.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig
from transformers.core_model_loading import revert_weight_conversion

from peft_isolate.checkpoints.shards import SINGLE, Spool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")]

MIB = 2**20
CHILD = """
import sys, torch, transformers, peft, zstandard
torch.set_num_threads(1)
from transformers import LlamaForCausalLM, MixtralForCausalLM, AutoModelForCausalLM
from peft_isolate import extract, merge
from peft_isolate.checkpoints import exact
def of(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name + ":")) * 1024
before = of("VmRSS")
{call}
print("GREW", of("VmHWM") - before)
"""


def config(kind: str):
    common = {"vocab_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False}
    if kind == "one large embedding":
        sizes = {"vocab_size": 131072, "hidden_size": 512, "intermediate_size": 128, "num_hidden_layers": 1}
        made = LlamaConfig(**common | sizes)
    elif kind == "many layers":
        sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 16}
        made = LlamaConfig(**common | sizes)
    else:
        sizes = {"hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 1, "num_local_experts": 8}
        made = MixtralConfig(**common | sizes)
    made.architectures = ["MixtralForCausalLM" if kind == "fused experts" else "LlamaForCausalLM"]
    made.dtype = "bfloat16"
    return made


LARGEST = {"one large embedding": 128 * MIB, "many layers": 4 * MIB, "fused experts": 128 * MIB}


def written(folder: Path, kind: str, share: float = 0.0) -> Path:
    """A model of random bf16 numbers, tensor by tensor; of a share of them the bits are others."""
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    made = config(kind)
    made.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    assert max(parameter.nbytes for parameter in model.parameters()) == LARGEST[kind]
    spool = Spool(folder / SINGLE)
    base, moved = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for name, tensor in revert_weight_conversion(model, model.state_dict()).items():
        numbers = torch.empty(tensor.shape, dtype=torch.int16)
        for piece in numbers.view(-1).split(2**22):
            piece.random_(0x3C00, 0x3D00, generator=base)
            if share:
                piece += 3 if share == 1 else 3 * (torch.rand(piece.shape, generator=moved) < share)
        spool.add(name, numbers.view(torch.bfloat16))
    spool.close({"format": "pt"})
    return folder


def growth(call: str, **variables: str) -> int:
    """Bytes by which the peak of a process grows in a call, under these environment variables."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run(
        [sys.executable, "-c", CHILD.replace("{call}", call)], capture_output=True, text=True, env=environment,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rpartition("GREW")[2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{kind: folder with base, everywhere (all moved) and some (5 % moved)}, made when they are asked for."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("models")
            for name, share in (("base", 0.0), ("everywhere", 1.0), ("some", 0.05)):
                written(made[kind] / name, kind, share)
        return made[kind]

    return of


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize(
    ("tuned", "how", "limit"),
    [
        ("everywhere", "mode='region'", 5),
        ("some", "mode='region'", 5),
        ("some", "mode='top', percent=1, include_embeddings=True", 5),
        ("everywhere", "mode='exact'", 3),
    ],
)
def test_extract_and_merge(kind, tuned, how, limit, folders, tmp_path):
    """Merging stays below three times the largest tensor and 256 MiB: whole deltas in fp32, single elements, codes.

    Extracting holds both tensors, their difference in fp32, and what merging makes of the base.
    """
    base, out = folders(kind) / "base", tmp_path / "adapter"
    # Of what was freed glibc keeps 0 to 130 MiB, another amount each run, unless large blocks are mapped one by one.
    extracting = growth(
        f"extract({str(base)!r}, {str(base.parent / tuned)!r}, {str(out)!r}, {how})", MALLOC_MMAP_THRESHOLD_=str(MIB)
    )
    merging = growth(f"merge({str(base)!r}, {str(out)!r}, out={str(tmp_path / 'out')!r})")
    print(f"{kind}, {tuned}, {how}: extract {extracting / MIB:.0f} MiB, merge {merging / MIB:.0f} MiB")
    assert merging <= 3 * LARGEST[kind] + 256 * MIB
    assert extracting <= limit * LARGEST[kind] + 256 * MIB


@pytest.mark.parametrize("kind", ["one large embedding", "fused experts"])
def test_merge_all_but_some(kind, folders, tmp_path):
    """A dense delta with holes."""
    base = folders(kind) / "base"
    name = "model.embed_tokens.weight" if kind == "one large embedding" else "model.layers.0.mlp.experts.gate_up_proj"
    holed(base, name, tmp_path / "adapter")
    merging = growth(f"merge({str(base)!r}, {str(tmp_path / 'adapter')!r}, out={str(tmp_path / 'out')!r})")
    print(f"{kind}, all but: merge {merging / MIB:.0f} MiB")
    assert merging <= 3 * LARGEST[kind] + 256 * MIB


def holed(base: Path, name: str, out: Path) -> None:
    """An adapter on all but one in a thousand scalars of one tensor."""
    from peft_isolate.checkpoints.adapter import PREFIX, WEIGHTS
    from peft_isolate.checkpoints.memory import Checkpoint
    from peft_isolate.deltas.extracted import ExtractedConfig
    from peft_isolate.regions import Region
    from peft_isolate.regions.fingerprint import fingerprint
    from peft_isolate.regions.selection import Selection
    from peft_isolate.regions.stored import StoredSelection

    checkpoint = Checkpoint(base)
    shape = tuple(checkpoint.parameters[name].shape)
    selection = Selection.all_but(shape, torch.arange(0, torch.Size(shape).numel(), 1000))
    made = ExtractedConfig(mode="region", inference_mode=True)
    made.record(Region({name: selection}), checkpoint.model, fingerprint((n, checkpoint.read(n)) for n in checkpoint))
    out.mkdir()
    spool = Spool(out / WEIGHTS)
    module, _, parameter = name.rpartition(".")
    stem = f"{PREFIX}{module}.extracted_{parameter}"
    spool.add(f"{stem}.delta", torch.full(shape, 1e-3))
    codes = StoredSelection.encode(selection).data
    assert codes is not None
    spool.add(f"{stem}.delta_codes", codes)
    spool.close({"format": "pt"})
    made.save_pretrained(str(out))
    assert json.loads((out / "adapter_config.json").read_text())["resolved"]["region"][name]["kind"] == "all_but"
