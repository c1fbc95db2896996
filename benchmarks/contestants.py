"""Who is timed against whom: our recipes, each beside the optimizers of torch and other libraries with its mathematics.

A peer that is not installed is left out. HeavyBall compiles its step with torch.compile.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import guided_descent as gd

Parameters = list[nn.Parameter]


def gpt_shapes(layers: int, d: int, matrices: bool) -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT: q, k, v, o and the MLP of each layer; with embedding, norms and biases unless told."""
    hidden: list[tuple[int, ...]] = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
    if matrices:
        return hidden * layers
    vectors: list[tuple[int, ...]] = [(d,)] * 4 + [(d,)] * 5 + [(4 * d,)]
    return [(256, d), (1024, d), *((hidden + vectors) * layers), (d,), (d,)]


def autoencoder_shapes(matrices: bool) -> list[tuple[int, ...]]:
    """784-1000-500-250-30 and back."""
    widths = [784, 1000, 500, 250, 30, 250, 500, 1000, 784]
    weights: list[tuple[int, ...]] = [(m, n) for n, m in itertools.pairwise(widths)]
    return weights if matrices else weights + [(m,) for m in widths[1:]]


SETS: dict[str, Callable[[bool], list[tuple[int, ...]]]] = {
    "gpt-6x512": lambda matrices: gpt_shapes(6, 512, matrices),
    "gpt-4x768": lambda matrices: gpt_shapes(4, 768, matrices),
    "gpt-2x256": lambda matrices: gpt_shapes(2, 256, matrices),
    "gpt-1x512": lambda matrices: gpt_shapes(1, 512, matrices),
    "autoencoder": autoencoder_shapes,
    "one-512": lambda matrices: [(512, 512)],
    "small-1000": lambda matrices: [(64, 16)] * 400 + [(32,)] * 400 + [(16, 16)] * 200,
}


#: The same method elsewhere: a class of torch with its options, of HeavyBall, and of pytorch_optimizer.
PEERS: dict[str, tuple[tuple[str, dict[str, Any]] | None, str, str]] = {
    "sgd": (("SGD", {"momentum": 0.9}), "SGD", ""),
    "adagrad": (("Adagrad", {}), "", ""),
    "rmsprop": (("RMSprop", {}), "RMSprop", ""),
    "adadelta": (("Adadelta", {}), "", ""),
    "adam": (("Adam", {}), "", ""),
    "amsgrad": (("Adam", {"amsgrad": True}), "", ""),
    "adamw": (("AdamW", {}), "AdamW", ""),
    "nadam": (("NAdam", {}), "", ""),
    "nadamw": (("NAdam", {"decoupled_weight_decay": True}), "NAdam", ""),
    "radam": (("RAdam", {}), "", ""),
    "adamax": (("Adamax", {}), "", "AdaMax"),
    "adafactor": (("Adafactor", {}), "", "AdaFactor"),
    "adabelief": (None, "", "AdaBelief"),
    "yogi": (None, "", "Yogi"),
    "laprop": (None, "LaProp", "LaProp"),
    "novograd": (None, "", "NovoGrad"),
    "lion": (None, "", "Lion"),
    "signum": (None, "", "SignSGD"),
    "grams": (None, "", "Grams"),
    "lars": (None, "", "LARS"),
    "lamb": (None, "", "Lamb"),
    "adan": (None, "", "Adan"),
    "adopt": (None, "ADOPT", "ADOPT"),
    "ademamix": (None, "AdEMAMix", "AdEMAMix"),
    "mars": (None, "", "MARS"),
    "came": (None, "", "CAME"),
    "sm3": (None, "", "SM3"),
    "prodigy": (None, "", "Prodigy"),
    "dadapt_adam": (None, "", "DAdaptAdam"),
    "dadapt_sgd": (None, "", "DAdaptSGD"),
    "schedule_free_sgd": (None, "", "ScheduleFreeSGD"),
    "schedule_free_adamw": (None, "SFAdamW", "ScheduleFreeAdamW"),
    "schedule_free_radam": (None, "", "ScheduleFreeRAdam"),
}
#: What differs from the defaults of a recipe when it is timed.
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}


def first_order() -> tuple[str, ...]:
    """The recipes of first order that need one gradient in a step and no model; PSGD's are with the matrix methods."""
    return tuple(key for key, info in gd.recipes.REGISTRY.items() if info.family != "psgd" and plain(key))


def plain(key: str) -> bool:
    """Whether a recipe is for any tensor and asks for a gradient in each step alone."""
    cls = gd.recipes.lookup(key)
    if cls.matrix or cls.reads_layers:
        return False
    buckets = gd.optimizer(key, [nn.Parameter(torch.zeros(4, 3))], lr=1e-3)._engine.bind().buckets
    return not any(bucket.parts.evaluations > 1 or bucket.parts.curvature for bucket in buckets)


#: Which methods are run by one command and written to one file.
FAMILIES: dict[str, tuple[str, ...]] = {
    "first_order": tuple(f"{key} floor" for key in first_order()),
    "elementwise": ("sgd", "adamw", "nadamw"),
    "spectral": ("muon", "normuon", "adamuon"),
    "kronecker": (
        *("soap", "shampoo", "kl_shampoo", "splus", "psgd_kron", "psgd_kron triangular", "asgo", "ec_shampoo"),
        *("kl_soap", "tonga", "psgd_lra", "psgd_diagonal"),
    ),
}


@dataclass
class Contestant:
    """An optimizer on its own copy of the parameters."""

    name: str
    make: Callable[[Parameters], torch.optim.Optimizer]
    ours: bool = False


@dataclass
class Method:
    """A method with its contestants, the first one being the reference that ratios are printed against.

    Attributes:
        contestants: Who is timed.
        matrices: Whether the set's matrices alone are trained.
        block: Steps of one timing, a whole number of refresh periods.
        sets: The sets on which it runs.
        floor: Whether the reference tells the rate of memory, to which the bytes of the others are compared.
    """

    contestants: list[Contestant]
    matrices: bool = False
    block: int = 1
    sets: tuple[str, ...] = ("gpt-6x512", "gpt-4x768", "small-1000")
    floor: bool = False


def ours(key: str, name: str = "ours", **options: Any) -> Contestant:
    """One of our recipes, every tensor taken for a matrix."""
    return Contestant(name, lambda p: gd.optimizer(key, p, lr=1e-3, **options), True)


def peer(library: str, cls: str, **options: Any) -> list[Contestant]:
    """Another library's optimizer, or nothing where it is not installed."""
    try:
        module = importlib.import_module(library)
    except ImportError:
        return []
    return [Contestant(library, lambda p: getattr(module, cls)(p, lr=1e-3, **options))]


def by_floor(key: str) -> Method:
    """A first-order method beside the fused AdamW of torch, which moves 28 bytes for each element."""
    official, heavyball, other = PEERS.get(key, (None, "", ""))
    found = [Contestant("torch fused adamw", lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))]
    options = OPTIONS.get(key, {})
    if official is not None:
        name, more = official
        found.append(Contestant("torch", lambda p: getattr(torch.optim, name)(p, lr=1e-3, foreach=True, **more)))
    found += peer("heavyball", heavyball) if heavyball else []
    found += peer("pytorch_optimizer", other) if other else []
    found.append(ours(key, "ours", **options))
    found.append(ours(key, "ours ignore", nonfinite="ignore", **options))
    found.append(ours(key, "ours compiled", nonfinite="ignore", fused=False, compile=True, **options))
    return Method(found, sets=("gpt-6x512",), floor=True)


def _muon_peer(cls: str) -> list[Contestant]:
    try:
        module = importlib.import_module("pytorch_optimizer")
    except ImportError:
        return []
    return [Contestant("pytorch_optimizer", lambda p: getattr(module, cls)([{"params": p, "use_muon": True}], lr=1e-3))]


def methods() -> dict[str, Method]:
    """Every method of the tables."""
    t = torch.optim
    spectral, kronecker = ("gpt-6x512", "gpt-4x768", "autoencoder"), ("gpt-2x256", "autoencoder")
    shampoo = {"precondition_frequency": 10, "start_preconditioning_step": 1, "graft": "rmsprop"}
    found = {
        "sgd": Method(
            [
                Contestant("torch fused", lambda p: t.SGD(p, lr=1e-3, momentum=0.9, fused=True)),
                Contestant("torch foreach", lambda p: t.SGD(p, lr=1e-3, momentum=0.9, foreach=True)),
                ours("sgd", "ours skip", momentum=0.9),
                ours("sgd", "ours ignore", momentum=0.9, nonfinite="ignore"),
            ]
        ),
        "adamw": Method(
            [
                Contestant("torch fused", lambda p: t.AdamW(p, lr=1e-3, fused=True)),
                Contestant("torch foreach", lambda p: t.AdamW(p, lr=1e-3, foreach=True)),
                ours("adamw", "ours skip"),
                ours("adamw", "ours ignore", nonfinite="ignore"),
                ours("adamw", "ours parts", nonfinite="ignore", fused=False),
            ]
        ),
        "nadamw": Method(
            [
                Contestant("torch foreach", lambda p: t.NAdam(p, lr=1e-3, decoupled_weight_decay=True, foreach=True)),
                Contestant("torch single", lambda p: t.NAdam(p, lr=1e-3, decoupled_weight_decay=True, foreach=False)),
                ours("nadamw", "ours skip"),
            ]
        ),
        "muon": Method(
            [
                Contestant("torch", lambda p: t.Muon(p, lr=1e-3)),
                *_muon_peer("Muon"),
                *peer("heavyball", "Muon"),
                ours("muon"),
            ],
            sets=spectral,
        ),
        "normuon": Method([*_muon_peer("NorMuon"), ours("normuon")], sets=spectral),
        "adamuon": Method([*_muon_peer("AdaMuon"), ours("adamuon")], sets=spectral),
        "soap": Method(
            [
                *peer("pytorch_optimizer", "SOAP", precondition_frequency=10),
                *peer("heavyball", "SOAP", precondition_frequency=10, use_precond_schedule=False, merge_dims=False),
                ours("soap", precondition_frequency=10),
                ours("soap", "ours bfloat16", precondition_frequency=10, product_dtype="bfloat16"),
            ],
            block=10,
            sets=kronecker,
        ),
        "shampoo": Method(
            [
                *peer(
                    "pytorch_optimizer",
                    "ScalableShampoo",
                    preconditioning_compute_steps=10,
                    block_size=1024,
                    start_preconditioning_step=1,
                    graft_type=3,
                ),
                ours("shampoo", **shampoo),
                ours("shampoo", "ours bfloat16", product_dtype="bfloat16", **shampoo),
            ],
            block=10,
            sets=kronecker,
        ),
        "kl_shampoo": Method(
            [*peer("heavyball", "KLShampoo", precondition_frequency=10), ours("kl_shampoo", precondition_frequency=10)],
            block=10,
            sets=kronecker,
        ),
        "splus": Method(
            [
                *peer("pytorch_optimizer", "SPlus", inverse_steps=20),
                ours("splus", precondition_frequency=20),
                ours("splus", "ours bfloat16", precondition_frequency=20, product_dtype="bfloat16"),
            ],
            block=20,
            sets=kronecker,
        ),
        "psgd_kron": Method(
            [
                *peer("heavyball", "PSGDPRO", preconditioner_update_probability=1.0),
                ours("psgd_kron"),
            ],
            sets=kronecker,
        ),
        "psgd_kron triangular": Method(
            [
                *peer("pytorch_optimizer", "Kron", pre_conditioner_update_probability=1.0),
                *peer("heavyball", "PSGDKron", preconditioner_update_probability=1.0),
                ours("psgd_kron", update="triangular"),
            ],
            sets=kronecker,
        ),
        "asgo": Method([ours("asgo", precondition_frequency=10)], block=10, sets=kronecker),
        "ec_shampoo": Method([ours("ec_shampoo", precondition_frequency=10)], block=10, sets=kronecker),
        "kl_soap": Method([ours("kl_soap", precondition_frequency=10)], block=10, sets=kronecker),
        "tonga": Method([ours("tonga")], block=10, sets=("one-512",)),
        "psgd_lra": Method(
            [*peer("heavyball", "PSGDLRA", rank=10, preconditioner_update_probability=1.0), ours("psgd_lra")],
            sets=("one-512",),
        ),
        "psgd_diagonal": Method([ours("psgd_diagonal")], sets=("one-512",)),
    }
    for method in list(found.values())[3:]:
        method.matrices = True
    return found | {f"{key} floor": by_floor(key) for key in first_order()}
