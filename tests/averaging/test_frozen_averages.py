"""Averages and schedules that were saved by format 1 load and continue as they did then."""

from __future__ import annotations

import pytest
import torch

from oracles.state.freeze_averages import AVERAGES, PATH, SCHEDULES, net, numbers, optimizer, place, shown

SAVED = torch.load(PATH, weights_only=True)


def test_all_are_in_the_file():
    assert SAVED["averages"].keys() == AVERAGES.keys()
    assert SAVED["schedules"].keys() == SCHEDULES.keys()


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_continues(name):
    model, saved = net(), SAVED["averages"][name]
    average = AVERAGES[name](model)
    place(model, 10)
    average.load_state_dict(saved["state"])
    for step in range(11, 16):
        place(model, step)
        average.update()
    found = shown(average, model)
    assert found.keys() == saved["expected"].keys()
    for key, tensor in saved["expected"].items():
        assert found[key].dtype == tensor.dtype
        torch.testing.assert_close(found[key], tensor, rtol=1e-6, atol=1e-7)
    assert average.state_dict().keys() == saved["state"].keys()


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_continues(name):
    opt, saved = optimizer(), SAVED["schedules"][name]
    schedule = SCHEDULES[name](opt)
    schedule.load_state_dict(saved["state"])
    seen = []
    for _ in saved["numbers"]:
        seen.append(numbers(opt))
        opt.step()
        schedule.step()
    assert [number for step in seen for number in step] == pytest.approx([n for step in saved["numbers"] for n in step])
    assert schedule.state_dict().keys() == saved["state"].keys()
