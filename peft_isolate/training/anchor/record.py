"""What a checkpoint tells of the anchor of its run, so that a run goes on with the same one."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ...deltas.reference import Reference
from ...errors import IsolateError
from .config import SELF, AnchorConfig
from .sampling import by_process_0
from .text import AnchorText

# Text of the source "self", in a trainer's output_dir and in each of its checkpoints.
TEXT_FILE = "anchor.safetensors"
_STATE_FILE = "trainer_state.json"
# What text of the source "self" alone depends on.
_OF_SELF = ("temperature", "n_rows")


class Record(NamedTuple):
    """What a run is anchored to.

    Attributes:
        config: `AnchorConfig.to_dict`.
        reference: Digest of the reference.
        text: Digest of the text; None while it is not there yet.
    """

    config: dict[str, Any]
    reference: str
    text: str | None = None

    @classmethod
    def of(cls, checkpoint: Path) -> Record | None:
        """What the run of a checkpoint was anchored to; None where it was not.

        Raises:
            IsolateError: What it says of that cannot be read, or a trainer without an anchor has gone on from there.
        """
        state = TrainerState.load_from_json(str(checkpoint / _STATE_FILE))
        told = state.stateful_callbacks.get(AnchoredTo.__name__)
        if told is None:
            return None
        try:
            record, until = cls(**told["args"]), told["attributes"]["step"]
        except (KeyError, TypeError) as error:
            raise IsolateError(
                f"{str(checkpoint / _STATE_FILE)!r} does not tell what its run was anchored to ({error}): it was "
                "altered, or written by another version; begin anew"
            ) from error
        if until != state.global_step:
            raise IsolateError(
                f"the run of {str(checkpoint)!r} was anchored until step {until} and went on without, to step "
                f"{state.global_step}: go on from its checkpoint of step {until}, or begin a new run"
            )
        return record


class AnchoredTo(TrainerCallback, ExportableState):
    """Writes a `Record` into the trainer's state, which every checkpoint has."""

    def __init__(self, config: dict[str, Any], reference: str, text: str) -> None:
        self._record = Record(config, reference, text)
        self.step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Until here the run is anchored: a trainer without an anchor would hand on the rest as it found it."""
        self.step = state.global_step

    def state(self) -> dict[str, Any]:
        """As transformers wants it."""
        return {"args": self._record._asdict(), "attributes": {"step": self.step}}


class KeepsText(TrainerCallback):
    """Keeps text of the source "self" in the trainer's output_dir, and in each checkpoint, which can then be moved."""

    def __init__(self, text: AnchorText) -> None:
        self._text = text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once for the run."""
        if args.should_save:
            self._text.save(Path(args.output_dir) / TEXT_FILE)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Beside what the trainer has just written."""
        if args.should_save:
            self._text.save(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / TEXT_FILE)


def kept_text(checkpoint: Path | None, config: AnchorConfig, reference: Reference) -> AnchorText | None:
    """The text that a run had; None where no checkpoint has it.

    Raises:
        IsolateError: It was sampled otherwise.
        FormatError: It is truncated or altered.
    """
    if checkpoint is None or not (checkpoint / TEXT_FILE).is_file():
        return None
    return AnchorText.load(checkpoint / TEXT_FILE, config, reference)


def check_resumed(checkpoint: Path | None, now: Record | None) -> None:
    """Refuse to go on from a checkpoint with another anchor than its run had. All processes must call it.

    Args:
        checkpoint: None where a run begins. A folder that is no checkpoint is left to the trainer to refuse.
        now: What this run is anchored to; a text that is None is not compared.

    Raises:
        IsolateError: On all of them, naming the first thing that differs.
    """
    if difference := by_process_0(lambda: _difference(checkpoint, now)):
        raise IsolateError(f"the run of {str(checkpoint)!r} was anchored otherwise: {difference}; or begin a new run")


def _difference(checkpoint: Path | None, now: Record | None) -> str | None:
    if checkpoint is None or not (checkpoint / _STATE_FILE).is_file():
        return None
    then = Record.of(checkpoint)
    if then is None or now is None:
        if then is not None:
            return f"it had beta={then.config.get('beta')!r}, and this one has no anchor: give it what that had"
        return now and "it had no anchor, and this one has: go on with beta=0"
    for name, value in now.config.items():
        if name in _OF_SELF and now.config["source"] != SELF:
            continue
        if (had := then.config.get(name)) != value:
            return f"it had {name}={had!r}, and this one has {name}={value!r}: give it what that had"
    if then.reference != now.reference:
        return (
            "it was held to another model: make the trainer as that of the first run was made, of the same model and "
            "adapters, and let it load the checkpoint"
        )
    if now.text is not None and then.text != now.text:
        return (
            "its text was another, though the config is the same: give the tokenizer that it had, and where the "
            f"reference wrote the text, leave {TEXT_FILE} in the checkpoint"
        )
    return None
