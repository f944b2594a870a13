"""`token_loss` against a twin that scores one token at a time, and what it does with odd input."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from accelerate import cpu_offload
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_isolate.errors import IsolateError
from peft_isolate.evaluation import forgetting, token_loss

PAD = 0


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    # Weights of an ordinary size: at the initial 0.02 every token costs the same and a wrong mean would not show.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20) if parameter.ndim == 2 else None
    return model


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 37, (length,), generator=generator).tolist() for length in lengths]


def padded(rows: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pads = [PAD] * (length - len(row))
        ids.append(row + pads if side == "right" else pads + row)
        ones, zeros = [1] * len(row), [0] * len(pads)
        mask.append(ones + zeros if side == "right" else zeros + ones)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def twin(model: torch.nn.Module, rows: list[list[int]], scored: list[list[bool]] | None = None) -> float:
    """The same mean in plain loops: one row at a time without padding, one token at a time, in Python floats."""
    was_training = model.training
    model.eval()
    losses = []
    for number, row in enumerate(rows):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row])).logits[0].double()
        for position in range(1, len(row)):
            if scored is None or scored[number][position]:
                losses.append(-torch.log_softmax(logits[position - 1], -1)[row[position]].item())
    model.train(was_training)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_the_twin_whatever_the_padding(llama: LlamaForCausalLM, side: str) -> None:
    rows = random_rows(9, 3, 6, 12, 2)
    batches = [padded(rows[:3], side), padded(rows[3:], side)]
    assert token_loss(llama, batches) == pytest.approx(twin(llama, rows), rel=1e-6)


def test_every_token_weighs_the_same_in_a_smaller_last_batch(llama: LlamaForCausalLM) -> None:
    """The mean of the batches' means, which a Trainer's eval loss resembles, is another number here."""
    rows = random_rows(12, 12, 12, 3)
    one_by_one = [token_loss(llama, [padded([row])]) for row in rows]
    expected = twin(llama, rows)
    assert token_loss(llama, [padded(rows[:3]), padded(rows[3:])]) == pytest.approx(expected, rel=1e-6)
    assert sum(one_by_one) / len(rows) != pytest.approx(expected, rel=1e-3)


def test_labels_choose_the_scored_tokens_and_padding_never_counts(llama: LlamaForCausalLM) -> None:
    rows = random_rows(8, 5)
    batch = padded(rows)
    scored = [[position >= 3 for position in range(len(row))] for row in rows]
    labels = batch["input_ids"].clone()  # not -100 at the padding: the mask alone must keep it out
    labels[:, :3] = -100
    loss = token_loss(llama, [{**batch, "labels": labels}])
    assert loss == pytest.approx(twin(llama, rows, scored), rel=1e-6)
    assert loss != pytest.approx(twin(llama, rows), rel=1e-3)


def test_without_a_mask_all_tokens_are_real(llama: LlamaForCausalLM) -> None:
    rows = random_rows(7, 7)
    assert token_loss(llama, [{"input_ids": torch.tensor(rows)}]) == pytest.approx(twin(llama, rows), rel=1e-6)


def test_more_positions_than_one_part(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(9, 9, 4)
    expected = token_loss(llama, [padded(rows)])
    # By sys.modules: the package's attribute of this name is the function.
    monkeypatch.setattr(sys.modules["peft_isolate.evaluation.forgetting"], "_POSITIONS", 5)
    assert token_loss(llama, [padded(rows)]) == pytest.approx(expected, rel=1e-12)


def test_bf16_logits_are_scored_in_fp32(llama: LlamaForCausalLM) -> None:
    """In bf16 a mean of losses keeps three digits; here only the logits are rounded."""
    rows = random_rows(12, 12)
    model = LlamaForCausalLM(llama.config)
    model.load_state_dict(llama.state_dict())
    model.to(torch.bfloat16)
    assert token_loss(model, [padded(rows)]) == pytest.approx(twin(model, rows), rel=1e-5)


def test_no_gradient_and_every_module_back_in_its_own_mode(llama: LlamaForCausalLM) -> None:
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    modes: list[bool] = []
    hook = llama.register_forward_pre_hook(
        lambda module, args: modes.append(module.training or torch.is_grad_enabled())
    )
    try:
        token_loss(llama, [padded(random_rows(4))])
    finally:
        hook.remove()
    assert modes == [False]
    assert [module.training for module in llama.modules()] == before
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_mode_is_restored_after_an_exception(llama: LlamaForCausalLM) -> None:
    llama.train()

    def broken():
        yield padded(random_rows(4))
        raise RuntimeError("the file ended")

    with pytest.raises(RuntimeError, match="the file ended"):
        token_loss(llama, broken())
    assert all(module.training for module in llama.modules())


def test_dropout_is_off() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=37, n_positions=16, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.5, embd_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    rows = random_rows(8, 6)
    assert token_loss(model, [padded(rows)]) == pytest.approx(twin(model, rows), rel=1e-6)
    assert model.training


def test_forgetting_is_the_rise_over_the_base(llama: LlamaForCausalLM) -> None:
    rows = random_rows(10, 10)
    base_loss = token_loss(llama, [padded(rows)])
    assert forgetting(llama, base_loss, [padded(rows)]) == 0.0
    tuned = LlamaForCausalLM(llama.config)
    tuned.load_state_dict(llama.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight.add_(torch.randn(tuned.lm_head.weight.shape, generator=torch.Generator().manual_seed(1)))
    expected = twin(tuned, rows) - twin(llama, rows)
    assert forgetting(tuned, base_loss, [padded(rows)]) == pytest.approx(expected, rel=1e-5)


def test_batches_may_come_from_a_generator(llama: LlamaForCausalLM) -> None:
    rows = random_rows(5, 5)
    assert token_loss(llama, (padded([row]) for row in rows)) == pytest.approx(twin(llama, rows), rel=1e-6)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        pytest.param([], "no batches", id="no batches"),
        pytest.param([{"input_ids": torch.tensor([[5]])}], "none of the tokens in 1 batch", id="one token"),
        pytest.param(
            [{"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[5, -100]])}],
            "none of the tokens",
            id="no label",
        ),
        pytest.param([{"text": "abc"}], "no tensor 'input_ids' but .'text'.", id="text"),
        pytest.param(
            [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 3, dtype=torch.int64)}],
            r"labels of shape \(1, 3\)",
            id="shape of the labels",
        ),
        pytest.param(
            [{"input_ids": torch.ones(1, 4, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}],
            r"attention_mask of shape \(2, 4\)",
            id="shape of the mask",
        ),
    ],
)
def test_bad_batches_are_refused(llama: LlamaForCausalLM, batches: list, message: str) -> None:
    llama.train()
    with pytest.raises(IsolateError, match=message):
        token_loss(llama, batches)
    assert llama.training


def test_logits_that_do_not_line_up_are_refused() -> None:
    class Longer(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor):
            return type("Output", (), {"logits": torch.zeros(*input_ids[:, :-1].shape, 7)})

    with pytest.raises(IsolateError, match=r"logits of shape \(1, 3, 7\) for input_ids of shape \(1, 4\)"):
        token_loss(Longer(), [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}])


@pytest.mark.parametrize("base_loss", [float("nan"), float("inf")])
def test_a_base_loss_that_is_no_number_is_refused(llama: LlamaForCausalLM, base_loss: float) -> None:
    with pytest.raises(IsolateError, match="base_loss"):
        forgetting(llama, base_loss, [padded(random_rows(4))])


def test_an_offloaded_model_is_scored_where_it_computes(llama):
    """Its parameters are on the meta device meanwhile."""
    batch = {"input_ids": torch.tensor(random_rows(8, 8))}
    before = token_loss(llama, [batch])
    offloaded = cpu_offload(copy.deepcopy(llama), torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert token_loss(offloaded, [batch]) == pytest.approx(before)
