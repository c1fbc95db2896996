"""Groups of a hybrid recipe: whose values they set."""

import pytest
import torch

import guided_descent as gd


def test_a_group_without_matrices_speaks_of_the_auxiliary_recipe():
    """The two groups of the Hugging Face Trainer: decay for matrices, none for vectors."""
    w, b = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(4))
    with pytest.warns(UserWarning, match="without their model"):
        opt = gd.Muon([{"params": [w], "weight_decay": 0.3}, {"params": [b], "weight_decay": 0.0, "lr": 5e-3}])
    matrix, vector = opt.param_groups
    assert (matrix["recipe"], matrix["weight_decay"], matrix["lr"]) == ("muon", 0.3, 0.02)
    assert (vector["recipe"], vector["weight_decay"], vector["lr"]) == ("adamw", 0.0, 5e-3)


def test_a_mixed_group_sets_the_main_recipe():
    w, b = torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(4))
    with pytest.warns(UserWarning, match="without their model"):
        opt = gd.Muon([{"params": [w, b], "lr": 0.5}])
    assert [group["lr"] for group in opt.param_groups] == [0.5, 3e-4]


def test_soaps_default_auxiliary_recipe_decays_alike():
    opt = gd.SOAP(torch.nn.Linear(4, 3), decay="independent")
    assert [group["decay"] for group in opt.param_groups] == ["independent", "independent"]
