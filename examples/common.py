"""What `sft.py` and `dpo.py` share: options, data, model, the plan, and what is saved."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import datasets
import torch
import yaml
from datasets import DatasetDict, IterableDatasetDict
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import find_adapter_config_file
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser, get_dataset

from peft_isolate import CoFiTuneConfig, CoreIsolationConfig, HalfFTConfig, plan
from peft_isolate.errors import IsolateError

# A method that is not in this list does not exist; "none" is full fine-tuning, to compare with.
METHODS = {"half_ft": HalfFTConfig, "cofitune": CoFiTuneConfig, "core_isolation": CoreIsolationConfig, "none": None}
# The options that only one of them has.
OPTIONS = {
    "half_ft": ("fraction", "granularity", "balance", "round_index", "region_seed", "train_embeddings"),
    "cofitune": ("layer_range", "modules", "importance", "soft_mask"),
    "core_isolation": ("core", "frozen"),
}

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class IsolateArguments:
    """Which region learns, see the configs of the methods, and what is written at the end."""

    method: str = field(default="half_ft", metadata={"help": "What chooses the region.", "choices": list(METHODS)})
    fraction: float = field(default=0.5, metadata={"help": "Share of the matrices that learns, in (0, 1]."})
    granularity: str = field(
        default="category",
        metadata={"help": "What is drawn: matrices of each category, whole layers, or any matrices of the model.",
                  "choices": ["category", "layer", "model"]},
    )  # fmt: skip
    balance: str = field(
        default="count",
        metadata={"help": "Draw by number of matrices, or the same share of large and small ones.",
                  "choices": ["count", "parameters"]},
    )  # fmt: skip
    round_index: int = field(default=0, metadata={"help": "Number of the round: another one draws another half."})
    region_seed: int = field(default=0, metadata={"help": "Seed of the draw; --seed is the trainer's and another."})
    train_embeddings: str = field(
        default="false",
        metadata={"help": "Train the input embeddings, too. (TRL refuses an adapter on the head.)",
                  "choices": ["false", "input"]},
    )  # fmt: skip
    layer_range: str = field(
        default="second_quarter",
        metadata={"help": "CoFiTune: two fractions of the depth, like 0.25,0.5, or the name of a range."},
    )
    modules: str = field(default="FFN", metadata={"help": "CoFiTune: MHA, FFN, MHA+FFN, or roles, like up,down."})
    importance: str | None = field(
        default=None, metadata={"help": "CoFiTune: a file of `peft-isolate importance`. Without it no mask applies."}
    )
    soft_mask: str = field(
        default="update",
        metadata={"help": "CoFiTune: what the importance damps.", "choices": ["update", "gradient", "none"]},
    )
    core: str | None = field(
        default=None, metadata={"help": "Core isolation: train this region alone, a file of `core_region`."}
    )
    frozen: str = field(
        default="", metadata={"help": "Core isolation: files of regions that stay as they are, with commas between."}
    )
    save_dtype: str | None = field(
        default=None,
        metadata={"help": "Save the adapter in this dtype instead of fp32: half the file, rounded.",
                  "choices": ["bfloat16", "float16", "float32"]},
    )  # fmt: skip
    merge: bool = field(default=False, metadata={"help": "Also write the merged model to <output_dir>/merged."})

    def __post_init__(self) -> None:
        # A YAML file passes by argparse's choices, and its `false` is no string.
        self.train_embeddings = str(self.train_embeddings).lower()
        for name, choices in (("method", list(METHODS)), ("train_embeddings", ["false", "input"])):
            if getattr(self, name) not in choices:
                raise IsolateError(f"{name}={getattr(self, name)!r} is unknown here: use one of {choices}")
        for method, names in OPTIONS.items():
            if self.method != method and (changed := self.changed(names)):
                raise IsolateError(
                    f"{' and '.join(changed)} belongs to method={method}, not {self.method}: leave it out"
                )
        if self.merge and METHODS[self.method] is None:
            raise IsolateError(
                f"merge has nothing to merge with method={self.method!r}: output_dir is the whole model"
            )

    def config(self) -> Any:
        """The PEFT config, or None where the whole model learns."""
        if METHODS[self.method] is None:
            return None
        fields: dict[str, Any] = {"save_dtype": self.save_dtype, "task_type": "CAUSAL_LM"}
        if self.method == "cofitune":
            return CoFiTuneConfig(
                layer_range=_fractions(self.layer_range),
                modules=tuple(self.modules.split(",")) if "," in self.modules else self.modules,
                importance=self.importance,
                soft_mask=None if self.soft_mask == "none" else self.soft_mask,
                **fields,
            )
        if self.method == "core_isolation":
            return CoreIsolationConfig(
                train="core" if self.core else "complement",
                core=self.core,
                frozen=tuple(self.frozen.split(",")) if self.frozen else (),
                **fields,
            )
        return HalfFTConfig(
            fraction=self.fraction,
            granularity=self.granularity,
            balance=self.balance,
            round_index=self.round_index,
            seed=self.region_seed,
            train_embeddings="input" if self.train_embeddings == "input" else False,
            **fields,
        )

    def changed(self, names: Sequence[str]) -> list[str]:
        """Those of the options that are not at their defaults."""
        default = {option.name: option.default for option in fields(self)}
        return [name for name in names if getattr(self, name) != default[name]]


def _fractions(text: str) -> Any:
    """ "0.25,0.5" as numbers; a name as it is, which the config checks."""
    try:
        return tuple(float(part) for part in text.split(",")) if "," in text else text
    except ValueError:
        return text


class Parser(TrlParser):
    """TRL's parser; a wrong flag gets one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise IsolateError(f"{message}; --help lists the options")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake ends the script with one line and exit code 1, anything else with its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from error


def parse(argv: Sequence[str] | None, trainer_config: type, isolate: type, learning_rate: float) -> tuple[Any, ...]:
    """Read flags and the YAML file of `--config`; flags win.

    Returns:
        (ScriptArguments, trainer_config, ModelConfig, DatasetMixtureConfig, isolate), instances.
    """
    parser = Parser((ScriptArguments, trainer_config, ModelConfig, DatasetMixtureConfig, isolate))
    parser.set_defaults(learning_rate=learning_rate)
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[-1:] == ["--config"]:
        raise IsolateError("--config needs the name of a YAML file after it")
    try:
        parsed = parser.parse_args_and_config(argv)
    except yaml.YAMLError as error:
        raise IsolateError(f"the file of --config is no YAML: {error}") from error
    model_args = parsed[2]
    if model_args.use_peft:
        raise IsolateError("use_peft is TRL's LoRA: use its own script for that, or --method here")
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise IsolateError("this script loads no quantised base: leave load_in_4bit and load_in_8bit out")
    return parsed


def load_data(script_args: ScriptArguments, mixture: DatasetMixtureConfig, columns: Sequence[set[str]]) -> Any:
    """Load `--dataset_name`, or the `datasets` of a YAML file.

    Args:
        script_args: `dataset_name` is a Hub id, a file (.json, .jsonl, .csv, .parquet), a folder of such files, or one
            written by `save_to_disk`.
        mixture: TRL's mixture of several.
        columns: The training split must have all columns of one of these sets.

    Returns:
        A dict of splits.
    """
    name = script_args.dataset_name
    if mixture.datasets:
        splits = get_dataset(mixture)
    elif name is None:
        raise IsolateError("no data: pass --dataset_name with a Hub id, a file or a folder")
    else:
        splits = _load(Path(name), script_args)
    found = split(splits, script_args.dataset_train_split)
    if found.column_names is not None and not any(wanted <= set(found.column_names) for wanted in columns):
        shown = " or ".join(" + ".join(sorted(wanted)) for wanted in columns)
        raise IsolateError(
            f"the data has the columns {sorted(found.column_names)}, but {shown} is needed; rename them"
        )
    return splits


def _load(path: Path, script_args: ScriptArguments) -> Any:
    name, streaming = script_args.dataset_name, script_args.dataset_streaming
    if path.is_file() and path.suffix not in LOADERS:
        raise IsolateError(f"{name!r} is no data file that is known: its name must end in one of {list(LOADERS)}")
    try:
        if path.is_file():
            return datasets.load_dataset(LOADERS[path.suffix], data_files=str(path), streaming=streaming)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            saved = datasets.load_from_disk(str(path))
            return saved if isinstance(saved, dict) else DatasetDict({script_args.dataset_train_split: saved})
        return datasets.load_dataset(name, name=script_args.dataset_config, streaming=streaming)
    except Exception as error:  # the loaders raise many kinds, few of them documented
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise IsolateError(f"the data {name!r} cannot be loaded: {reason}") from error


def split(splits: DatasetDict | IterableDatasetDict, name: str) -> Any:
    """One split of the data, or an error that names those there are."""
    if name not in splits:
        raise IsolateError(
            f"no split {name!r} in the data, only {list(splits)}: see --dataset_train_split, --dataset_test_split"
        )
    return splits[name]


def load_model(
    model_args: ModelConfig, training_args: Any, name: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the base in the dtype of `--dtype`, and its tokenizer. (The deltas are fp32 whatever the base is.)

    Args:
        model_args: TRL's.
        training_args: `model_init_kwargs` are used up: TRL takes them for models that it loads itself.
        name: Instead of `model_args.model_name_or_path`.
    """
    name = name or model_args.model_name_or_path
    if name is None:
        raise IsolateError("no model: pass --model_name_or_path with a Hub id or a folder")
    if not Path(name).is_dir() and name.count("/") != 1 and "/" in name:
        raise IsolateError(f"there is no folder {name!r}, and no model of the Hub has such a name")
    kwargs: dict[str, Any] = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
    }
    if find_adapter_config_file(name, revision=model_args.model_revision) is not None:
        raise IsolateError(
            f"{name!r} is an adapter, no model: train it further with dpo.py --adapter, or take its merged model"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    dtype = model_args.dtype
    kwargs["dtype"] = dtype if dtype in ("auto", None) else getattr(torch, dtype)
    kwargs["attn_implementation"] = model_args.attn_implementation
    model = AutoModelForCausalLM.from_pretrained(name, **(kwargs | (training_args.model_init_kwargs or {})))
    training_args.model_init_kwargs = None
    return model, tokenizer


def load_adapter(path: str, model_args: ModelConfig, training_args: Any) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load an adapter to be trained further, on `--model_name_or_path` or the base that it names."""
    config = PeftConfig.from_pretrained(path)
    base, tokenizer = load_model(
        model_args, training_args, model_args.model_name_or_path or config.base_model_name_or_path
    )
    with suppress(ValueError, OSError):
        # The one it was trained with: SFT may have given it a chat template.
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=training_args.trust_remote_code)
    return PeftModel.from_pretrained(base, path, is_trainable=True), tokenizer


def show_plan(model: PreTrainedModel, config: PeftConfig | None, training_args: Any) -> None:
    """Print what learns, on the first process."""
    if config is None:
        text = f"trained   all {sum(parameter.numel() for parameter in model.parameters()):,} scalars"
    else:
        text = str(plan(model, config))
    if training_args.process_index == 0:
        print(text, flush=True)


def checkpoint(training_args: Any) -> str | None:
    """The checkpoint to go on from: `--resume_from_checkpoint` with a folder, or with `true` for the latest."""
    wanted = training_args.resume_from_checkpoint
    if wanted in (None, False) or str(wanted).lower() == "false":
        return None
    folder = Path(training_args.output_dir)
    if str(wanted).lower() == "true":
        latest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if latest is None:
            raise IsolateError(f"output_dir={str(folder)!r} holds no checkpoint: leave resume_from_checkpoint out")
        return latest
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise IsolateError(
            f"resume_from_checkpoint={wanted!r} is no checkpoint: pass a folder like output/checkpoint-500"
        )
    return wanted


def save(trainer: Trainer, script_args: ScriptArguments, merge: bool) -> None:
    """Write the adapter (or the whole model), push it where asked, and write the merged model."""
    output = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if isinstance(model, PeftModel) and "ref" in model.peft_config:
        # TRL's frozen copy of the adapter that DPO started from would be saved, too.
        model.delete_adapter("ref")
    trainer.save_model(str(output))
    trainer.accelerator.print(f"saved to {output}")
    if trainer.args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    if merge and trainer.args.should_save:
        model.merge_and_unload().save_pretrained(output / "merged")
        trainer.processing_class.save_pretrained(output / "merged")
        trainer.accelerator.print(f"merged model saved to {output / 'merged'}")
    # A process that ends right after a collective can hang: gloo's thread wants Python to let go of the last tensors,
    # and Python, on its way out, waits for that thread (pytorch/pytorch#190489). While this waits, the thread is done.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
