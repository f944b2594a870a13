"""Where a model lies, and what class it is of: its config alone is read, no weight."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import IsolateError


def folder_of(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model or an adapter: one that is there, or the local copy of a repository on the Hub.

    Args:
        name: A folder, or a Hub id.
        revision: Branch, tag or commit; of the Hub only.

    Raises:
        IsolateError: It is neither, or the Hub cannot be reached and there is no copy of it here.
    """
    if not isinstance(name, str | os.PathLike):
        raise IsolateError(f"a folder or the name of a repository of the Hub is wanted, not a {type(name).__name__}")
    text = os.fspath(name)
    if os.path.isdir(text):
        return Path(text)
    if text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise IsolateError(f"there is no folder {text!r}, and no repository of the Hub has such a name")
    from huggingface_hub import snapshot_download

    # Never what runs when it is read.
    ignored = ["*.bin", "*.pt", "*.pth", "*.msgpack", "*.h5", "*.gguf", "*.onnx", "*.ckpt", "*.pkl"]
    try:
        return Path(snapshot_download(text, revision=revision, ignore_patterns=ignored))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise IsolateError(f"{text!r} is no folder, and the Hub does not give it: {reason}") from error


def models_config(base: str | os.PathLike[str], revision: str | None = None) -> Any:
    """A model's config.

    Args:
        base: Folder or Hub id.
        revision: Of the Hub.

    Raises:
        IsolateError: There is none, or of a model that transformers does not know.
    """
    from transformers import AutoConfig

    if os.path.isfile(os.path.join(os.fspath(base), "adapter_config.json")) and not os.path.isfile(
        os.path.join(os.fspath(base), "config.json")
    ):
        raise IsolateError(f"{os.fspath(base)!r} is an adapter, and a model is wanted: merge it first")
    name = os.fspath(base)
    if not os.path.isdir(name) and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise IsolateError(f"there is no folder {name!r}, and no model of the Hub has such a name")
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except OSError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise IsolateError(f"{name!r} is no folder with a model, and the Hub does not give it: {reason}") from error
    except (ValueError, KeyError) as error:
        raise IsolateError(f"{name!r} holds no model that transformers knows: {error}") from error


def meta_model(base: str | os.PathLike[str], class_name: str | None = None, revision: str | None = None) -> nn.Module:
    """A model of the right class without weights, on the meta device.

    Args:
        base: Folder or Hub id.
        class_name: Of transformers' classes; None for the one that the model's config names.
        revision: Of the Hub.

    Raises:
        IsolateError: See `models_config`; or transformers has no such class.
    """
    import transformers

    config = models_config(base, revision)
    dtype = config.dtype or torch.float32
    with torch.device("meta"):
        if class_name is None:
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
        kind = getattr(transformers, class_name, None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            raise IsolateError(f"transformers has no model class {class_name!r}: update transformers")
        if not isinstance(config, kind.config_class):  # type: ignore[attr-defined]
            raise IsolateError(
                f"{os.fspath(base)!r} is a {type(config).__name__.removesuffix('Config')}, and a {class_name} is "
                "wanted: "
                "it is another model than the adapter's base"
            )
        made: nn.Module = kind._from_config(config, dtype=dtype)  # type: ignore[attr-defined]
        return made


def auto_class(config: Any) -> Any:
    """The Auto class that makes the architecture which the config names; causal language models failing that."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModel": auto.MODEL_MAPPING_NAMES,
    }
    for architecture in config.architectures or ():
        for name, classes in mappings.items():
            made = classes.get(config.model_type, ())
            if architecture in ((made,) if isinstance(made, str) else made):
                return getattr(transformers, name)
    return transformers.AutoModelForCausalLM
