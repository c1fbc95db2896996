"""Around the steps of sharded models: missing and broken gradients, clipping, several evaluations, averages."""

from __future__ import annotations

import warnings

import pytest
import torch
from mesh import RULES, SHAPES, Bag, close, fsdp, full, hsdp, mine, push, run, same_everywhere, twins, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import guided_descent as gd
from guided_descent.parallel.boxes import local

EXACT = {"ns_dtype": "float64"}


def pair(key, shard=fsdp, dtype=torch.float64, **options):
    """An optimizer of a whole model and one of the same model sharded."""
    return [(model, gd.optimizer(key, model, rules=RULES, **options)) for model in twins(shard, dtype)]


def state_of(opt):
    """Copies of what a step may change on this rank."""
    found = {f"{i}/{k}": g[k] for i, g in enumerate(opt.param_groups) for k in ("steps", "skipped")}
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"]):
            found[name] = local(p).clone()
            found |= {f"{name}/{k}": local(v).clone() for k, v in opt.state.get(p, {}).items()}
    return found


def unchanged(a, b):
    assert a.keys() == b.keys()
    for name in a:
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same or name.endswith("skipped"), name


def missing_on_one_rank(rank, world):
    """A parameter without a gradient on one rank counts as 0 there; without any it is left alone."""
    for key, options in (("adamw", {}), ("muon", EXACT)):
        (one, alone), (many, together) = pair(key, **options)
        for step in range(3):
            push(one, step)
            push(many, step)
            if rank == 1:
                many.experts.grad = many.up.grad = None
            for name in ("experts", "up"):
                p = getattr(many, name)
                held = mine(p, torch.ones(SHAPES[name], dtype=torch.float64))
                there = full(
                    DTensor.from_local(
                        local(held) * (rank != 1), p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                    )
                )
                getattr(one, name).grad.mul_(there)
            for model in (one, many):
                model.down.grad = None
            alone.step()
            together.step()
        close(weights(many), weights(one), 1e-10, f"{key}, missing on one rank")
        assert int(together.state[many.down]["step"]) == 0
        assert int(together.state[many.up]["step"]) == 3


def broken_on_one_rank(rank, world):
    """One NaN anywhere: a step that changes nothing on any rank, or an error that names the parameter on all."""
    for key in ("adamw", "muon", "soap"):
        model = fsdp(Bag())
        opt = gd.optimizer(key, model, rules=RULES)
        push(model, 0)
        opt.step()
        before = state_of(opt)
        push(model, 1)
        if rank == 1:
            local(model.wide.grad)[0, 0] = float("nan")
        opt.step()
        assert opt.skipped == 1
        assert opt.steps == 1
        unchanged(before, state_of(opt))
        push(model, 1)
        opt.step()
        assert opt.steps == 2
        raising = gd.optimizer(key, model, rules=RULES, nonfinite="raise")
        push(model, 2)
        if rank == 1:
            local(model.wide.grad)[0, 0] = float("inf")
        with pytest.raises(gd.NonFiniteError, match="gradient in wide at step 1"):
            raising.step()


def wrappers(rank, world):
    """Global sums, several evaluations and averages are those of one process."""
    add = [
        [gd.parts.ClipNorm(max_norm=0.5)],
        [gd.parts.ZClip(warmup=2, max_norm=2.0)],
        [gd.parts.AdaGC(warmup=2)],
        [gd.parts.AGC(), gd.parts.Cautious()],
        [gd.parts.SkipSpikes(warmup=1, factor=1.4)],
        [gd.parts.SAM(rho=0.1)],
        [gd.parts.ASAM(rho=0.1)],
        [gd.parts.Lookahead(k=2)],
        [gd.parts.ScheduleFree()],
        [gd.parts.SphereStep(), gd.parts.Lookahead(k=2)],
    ]
    for shard in (fsdp, *([hsdp] if world == 4 else [])):
        for key, options in (("adamw", {}), ("muon", EXACT)):
            for parts in add:
                what = f"{key} with {[type(part).__name__ for part in parts]}"
                found = [(m, gd.optimizer(key, m, rules=RULES, add=parts, **options)) for m in twins(shard)]
                for step in range(5):
                    for model, opt in found:

                        def closure(model=model, step=step):
                            push(model, step)
                            for p in model.parameters():  # so that the second evaluation differs
                                if p.grad is not None:
                                    p.grad.add_(p.detach(), alpha=0.1)

                        if any(isinstance(part, gd.parts.SAM | gd.parts.ASAM) for part in parts):
                            opt.step(closure)
                        else:
                            closure()
                            opt.step()
                (one, alone), (many, together) = found
                close(weights(many), weights(one), 1e-10, what)
                assert together.skipped == alone.skipped
                same_everywhere(many, what)
                alone.eval()
                together.eval()
                close(weights(many), weights(one), 1e-10, f"{what}, evaluated")
                kept = together.state_dict()
                together.train()
                alone.train()
                close(weights(many), weights(one), 1e-10, f"{what}, live again")
                together.load_state_dict(kept)
                assert together.param_groups[0]["mode"] == "eval"
                together.train()


def half(rank, world):
    """Half-precision parameters in every rounding: copies stay equal, and what is not drawn equals one process."""
    for key in ("adamw", "muon", "hyperball"):
        for rounding in ("nearest", "stochastic", "compensated", "master"):
            (one, alone), (many, together) = pair(key, hsdp if world == 4 else fsdp, torch.bfloat16, rounding=rounding)
            for step in range(4):
                for model, opt in ((one, alone), (many, together)):
                    push(model, step)
                    opt.step()
            same_everywhere(many, f"{key} {rounding}")
            if rounding != "stochastic":
                close(weights(many), weights(one), 2e-2 if key == "muon" else 1e-2, f"{key} {rounding}")
            state = together.state_dict()
            together.load_state_dict(state)


def compiled(rank, world):
    """Compiled parts take the same steps."""
    for key, options in (("adamw", {}), ("muon", EXACT)):
        (one, alone), (many, together) = pair(key, **options)
        together.compile(backend="eager")
        for step in range(5):
            for model, opt in ((one, alone), (many, together)):
                push(model, step)
                opt.step()
        close(weights(many), weights(one), 1e-10, key)


def forecast(rank, world):
    """The bytes that are sent are those that the plan names; messages within a small bound send as many."""
    for key, options in (
        ("muon", {}),
        ("lamb", {}),
        ("hyperball", {}),
        ("adamw", {}),
        ("muon", {"wire_dtype": "bfloat16"}),
    ):
        for bound in (64, 1e-4):
            model = fsdp(Bag(torch.float32))
            opt = gd.optimizer(key, model, rules=RULES, workspace_mb=bound, **options)
            plan = opt.assignment
            sent = opt.bytes_sent
            for step in range(2):
                push(model, step)
                opt.step()
                assert opt.bytes_sent - sent == plan.bytes_sent[rank], (key, options)
                sent = opt.bytes_sent
            text = str(gd.explain(opt))
            assert f"rank {rank}: owns {sum(share.owner == rank for share in plan.shares)} blocks" in text
            assert ("whole at rank" in text) == (key != "adamw")
            assert opt.state_bytes() > 0


def narrow(rank, world):
    """Gradients and directions that travel in bfloat16 are rounded to it, and copies stay equal."""
    shard = hsdp if world == 4 else fsdp
    found = []
    for options in ({}, {"wire_dtype": "bfloat16"}):
        model = shard(Bag(torch.float32))
        opt = gd.optimizer("muon", model, rules=RULES, **options)
        for step in range(3):
            push(model, step)
            opt.step()
        same_everywhere(model, "narrow")
        found.append(weights(model))
    close(found[1], found[0], 1e-2, "bfloat16 on the way")
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def different_plans(rank, world):
    """Ranks that have built different optimizers are told so, before anything is sent."""
    model = fsdp(Bag())
    rules = [gd.rule("wide", recipe="adamw"), *RULES] if rank else RULES
    opt = gd.Muon(model, rules=rules)
    push(model, 0)
    with pytest.raises(ValueError, match=r"the plans of the ranks differ: rank 0 has .* where rank 1"):
        opt.step()


def refused(rank, world):
    """What cannot be sharded says so at the build."""
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    for key, why in (
        ("ekfac", "projects what it sees"),
        ("singd", "projects what"),
        ("adahessian", "second derivatives"),
    ):
        with pytest.raises(TypeError, match=why):
            gd.optimizer(key, net, loss="cross_entropy") if key != "adahessian" else gd.optimizer(key, net)
    with pytest.raises(TypeError, match=r"'0\.weight' is sharded and cannot be trained by sophia_h: Clipped"):
        gd.SophiaH(net)
    with pytest.raises(TypeError, match="state_dtype='8bit' packs runs of elements"):
        gd.AdamW(net, state_dtype="8bit")
    with pytest.raises(ValueError, match="parallel=False is for DistributedDataParallel"):
        gd.AdamW(net, parallel=False)
    with pytest.raises(ValueError, match="parallel=True needs to know the ranks"):
        gd.AdamW(nn.Linear(2, 2), parallel=True)
    with pytest.raises(ValueError, match="wire_dtype='half' must be one of None, 'bfloat16'"):
        gd.AdamW(net, wire_dtype="half")


def begin(rank, world, name):
    warnings.simplefilter("ignore")
    globals()[name](rank, world)


SMALL = (
    "missing_on_one_rank",
    "broken_on_one_rank",
    "wrappers",
    "half",
    "compiled",
    "forecast",
    "narrow",
    "different_plans",
    "refused",
)


def all_of(rank, world, names):
    for name in names:
        begin(rank, world, name)


def test_two_ranks(tmp_path):
    run(all_of, 2, tmp_path, SMALL)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_copies(tmp_path):
    run(all_of, 4, tmp_path, ("wrappers", "half", "narrow", "forecast"))
