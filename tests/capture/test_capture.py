"""The tap: what is captured equals plain float64 factors, in every way of training, and nothing else is touched."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from guided_descent.capture import LOSSES, Capture, CrossEntropy, LayerIO, Masked, per_sample_norms
from oracles.fisher import ggn, per_sample_gradients, plain_factors

LAYERS = ["conv", "inner", "shared", "head"]
NAMES = list(LOSSES)


class Net(nn.Module):
    """A convolution, in-place activations, a layer that is called twice, and a checkpoint if asked for."""

    def __init__(self, checkpointing=False):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.inner = nn.Linear(4, 5)
        self.shared = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)
        self.checkpointing = checkpointing

    def body(self, x):
        x = self.inner(x).tanh_()
        for _ in range(2):
            x = x + F.relu_(self.shared(x))
        return x

    def forward(self, x):
        x = F.relu_(self.conv(x)).flatten(2).mT
        x = checkpoint(self.body, x, use_reentrant=False) if self.checkpointing else self.body(x)
        return self.head(x.mean(1))


class Labelled(CrossEntropy):
    """Draws the labels it is told, so that the sampled pass can be compared with the real one."""

    def sample(self, out, generator):
        labels = F.one_hot(type(self).labels, out.shape[-1])
        return (out.double().softmax(-1) - labels).to(out.dtype)


class Sums:
    """An observer that adds raw sums, as a consumer does."""

    def __init__(self, approx="expand"):
        self.approx, self.found, self.seen = approx, {}, []

    def __call__(self, name, io):
        self.seen.append((name, io.fresh))
        new = [*(io.gram_inputs(self.approx) if io.fresh else (0, 0)), *io.gram_gradients(self.approx)]
        if not io.fresh:
            new[3] = 0
        self.found[name] = [a + b for a, b in zip(self.found.get(name, [0] * 4), new, strict=True)]

    def factors(self, passes=1):
        """A and B; gradients of k micro-batches of loss / k are multiplied by k."""
        return {name: (a / n, b * passes**2 / t) for name, (a, n, b, t) in self.found.items()}


def data(n=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 6, 6, dtype=torch.float64, generator=generator).to(dtype)
    return x, torch.randint(3, (n,), generator=generator)


def net(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs).double()


def expected(model, approx="expand"):
    x, y = data()
    return plain_factors(model, LAYERS, x, lambda out: F.cross_entropy(out, y, reduction="sum"), len(y), approx)


def close(found, wanted, tol=1e-6):
    assert sorted(found) == sorted(wanted)
    for name, pair in wanted.items():
        for got, want in zip(found[name], pair, strict=True):
            assert (got.double() - want).norm() <= tol * want.norm(), name


def train(model, capture, *, chunks=1, dtype=torch.float64, autocast=None, scaler=None, x_dtype=None):
    """One step of ``chunks`` micro-batches."""
    x, y = data()
    capture.arm(1)
    for part, label in zip(x.to(x_dtype or dtype).chunk(chunks), y.chunk(chunks), strict=True):
        Labelled.labels = label
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(model(part), label) / chunks
        (loss if scaler is None else scaler.scale(loss)).backward()
    passes = capture.passes
    capture.disarm()
    return passes if capture.fisher == "empirical" else 1


FISHERS = pytest.mark.parametrize("fisher", ["empirical", "mc"])


@FISHERS
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_are_the_plain_ones(fisher, approx):
    model, sums = net(), Sums(approx)
    capture = Capture(model, LAYERS, sums, fisher=fisher, loss=Labelled())
    for _ in range(2):  # a second step counts afresh
        sums.found.clear()
        close(sums.factors(train(model, capture)), expected(model, approx), 1e-12)
    assert sorted(sums.seen) == sorted([(name, True) for name in LAYERS] * 2)  # the shared layer once


@FISHERS
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_accumulation_over_four_micro_batches(fisher, approx):
    model, sums = net(), Sums(approx)
    capture = Capture(model, LAYERS, sums, fisher=fisher, loss=Labelled())
    passes = train(model, capture, chunks=4)
    assert capture.passes == 4
    close(sums.factors(passes), expected(model, approx), 1e-12)


@FISHERS
def test_checkpointing_counts_once(fisher):
    model, sums = net(checkpointing=True), Sums()
    capture = Capture(model, LAYERS, sums, fisher=fisher, loss=Labelled())
    close(sums.factors(train(model, capture)), expected(net()), 1e-12)
    assert len(sums.seen) == 4
    gradients = {name: p.grad for name, p in model.named_parameters()}
    plain = net()
    F.cross_entropy(plain(data()[0]), data()[1]).backward()
    for name, p in plain.named_parameters():
        assert torch.equal(p.grad, gradients[name])


@FISHERS
def test_recomputation_leaves_nothing_behind(fisher):
    model = net(checkpointing=True)
    capture = Capture(model, LAYERS, Sums(), fisher=fisher, loss="cross_entropy")
    capture.arm(1)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    assert not capture._pass.calls


def test_reentrant_checkpointing_is_seen_to_be_missing():
    sums = Sums()
    model = net()
    body = model.body
    model.body = lambda x: checkpoint(body, x, use_reentrant=True)
    train(model, Capture(model, LAYERS, sums, fisher="empirical", loss=None))
    assert sorted(sums.found) == ["conv", "head"]


def test_grad_scaler():
    model, sums = net(), Sums()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    capture = Capture(model, LAYERS, sums, fisher="empirical", loss="cross_entropy", scaler=scaler)
    close(sums.factors(train(model, capture, chunks=2, scaler=scaler)), expected(model), 1e-12)


@FISHERS
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_autocast(fisher, kind):
    model, sums = net().float(), Sums()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    capture = Capture(model, LAYERS, sums, fisher=fisher, loss=Labelled(), scaler=scaler)
    passes = train(model, capture, dtype=torch.float32, autocast=kind, scaler=scaler)
    close(sums.factors(passes), expected(net()), 1e-2)
    assert all(value.dtype == torch.float32 for value, *_ in sums.found.values())


def counting(calls):
    def backend(graph, inputs):
        calls.append(1)
        return graph.forward

    return backend


@FISHERS
@pytest.mark.parametrize("order", ["before", "after", "in place before", "in place after"])
def test_compiled(fisher, order):
    torch._dynamo.reset()
    model, sums, calls = net(), Sums(), []

    def make(around):
        return Capture(around, LAYERS, sums, fisher=fisher, loss=Labelled())

    capture = make(model) if order.endswith("after") else None
    if order.startswith("in place"):
        model.compile(backend=counting(calls), fullgraph=True)
        compiled = model
    else:
        compiled = torch.compile(model, backend=counting(calls), fullgraph=True)
    capture = capture or make(compiled)
    x, y = data()
    F.cross_entropy(compiled(x), y).backward()
    assert len(calls) == 1
    close(sums.factors(train(compiled, capture)), expected(net()), 1e-12)
    F.cross_entropy(compiled(x), y).backward()
    assert len(calls) == 1  # compiled code runs again as it was
    assert len(sums.seen) == 4


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_backends(backend):
    torch._dynamo.reset()
    model, sums = net(), Sums()
    compiled = torch.compile(model, backend=backend)
    capture = Capture(compiled, LAYERS, sums, fisher="mc", loss=Labelled())
    x, y = data()
    plain = F.cross_entropy(compiled(x), y)
    plain.backward()
    close(sums.factors(train(compiled, capture)), expected(net()), 1e-12)
    after = F.cross_entropy(compiled(x), y)
    after.backward()
    assert torch.equal(plain, after)


def test_stances_of_others_are_kept_and_captures_share_one():
    from torch._dynamo import eval_frame

    def stance():
        return eval_frame._stance.stance

    one, two = (Capture(net(), LAYERS, Sums(), fisher="forward", loss=None) for _ in range(2))
    one.arm(1)
    two.arm(1)
    one.disarm()
    assert stance() == "force_eager"
    two.disarm()
    two.disarm()
    assert stance() == "default"
    with torch.compiler.set_stance("eager_on_recompile"):
        one.arm(1)
        assert stance() == "force_eager"
        one.disarm()
        assert stance() == "eager_on_recompile"
    with torch.compiler.set_stance("eager_on_recompile"):
        one.arm(1)
    one.disarm()
    assert stance() == "default"
    one.arm(1)
    del one  # a capture that is dropped lets go
    gc.collect()
    assert stance() == "default"


def test_unarmed_there_is_no_hook():
    model = net()
    capture = Capture(model, LAYERS, Sums(), fisher="mc", loss="cross_entropy")

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    capture.arm(1)
    assert hooks() == 6
    capture.disarm()
    assert hooks() == 0
    capture.arm(2)
    capture.remove()
    assert hooks() == 0
    assert not capture.armed
    with pytest.raises(RuntimeError, match="was removed"):
        capture.arm(3)


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x)


@FISHERS
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3), (4, 2, 2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_in_place_on_views(fisher, shape, bias):
    """A Linear of three axes returns a view, and an operation in place on a view takes its place in the graph."""
    model = nn.Sequential(nn.Linear(3, 5, bias=bias), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=bias)).double()
    x = torch.randn(shape, dtype=torch.float64)
    found, gradients = [], []
    for inplace in (True, False):
        model[1].inplace = inplace
        sums = Sums()
        capture = Capture(model, ["0", "2"], sums, fisher=fisher, loss="mse")
        capture.arm(1)
        model.zero_grad()
        F.mse_loss(model(x), torch.ones_like(x)).backward()
        capture.disarm()
        found.append(sums.factors())
        gradients.append([p.grad for p in model.parameters()])
    close(*found, tol=1e-12)
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_gradients_and_the_users_generator_are_untouched_bitwise(fisher):
    def run(captured):
        torch.manual_seed(0)
        model, fired = Dropping(), []
        if captured:
            capture = Capture(model, ["body.0", "body.3"], lambda *_: None, fisher=fisher, loss="cross_entropy")
            capture.arm(1)
        handles = [p.register_post_accumulate_grad_hook(lambda p: fired.append(1)) for p in model.parameters()]
        out = model(torch.randn(5, 4))
        assert all(p.grad is None for p in model.parameters())
        assert not fired  # nor would DistributedDataParallel have reduced anything
        F.cross_entropy(out, torch.tensor([0, 1, 2, 0, 1])).backward()
        assert len(fired) == len(handles) == 4
        if captured:
            assert capture.passes == 1
            capture.disarm()
        return [p.grad for p in model.parameters()], torch.get_rng_state()

    (plain, state), (captured, other) = run(False), run(True)
    assert all(map(torch.equal, plain, captured))
    assert torch.equal(state, other)


def test_draws_are_a_function_of_seed_step_micro_batch_and_rank():
    model, x = net(), data()[0]

    def draw(step=3, batch=0, **kwargs):
        found = []
        capture = Capture(
            model, ["head"], lambda _, io: found.append(io.d), fisher="mc", loss="cross_entropy", **kwargs
        )
        capture.arm(step)
        for _ in range(batch + 1):
            model(x)
        return found[batch]

    first = draw()
    assert torch.equal(first, draw())
    for other in (draw(step=4), draw(batch=1), draw(seed=1), draw(rank=1)):
        assert not torch.equal(first, other)


# -- exactness ------------------------------------------------------------------------------------------------------


def exact(model, layers, x, loss):
    """(columns' outer products of per-sample gradients over T: the block of each layer, Sums)."""
    blocks, sums = {}, Sums()

    def observe(name, io):
        sums(name, io)
        g = io.per_sample_gradients().flatten(1)
        blocks[name] = blocks.get(name, 0) + g.T @ g / io.terms

    capture = Capture(model, layers, observe, fisher="exact", loss=loss)
    capture.arm(0)
    model(x)
    capture.disarm()
    return blocks, sums


@pytest.mark.parametrize("loss", ["mse", "half_mse", "sum_mse"])
def test_one_linear_layer_with_squared_error_is_its_kronecker_product(loss):
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)).double(), torch.randn(7, 4, dtype=torch.float64)
    dense = ggn(model, x, ["0.weight"], loss)
    [(a, b)] = exact(model, ["0"], x, loss)[1].factors().values()
    torch.testing.assert_close(torch.kron(b, a), dense, rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", NAMES)
def test_one_sample_is_its_kronecker_product_for_every_loss(loss):
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)).double(), torch.randn(1, 4, dtype=torch.float64)
    [(a, b)] = exact(model, ["0"], x, loss)[1].factors().values()
    torch.testing.assert_close(torch.kron(b, a), ggn(model, x, ["0.weight"], loss), rtol=0, atol=1e-14)


def test_expand_is_exact_for_a_term_at_every_position_and_reduce_for_their_mean():
    layer, x = nn.Linear(4, 3, bias=False).double(), torch.randn(5, 6, 4, dtype=torch.float64)

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x).mean(1)

    for model, name, approx in ((nn.Sequential(layer), "0", "expand"), (Mean(), "layer", "reduce")):
        sums = Sums(approx)
        capture = Capture(model, [name], sums, fisher="exact", loss="mse")
        capture.arm(0)
        model(x)
        capture.disarm()
        [(a, b)] = sums.factors().values()
        torch.testing.assert_close(torch.kron(b, a), ggn(model, x, [f"{name}.weight"], "mse"), rtol=0, atol=1e-14)


class Tokens(nn.Module):
    """Embedding, norms, a map that mixes positions, a convolution: every kind of layer, a term at every position."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(3, 3)
        self.conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.rms = nn.RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.embed(x))
        x = x + self.mix(x.mT).mT.tanh()
        x = x + self.conv(x.mT).mT.tanh()
        return self.head(self.rms(x))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse", "bce"])
def test_per_sample_gradients_of_the_columns_make_the_gauss_newton_block_of_every_layer(loss):
    model = Tokens().double()
    x = torch.tensor([[1, 0, 3], [4, 4, 1], [5, 2, 0]])
    layers = ["embed", "norm", "mix", "conv", "rms", "head"]
    blocks, sums = exact(model, layers, x, loss)
    for name in layers:
        module = model.get_submodule(name)
        names = [f"{name}.{leaf}" for leaf, _ in module.named_parameters()]
        dense = ggn(model, x, names, loss)
        if len(names) == 2:  # [weight, bias] to rows of [weight | bias]
            rows = module.weight.shape[0]
            order = torch.arange(len(dense))
            weight, bias = order[: module.weight.numel()].view(rows, -1), order[module.weight.numel() :].view(-1, 1)
            order = torch.cat([weight, bias], 1).flatten()
            dense = dense[order][:, order]
        torch.testing.assert_close(blocks[name], dense, rtol=0, atol=1e-13)
    assert [fresh for name, fresh in sums.seen if name == "head"] == [True] + [False] * 8  # 3 positions of 3 columns


def test_draws_converge_to_the_exact_gradients():
    """B of 60,000 copies of each of two samples against the exact B: within 5 standard errors, element by element."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    for loss in NAMES:
        _, sums = exact(model, ["0"], x, loss)
        found = []
        capture = Capture(model, ["0"], lambda _, io, to=found: to.append(io.d[:, 0]), fisher="mc", loss=loss)
        capture.arm(5)
        model(x.repeat(60_000, 1))
        capture.disarm()
        products = torch.einsum("ni,nj->nij", found[0], found[0])
        error = products.std(0) / len(products) ** 0.5
        assert ((products.mean(0) - sums.factors()["0"][1]).abs() <= 5 * error).all(), loss
        assert (error < 0.02 * products.mean(0).diagonal().max()).all()


# -- what is seen ---------------------------------------------------------------------------------------------------


def test_per_sample_norms_of_a_training_pass():
    model, (x, y) = net(), data()
    ios = []
    capture = Capture(model, LAYERS, lambda _, io: ios.append(io), fisher="empirical", loss=None)
    train(model, capture)
    gradients = per_sample_gradients(model, x, lambda out, y: F.cross_entropy(out, y, reduction="sum"), y)
    expected = sum(g.flatten(1).square().sum(1) for g in gradients.values())
    torch.testing.assert_close(per_sample_norms(ios), expected)


def test_forward_sees_inputs_alone():
    model, ios = net(), {}
    capture = Capture(model, LAYERS, ios.__setitem__, fisher="forward", loss=None)
    capture.arm(1)
    with torch.autocast("cpu", torch.bfloat16):
        model.float()(data(dtype=torch.float32)[0])
    assert capture.passes == 1
    capture.disarm()
    assert sorted(ios) == sorted(LAYERS)
    for name, io in ios.items():
        assert io.d is None
        a, count = io.gram_inputs()
        close({name: (a / count,)}, {name: expected(net())[name][:1]}, 1e-2)


def test_sums_are_not_taken_in_autocasts_precision():
    """An observer runs outside autocast: its products keep the precision of their operands."""
    layer, kinds = nn.Sequential(nn.Linear(3, 2)), []

    def observe(name, io):
        kinds.append((io.gram_inputs()[0].dtype, torch.is_grad_enabled()))

    for fisher in ("mc", "exact", "forward"):
        capture = Capture(layer, ["0"], observe, fisher=fisher, loss="mse")
        capture.arm(1)
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.randn(4, 3))
        capture.disarm()
    assert kinds == [(torch.float32, False)] * 4


@FISHERS
def test_evaluation_and_transforms_are_not_seen(fisher):
    model, sums = net(), Sums()
    x, y = data()
    capture = Capture(model, LAYERS, sums, fisher=fisher, loss=Labelled())
    capture.arm(1)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    params = dict(model.named_parameters())
    torch.func.grad(lambda p: F.cross_entropy(torch.func.functional_call(model, p, (x,)), y))(params)
    assert not sums.seen
    if fisher == "empirical":
        model(x + 1)  # a forward without a backward vanishes
    close(sums.factors(train(model, capture)), expected(model), 1e-12)


def test_what_came_before_arm_is_not_seen():
    model, sums = net(), Sums()
    x, y = data()
    capture = Capture(model, LAYERS, sums, fisher="empirical", loss=None)
    capture.arm(1)
    loss = F.cross_entropy(model(x), y)
    capture.disarm()
    capture.arm(2)
    loss.backward()
    assert not sums.seen
    assert capture.passes == 0


def test_two_forwards_of_one_backward_are_one_pass():
    model, sums = net(), Sums()
    x, y = data()
    capture = Capture(model, LAYERS, sums, fisher="empirical", loss=None)
    capture.arm(1)
    losses = [F.cross_entropy(model(part), label, reduction="sum") for part, label in zip(x.chunk(2), y.chunk(2))]
    (sum(losses) / 4).backward()  # each forward has 4 terms
    assert capture.passes == 1
    capture.disarm()
    close(sums.factors(), expected(model), 1e-12)


def test_a_second_backward_through_a_forward_warns_and_does_not_count():
    model, sums = net(), Sums()
    x, y = data()
    capture = Capture(model, LAYERS, sums, fisher="empirical", loss=None)
    capture.arm(1)
    loss = F.cross_entropy(model(x), y)
    loss.backward(retain_graph=True)
    with pytest.warns(UserWarning, match="a second backward ran through one forward"):
        loss.backward(retain_graph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss.backward()  # once is enough
    assert (len(sums.seen), capture.passes) == (4, 1)
    capture.disarm()
    close(sums.factors(), expected(model), 1e-12)


class Unused(nn.Module):
    """A layer whose second call no loss sees, and one that is not used at all."""

    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x).tanh(), self.layer(x + 1), self.idle(x)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_calls_that_no_loss_sees_are_left_out(fisher):
    model, found = Unused(), {}
    x = torch.randn(4, 3)
    capture = Capture(model, ["layer", "idle"], found.__setitem__, fisher=fisher, loss="mse")
    capture.arm(1)
    F.mse_loss(model(x)[0], torch.zeros(4, 3)).backward()
    assert list(found) == ["layer"]
    assert torch.equal(found["layer"].a, x.unsqueeze(1))


class Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


@FISHERS
@pytest.mark.parametrize(
    "wrap",
    [
        lambda out: SimpleNamespace(loss=out.sum(), logits=out),
        lambda out: {"loss": out.sum(), "logits": out},
        lambda out: (None, out, out.sum()),
        lambda out: [out],
    ],
)
def test_outputs_of_many_shapes(fisher, wrap):
    model, sums = Wrapped(wrap), Sums()
    names = [f"net.{name}" for name in LAYERS]
    capture = Capture(model, names, sums, fisher=fisher, loss=Labelled())
    capture.arm(1)
    x, Labelled.labels = data()
    out = model(x)
    out = out.logits if hasattr(out, "logits") else out["logits"] if isinstance(out, dict) else out[-2:][0]
    F.cross_entropy(out, Labelled.labels).backward()
    close({k.removeprefix("net."): v for k, v in sums.factors().items()}, expected(model.net), 1e-12)


def test_an_output_that_cannot_be_read_names_the_explicit_form():
    model = Wrapped(lambda out: SimpleNamespace(prediction=out))
    names = [f"net.{name}" for name in LAYERS]
    capture = Capture(model, names, Sums(), fisher="mc", loss="cross_entropy")
    capture.arm(1)
    with pytest.raises(TypeError, match=r"SimpleNamespace.*curvature_pass\(out, loss\)"):
        model(data()[0])
    capture.disarm()

    sums = Sums()
    capture = Capture(model, names, sums, fisher="mc", loss=None)
    capture.arm(1)
    x, Labelled.labels = data()
    out = model(x).prediction
    assert not sums.seen
    with pytest.raises(ValueError, match="no loss is known"):
        capture.curvature_pass(out)
    capture.curvature_pass(out, Labelled())
    capture.curvature_pass(out)  # once taken, a pass stays taken
    capture.curvature_pass(out, Labelled())
    close({k.removeprefix("net."): v for k, v in sums.factors().items()}, expected(model.net), 1e-12)


def test_the_explicit_pass_of_submodules_called_alone():
    model, sums = net(), Sums()
    capture = Capture(model, LAYERS, sums, fisher="mc", loss=None)
    capture.arm(1)
    x, Labelled.labels = data()
    out = model.forward(x)  # past the hooks of the model itself
    capture.curvature_pass(out, Labelled())
    close(sums.factors(), expected(model), 1e-12)


def test_an_explicit_loss_for_a_pass_that_was_automatic_is_refused():
    capture = Capture(net(), LAYERS, Sums(), fisher="mc", loss="cross_entropy")
    capture.arm(1)
    out = capture.root(data()[0])
    capture.curvature_pass(out)  # without effect
    assert capture.passes == 1
    with pytest.raises(ValueError, match="has had its pass"):
        capture.curvature_pass(out, "mse")
    capture.disarm()
    capture.curvature_pass(out, "mse")  # without effect while not armed


def test_padding_is_left_out_by_a_mask():
    """Batches with and without two ignored tokens give the same factors, when those change nothing else."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(3, 4, 3, dtype=torch.float64)
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 3] = False
    found = []
    for inputs, loss in ((x, Masked(LOSSES["cross_entropy"], mask)), (x[:, :3], LOSSES["cross_entropy"])):
        sums = Sums()
        capture = Capture(model, ["0", "2"], sums, fisher="exact", loss=None)
        capture.arm(1)
        capture.curvature_pass(model(inputs), loss)
        capture.disarm()
        found.append(sums.factors())
    for name in ("0", "2"):
        torch.testing.assert_close(found[0][name][1], found[1][name][1])


def test_hooks_that_change_a_layers_output_come_after_it():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)).double()
    model[0].register_forward_hook(lambda m, args, out: 3 * out)
    x = torch.randn(4, 3, dtype=torch.float64)
    blocks, _ = exact(model, ["0"], x, "mse")
    dense = ggn(model, x, ["0.weight", "0.bias"], "mse")
    order = torch.tensor([0, 1, 2, 6, 3, 4, 5, 7])
    torch.testing.assert_close(blocks["0"], dense[order][:, order])


def test_the_model_may_be_a_layer_and_inputs_keywords():
    layer, found = nn.Linear(3, 2), []
    capture = Capture(layer, {"": layer}, lambda _, io: found.append(io), fisher="mc", loss="mse")
    capture.arm(1)
    layer(input=torch.ones(4, 3))
    assert (found[0].a.shape, found[0].d.shape) == ((4, 1, 3), (4, 1, 2))


def test_an_input_changed_in_place_is_refused():
    """Autocast lets it pass, as torch keeps a cast copy; what the layer read is gone all the same."""

    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            y = self.layer(x)
            x.add_(1)
            return y

    model = Careless()
    capture = Capture(model, ["layer"], lambda *_: None, fisher="mc", loss="mse")
    capture.arm(1)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="layer: its input was changed in place"),
    ):
        model(torch.ones(2, 3))


def test_calls_that_cannot_be_joined_are_refused():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + self.layer(x[:1])

    model = Uneven()
    capture = Capture(model, ["layer"], lambda *_: None, fisher="mc", loss="mse")
    capture.arm(1)
    with pytest.raises(RuntimeError, match=r"batches of \[1, 4\]"):
        model(torch.ones(4, 3))


def test_copies_and_pickles_of_an_armed_model_carry_no_hook():
    model, sums = nn.Sequential(nn.Linear(3, 2)), Sums()
    capture = Capture(model, ["0"], sums, fisher="mc", loss="mse")
    capture.arm(1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(torch.ones(2, 3))
    assert not sums.seen
    model(torch.ones(2, 3))
    assert len(sums.seen) == 1


def test_inputs_are_freed_after_the_backward():
    """The graph lives as long as the loss does; what was captured does not."""

    def calls():
        return [o for o in gc.get_objects() if type(o).__name__ == "_Call"]

    others = calls()
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    capture = Capture(model, ["0", "1"], lambda *_: None, fisher="empirical", loss=None)
    capture.arm(1)
    loss = model(torch.ones(2, 3)).sum()
    loss.backward()
    mine = [call for call in calls() if not any(call is other for other in others)]
    assert len(mine) == 2
    assert all(call.x is None and call.d is None for call in mine)


# -- what is refused ------------------------------------------------------------------------------------------------


def test_refusals():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def make(layers, model=model, **kwargs):
        return Capture(model, layers, lambda *_: None, **{"fisher": "mc", "loss": "mse", **kwargs})

    with pytest.raises(ValueError, match=r"1: cannot be captured\. ReLU is not one of the exact types"):
        make(["1"])
    with pytest.raises(ValueError, match="other: this Linear is not a submodule"):
        make({"other": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="b and a are one module"):
        make({"a": model[0], "b": model[0]})
    with pytest.raises(ValueError, match="layers is empty"):
        make([])
    with pytest.raises(ValueError, match="fisher='true': choose one of mc, exact, empirical, forward"):
        make(["0"], fisher="true")
    with pytest.raises(ValueError, match="loss='mae' is unknown"):
        make(["0"], loss="mae")
    with pytest.raises(ValueError, match="DataParallel"):
        make(["0"], model=nn.DataParallel(model))


def test_a_layer_that_changes_after_the_build_is_refused_when_arming():
    model = nn.Sequential(nn.Linear(3, 3))
    capture = Capture(model, ["0"], lambda *_: None, fisher="mc", loss="mse")
    nn.utils.parametrizations.spectral_norm(model[0])
    with pytest.raises(ValueError, match="parametrized"):
        capture.arm(1)
    assert not capture.armed


def test_an_observer_gets_detached_tensors():
    model, ios = net(), []
    capture = Capture(model, LAYERS, lambda _, io: ios.append(io), fisher="mc", loss="cross_entropy")
    capture.arm(1)
    model(data()[0])
    assert all(isinstance(io, LayerIO) and not io.a.requires_grad and not io.d.requires_grad for io in ios)
