"""Real models, forward and backward: fully sharded, layer by layer, and under DistributedDataParallel."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from mesh import close, run, same_everywhere, weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import guided_descent as gd
from guided_descent.capture import CrossEntropy

#: Roots and no bases: that of a null space would be rounding's choice.
ROOTS = {"precondition_frequency": 2, "start_preconditioning_step": 2}
SIZE = 12  # samples of a batch, for 2, 3 and 4 ranks


class Likeliest(CrossEntropy):
    """Cross-entropy of which the draw is the class with the largest probability, so that ranks draw as one process."""

    def sample(self, out, generator):
        return out.softmax(-1) - F.one_hot(out.argmax(-1), out.shape[-1])


def net(dtype=torch.float64):
    torch.manual_seed(0)
    body = [nn.Sequential(nn.Linear(9, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 9)) for _ in range(2)]
    return nn.Sequential(nn.Linear(6, 9), *body, nn.Linear(9, 5)).to(dtype)


def batch(step, rank=0, world=1, dtype=torch.float64):
    made = torch.Generator().manual_seed(step)
    x = torch.randn(SIZE, 6, generator=made, dtype=torch.float64).to(dtype)
    y = torch.randint(5, (SIZE,), generator=made)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def fsdp(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def by_layer(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules())[:0:-1]:  # inner ones first
        if isinstance(module, nn.Linear) or type(module) is nn.Sequential:
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model, opt, steps, rank=0, world=1, chunks=1, clip=0.0, scaler=None):
    dtype = next(model.parameters()).dtype
    for step in steps:
        opt.zero_grad()
        pieces = list(zip(*(part.chunk(chunks) for part in batch(step, rank, world, dtype))))
        for i, (x, y) in enumerate(pieces):
            later = i < len(pieces) - 1
            sync = contextlib.nullcontext()
            if isinstance(model, DistributedDataParallel):
                sync = model.no_sync() if later else sync
            elif hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(not later)
            with sync:
                loss = F.cross_entropy(model(x), y) / len(pieces)
                (scaler.scale(loss) if scaler else loss).backward()
        if scaler:
            scaler.unscale_(opt)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler:
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()


def pair(key, shard, dtype=torch.float64, **options):
    one = net(dtype)
    many = shard(copy.deepcopy(one))
    return one, gd.optimizer(key, one, **options), many, gd.optimizer(key, many, **options)


def sharded(rank, world):
    """Micro-batches, clipping and a GradScaler; every module in a shard of its own changes nothing, nor its route."""
    for key, options in (("adamw", {}), ("muon", {"ns_dtype": "float64"}), ("shampoo", ROOTS)):
        for shard in (fsdp, by_layer):
            one, alone, many, together = pair(key, shard, **options)
            assert [line.recipe for line in gd.explain(together).lines] == [
                line.recipe for line in gd.explain(alone).lines
            ]
            routes = [[(e.blocks[0].role, e.blocks[0].why) for e in opt.table] for opt in (together, alone)]
            assert routes[0] == routes[1]
            for chunks, clip in ((1, 0.0), (2, 0.3)):
                steps = range(3 * chunks, 3 * chunks + 3)
                train(one, alone, steps, chunks=chunks, clip=clip)
                train(many, together, steps, rank, world, chunks=chunks, clip=clip)
            close(weights(many), weights(one), 1e-9, key)
    one, alone, many, together = pair("muon", fsdp, torch.float32, ns_dtype="float32")
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    train(one, alone, range(3), scaler=scalers[0])
    train(many, together, range(3), rank, world, scaler=scalers[1])
    close(weights(many), weights(one), 1e-4, "with a GradScaler")
    assert scalers[0].get_scale() == scalers[1].get_scale()


CURVED = (
    ("kfac", {"loss": Likeliest()}),
    ("kfac", {"loss": "cross_entropy", "fisher": "empirical"}),
    ("foof", {}),
    ("clars", {}),
)


def layers(rank, world):
    """What is read of layers is added over ranks, and factorised by owners."""
    for key, options in CURVED:
        for shard in (fsdp, by_layer):
            if key != "foof" and key != "clars":
                options = {"factor_frequency": 2, "precondition_frequency": 2} | options
            one, alone, many, together = pair(key, shard, **options)
            assert [line.recipe for line in gd.explain(together).lines] == [
                line.recipe for line in gd.explain(alone).lines
            ]
            for chunks in (1, 2):
                steps = range(3 * chunks, 3 * chunks + 3)
                train(one, alone, steps, chunks=chunks)
                train(many, together, steps, rank, world, chunks=chunks)
            close(weights(many), weights(one), 1e-7, f"{key} {options}")
            same_everywhere(many, key)
    mesh = init_device_mesh("cpu", (world,))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    tp = parallelize_module(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), mesh, plan)
    with pytest.raises(TypeError, match=r"kfac reads layers, and that of '0.weight' is divided among ranks"):
        gd.KFAC(tp, loss="mse")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).view(x.shape[0], -1, 2, 3).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.attn, self.head = nn.Linear(6, 6), Attention(), nn.Linear(6, 5)

    def forward(self, x):
        return self.head(
            self.attn(self.first(x[:, None] * torch.linspace(1, 3, 4, dtype=x.dtype)[None, :, None]))[:, 0]
        )


def clipped(rank, world):
    """QK-clip scales the shards of queries and keys by the largest logits of all ranks."""
    torch.manual_seed(0)
    one = Small().double()
    with torch.no_grad():
        one.attn.q.weight.mul_(8)
    many = fsdp(copy.deepcopy(one))
    alone, together = (gd.MuonClip(m, tau=0.5, ns_dtype="float64") for m in (one, many))
    before = one.attn.q.weight.detach().clone()
    for step in range(3):
        train(one, alone, [step])
        train(many, together, [step], rank, world)
    assert float(one.attn.q.weight.detach().norm()) < 0.9 * float(before.norm())
    close(weights(many), weights(one), 1e-9, "muonclip")


def replicated(rank, world):
    """Ranks that share the work under DistributedDataParallel take the steps of one, and stay equal to the bit."""
    cases = [
        ("muon", {"ns_dtype": "float64"}),
        ("shampoo", ROOTS),
        ("kfac", {"loss": Likeliest(), "factor_frequency": 2, "precondition_frequency": 2}),
        ("adamw", {}),
        ("muon", {"ns_dtype": "float64", "add": [gd.parts.ClipNorm(max_norm=0.1), gd.parts.ScheduleFree()]}),
    ]
    for key, options in cases:
        one = net()
        many = DistributedDataParallel(copy.deepcopy(one))
        alone, together = gd.optimizer(key, one, **options), gd.optimizer(key, many, parallel=True, **options)
        for chunks in (1, 2):
            steps = range(3 * chunks, 3 * chunks + 3)
            train(one, alone, steps, chunks=chunks)
            train(many, together, steps, rank, world, chunks=chunks)
        close(weights(many.module), weights(one), 1e-7, key)
        owned = [share.owner for share in together.assignment.shares]
        assert (set(owned) == set(range(world))) == (key != "adamw"), key
        mine = {name: p.detach().clone() for name, p in many.module.named_parameters()}
        theirs = [None] * world
        dist.all_gather_object(theirs, mine)
        assert all(torch.equal(theirs[0][name], other[name]) for other in theirs for name in mine)
        state = together.state_dict()  # whole on every rank, and good for one process
        plain = net()
        plain.load_state_dict(many.module.state_dict())
        single = gd.optimizer(key, plain, **options)
        single.load_state_dict(state)
        train(plain, single, range(9, 11))
        train(many, together, range(9, 11), rank, world)
        close(weights(many.module), weights(plain), 1e-7, f"{key}, loaded by one")
        together.load_state_dict(single.state_dict())
        assert together.steps == single.steps
    pairs = []
    for shared in (True, None):  # what cannot be shared out is done by every rank, as without
        model = DistributedDataParallel(net())
        opt = gd.EKFAC(model, loss=Likeliest(), factor_frequency=2, precondition_frequency=2, parallel=shared)
        train(model, opt, range(4), rank, world)
        pairs.append(weights(model))
        assert shared is None or not opt.assignment.shares
    close(*pairs, 0.0, "ekfac")


def all_of(rank, world, names):
    warnings.simplefilter("ignore")
    for name in names:
        globals()[name](rank, world)


def test_two_ranks(tmp_path):
    run(all_of, 2, tmp_path, ("sharded", "layers", "clipped", "replicated"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_ranks(tmp_path):
    run(all_of, 3, tmp_path, ("sharded", "layers", "clipped", "replicated"))


def one_rank(rank, world):
    """A mesh of one rank sends nothing at all."""
    model = fsdp(net())
    opt = gd.Muon(model, ns_dtype="float64")
    same = net()
    alone = gd.Muon(same, ns_dtype="float64")
    train(model, opt, [0])
    train(same, alone, [0])
    send = dist.all_to_all_single, dist.all_reduce, dist.all_gather_object
    for name in ("all_to_all_single", "all_reduce", "all_gather_object"):
        setattr(dist, name, None)  # calling it would fail
    opt.step()
    alone.step()
    opt.state_dict()
    dist.all_to_all_single, dist.all_reduce, dist.all_gather_object = send
    assert opt.bytes_sent == 0
    close(weights(model), weights(same), 1e-10, "one rank")


def test_one_rank(tmp_path):
    run(all_of, 1, tmp_path, ("one_rank",))
