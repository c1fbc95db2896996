"""Build: the one place where a model, a recipe and the user's rules meet to become an optimizer."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn

from guided_descent.capture import LOSSES, as_loss
from guided_descent.capture.attention import AttentionLogits
from guided_descent.engine.observing import Observer
from guided_descent.engine.optimizer import ENGINE_KEYS, Optimizer
from guided_descent.layers import Layer, find_layers, joined, not_read, undivided, watched, why_not_read
from guided_descent.parallel.boxes import is_dtensor
from guided_descent.parallel.sharing import check_readable, settle
from guided_descent.parts.base import Part
from guided_descent.parts.numbers import listed
from guided_descent.parts.wrapper import Wrapper, keys_of, sort_out
from guided_descent.recipes.base import Recipe, lookup
from guided_descent.routing import Block, Entry, Role, Rule, Table, canonical_name, check_not_flattened, route
from guided_descent.scaling import Parametrization, resolve

Params: TypeAlias = nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]

#: Roles that are not decayed when the roles are known, that is when the optimizer is built from a model.
UNDECAYED = frozenset({Role.NORM, Role.BIAS, Role.SCALAR, Role.VECTOR})
_NOT_OPTIONS = {
    "capturable": "CUDA graphs are not supported yet",
    "differentiable": "differentiating through the step is not supported: use torch.optim for that",
}


@dataclasses.dataclass
class Assembly:
    """Groups, a recipe and the wrappers of each, the blocks of every parameter, their table, and the layers to read."""

    groups: list[dict[str, Any]]
    recipes: list[Recipe]
    blocks: dict[str, tuple[Block, ...]]
    entries: tuple[Entry, ...]
    carried: list[tuple[Wrapper, ...]]
    read: dict[str, tuple[Block, ...]] = dataclasses.field(default_factory=dict)


class RoutedOptimizer(Optimizer):
    """An optimizer built from a model, a list of parameters or a list of groups, by one recipe.

    Args:
        params: A model, whose parameters are routed by role; or what torch takes: tensors, ``(name, tensor)`` pairs, or
            groups. Without a model a matrix recipe takes every 2-D tensor and warns once.
        recipe: The recipe.
        rules: Overrides by parameter name, see ``guided_descent.rule``; the first match wins.
        add: Wrappers and parts added to every recipe; the numbers of wrappers become keys of every group.
        nonfinite: ``skip``, ``raise`` or ``ignore`` a step with a non-finite gradient.
        rounding: How half-precision parameters take updates: ``nearest``, ``stochastic``, ``compensated``, ``master``.
        state_dtype: ``8bit`` or ``bfloat16`` to hold the averages of elementwise methods so, see ``engine.packing``; or
            by slot, as ``{"exp_avg": "bfloat16", "exp_avg_sq": "8bit"}``. Tensors of less than 4096 elements, complex
            ones and the state of matrix methods stay as they are.
        maximize: Ascend instead of descend.
        foreach: False for the plain loop over tensors.
        fused: False to leave out torch's fused kernels.
        compile: Compile the parts.
        workspace_mb: Bound of the scratch memory in MiB; K-FAC's clip, a sum over all layers, holds every direction
            beside it.
        seed: Seed of every random draw.
        loss: For recipes that sample labels from the model: ``cross_entropy``, ``mse`` and others of
            ``guided_descent.capture.LOSSES``, or a ``Loss``.
        scaler: The ``GradScaler`` that scales the loss, for recipes that read output gradients.
        parametrization: What multiplies the learning rate of each weight: a tree of ``guided_descent.modula``,
            another ``Parametrization``, or the name of one, ``modula`` or ``flat``. ``None`` is the recipe's own.
        parallel: True for ranks to share the work on matrices under ``DistributedDataParallel``: each is updated by one
            of them, which alone holds its state, so that every rank must then call ``state_dict``. Parameters that are
            sharded (``DTensor``) are always shared.
        mesh: The mesh of all ranks that train together, where neither the parameters nor the model's wrapper tell.
        wire_dtype: ``bfloat16`` to round the gradients and directions of whole matrices on their way between ranks.
    """

    recipe_class: ClassVar[type[Recipe] | None] = None

    def __init__(
        self,
        params: Params,
        recipe: Recipe,
        *,
        rules: Sequence[Rule] = (),
        add: Iterable[Part | Wrapper] = (),
        compile: bool = False,
        workspace_mb: float = 64.0,
        seed: int = 0,
        loss: Any = None,
        scaler: Any = None,
        parametrization: Parametrization | str | None = None,
        parallel: bool | None = None,
        mesh: Any = None,
        wire_dtype: str | None = None,
        **engine: Any,
    ) -> None:
        engine = _engine_options(engine, recipe)
        self._base = recipe
        self._engine_options = engine
        parts, self._wrappers = sort_out(add)
        if isinstance(params, nn.Module) and recipe.reads_layers:
            check_readable(params, recipe.label)
        assembly = assemble(params, recipe, rules, engine, self._wrappers, parametrization)
        self.table = Table(assembly.entries)
        sharing = settle(params, parallel, mesh, wire_dtype, workspace_mb)
        self._start(
            assembly.groups,
            assembly.recipes,
            assembly.blocks,
            parts,
            assembly.carried,
            workspace_mb,
            seed,
            sharing,
        )
        repeats = any(parts.probing or parts.judging for _, parts in self._engine.bind().uses)
        if isinstance(params, nn.Module) and repeats:
            self._engine.buffers = params.buffers
        self._blocks_read = assembly.read
        self._logits: AttentionLogits | None = None
        samples = loss is not None and any(r.samples_labels for r in self.recipes)
        if (loss is not None or scaler is not None) and not (assembly.read or recipe.reads_layers or samples):
            raise ValueError(f"loss= and scaler= are for recipes that read layers, and {recipe.label} does not")
        if isinstance(params, nn.Module):
            self.watch(params, loss=loss, scaler=scaler)
        if compile:
            self.compile()

    def watch(self, model: nn.Module, *, loss: Any = None, scaler: Any = None) -> None:
        """Read this model from now on; done at the build, and needed again for a copied optimizer.

        Layers are read for recipes that need their inputs and output gradients; attention is, for those that clip its
        logits; outputs are, for those that draw labels from them; buffers are, where a step evaluates more than once.
        Where the model is a ``DistributedDataParallel`` or fully sharded, statistics are joined over its ranks.

        Args:
            model: The model whose parameters are trained.
            loss: The loss from which labels are sampled; a name or a ``Loss``. Where it is left out and labels are
                sampled, call ``curvature_pass`` in each step for which ``due`` holds, or the step raises RuntimeError.
            scaler: The ``GradScaler`` that scales the loss.

        Raises:
            ValueError: The recipes disagree on ``fisher``, or no loss has this name.
            TypeError: The loss is an object from which labels cannot be sampled, such as torch's function or module; or
                layers are to be read that are divided among ranks.
        """
        ranks = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
        inner = model if ranks is None else ranks.module
        self._engine.process_group = None if ranks is None else ranks.process_group
        self._engine.buffers = inner.buffers
        if self._logits is not None:
            self._logits.remove()
        attention = self._noted("max_logits")
        owners = self._engine.bind().owners
        if owners is not None and (attention or self._blocks_read) and any(map(is_dtensor, inner.parameters())):
            check_readable(inner, self._base.label)
            self._engine.process_group = owners.ranks.group
        self._logits = AttentionLogits(inner, attention, partial(self.note, "max_logits")) if attention else None
        if self._blocks_read:
            self._read_layers(inner, loss, scaler)
        if any(recipe.samples_labels for recipe in self.recipes):
            _check_loss(loss, "mc")
            self._engine.diagonal.watch(inner, loss)

    def _read_layers(self, model: nn.Module, loss: Any, scaler: Any) -> None:
        kinds = {r.values()["fisher"] for r in self.recipes if r.reads_layers}
        if len(kinds) != 1:
            raise ValueError(f"fisher must be the same in all groups, not {', '.join(sorted(map(repr, kinds)))}")
        [fisher] = kinds
        _check_loss(loss, fisher)
        if self._engine.observer is not None:
            self._engine.observer.capture.remove()
        layers = find_layers(model)
        modules = {n: m for weight in self._blocks_read for n, m in zip(layers[weight].names, layers[weight].modules)}
        blocks = watched(self._blocks_read, layers)
        self._engine.observer = Observer(self._engine, model, modules, blocks, fisher=fisher, loss=loss, scaler=scaler)

    def _noted(self, kind: str) -> list[str]:
        """The modules whose notes of a kind some constraint reads."""
        found = []
        for index, recipe in enumerate(self.recipes):
            if recipe.couples:
                names = self.param_groups[index]["param_names"]
                blocks = [block for name in names for block in self._engine.binder.blocks[name]]
                found += [c.module for c in recipe.constraints(blocks) if c.note == kind and c.module]
        return list(dict.fromkeys(found))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters: routed by shape, and split into a group for each recipe that takes some of them.

        Args:
            param_group: ``params`` (tensors or ``(name, tensor)`` pairs) and any of the recipe's keys.
        """
        if getattr(self, "_typed", False):
            super().add_param_group(param_group)
            return
        taken = sum(len(group["params"]) for group in self.param_groups)
        assembly = assemble([param_group], self._base, (), self._engine_options, self._wrappers, first=taken)
        clash = set(assembly.blocks) & set(self._engine.binder.blocks)
        if clash:
            raise ValueError(
                f"a parameter named {min(clash)!r} is in the optimizer already; give the new one another name"
            )
        self._typed = True
        try:
            for group, recipe, carried in zip(assembly.groups, assembly.recipes, assembly.carried):
                self._extend(group, recipe, carried)
        finally:
            self._typed = False
        self._engine.binder.blocks.update(assembly.blocks)
        self.table = Table((*self.table.parameters, *assembly.entries))
        self._engine.forget()
        self._engine.bind()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy needs: the engine's part, and how it was built."""
        return super().__getstate__() | {
            "_base": self._base,
            "_engine_options": self._engine_options,
            "_wrappers": self._wrappers,
            "_blocks_read": self._blocks_read,
            "_logits": None,
            "table": self.table,
        }


def optimizer_class(recipe_class: type[Recipe]) -> type[RoutedOptimizer]:
    """The ``torch.optim``-style class of a recipe: the recipe's fields are its keywords."""
    own = dataclasses.fields(recipe_class)

    class Built(RoutedOptimizer):
        def __init__(self, params: Params, *args: Any, **options: Any) -> None:
            names = [item.name for item in own]
            if len(args) > len(names):
                raise TypeError(f"{type(self).__name__} takes the parameters and at most {len(names)} hyperparameters")
            for name, value in zip(names, args):
                if name in options:
                    raise TypeError(f"{type(self).__name__} got {name!r} twice")
                options[name] = value
            build_options = {key: options.pop(key) for key in list(options) if key in _BUILD_KEYS}
            super().__init__(params, make_recipe(recipe_class, options), **build_options)

    Built.__name__ = Built.__qualname__ = recipe_class.__name__
    Built.__module__ = "guided_descent"
    Built.recipe_class = recipe_class
    Built.__doc__ = _class_doc(recipe_class)
    Built.__signature__ = _signature(recipe_class)  # type: ignore[attr-defined]
    return Built


def make_recipe(recipe_class: type[Recipe], options: Mapping[str, Any]) -> Recipe:
    """A recipe from keywords; an unknown one is an error that lists the valid ones."""
    fields = dataclasses.fields(recipe_class)
    valid = [item.name for item in fields]
    for name in options:
        if name not in valid:
            label = recipe_class.key or recipe_class.__name__
            near = difflib.get_close_matches(name, [*valid, *_BUILD_KEYS], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{label} has no option {name!r}{hint} (hyperparameters: {listed(fields)}; "
                f"build options: {', '.join(_BUILD_KEYS)})"
            )
    return recipe_class(**options)


def build(
    model: Params,
    recipe: Recipe | str,
    *,
    rules: Sequence[Rule] = (),
    add: Iterable[Part | Wrapper] = (),
    nonfinite: str = "skip",
    compile: bool = False,
    seed: int = 0,
    **options: Any,
) -> RoutedOptimizer:
    """An optimizer for a model from a recipe, of the class that belongs to the recipe.

    Args:
        model: A model, or parameters as torch takes them.
        recipe: A recipe, a registered one's key, or one of the user's own.
        rules: Overrides by parameter name; the first match wins.
        add: Wrappers and parts added to every recipe, such as ``guided_descent.parts.SAM(rho=0.1)``.
        nonfinite: ``skip``, ``raise`` or ``ignore`` a step with a non-finite gradient.
        compile: Compile the parts.
        seed: Seed of every random draw.
        **options: ``rounding``, ``state_dtype``, ``maximize``, ``foreach``, ``fused``, ``workspace_mb``,
            ``parametrization``, ``parallel``, ``mesh``, ``wire_dtype``.

    Example:
        >>> import torch, guided_descent as gd
        >>> opt = gd.build(torch.nn.Linear(4, 2), gd.recipes.Muon(lr=0.02), nonfinite="raise")
        >>> type(opt).__name__, [group["recipe"] for group in opt.param_groups]
        ('Muon', ['muon', 'adamw'])
    """
    made = lookup(recipe)() if isinstance(recipe, str) else recipe
    cls = CLASSES.get(type(made), RoutedOptimizer)
    opt = cls.__new__(cls)
    RoutedOptimizer.__init__(
        opt, model, made, rules=rules, add=add, nonfinite=nonfinite, compile=compile, seed=seed, **options
    )
    return opt


def optimizer(name: str, params: Params, **options: Any) -> RoutedOptimizer:
    """An optimizer by the name of its recipe.

    Args:
        name: A key of ``list_optimizers()``.
        params: A model, or parameters as torch takes them.
        **options: The recipe's hyperparameters and the build options.

    Raises:
        ValueError: The name is unknown, or a value is out of range.
        TypeError: A keyword is unknown.
    """
    return class_of(lookup(name))(params, **options)


def class_of(recipe_class: type[Recipe]) -> Callable[..., RoutedOptimizer]:
    """The optimizer class of a recipe class, made on first use."""
    if recipe_class not in CLASSES:
        CLASSES[recipe_class] = optimizer_class(recipe_class)
    return CLASSES[recipe_class]


CLASSES: dict[type[Recipe], type[RoutedOptimizer]] = {}
_BUILD_KEYS = (
    "rules",
    "add",
    "nonfinite",
    "rounding",
    "state_dtype",
    "maximize",
    "foreach",
    "fused",
    "compile",
    "workspace_mb",
    "seed",
    "loss",
    "scaler",
    "parametrization",
    "parallel",
    "mesh",
    "wire_dtype",
    *_NOT_OPTIONS,
)


# -- assembling groups ---------------------------------------------------------------------------------------------


def assemble(
    params: Params,
    recipe: Recipe,
    rules: Sequence[Rule],
    engine: Mapping[str, Any],
    wrappers: tuple[Wrapper, ...] = (),
    parametrization: Parametrization | str | None = None,
    first: int = 0,
) -> Assembly:
    """Route the parameters and sort them into typed groups; each trainable parameter ends in exactly one.

    Args:
        params: A model, tensors, named tensors, or groups of either.
        recipe: The recipe that takes what no rule takes.
        rules: Overrides.
        engine: Engine keys for every group.
        wrappers: What every group carries.
        parametrization: What multiplies learning rates; ``None`` is the recipe's own.
        first: Number of the first unnamed parameter.
    """
    known = isinstance(params, nn.Module)
    user_groups, named, table = _sources(params, rules, first)
    groups: list[dict[str, Any]] = []
    recipes: list[Recipe] = []
    carried: list[tuple[Wrapper, ...]] = []
    more = keys_of(wrappers)
    blocks: dict[str, tuple[Block, ...]] = {}
    read: dict[str, tuple[Block, ...]] = {}
    shape_only = False
    for overrides, names in user_groups:
        base = _with(recipe, overrides, "this param group", more)
        found: dict[Any, int] = {}
        entries = [table[name] for name in names]
        owners = [_owner(entry, base, more) for entry in entries]
        layers = find_layers(params) if isinstance(params, nn.Module) and _reads([base, *owners]) else {}
        _undivide(entries, owners, base, layers, more)
        joints = _read_layers(entries, owners, layers, known)
        if not any(type(owner) is type(base) for owner in owners):
            # nothing here is for the base recipe, so the group speaks of the auxiliary one: say, norms without decay
            owners = [_with(o, {k: v for k, v in overrides.items() if k in o.numbers()}, "", more) for o in owners]
        for name, entry, owner in zip(names, entries, owners):
            rule = entry.rule
            own_key = (id(owner) if owner is base else owner.label, rule.pattern if rule and _opts(rule) else None)
            if owner.matrix or (base.matrix and (rule is None or rule.recipe is None)):
                check_not_flattened([entry])  # a flat shard is no matrix, so that the auxiliary recipe would take it
            if owner.matrix:
                shape_only = shape_only or not known
            if own_key not in found:
                found[own_key] = len(groups)
                asked = {**overrides, **(rule.options if rule else {})}
                carries = tuple(each.begin_with(asked) for each in wrappers)
                numbers = {key: value for each in (owner, *carries) for key, value in each.values().items()}
                extra = {key: value for key, value in overrides.items() if key not in numbers}
                groups.append({"params": [], "param_names": [], **numbers, **engine, **extra})
                recipes.append(owner)
                carried.append(carries)
            group = groups[found[own_key]]
            group["params"].append(named[name])
            group["param_names"].append(name)
            made = tuple(part for block in joints.get(name, entry.blocks) for part in owner.cut(block))
            blocks[name] = _scaled(entry, made, recipes[found[own_key]], known)
            if owner.reads_layers and name in layers:
                read[name] = blocks[name]
    needed = [name for group, owner in zip(groups, recipes) if owner.parametrization for name in group["param_names"]]
    if parametrization is None and needed:
        parametrization = next(owner.parametrization for owner in recipes if owner.parametrization)
    if parametrization is not None:
        model = params if isinstance(params, nn.Module) else None
        blocks = resolve(parametrization, model, rules, needed).apply(blocks, needed)
        read = {name: blocks[name] for name in read}
    if not groups:
        raise ValueError("there are no parameters to train: the model, list or groups given hold none")
    if recipe.matrix and not any(r.matrix for r in recipes):
        warnings.warn(
            f"no parameter is a matrix that {recipe.label} takes: all go to its auxiliary recipe", stacklevel=4
        )
    if shape_only:
        warnings.warn(
            f"{recipe.label} was given tensors without their model, so that every 2-D tensor, also embeddings and "
            "output layers, is taken for a matrix; pass the model itself to route by role",
            stacklevel=4,
        )
    for index, group in enumerate(groups):
        if index and isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()  # a scheduler that fills it must not touch another group
    return Assembly(groups, recipes, blocks, table.parameters, carried, read)


def _reads(owners: Iterable[Recipe]) -> bool:
    return any(owner.reads_layers for owner in owners)


def _undivide(
    entries: list[Entry], owners: list[Recipe], base: Recipe, layers: Mapping[str, Layer], more: Sequence[str]
) -> None:
    """Make one matrix of each convolution in groups that a recipe which reads layers then takes."""
    for i, entry in enumerate(entries):
        whole = undivided(entry, layers[entry.name]) if entry.name in layers else None
        if whole is not None:
            owner = _owner(whole, base, more)
            if owner.reads_layers:
                entries[i], owners[i] = whole, owner


def _read_layers(
    entries: Sequence[Entry], owners: list[Recipe], layers: Mapping[str, Layer], known: bool
) -> dict[str, tuple[Block, ...]]:
    """Blocks ``[W | b]`` by the names of both parameters; what cannot be read is given to the auxiliary recipe."""
    if not _reads(owners):
        return {}
    if not known:
        label = next(owner.label for owner in owners if owner.reads_layers)
        raise TypeError(
            f"{label} reads the inputs and output gradients of layers: pass the model itself, not its parameters; for "
            "layers that come later build a new optimizer"
        )
    place = {entry.name: i for i, entry in enumerate(entries)}
    made: dict[str, tuple[Block, ...]] = {}
    for i, entry in enumerate(entries):
        name, owner, layer = entry.name, owners[i], layers.get(entry.name)
        if not owner.reads_layers or name in made:
            continue
        why = why_not_read(entry, layer)
        if layer is None or why:
            owners[i] = owner.spare()
            made[name] = not_read(entry.blocks, why)
        elif owner.joins_bias and layer.bias in place and entries[place[layer.bias]].rule is None:
            joint = joined(entry, layer.bias)
            if joint is not None:
                owners[place[layer.bias]] = owner
                made[name] = made[layer.bias] = joint
    return made


def _sources(
    params: Params, rules: Sequence[Rule], first: int
) -> tuple[list[tuple[dict[str, Any], list[str]]], dict[str, Tensor], Table]:
    """The user's groups as (overrides, names), the tensors by name, and their routing table."""
    if isinstance(params, nn.Module):
        table = route(params, rules)
        tensors = _by_name(params)
        return [({}, [entry.name for entry in table])], tensors, table
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors, not one tensor; write [tensor]")
    if isinstance(params, set):
        raise TypeError("params must be ordered, and a set is not: its order changes between runs; write a list")
    given = list(params)
    if not given:
        raise ValueError("optimizer got an empty parameter list")
    grouped = given if isinstance(given[0], dict) else [{"params": given}]
    user_groups: list[tuple[dict[str, Any], list[str]]] = []
    named: dict[str, Tensor] = {}
    for group in cast(list[dict[str, Any]], grouped):
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        given_names = list(group.get("param_names") or [])
        names: list[str] = []
        for position, member in enumerate(members):
            name, tensor = member if isinstance(member, tuple) else (None, member)
            if name is None:
                name = given_names[position] if given_names else f"param.{first + len(named)}"
            _check_tensor(name, tensor, named)
            named[name] = tensor
            names.append(name)
        overrides = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        user_groups.append((overrides, names))
    return user_groups, named, route(list(named.items()), rules)


def _by_name(model: nn.Module) -> dict[str, Tensor]:
    return {canonical_name(name): p for name, p in model.named_parameters()}


def _check_tensor(name: str, tensor: object, named: Mapping[str, Tensor]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"optimizer can only optimize tensors, but {name!r} is a {type(tensor).__name__}")
    if not (tensor.is_leaf or tensor.retains_grad):
        raise ValueError(f"can't optimize {name!r}, a non-leaf tensor: it is computed from others and has no gradient")
    if name in named:
        raise ValueError(f"two parameters are named {name!r}; names must be unique")
    for other, there in named.items():
        if there is tensor:
            raise ValueError(f"{name!r} and {other!r} are the same tensor; each may be in one group, once")


def _opts(rule: Rule) -> bool:
    return bool(rule.options) or rule.recipe is not None


def _owner(entry: Entry, base: Recipe, more: Sequence[str]) -> Recipe:
    """The recipe of a parameter: its rule's, or the one to which the base routes its blocks."""
    rule = entry.rule
    if rule is not None and rule.recipe is not None:
        made = lookup(rule.recipe)() if isinstance(rule.recipe, str) else rule.recipe
        if not isinstance(made, Recipe):
            raise TypeError(f"recipe={rule.recipe!r} of rule {rule.pattern!r} must be a recipe or the key of one")
        return _with(made, rule.options, f"rule {rule.pattern!r}", more, strict=True)
    owners = [base.route(block) for block in entry.blocks]
    if any(owner != owners[0] for owner in owners):
        raise ValueError(f"the blocks of {entry.name!r} go to different recipes; use a rule to give it one")
    if rule is not None and rule.options:
        return _with(owners[0], rule.options, f"rule {rule.pattern!r}", more, strict=True)
    return owners[0]


def _with(
    recipe: Recipe, overrides: Mapping[str, Any], where: str, more: Sequence[str], strict: bool = False
) -> Recipe:
    """A recipe with a group's values; near misses of its keys are errors, other keys are the user's notes.

    ``more`` are keys that the group has from elsewhere.
    """
    own = [item.name for item in dataclasses.fields(recipe)]
    changes = {key: value for key, value in overrides.items() if key in own}
    valid = [*own, *more]
    for key in overrides:
        if key in valid or key in ENGINE_KEYS or key in _NOT_OPTIONS:
            continue
        for name in own:
            aux = getattr(recipe, name)
            if isinstance(aux, Recipe) and key in aux.numbers():
                raise TypeError(f"{where} sets {key!r}, which belongs to {aux.label}: write {name}={{{key!r}: ...}}")
        near = difflib.get_close_matches(key, [*valid, *ENGINE_KEYS], n=1, cutoff=0.75)
        if strict or near:
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(
                f"{where} sets {key!r}, which {recipe.label} does not have{hint} (valid: {', '.join(valid)})"
            )
    return recipe.replace(**changes) if changes else recipe


def _scaled(entry: Entry, blocks: tuple[Block, ...], recipe: Recipe, known: bool) -> tuple[Block, ...]:
    """Blocks with decay switched off where the role is known and is not to be decayed."""
    asked = entry.rule is not None and "weight_decay" in entry.rule.options
    if not known or asked or "weight_decay" not in recipe.numbers():
        return blocks
    return tuple(dataclasses.replace(block, wd_scale=0.0) if block.role in UNDECAYED else block for block in blocks)


def _engine_options(options: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    for name, why in _NOT_OPTIONS.items():
        if options.pop(name, None):
            raise ValueError(f"{name}=True: {why}")
    for name in options:
        if name in ENGINE_KEYS:
            continue
        if name in (item.name for item in dataclasses.fields(recipe)):
            raise TypeError(_no_option(name, options[name], type(recipe)))
        near = difflib.get_close_matches(name, _BUILD_KEYS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"unknown build option {name!r}{hint} (valid: {', '.join(_BUILD_KEYS)})")
    return ENGINE_KEYS | options


def _no_option(name: str, value: Any, recipe_class: type[Recipe]) -> str:
    """What to write where a hyperparameter was given to ``build``."""
    cls, label = recipe_class.__name__, recipe_class.key or recipe_class.__name__
    given = f"{name}={value!r}" if isinstance(value, bool | float | int | str | tuple | None) else f"{name}=..."
    if not recipe_class.__module__.startswith("guided_descent."):
        return f"{name} is a hyperparameter of {label}: give it to the recipe, build(model, {cls}({given}))"
    return (
        f"{name} is a hyperparameter of {label}: give it to the recipe, "
        f"build(model, guided_descent.recipes.{cls}({given})), or write guided_descent.{cls}(model, {given})"
    )


def _check_loss(loss: Any, fisher: str) -> None:
    """A name that no loss has, or an object without what ``fisher`` asks of it, is an error before any forward pass."""
    if as_loss(loss) is None or isinstance(loss, str):
        return
    for method in ("terms", *{"mc": ["sample"], "exact": ["sqrt_hessian"]}.get(fisher, [])):
        if isinstance(loss, type) or not callable(getattr(loss, method, None)):
            name = getattr(loss, "__name__", type(loss).__name__)
            raise TypeError(
                f"loss={name} has no method {method!r}, which fisher={fisher!r} needs: give the name of the loss, one "
                f"of {', '.join(map(repr, LOSSES))}, or an object like those of guided_descent.capture.LOSSES"
            )


def _class_doc(recipe_class: type[Recipe]) -> str:
    fields = "\n".join(
        f"    {item.name}: {item.metadata.get('help', 'recipe of the blocks that are no matrices')}"
        for item in dataclasses.fields(recipe_class)
    )
    head = inspect.cleandoc(recipe_class.__doc__ or "")
    return f"{head}\n\nArgs:\n    params: A model, or what torch.optim takes.\n{fields}\n"


def _signature(recipe_class: type[Recipe]) -> inspect.Signature:
    kinds = inspect.Parameter
    fields = [
        kinds(item.name, kinds.POSITIONAL_OR_KEYWORD, default=item.default, annotation=item.type)
        for item in dataclasses.fields(recipe_class)
    ]
    options = [kinds(name, kinds.KEYWORD_ONLY, default=None) for name in _BUILD_KEYS]
    return inspect.Signature([kinds("params", kinds.POSITIONAL_OR_KEYWORD, annotation=Params), *fields, *options])
