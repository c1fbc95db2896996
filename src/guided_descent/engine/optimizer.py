"""The one optimizer class: a ``torch.optim.Optimizer`` whose groups name a recipe each.

It keeps torch's contract (groups, hooks, state dicts, closures) and leaves the work to the engine. Everything that
changes lives in ``param_groups``, ``state`` and the engine, none of which is ever replaced, so that wrappers which copy
the instance's dictionary stay in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from guided_descent.engine import evaluation
from guided_descent.engine.binding import Binder
from guided_descent.engine.compiled import Compiled
from guided_descent.engine.engine import Engine
from guided_descent.engine.packing import canonical
from guided_descent.engine.persistence import load, pack
from guided_descent.engine.policies import POLICIES
from guided_descent.engine.rounding import ROUNDINGS
from guided_descent.engine.state import state_bytes
from guided_descent.parallel.assignment import Assignment
from guided_descent.parallel.sharing import Sharing
from guided_descent.parts.base import Part
from guided_descent.parts.wrapper import Wrapper
from guided_descent.recipes.base import Recipe
from guided_descent.routing import Block, canonical_name

#: Version of the layout of state dicts.
FORMAT = 1
#: Keys of a group that belong to the engine: name -> default.
ENGINE_KEYS: dict[str, Any] = {
    "nonfinite": "skip",
    "rounding": "nearest",
    "state_dtype": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
}

StateDict: TypeAlias = dict[str, Any]


class Optimizer(torch.optim.Optimizer):
    """Runs the recipes of its groups.

    Not built directly: use a class such as ``guided_descent.AdamW``, or ``guided_descent.build``.

    Args:
        groups: Typed groups: ``params``, ``param_names``, the recipe's keys and the engine's keys.
        recipes: The recipe of each group.
        blocks: The blocks of every parameter, by canonical name.
        add: Parts added to every recipe.
        carried: The wrappers of each group, whose parts are among the added ones.
        workspace_mb: Bound of the scratch memory in MiB; a single larger matrix may exceed it, and parts with global
            sums hold all their directions at once.
        seed: Seed of every random draw.
        sharing: How ranks divide the work.
    """

    _engine: Engine

    def _start(
        self,
        groups: list[dict[str, Any]],
        recipes: list[Recipe],
        blocks: dict[str, tuple[Block, ...]],
        add: Iterable[Part] = (),
        carried: Sequence[tuple[Wrapper, ...]] = (),
        workspace_mb: float = 64.0,
        seed: int = 0,
        sharing: Sharing | None = None,
    ) -> None:
        self._recipes: list[Recipe] = []
        self._typed = True
        for group, recipe in zip(groups, recipes):
            complete(group, recipe, seed)
            check_policy(group, groups[0])
        super().__init__(groups, {})  # defaults would be written into every group, also of other recipes
        self._carried = list(carried) or [()] * len(groups)
        for source in (recipes[0], *self._carried[0]):
            self.defaults.update(source.values())
        self.defaults.update(ENGINE_KEYS)
        self._recipes.extend(recipes)
        self._typed = False
        binder = Binder(
            self.param_groups,
            self.state,
            self._recipes,
            blocks,
            tuple(add),
            self._carried,
            workspace_mb,
            sharing or Sharing(),
        )
        self._engine = Engine(binder)
        self._engine.bind()

    def _extend(self, group: dict[str, Any], recipe: Recipe, carried: tuple[Wrapper, ...] = ()) -> None:
        """Append one typed group."""
        complete(group, recipe, self.param_groups[0]["seed"])
        check_policy(group, self.param_groups[0])
        for name in ("steps", "skipped", "mode"):
            group[name] = self.param_groups[0][name]
        defaults = dict(self.defaults)
        self.defaults.clear()
        try:
            self.add_param_group(group)
        finally:
            self.defaults.update(defaults)
        self._recipes.append(recipe)
        self._carried.append(carried)

    # -- training --------------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update.

        Args:
            closure: Computes the loss and its gradients; called once with gradients enabled, or as often as the recipe
                needs.

        Returns:
            What the closure returned (first call), or ``None``.

        Raises:
            NonFiniteError: The policy is ``raise``, or ``skip`` has skipped 25 steps in a row.
            RefusedError: 25 steps in a row were skipped, the last one since a part refused it.
            RuntimeError: The optimizer is in evaluation mode.
        """
        if self.param_groups[0]["mode"] != "train":
            raise RuntimeError("step() in evaluation mode: call optimizer.train() before training goes on")
        return self._engine.step(closure)

    def train(self) -> None:
        """Training mode, in which ``step`` works: the parameters are what the last step left, to the bit."""
        self._enter("train", evaluation.hide)

    def eval(self) -> None:
        """Evaluation mode, in which ``step`` raises: the parameters are the averages of methods that keep one.

        Those are Schedule-Free, GPA and Lookahead; with others the parameters stay. The live weights wait in the state,
        for which it takes as much memory as the parameters; so a state dict of this mode trains on as one of the other
        does, and the model's own state dict holds what is to be deployed. Save both in the same mode. Buffers stay, and
        with them the running statistics of the live weights; ``guided_descent.evaluating(model, optimizer)`` does the
        same for the time of a context and asks what to do about those.

        Raises:
            RuntimeError: Inside ``evaluating``.
        """
        self._enter("eval", evaluation.show)

    @torch.no_grad()
    def _enter(self, mode: str, swap: Callable[[Engine], None]) -> None:
        if self.param_groups[0]["mode"] != mode:
            swap(self._engine)
            for group in self.param_groups:
                group["mode"] = mode

    @torch.no_grad()
    def evaluation_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The averages of methods that keep one, as ``guided_descent.evaluating`` asks for them.

        Args:
            model: The module that will hold them: the trained one, a wrapper around it, or a copy of one from which the
                optimizer was built.

        Returns:
            Weights by canonical name, in the work dtype. Parameters that keep no average or have not been updated are
            left out; in evaluation mode all are, since they hold them already.

        Raises:
            ValueError: The model holds none of the averaged parameters and none of their names.
        """
        if self.param_groups[0]["mode"] == "eval":
            return {}
        own = {p.index: p for p in self._engine.bind().parameters}
        weights = evaluation.evaluation_weights(self._engine)
        theirs = {id(tensor): canonical_name(name) for name, tensor in model.named_parameters()}
        found = {theirs.get(id(own[i].tensor)): value for i, value in weights.items()}
        named = {name: value for name, value in found.items() if name is not None}
        if weights and not named:
            names = set(theirs.values())
            named = {own[i].name: value for i, value in weights.items() if own[i].name in names}
            if not named:
                raise ValueError(
                    f"the model has no parameter of this optimizer, whose names begin with {own[min(weights)].name!r}: "
                    "give the model that it trains, or build it from the model so that it knows the names"
                )
        return named

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile the parts; learning rates and other numbers may change without a new graph.

        Args:
            backend: Backend of ``torch.compile``.
        """
        self._engine.compiled = Compiled(self._engine.work, backend)
        self._engine.binder.graphs = True
        self._engine.forget()

    def materialize_state(self) -> None:
        """Allocate the state of every parameter that has a device; done at build except for meta parameters."""
        self._engine.bind()

    # -- what there is to see --------------------------------------------------------------------------------------

    @property
    def steps(self) -> int:
        """Accepted steps: those that were not skipped."""
        return int(self.param_groups[0]["steps"])

    @property
    def skipped(self) -> int:
        """Steps skipped because of a non-finite gradient, or since a part refused them."""
        return int(self.param_groups[0]["skipped"])

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipe of each group."""
        return tuple(self._recipes)

    def audit(self) -> dict[str, dict[str, int]]:
        """Events counted since the optimizer was built, by parameter: orthogonalizations, refreshes, fallbacks.

        ``refreshes`` and ``skipped_refreshes`` (nothing had drifted) count tasks, one for each side of a matrix, say;
        ``captures`` steps whose passes told a layer's statistics; ``fallbacks`` factorisations that failed at first;
        ``repairs`` statistics that were restarted or left out.
        """
        return {name: dict(counts) for name, counts in self._engine.audit.items()}

    def state_bytes(self) -> int:
        """Bytes of optimizer state held now, scratch excluded."""
        self._engine.bind()
        shared = [v for group in self.param_groups for v in group["extra"].values() if isinstance(v, Tensor)]
        return sum(map(state_bytes, self.state.values())) + sum(v.numel() * v.element_size() for v in shared)

    @property
    def assignment(self) -> Assignment | None:
        """Which rank owns which block, with FLOPs and bytes sent by rank; ``None`` where no ranks share the work."""
        owners = self._engine.bind().owners
        return None if owners is None else owners.assignment(self.param_groups)

    @property
    def bytes_sent(self) -> int:
        """Bytes of gradients, directions and state that have gone from this rank to others since the build.

        A step in which every parameter has a gradient sends what ``assignment`` forecasts.
        """
        return self._engine.binder.sharing.tally.sent

    @property
    def workspace_bytes(self) -> int:
        """Bytes of scratch held between steps."""
        return self._engine.work.nbytes

    # -- what the training loop tells --------------------------------------------------------------------------------

    def note(self, kind: str, values: Mapping[str, Tensor]) -> None:
        """Tell the next step what the forward passes have shown, by module name; the largest value counts.

        Args:
            kind: What is noted: ``max_logits``, the largest attention logit of each head [H], for QK-clip.
            values: Tensors, by the full name of the module.
        """
        self._engine.note(kind, values)

    def due(self, what: str = "curvature") -> bool:
        """Whether the passes before the next step feed curvature estimates, so that a curvature pass is wanted.

        Args:
            what: ``curvature`` for any of them, ``hessian`` for those that ``hessian_pass`` feeds.

        Raises:
            ValueError: ``what`` is something else.
        """
        sources = {"curvature": ("hessian", "labels"), "hessian": ("hessian",)}
        if what not in sources:
            raise ValueError(f"due({what!r}): choose one of {', '.join(map(repr, sources))}")
        reads = what == "curvature" and self._engine.observer is not None and self._engine.observer.armed
        return reads or self._engine.diagonal.due(*sources[what])

    def curvature_pass(self, out: Any, loss: Any = None) -> None:
        """Backpropagate sampled labels from the model's output, before the real backward pass; nothing else changes.

        Needed only where the optimizer was built without ``loss``; else it happens by itself in the forward pass.

        Args:
            out: The model's output, with its graph.
            loss: The name of the loss or a ``Loss``; the one given at the build, if left out.

        Raises:
            RuntimeError: The recipe reads no layers.
        """
        observer, diagonal = self._engine.observer, self._engine.diagonal
        samples = any(recipe.samples_labels for recipe in self._recipes)
        if observer is None and not samples:
            raise RuntimeError("curvature_pass: no recipe of this optimizer reads layers or samples labels")
        if observer is not None and observer.armed:
            observer.capture.curvature_pass(out, loss)
        if samples:
            diagonal.curvature_pass(out, loss)

    def hessian_pass(self, loss: Tensor) -> None:
        """Multiply the Hessian of the loss by a random probe, before ``loss.backward()``; nothing else changes.

        With micro-batches give each loss as you backpropagate it, divided by their number: products add up as gradients
        do. With a ``GradScaler`` give the loss before it is scaled. Where ``due("hessian")`` does not hold it does
        nothing; where it does, the forward pass must have a second derivative, which fused attention and
        ``torch.compile`` have not.

        Args:
            loss: The loss, one element with its graph.

        Raises:
            RuntimeError: No recipe reads the Hessian, or the graph has no second derivative.
            TypeError: The loss is something else.
        """
        if not self._engine.diagonal.reads("hessian"):
            raise RuntimeError("hessian_pass: no recipe of this optimizer reads the Hessian's diagonal")
        self._engine.diagonal.add_hessian(loss)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def state_dict(self) -> StateDict:
        """State and groups in torch's layout: tensors, numbers, strings and lists only; loads with ``weights_only``.

        Parameter-shaped tensors are the live ones, as in torch; factors and counters are copies. Where ranks share the
        work it is collective: every rank calls it, and what an owner holds alone leaves in parts, as ``DTensor`` where
        the parameters are, so that ``torch.distributed.checkpoint`` can save it and load it on any number of ranks.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        self._engine.bind()
        self._engine.refresher.settle()
        packed = pack(self._engine)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, packed)
            packed = packed if changed is None else changed
        return packed

    @_disable_dynamo
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state dict of this optimizer, or of the ``torch.optim`` one that it equals.

        Parameters are matched by name, else by position with one warning. Every tensor keeps the dtype its slot
        declares. Nothing is changed if anything does not fit.

        Raises:
            ValueError: Groups, names, shapes, recipe or structure do not fit; the message names the first misfit.
        """
        given = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, given)
            given = given if changed is None else changed
        load(self._engine, given)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle needs: torch's part, the recipes and the engine without its plan."""
        self._engine.refresher.settle()  # first: what follows is copied in this order
        held = {"_engine": self._engine, "_recipes": self._recipes, "_carried": self._carried, "_typed": False}
        return super().__getstate__() | held

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} (steps {self.steps}, skipped {self.skipped})"]
        for index, group in enumerate(self.param_groups):
            numbers = ", ".join(f"{name}={group[name]}" for _, name, _ in self._engine.binder.declared(index))
            lines.append(f"  {index}: {group['recipe']} for {len(group['params'])} parameters ({numbers})")
        return "\n".join(lines)


def complete(group: dict[str, Any], recipe: Recipe, seed: int) -> None:
    """Fill in and check the keys that every group has.

    Raises:
        ValueError: A value is none of the valid ones.
    """
    group.update(
        peak_lr=float(group["lr"]),
        recipe=recipe.label,
        revision=recipe.revision,
        format=FORMAT,
        seed=seed,
        steps=0,
        skipped=0,
        mode="train",
        extra={},
    )
    for name, default in ENGINE_KEYS.items():
        group.setdefault(name, default)
    group["state_dtype"] = canonical(group["state_dtype"])
    for name, valid in (("nonfinite", POLICIES), ("rounding", ROUNDINGS)):
        if group[name] not in valid:
            raise ValueError(f"{name}={group[name]!r} must be one of {', '.join(map(repr, valid))}")
    for name in ("maximize", "foreach", "fused"):
        if group[name] not in (True, False, None):
            raise ValueError(f"{name}={group[name]!r} must be True, False or None")


def check_policy(group: dict[str, Any], other: dict[str, Any]) -> None:
    """A step is skipped whole or not at all, so the groups must agree on when.

    Raises:
        ValueError: They do not.
    """
    if group["nonfinite"] != other["nonfinite"]:
        raise ValueError(
            f"nonfinite={group['nonfinite']!r} of one group and {other['nonfinite']!r} of another: a step is skipped "
            "for all parameters or for none; give the policy once, to the optimizer"
        )
