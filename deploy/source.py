"""A network as Python source that a person can read: plain layers of torch.nn and a `forward`, with its weights beside it.

The operations are those of the network's graph. Modules of the dense network that take one value and give one become
classes again, the same code with other numbers becomes one class, and layers one after the other become an `nn.Sequential`.
"""

import keyword
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from deploy.expressions import (
    HELPERS,
    acts_in_training_alone,
    default_argument,
    enclosed,
    expression,
    layer_arguments,
    literal,
    quoted,
    required_arguments,
    torch_layers,
)
from models.graph.function import scopes_of
from models.graph.tracing import require_image_size
from models.narrow import NarrowNetwork
from models.narrow.relayout import AddInto, Relayout
from utils.errors import UserError, printable
from utils.images.preparation import is_small, resized_side
from utils.images.spec import ImageSpec

WIDTH, INDENT, MAX_LINE = 100, "    ", 1000
WHOLE = "Network"  # the class of all of it
LONGEST_EXPRESSION = 84  # characters, above which what is written into it becomes a line of its own
MAP_RANK = 4  # of a tensor of which nothing else is known
MOST_POSITIONAL = 5  # arguments of a class that are written without their names
SHORT = {"in_channels": "in", "out_channels": "out", "in_features": "in", "out_features": "out", "num_features": "channels"}


@dataclass(frozen=True)
class PythonSource:
    """The text of a module, and the tensors that its `load` reads."""

    text: str
    tensors: dict[str, Tensor]


def network_source(network: NarrowNetwork, *, title: str, images: ImageSpec, weights: str) -> PythonSource:
    """`network` as a Python module, whose `load()` gives it with the weights that lie in the file `weights` beside it.

    `title` begins the module's docstring, `images` becomes its constants. Raises UserError for a layer or an operation that
    is not torch's own.
    """
    layers = network.bare()
    writer = _ClassWriter(layers)
    both_modes = network.trainable and not any(acts_in_training_alone(layer) for layer in layers.modules())
    writer.write(_read_graph(network.graph(), layers), both_modes=both_modes)
    height, width = images.image_size
    usage = _USAGE.format(weights=_in_docstring(weights), height=height, width=width)
    functional = "import torch.nn.functional as F\n" if re.search(r"\bF\.", "".join(writer.texts)) else ""
    head = [f'"""{_in_docstring(title)}\n\n{usage}"""', _IMPORTS.format(functional=functional), _constants(images, weights)]
    text = "\n\n\n".join(["\n\n".join(head), *writer.helpers.values(), *writer.texts, _LOADING, _preprocessing(images)])
    return PythonSource(text + "\n", {key: value.detach().clone().contiguous() for key, value in writer.tensors.items()})


def _in_docstring(text: str) -> str:
    lines = [printable(line, MAX_LINE) for line in text.split("\n")]
    return "\n".join(lines).replace("\\", "\\\\").replace('"', "'")


_USAGE = """    network = load()                          # with the weights in {weights}, beside this file
    logits = network(normalise(images))       # images (N, 3, {height}, {width}), scaled to [0, 1], red, green, blue
    name = CLASS_NAMES[int(logits[0].argmax())]

preprocess(photo) makes such images, normalised, of a PIL.Image, as the network was tested.
"""
_IMPORTS = """from pathlib import Path

import torch
{functional}from safetensors.torch import load_file
from torch import nn"""
_LOADING = '''def normalise(images):
    """Images (N, 3, H, W), scaled to [0, 1], as the network takes them."""
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def load(path=WEIGHTS):
    """The network with its weights, in evaluation mode."""
    network = Network()
    network.load_state_dict(load_file(path))
    return network.eval()'''


_PREPROCESS = '''def preprocess(image):
    """A PIL.Image of any size as the network was tested on it: (1, 3, {height}, {width}), normalised."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # grey numbers of more than 8 bits
        white = 1 if image.mode == "F" else {white}
        image = Image.fromarray(np.rint(np.asarray(image) * (255 / white)).astype(np.uint8))
    image = image.convert("RGB")
{steps}
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return normalise(pixels.float() / 255)'''
_WHOLE_IMAGE = "    image = image.resize(({width}, {height}), Image.Resampling.BILINEAR)"
_MIDDLE = """    short, long = min(image.size), max(image.size)
    sides = {side}, int({side} * long / short)
    image = image.resize(sides if image.size[0] == short else sides[::-1], Image.Resampling.BILINEAR)
    corner = []
    for have, want in zip(image.size, ({width}, {height}), strict=True):
        corner.append(round((have - want) / 2) if have >= want else -((want - have) // 2))
    image = image.crop((*corner, corner[0] + {width}, corner[1] + {height}))"""


def _preprocessing(images: ImageSpec) -> str:
    """The function that does to an image what `utils.images.preparation` does."""
    height, width = images.image_size
    numbers = {"height": height, "width": width, "side": resized_side(images.image_size)}
    steps = (_WHOLE_IMAGE if is_small(images.image_size) else _MIDDLE).format(**numbers)
    return _PREPROCESS.format(**numbers, steps=steps, white=(1 << images.grey_bits) - 1)


def _constants(images: ImageSpec, weights: str) -> str:
    names = [quoted(name) for name in images.class_names]
    on_one_line = f"CLASS_NAMES = [{', '.join(names)}]"
    in_lines = ["CLASS_NAMES = [", *_filled(names, INDENT), "]"]
    return "\n".join(
        [
            *([on_one_line] if len(on_one_line) <= WIDTH else in_lines),
            f"IMAGE_SIZE = {tuple(images.image_size)}  # height, width",
            f"MEAN = {tuple(images.mean)}",
            f"STD = {tuple(images.std)}",
            f"WEIGHTS = Path(__file__).with_name({quoted(weights)})",
        ]
    )


def _broken(text: str, indent: str = "", *, last: str = "") -> list[str]:
    """`text` in lines of `indent`, broken within its brackets where one is too short for it."""
    if len(indent) + len(text) + len(last) <= WIDTH or not text.endswith((")", "]")):
        return [f"{indent}{text}{last}"]
    code = _QUOTED.sub(lambda found: "-" * len(found[0]), text)  # a bracket or comma of a text is none of the code
    depth, opening, commas = 0, 0, []
    for place in reversed(range(len(code))):  # the last bracket that is in no other
        depth += (code[place] in ")]}") - (code[place] in "([{")
        if depth == 0:
            opening = place
            break
        if depth == 1 and code[place] == ",":
            commas.insert(0, place)
    ends = [*commas, len(text) - 1]
    items = [text[begin + 1 : end].strip() for begin, end in zip([opening, *commas], ends, strict=True)]
    inner = indent + INDENT
    if any("(" in item or "[" in item for item in items):
        lines = [line for item in items for line in _broken(item, inner, last=",")]
    else:
        lines = _filled(items, inner)
    return [f"{indent}{text[: opening + 1]}", *lines, f"{indent}{text[-1]}{last}"]


_QUOTED = re.compile(r"""(["'])(?:\\.|(?!\1).)*\1""")


def _filled(items: Sequence[str], indent: str) -> list[str]:
    """The items with a comma behind each, as many in a line as it has room for."""
    lines: list[str] = []
    for item in items:
        if lines and len(lines[-1]) + len(item) + 2 <= WIDTH:
            lines[-1] += f" {item},"
        else:
            lines.append(f"{indent}{item},")
    return lines


# ---- what a scope consists of ------------------------------------------------------------------------------------------


@dataclass
class _Operation:
    """One operation of a scope: a node of the graph, a whole scope within it (`body`), or several in a chain (`chain`)."""

    value: fx.Node  # what it gives
    inputs: list[fx.Node]
    path: str = ""  # of the module that is called, from the network on
    body: "_Scope | None" = None
    chain: "list[_Operation]" = field(default_factory=list)

    @property
    def is_module(self) -> bool:
        """Whether it calls one module with one value, and nothing else."""
        return bool(self.path) and len(self.inputs) == 1


@dataclass
class _Scope:
    """What a module does: its calls in order, what it is given and what it gives."""

    path: str
    kind: str
    calls: list[_Operation]
    given: fx.Node
    result: fx.Node


def _read_graph(graph: fx.Graph, layers: nn.Module) -> _Scope:
    nodes = list(graph.nodes)
    result = nodes[-1].args[0]
    if not isinstance(result, fx.Node):
        raise UserError("it gives more than its logits, and cannot be written as Python")
    given = [node for node in nodes if node.op == "placeholder"][1]
    operations = [node for node in nodes[:-1] if node.op not in ("placeholder", "get_attr")]
    operations = [node for node in operations if node.users or node.target is require_image_size]
    calls = _grouped(operations, layers, path="", depth=0)
    return _Scope("", "", _chained(calls, result), given, result)


def _grouped(nodes: Sequence[fx.Node], layers: nn.Module, *, path: str, depth: int) -> list[_Operation]:
    """The operations of a scope; those of a module within it are one call where it can be a module of its own."""
    calls, begin = [], 0
    while begin < len(nodes):
        name, kind = _scope_at(nodes[begin], depth)
        end = begin + 1
        while name and end < len(nodes) and _scope_at(nodes[end], depth)[0] == name:
            end += 1
        run = nodes[begin:end]
        if not name:
            calls.append(_single(run[0], layers))
        elif (scope := _own_scope(run, layers, path=name, kind=kind, depth=depth)) is not None:
            calls.append(_as_call(scope))
        else:
            calls += _grouped(run, layers, path=path, depth=depth + 1)
        begin = end
    return calls


def _as_call(scope: _Scope) -> _Operation:
    """The scope, or if it does nothing but run layers one after the other, these."""
    if len(scope.calls) == 1 and scope.calls[0].chain:
        return replace(scope.calls[0], path=scope.path)
    return _Operation(scope.result, [scope.given], path=scope.path, body=scope)


def _scope_at(node: fx.Node, depth: int) -> tuple[str, str]:
    """The module at this depth that called the operation; empty where it was that of the depth before itself."""
    scopes = [scope for scope in scopes_of(node) if scope[0].partition("@")[0] != node.target]
    return scopes[depth] if depth < len(scopes) else ("", "")


def _own_scope(nodes: Sequence[fx.Node], layers: nn.Module, *, path: str, kind: str, depth: int) -> _Scope | None:
    """The operations as a module, where they take one value, give one, and share no layer with others."""
    inside = set(nodes)
    sources = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    given = [source for source in sources if source.op != "get_attr" and source.name != "training"]
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    owned = [node.target for node in nodes if node.op == "call_module" and not _is_relayout(node, layers)]
    owned += [source.target for source in sources if source.op == "get_attr"]
    shared = any(_users_outside(name, nodes[0].graph, inside) for name in owned)
    if len(nodes) < 2 or "@" in path or len(given) != 1 or len(results) != 1 or shared:
        return None
    if not all(name.startswith(f"{path}.") for name in owned):
        return None
    calls = _chained(_grouped(nodes, layers, path=path, depth=depth + 1), results[0])
    return _Scope(path, kind, calls, given[0], results[0])


def _users_outside(name: str, graph: fx.Graph, inside: set[fx.Node]) -> bool:
    for node in graph.nodes:
        readers = [node] if node.op == "call_module" else node.users if node.op == "get_attr" else []
        if node.target == name and any(reader not in inside for reader in readers):
            return True
    return False


def _single(node: fx.Node, layers: nn.Module) -> _Operation:
    is_layer = node.op == "call_module" and not _is_relayout(node, layers)
    inputs = [source for source in node.all_input_nodes if source.op != "get_attr" and source.name != "training"]
    return _Operation(node, inputs, path=node.target if is_layer else "")


def _is_relayout(node: fx.Node, layers: nn.Module) -> bool:
    return node.op == "call_module" and isinstance(layers.get_submodule(node.target), Relayout | AddInto)


def _chained(calls: list[_Operation], result: fx.Node) -> list[_Operation]:
    """Modules that were numbers of the same list and do nothing but follow each other, as one call."""
    while True:
        run = next(_runs(calls, _uses(calls, result)), None)
        if run is None:
            return calls
        begin, end = run
        chain = calls[begin:end]
        joined = _Operation(chain[-1].value, chain[0].inputs, path=chain[0].path.rpartition(".")[0], chain=chain)
        calls = [*calls[:begin], joined, *calls[end:]]


def _uses(calls: Sequence[_Operation], result: fx.Node) -> Counter[fx.Node]:
    """How often each value is read, the result by who called."""
    return Counter([result, *(source for call in calls for source in call.inputs)])


def _runs(calls: Sequence[_Operation], uses: Mapping[fx.Node, int]) -> Any:
    lists = [_list_of(call) for call in calls]
    for begin, name in enumerate(lists):
        if not name:
            continue
        end = begin + 1
        while (
            end < len(calls)
            and lists[end] == name
            and calls[end].inputs == [calls[end - 1].value]
            and uses[calls[end - 1].value] == 1
        ):
            end += 1
        paths = {call.path for call in calls[begin:end]}
        if end - begin > 1 and lists.count(name) == end - begin == len(paths):
            yield begin, end


def _list_of(call: _Operation) -> str:
    head, _, last = call.path.rpartition(".")
    return head if call.is_module and last.isdigit() else ""


# ---- scopes as classes -------------------------------------------------------------------------------------------------


@dataclass
class _Member:
    """What the constructor of a class makes: a layer, an instance of a class, a list of both, an index or a tensor."""

    name: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    parts: "list[_Member]" = field(default_factory=list)
    module: Any = None  # whose tensors it holds

    @property
    def skeleton(self) -> Any:
        return self.name, self.kind, tuple(part.skeleton for part in self.parts)


@dataclass
class _Instance:
    """A scope as it is written: the members and the lines of `forward`, before it is known which numbers are arguments."""

    scope: _Scope
    members: list[_Member]
    lines: list[str]


class _ClassWriter:
    """Writes scopes as classes, the innermost first; `texts` are in order, `tensors` by their names in the network."""

    def __init__(self, layers: nn.Module):
        self.layers = layers
        self.texts: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.helpers: dict[str, str] = {}
        self._made: dict[int, _Member] = {}  # by scope: its class with the arguments
        self._names = {helper.__name__ for helper in HELPERS} | {"Path", "F", WHOLE}

    def write(self, whole: _Scope, *, both_modes: bool) -> None:
        levels: dict[int, list[_Scope]] = {}
        _sort_by_height(whole, levels)
        for height in sorted(levels):
            groups: dict[Any, list[_Instance]] = {}
            for scope in levels[height]:
                if scope is not whole:
                    instance = self._instance(scope)
                    key = (scope.kind, tuple(instance.lines), tuple(member.skeleton for member in instance.members))
                    groups.setdefault(key, []).append(instance)
            for instances in groups.values():
                name = _free_name(instances[0].scope.kind, self._names, joint="")
                self._names.add(name)
                self._write_class(instances, name)
        own = self._instance(whole)
        self._write_class([own], WHOLE, tail="" if both_modes else _EVALUATION_ONLY)
        self._collect(own.members, "")

    def _instance(self, scope: _Scope) -> _Instance:
        members = _Members(self, scope)
        return _Instance(scope, members.found, _forward(scope, members))

    def module_of(self, call: _Operation, name: str) -> _Member:
        if call.chain:
            return _Member(name, "nn.Sequential", parts=[self.module_of(part, "") for part in call.chain])
        if call.body is not None:
            made = self._made[id(call.body)]
            return _Member(name, made.kind, made.arguments, made.parts, made.module)
        layers = torch_layers(self.layers.get_submodule(call.path))
        members = [self._layer_member(layer, call.path) for layer in layers]
        return replace(members[0], name=name) if len(members) == 1 else _Member(name, "nn.Sequential", parts=members)

    def _layer_member(self, layer: nn.Module, path: str) -> _Member:
        kind, arguments = layer_arguments(layer, path)
        if type(layer) in HELPERS:
            self.helpers[kind] = HELPERS[type(layer)].text
        return _Member("", kind, arguments, module=layer)

    def _write_class(self, instances: Sequence[_Instance], name: str, *, tail: str = "") -> None:
        rows = [dict(_slots(instance.members)) for instance in instances]
        slots = list(dict.fromkeys(slot for row in rows for slot in row))
        columns = {slot: tuple(_hashable(row.get(slot, _default(slot))) for row in rows) for slot in slots}
        parameters: dict[Any, str] = {}  # by column
        for slot, column in columns.items():
            if len(set(column)) > 1 and column not in parameters:
                parameters[column] = _free_name(_parameter_name(slot), set(parameters.values()))
        given = {slot: parameters[column] for slot, column in columns.items() if column in parameters}
        lines = [line for member in instances[0].members for line in _declaration(member, member.name, given)]
        head = ", ".join(["self", *parameters.values()])
        self.texts.append(
            "\n".join(
                [
                    f"class {name}(nn.Module):",
                    *_broken(f"def __init__({head})", INDENT, last=":"),
                    f"{INDENT * 2}super().__init__()",
                    *lines,
                    "",
                    f"{INDENT}def forward(self, x):",
                    *instances[0].lines,
                ]
            )
            + tail
        )
        for instance, row in zip(instances, rows, strict=True):
            arguments = {}
            for slot, parameter in given.items():
                arguments.setdefault(parameter, row.get(slot, _default(slot)))
            arguments = {parameter: arguments[parameter] for parameter in parameters.values()}
            self._made[id(instance.scope)] = _Member("", name, arguments, module=instance.members)

    def _collect(self, members: Sequence[_Member], prefix: str) -> None:
        for position, member in enumerate(members):
            path = f"{prefix}{member.name or position}"
            if member.kind == "nn.Sequential":
                self._collect(member.parts, f"{path}.")
            elif isinstance(member.module, list):
                self._collect(member.module, f"{path}.")
            elif isinstance(member.module, nn.Module):
                self.tensors |= {f"{path}.{key}": value for key, value in member.module.state_dict().items()}
            elif isinstance(member.module, Tensor):
                self.tensors[path] = member.module


_EVALUATION_ONLY = """

    def train(self, mode=True):
        if mode:
            raise RuntimeError("this network runs other operations in training: it can only be evaluated")
        return super().train(mode)"""


def _sort_by_height(scope: _Scope, levels: dict[int, list[_Scope]]) -> int:
    def below(calls: Sequence[_Operation]) -> list[_Scope]:
        return [own for call in calls for own in (below(call.chain) if call.chain else [call.body] if call.body else [])]

    height = 1 + max((_sort_by_height(inner, levels) for inner in below(scope.calls)), default=-1)
    levels.setdefault(height, []).append(scope)
    return height


def _slots(members: Sequence[_Member], before: tuple[str, ...] = ()) -> Any:
    """((names, kind, argument), value) of all that a constructor is given."""
    for position, member in enumerate(members):
        names = (*before, member.name or str(position))
        if member.kind == "nn.Sequential":
            yield from _slots(member.parts, names)
        for argument, value in member.arguments.items():
            yield (names, member.kind, argument), value


def _default(slot: Any) -> Any:
    _, kind, argument = slot
    return default_argument(kind, argument) if kind.startswith("nn.") else None


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def _parameter_name(slot: Any) -> str:
    names, _, argument = slot
    return "_".join(dict.fromkeys([*names, *([SHORT.get(argument, argument)] if argument else [])]))


def _free_name(name: str, taken: set[str], *, joint: str = "_") -> str:
    """`name` as an identifier that is not taken, with a number behind where it is."""
    name = re.sub(r"\W", "_", name)
    name = f"layer_{name}" if not name.isidentifier() or keyword.iskeyword(name) else name
    free, count = name, 2
    while free in taken:
        free, count = f"{name}{joint}{count}", count + 1
    return free


def _declaration(member: _Member, name: str, given: Mapping[Any, str]) -> list[str]:
    indent = INDENT * 2
    if member.kind == "index":
        values = given.get(((name,), "index", name))
        lines = [] if values else _broken(f"{name} = {literal(member.arguments[name])}", indent)
        return [*lines, f'{indent}self.register_buffer("{name}", torch.tensor({values or name}), persistent=False)']
    if member.kind in ("parameter", "buffer"):
        value = f"torch.empty({given.get(((name,), member.kind, name)) or literal(member.arguments[name])})"
        if member.kind == "parameter":
            return [f"{indent}self.{name} = nn.Parameter({value})"]
        return [f'{indent}self.register_buffer("{name}", {value})']
    if member.kind == "nn.Sequential":
        parts = [_constructor(part, (name, str(position)), given) for position, part in enumerate(member.parts)]
        return _broken(f"self.{name} = nn.Sequential({', '.join(parts)})", indent)
    return _broken(f"self.{name} = {_constructor(member, (name,), given)}", indent)


def _constructor(member: _Member, names: tuple[str, ...], given: Mapping[Any, str]) -> str:
    if member.kind == "nn.Sequential":
        parts = [_constructor(part, (*names, str(position)), given) for position, part in enumerate(member.parts)]
        return f"nn.Sequential({', '.join(parts)})"
    is_layer = member.kind.startswith("nn.")
    positional = required_arguments(member.kind) if is_layer else list(member.arguments)
    if not is_layer and len(positional) > MOST_POSITIONAL:
        positional = []
    slots = {slot: parameter for slot, parameter in given.items() if slot[:2] == (names, member.kind)}
    values = {argument: literal(value) for argument, value in member.arguments.items()}
    values |= {argument: parameter for (_, _, argument), parameter in slots.items()}
    ordered = [values.pop(argument) for argument in positional if argument in values]
    return f"{member.kind}({', '.join([*ordered, *(f'{argument}={value}' for argument, value in values.items())])})"


class _Members:
    """The members of a scope, found as its calls are written; `name_of` gives the name of each within its class."""

    def __init__(self, writer: _ClassWriter, scope: _Scope):
        self.writer, self.scope = writer, scope
        self.found: list[_Member] = []
        self._names: dict[str, str] = {}

    def of_call(self, call: _Operation) -> str:
        return self._named(call.path, lambda name: self.writer.module_of(call, name))

    def of_tensor(self, path: str) -> str:
        owner, _, last = path.rpartition(".")
        tensor = getattr(self.writer.layers.get_submodule(owner), last)
        if not isinstance(tensor, Tensor):
            return literal(tensor)
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "buffer"
        return "self." + self._named(path, lambda name: _Member(name, kind, {name: tuple(tensor.shape)}, module=tensor))

    def of_index(self, key: str, places: Sequence[int], *, wanted: str) -> str:
        return self._named(key, lambda name: _Member(name, "index", {name: list(places)}), wanted=wanted)

    def _named(self, path: str, make: Callable[[str], _Member], *, wanted: str | None = None) -> str:
        if path not in self._names:
            relative = path.removeprefix(f"{self.scope.path}.") if self.scope.path else path
            name = wanted or (relative if path != self.scope.path else "layers")
            if hasattr(nn.Module, name) or name == "training":
                name += "_"
            name = _free_name(name, set(self._names.values()))
            self._names[path] = name
            self.found.append(make(name))
        return self._names[path]


# ---- the lines of a forward --------------------------------------------------------------------------------------------


class _Names:
    """The variables of a `forward`: each holds a value as long as a later call, or an expression not yet written, reads it."""

    def __init__(self, scope: _Scope):
        self._last = {source: position for position, call in enumerate(scope.calls) for source in call.inputs}
        self._last[scope.result] = len(scope.calls)
        self._holds = {"x": scope.given}
        self.nested: dict[fx.Node, str] = {}  # expressions that are written into the next call
        self._needs: dict[fx.Node, set[str]] = {}

    def of(self, node: fx.Node) -> str:
        return self.nested.get(node) or next(name for name, value in self._holds.items() if value is node)

    def nest(self, call: _Operation, text: str) -> None:
        self.nested[call.value] = text
        own = [self._needs[source] if source in self.nested else {self.of(source)} for source in call.inputs]
        self._needs[call.value] = set().union(*own)

    def assign(self, node: fx.Node, *, position: int) -> str:
        """A name for what the call at `position` gives: one that nothing reads after it."""
        needed = {name for other in self.nested if other is not node for name in self._needs[other]}
        free = [name for name, value in self._holds.items() if self._last.get(value, -1) <= position and name not in needed]
        name = free[0] if free else _free_name("y", set(self._holds))
        self._holds[name] = node
        return name

    def forget(self, sources: Sequence[fx.Node]) -> None:
        for source in sources:
            self.nested.pop(source, None)


def _forward(scope: _Scope, members: _Members) -> list[str]:
    """The statements of a scope. A value that only the next call reads is written into it, as long as the line is short."""
    names, lines, indent = _Names(scope), [], INDENT * 2
    uses = _uses(scope.calls, scope.result)

    def operand(node: fx.Node) -> str:
        if node.op == "get_attr":
            return members.of_tensor(node.target)
        return "self.training" if node.name == "training" else names.of(node)

    for position, call in enumerate(scope.calls):
        if call.value.target is require_image_size:
            lines += _size_check(call.value)
            continue
        for source in call.inputs:
            if len(_text(call, operand, members)) > LONGEST_EXPRESSION and source in names.nested:
                text = names.nested[source]
                name = names.assign(source, position=position - 1)
                names.forget([source])
                lines += _broken(f"{name} = {text}", indent)
        text = _text(call, operand, members)
        following = scope.calls[position + 1] if position + 1 < len(scope.calls) else None
        if following is None and call.value is scope.result:
            return [*lines, *_broken(f"return {text}", indent)]
        if following is not None and uses[call.value] == 1 and call.value in following.inputs:
            names.nest(call, text)
            names.forget(call.inputs)
            continue
        names.forget(call.inputs)
        lines += _broken(f"{names.assign(call.value, position=position)} = {text}", indent)
    return [*lines, f"{indent}return {operand(scope.result)}"]


def _text(call: _Operation, operand: Callable[[fx.Node], str], members: _Members) -> str:
    if call.path:
        arguments = ", ".join(literal(value, operand) for value in call.value.args) if not call.body and not call.chain else None
        return f"self.{members.of_call(call)}({arguments if arguments is not None else operand(call.inputs[0])})"
    node = call.value
    if node.op != "call_module":
        return expression(node, operand)
    step = members.writer.layers.get_submodule(node.target)
    if isinstance(step, Relayout):
        return _laid_out(step, operand(node.args[0]), node.target, members)
    whole, part = (operand(source) for source in node.args[:2])
    if isinstance(step.widen_whole, Relayout):
        whole = _laid_out(step.widen_whole, whole, f"{node.target}.whole", members)
    if step.axis is not None and not step.widen_part.flat:
        places = members.of_index(f"{node.target}.part", step.widen_part.places.tolist(), wanted="places")
        return f"{enclosed(whole)}.index_add({step.axis}, self.{places}, {part})"
    return f"{whole} + {_laid_out(step.widen_part, part, f'{node.target}.part', members)}"


def _laid_out(step: Relayout, text: str, key: str, members: _Members) -> str:
    """Channels picked by an index; one behind the last is zero."""
    index = f"self.{members.of_index(key, step.origins.tolist(), wanted='channels')}"
    axis, text = step.axis, enclosed(text) if step.flat or step.selects else text
    if step.flat:
        text = f"{text}.unflatten({axis}, ({step.count}, -1))"
    if not step.selects:
        behind = 1 if step.flat else (step.rank or MAP_RANK) - 1 - step.axis if step.axis >= 0 else -1 - step.axis
        text = f"F.pad({text}, {literal((0, 0) * behind + (0, 1))})"
    text = f"{text}.index_select({axis}, {index})"
    return f"{text}.flatten({axis}, {axis + 1})" if step.flat else text


def _size_check(node: fx.Node) -> list[str]:
    _, size, _ = node.args
    indent = INDENT * 2
    return [
        f"{indent}if tuple(x.shape[2:]) != {tuple(size)}:",
        f'{indent}{INDENT}raise ValueError(f"images of {size[1]}x{size[0]} pixels are needed, not {{tuple(x.shape)}}")',
    ]
