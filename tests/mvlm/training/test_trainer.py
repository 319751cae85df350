"""One training step: losses, gradients, updates and metrics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mvlm.distributed.parallel import compile_step
from mvlm.errors import NonFiniteLossError
from mvlm.model import fast
from mvlm.objectives import pretraining
from mvlm.training.run import make_loader
from support.models import ALONE, micro_config, micro_model


@pytest.mark.slow
def test_step_is_adamws_update_with_the_gradient_of_the_total(start):
    """One update of every parameter against Loshchilov and Hutter's formula in numpy."""
    run, batches = start(warmup_steps=4, weight_decay=0.1, clip_norm=0.5)
    before = {name: p.detach().double().numpy().copy() for name, p in run.model.named_parameters()}
    batch, masks = next(iter(make_loader(run.loader.dataset, run.tokenizer, run.config, ALONE)))
    twin = micro_model(dtype=torch.float32)
    twin(batch, masks, seed=0, step=0, plan=run.config.plan).total.backward()
    gradients = {name: p.grad.double().numpy() for name, p in twin.named_parameters() if p.grad is not None}
    norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
    assert norm > 0.5

    run.one_step(batches)
    row = run.metrics.read()[-1]
    assert run.metrics.steps == [run.step] == [1]
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before clipping
    for part, _ in run.model.named_children():
        squares = [(g**2).sum() for name, g in gradients.items() if name.startswith(f"{part}.")]
        assert row[f"grad_norm_{part}"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    assert {group["lr"] / group["peak"] for group in run.optimizer.param_groups} == {1 / 4}
    peaks = {id(p): (g["peak"], g["weight_decay"]) for g in run.optimizer.param_groups for p in g["params"]}
    for name, parameter in run.model.named_parameters():
        g, (peak, decay) = gradients[name] * 0.5 / norm, peaks[id(parameter)]
        moved = before[name] * (1 - peak / 4 * decay) - peak / 4 * g / (np.abs(g) + 1e-8)  # the first step of Adam
        np.testing.assert_allclose(parameter.detach().numpy(), moved, rtol=1e-6, atol=1e-7, err_msg=name)
        assert parameter.grad is None


@pytest.mark.slow
def test_steps_in_bf16_have_the_bits_of_steps_that_cast_each_weight(start):
    """Also after weights were loaded between two steps."""
    rows, weights = [], []
    for copies in (True, False):
        run, batches = start()
        run.config = replace(run.config, precision="bf16")
        if not copies:
            run.shadows = None
        assert (run.shadows is not None) == copies
        for _ in range(2):
            run.one_step(batches)
        run.model.load_state_dict(micro_model(seed=5, dtype=torch.float32).state_dict())
        run.one_step(batches)
        rows.append([{name: x for name, x in row.items() if name != "seconds"} for row in run.metrics.read()])
        weights.append(list(run.model.parameters()))
    assert rows[0] == rows[1]
    assert all(map(torch.equal, *weights))


@pytest.mark.parametrize(
    "changes", [{"plan": "plain"}, {"precision": "fp32"}, {"capture": "compile"}, {"checkpoint_activations": True}]
)
def test_weights_have_no_copies_where_they_would_not_pay(start, changes):
    run, _ = start()
    run.config = replace(run.config, **{"precision": "bf16", **changes})
    assert run.shadows is None


@pytest.mark.slow
@pytest.mark.parametrize("value, end", [(20.0, math.log(1 / 0.001)), (-3.0, math.log(1 / 0.5))])
def test_temperature_is_clamped_after_each_step(start, value, end):
    run, batches = start()
    with torch.no_grad():
        run.model.log_scale.fill_(value)
    run.one_step(batches)
    assert run.model.log_scale.item() == pytest.approx(end, rel=1e-6)


@pytest.mark.parametrize(
    "term, module, function, spoil",
    [
        ("mlm is nan", fast, "linear_cross_entropy", lambda loss: loss + math.nan),
        ("mim is inf", fast, "masked_pixel_loss", lambda loss: loss + math.inf),
        ("itc is nan", pretraining, "contrastive_sums", lambda loss: loss + math.nan),
        ("itm is inf", pretraining, "matching_loss", lambda loss: loss + math.inf),
        # The loss is finite and its gradient is not, by the square root of zero.
        ("grad_norm is nan", fast, "masked_pixel_loss", lambda loss: loss + (0 * loss).sqrt()),
    ],
)
def test_what_is_not_finite_stops_the_run_before_the_update(start, monkeypatch, term, module, function, spoil):
    run, batches = start(max_bad_steps=0)
    run.one_step(batches)
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    moments = [{k: v.clone() for k, v in state.items()} for state in run.optimizer.state.values()]
    loss = getattr(module, function)

    def spoilt(*inputs, **settings):
        found = loss(*inputs, **settings)
        return (spoil(found[0]), *found[1:]) if isinstance(found, tuple) else spoil(found)

    monkeypatch.setattr(module, function, spoilt)
    run.one_step(batches)
    with pytest.raises(NonFiniteLossError, match=rf"^step 2: {term}"):
        run.check_skipped_updates(run.metrics)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.model.state_dict().items())
    for before, state in zip(moments, run.optimizer.state.values(), strict=True):
        assert all(torch.equal(before[k], v) for k, v in state.items())


# Dynamo instantiates an autograd.Function while it traces it.
@pytest.mark.extended
@pytest.mark.slow
def test_compiled_steps_equal_eager_steps(start):
    """One graph a step, run by torch's own kernels in float64. Batches of all lengths share a handful of graphs."""
    sizes = {"image_layers": 1, "text_layers": 1, "cross_layers": 1, "decoder_layers": 1}
    plain, batches = start(dtype=torch.float64, sizes=sizes)
    for _ in range(6):
        plain.one_step(batches)
    compiled, batches = start(dtype=torch.float64, sizes=sizes, capture="compile")
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compile_step(compiled.model, ALONE, 1, False, backend="aot_eager")
    for _ in range(6):
        compiled.one_step(batches)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 3
    for wanted, got in zip(plain.metrics.read(), compiled.metrics.read(), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)  # numbers are kept in fp32


@pytest.mark.extended
@pytest.mark.slow
def test_compiled_steps_of_stages_equal_eager_steps(start):
    """The first step of a stage compiles the model for its images."""
    sizes = {"image_layers": 1, "text_layers": 1, "cross_layers": 1, "decoder_layers": 1}
    how = {"dtype": torch.float64, "sizes": sizes, "model": micro_config(**sizes), "stages": ("0:16", "2:32")}
    plain, batches = start(**how)
    for _ in range(3):
        plain.one_step(batches)
    compiled, batches = start(**how, capture="compile")
    torch._dynamo.reset()
    compile_step(compiled.model, ALONE, 1, False, backend="aot_eager")
    for _ in range(3):
        compiled.one_step(batches)
    for wanted, got in zip(plain.metrics.read(), compiled.metrics.read(), strict=True):
        assert got == pytest.approx(wanted, rel=1e-6)  # numbers are kept in fp32
