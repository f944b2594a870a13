"""Direct preference optimization of a region, with TRL's `DPOTrainer`. `examples/README.md` shows the commands.

After SFT there are two ways on, both from its adapter (`--adapter`): another round, which holds what SFT learned and
trains another half (`--next_round`), or the same half further. All options of TRL's `dpo.py` that do not concern LoRA
or quantisation work here, as flags or in the YAML file of `--config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trl import DPOConfig, DPOTrainer

from peft_isolate import next_round
from peft_isolate.errors import IsolateError

if __package__:  # python -m examples.dpo
    from . import common
else:
    import common

# Full fine-tuning's rate, not LoRA's ten times higher one: what learns are the weights themselves. HFT's authors take
# 5e-7 to 1e-6.
LEARNING_RATE = 1e-6


@dataclass
class DPOArguments(common.IsolateArguments):
    """The options of both scripts, and the adapter to start from."""

    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an adapter of sft.py to train further. It brings its own region."},
    )

    next_round: bool = field(
        default=False, metadata={"help": "Hold what the adapter has learned, and train the next half."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.next_round and self.adapter is None:
            raise IsolateError("next_round needs the adapter of an earlier round: pass --adapter")
        brought = ["method", *(name for names in common.OPTIONS.values() for name in names), "save_dtype"]
        if self.adapter is not None and (changed := self.changed(brought)):
            raise IsolateError(
                f"the adapter brings its own {', '.join(changed)}: leave that out; --next_round trains the next half"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line (or `argv`) says."""
    with common.one_line_errors():
        script_args, training_args, model_args, mixture, isolate_args = common.parse(
            argv, DPOConfig, DPOArguments, LEARNING_RATE
        )
        # With an adapter there is no `peft_config`: TRL then keeps a frozen copy of it, "ref", as the reference model.
        config = isolate_args.config() if isolate_args.adapter is None else None
        resume = common.checkpoint(training_args)
        data = common.load_data(script_args, mixture, [{"chosen", "rejected"}])
        train = common.split(data, script_args.dataset_train_split)
        test = common.split(data, script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
        if isolate_args.adapter is None:
            model, tokenizer = common.load_model(model_args, training_args)
            common.show_plan(model, config, training_args)
        else:
            model, tokenizer = common.load_adapter(isolate_args.adapter, model_args, training_args)
            if isolate_args.next_round:
                next_round(model)
            common.show_plan(model, model.peft_config["default"], training_args)
        trainer = DPOTrainer(
            model=model,
            args=training_args,
            train_dataset=train,
            eval_dataset=test,
            processing_class=tokenizer,
            peft_config=config,
        )
    trainer.train(resume_from_checkpoint=resume)
    common.save(trainer, script_args, isolate_args.merge)


if __name__ == "__main__":
    main()
