"""Makes a method known to PEFT: the one file that touches PEFT's enum and its mappings."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

from .deltas import DeltaConfig, DeltaTuner


def register(name: str, config_cls: type[DeltaConfig], tuner_cls: type[DeltaTuner]) -> None:
    """Register a method with PEFT under `name`, as often as one likes.

    Args:
        name: The PEFT type in capitals, such as "HALFFT".
        config_cls: Its config.
        tuner_cls: Its tuner, whose prefix must be `name.lower() + "_"`: transformers takes that for granted.

    Raises:
        KeyError: Another package has registered another method under this name or prefix.
    """
    if name not in PeftType.__members__:
        _add_member(name)
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType(name))
    if known is not None and (known.__module__, known.__qualname__) == (
        config_cls.__module__,
        config_cls.__qualname__,
    ):
        # The package was imported before, perhaps reloaded since: the newest classes count.
        PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType(name)] = tuner_cls
        return
    register_peft_method(name=name.lower(), config_cls=config_cls, model_cls=tuner_cls)


def _add_member(name: str) -> None:
    """A real member of the closed enum `PeftType`: found by name, by value, in iteration, and pickled by value."""
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    # `EnumType.__setattr__` guards against reassigning members; from Python 3.12 on members are plain attributes.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
