"""Optimizers written as text: values, nesting, brackets, and what is refused."""

from __future__ import annotations

import pytest

from guided_descent.bench.files import BenchError
from guided_descent.bench.specs import format_hyper, parse_optimizer


@pytest.mark.parametrize(
    ("text", "name", "hyper"),
    [
        ("adamw", "adamw", {}),
        (" adamw : lr = 3e-3 ", "adamw", {"lr": 0.003}),
        ("adamw:betas=(0.9,0.95),lr=1e-3", "adamw", {"betas": (0.9, 0.95), "lr": 0.001}),
        ("muon:aux={'lr': 1e-3, 'eps': 1e-8}", "muon", {"aux": {"lr": 1e-3, "eps": 1e-8}}),
        ("muon:aux.lr=1e-3,aux.eps=1e-8", "muon", {"aux": {"lr": 1e-3, "eps": 1e-8}}),
        ("sgd:nesterov=TRUE,momentum=.9", "sgd", {"nesterov": True, "momentum": 0.9}),
        ("muon:ns_dtype=bf16,extra=None", "muon", {"ns_dtype": "bf16", "extra": None}),
        ("sgd:lr=-1", "sgd", {"lr": -1}),
    ],
)
def test_reading(text, name, hyper):
    spec = parse_optimizer(text)
    assert (spec.name, spec.hyper) == (name, hyper)


def test_labels_tell_arms_apart():
    assert parse_optimizer("adamw").label == "adamw"
    assert parse_optimizer("adamw:lr=3e-3,betas=(0.9,0.95)").label == "adamw lr=0.003 betas=(0.9, 0.95)"
    assert format_hyper({"aux": {"lr": 1e-3}}) == "aux.lr=0.001"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no optimizer"),
        (":lr=1", "names no optimizer"),
        ("adamw:lr", "'lr' in 'adamw:lr' is no key=value pair; write for example adamw:lr=0.01"),
        ("adamw:lr=", "no key=value pair"),
        ("adamw:lr=1,lr=2", "'lr' stands twice"),
        ("muon:aux=3,aux.lr=1", "already has the value 3"),
    ],
)
def test_refusals(text, message):
    with pytest.raises(BenchError, match="(?s)" + message.replace("(", r"\(")):
        parse_optimizer(text)
