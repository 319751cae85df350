"""Cost of fine-tuning: counts against real steps, and the trial and the plan that show them."""

from dataclasses import replace

import pytest
import torch

from mvlm.costs.cluster_plan import ClusterSetting
from mvlm.costs.flops import counter
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.cost import task_step_cost
from mvlm.tasks.load import find_task
from mvlm.tasks.task import Task, TaskOptions
from support.commands import assert_refused
from support.models import micro_batch, micro_config, micro_model


def setting(image_size: int = 32, **changes) -> ClusterSetting:
    values = {"model": micro_config(text_length=16, image_size=image_size), "gpu": "H100", "per_node": 1, "nodes": 1}
    return ClusterSetting(**(values | {"batch_size": 4} | changes))  # pyright: ignore[reportArgumentType]


def made(task: str, text_length: int) -> Task:
    state, _ = find_task(task).example(4)
    network = micro_model(dtype=torch.float32, text_length=text_length)
    return find_task(task)(network, TaskOptions(answers="classifier"), state)


def real_flops(task: str, lengths: tuple[int, ...], plan: str = "fast") -> int:
    """FLOPs of a step on four texts of these lengths."""
    model, most = made(task, max(16, *lengths)), micro_config(text_length=max(16, *lengths))
    batch, masks = micro_batch(lengths, config=most)
    if task == "pairs":
        batch = replace(batch, images=batch.images.repeat(1, 1, 1, 2))
    with counter() as flops:
        model.losses_of_step(batch, masks, find_task(task).example(4)[1], IMPLEMENTATIONS[plan]).total.backward()
    return flops.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "entailment", "pairs", "caption"])
def test_flops_of_a_planned_step_lie_between_those_of_real_steps(task):
    """The plan's texts have 12 tokens and room for 16. Real steps of 12 and of 16 tokens need less and more."""
    found = task_step_cost(task, setting())
    assert real_flops(task, 4 * (12,)) <= found.forward + found.backward <= real_flops(task, 4 * (16,))
    assert found.parameters == sum(p.numel() for p in made(task, 16).parameters())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["vqa", "entailment", "pairs", "caption"])
def test_a_fast_step_computes_no_padding(task):
    """The step saves most products of the padded rows of all blocks of the text cross encoder but the last."""
    lengths, config = (4, 5, 6, 40), micro_config()
    padding = (2 if task == "pairs" else 1) * sum(40 - length for length in lengths)
    products = 6 * 14 * config.width**2 * (config.cross_layers - 1)  # FLOPs of a row: queries, keys, values, MLP
    assert real_flops(task, lengths, "plain") - real_flops(task, lengths) > padding * products / 2


@pytest.mark.slow
def test_the_plan_names_the_task_and_refuses_what_fine_tuning_cannot_do(run_mvlm):
    words = ("plan", "--gpus", 1, "--data", "10k", "--preset", "tiny", "--batch-size", 8, "--image-size", 64)
    done, short = (run_mvlm(*words, "--task", "entailment", *more) for more in ((), ("--text-length", 8)))
    assert (done.code, short.code) == (0, 0)
    assert short.out[1] != done.out[1]  # parameters and FLOPs
    assert_refused(run_mvlm(*words, "--task", "vqa2"), "task: wanted one of caption, entailment")
    assert_refused(run_mvlm(*words, "--task", "vqa", "--parallel", "fsdp"), "plan: wanted --parallel ddp")
    assert_refused(run_mvlm(*words, "--task", "vqa", "--accumulate", 3), "batch_size: wanted a multiple of 1 GPUs x 3")


@pytest.mark.slow
def test_doctor_tries_fine_tuning(trained, scenes, tmp_path, run_mvlm):
    words = ("doctor", "--data", scenes, "--out", tmp_path, "--device", "cpu", "--task", "retrieval")
    done = run_mvlm(*words, "--checkpoint", trained, "--batch-size", 4, "--image-size", 48)
    assert done.code == 0
    assert any(line.split()[1] == "speed" for line in done.out)
    assert not list(tmp_path.iterdir())
    assert_refused(run_mvlm(*words), "with --checkpoint and --data, got retrieval with None")
