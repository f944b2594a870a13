"""What the commands read: YAML files, configs, models. What is wrong is said in one line, with what is allowed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import IsolateError

# What a model's wrapping writes into a config, not its user.
_NOT_SET_BY_HAND = ("auto_mapping", "peft_type", "peft_version", "plugin", "resolved")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        IsolateError: It is no YAML, something else than a mapping, or says one key twice: YAML takes the last.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses what the other loaders pass by."""

    def mapping(loader: Any, node: Any) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            line = node.start_mark.line + 1
            raise IsolateError(f"{path}: {twice!r} is there twice, in what begins in line {line}: leave one")
        return yaml.SafeLoader.construct_yaml_map(loader, node)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)

    if not path.is_file():
        raise IsolateError(f"there is no file {str(path)!r}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise IsolateError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise IsolateError(f"{path} holds no fields: write lines of 'name: value'")
    return content


def check_keys(given: Any, allowed: Iterable[str], where: str) -> None:
    """Refuse anything but a mapping with some of these keys."""
    names = sorted(allowed)
    if not isinstance(given, Mapping):
        raise IsolateError(f"{where}: {given!r} is no mapping; write some of {names}, each as 'name: value'")
    for key in given:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            raise IsolateError(
                f"{where}: {key!r} is unknown"
                + (f", did you mean {close[0]!r}?" if close else ";")
                + f" It knows {names}"
            )


def methods() -> dict[str, type]:
    """{name: config class} of the methods of this library, as PEFT knows them."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from ..deltas import DeltaConfig

    return {
        str(kind.value).lower(): config
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if issubclass(config, DeltaConfig)
    }


def method_named(name: Any, where: str) -> type:
    """The config class of a method: "half_ft", "halfft" and "HALFFT" are one.

    Raises:
        IsolateError: There is none of this name.
    """
    known = {key.replace("_", ""): config for key, config in methods().items()}
    plain = str(name).lower().replace("_", "").replace("-", "")
    if plain not in known:
        raise IsolateError(f"{where}: method {name!r} is unknown: use one of {sorted(methods())}")
    return known[plain]


def make_config(kind: type, fields: Any, where: str, without: Iterable[str] = ()) -> Any:
    """A config of these fields.

    Args:
        kind: Its class.
        fields: A mapping, from a file.
        where: Its file, for an error.
        without: Fields that may not be set there.

    Raises:
        IsolateError: A field is unknown or has no sense.
    """
    allowed = {field.name for field in dataclasses.fields(kind) if field.init} - {*_NOT_SET_BY_HAND, *without}
    check_keys(fields, allowed, where)
    try:
        return kind(**fields)
    except IsolateError as error:
        raise type(error)(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise IsolateError(f"{where}: {dict(fields)} makes no {kind.__name__}: {error}") from error


def read_config(config: str) -> Any:
    """A config from a method's bare name for its defaults, from a YAML file, or from an adapter's folder.

    A folder that is called like a method, as trainings for one often are, goes by "./name".

    Raises:
        IsolateError: It is none of these.
    """
    path = Path(config)
    if config.lower().replace("_", "") in methods():
        return method_named(config, "")()
    if path.is_dir():
        return _adapters_config(path)
    if path.is_file():
        fields = read_yaml(path)
        named = [key for key in ("method", "peft_type") if key in fields]
        if len(named) != 1:
            raise IsolateError(f"{path}: name the method, once: 'method: ' and one of {sorted(methods())}")
        kind = method_named(fields.pop(named[0]), str(path))
        return make_config(kind, fields, str(path))
    if path.suffix or path.name != config:
        raise IsolateError(f"there is no file and no folder {config!r}")
    return method_named(config, "there is no file and no folder of this name")()


def _adapters_config(folder: Path) -> Any:
    from peft import PeftConfig

    if not (folder / "adapter_config.json").is_file():
        raise IsolateError(f"{str(folder)!r} is no adapter: it has no adapter_config.json")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except IsolateError as error:
        raise type(error)(f"{folder}/adapter_config.json: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise IsolateError(f"{folder}/adapter_config.json makes no config: {type(error).__name__}: {error}") from error


def find_device(device: str | None = None) -> Any:
    """A device that is there: a GPU where there is one, or the one asked for.

    Raises:
        IsolateError: It is unknown, or not in this machine.
    """
    import torch

    if device is None:
        there = torch.accelerator.is_available()
        device = torch.accelerator.current_accelerator().type if there else "cpu"  # type: ignore[union-attr]
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise IsolateError(f"device {device!r} is unknown to torch: use cpu, cuda or cuda:0, for example") from error
    try:
        torch.ones(1, device=target).item()  # of the meta device there is none
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IsolateError(f"device {device!r} cannot be used here ({reason}): use another, or cpu") from error
    return target


def load_model(base: str, device: Any) -> Any:
    """The model itself, on a device."""
    from ..checkpoints.architecture import auto_class, models_config

    return auto_class(models_config(base)).from_pretrained(base).to(device)


def load_tokenizer(base: str) -> Any:
    """The tokenizer in a folder or of a Hub id."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except (ValueError, KeyError) as error:
        raise IsolateError(f"no tokenizer can be loaded from {base!r}: {error}") from error
