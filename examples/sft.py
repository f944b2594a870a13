"""Supervised fine-tuning of a region, with TRL's `SFTTrainer`. `examples/README.md` shows the commands.

All options of TRL's `sft.py` that do not concern LoRA or quantisation work here, as flags or in the YAML file of
`--config`.
"""

from __future__ import annotations

from collections.abc import Sequence

from trl import SFTConfig, SFTTrainer

if __package__:  # python -m examples.sft
    from . import common
else:
    import common

# Full fine-tuning's rate, not LoRA's ten times higher one: what learns are the weights themselves. HFT's authors take
# 1e-5 to 4e-5.
LEARNING_RATE = 2e-5


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line (or `argv`) says."""
    with common.one_line_errors():
        script_args, training_args, model_args, mixture, isolate_args = common.parse(
            argv, SFTConfig, common.IsolateArguments, LEARNING_RATE
        )
        config = isolate_args.config()
        resume = common.checkpoint(training_args)
        columns = [{"messages"}, {"prompt", "completion"}, {training_args.dataset_text_field}, {"conversations"}]
        data = common.load_data(script_args, mixture, [*columns, {"input_ids"}])
        train = common.split(data, script_args.dataset_train_split)
        test = common.split(data, script_args.dataset_test_split) if training_args.eval_strategy != "no" else None
        model, tokenizer = common.load_model(model_args, training_args)
        common.show_plan(model, config, training_args)
        trainer = SFTTrainer(
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
