"""Imports of the package point downwards only, stand at the top of their modules, and make no
circle."""

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "parammap"
#: rooms from the bottom to the top: what stands in one row knows those above it in this list, and
#: nothing beside or below itself
ROWS = [
    {"errors", "version"},
    {"tensors"},
    {"families", "formats"},
    {"checkpoint"},
    {"plan"},
    {"execute"},
    {"frameworks"},
    {"proof"},
    {"inspection"},
    {"job"},
    {"cli"},
    {"api"},
    {"__main__"},
]
HEIGHT = {room: height for height, row in enumerate(ROWS) for room in row}
#: what is no room: hooks run inside of trainings, where nothing else of the package is there
APART = {"hooks", "patches", "schemas"}
#: what all frameworks share: of what their records are made
SHARED = {"architecture", "flags", "framework", "target"}
#: third-party packages that only some users have
OPTIONAL = {"ray", "torch"}


def _modules() -> dict[str, ast.Module]:
    paths = [
        path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in APART
    ]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
    ]
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


MODULES = _modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules of this package that a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: imports are absolute"
            for alias in node.names if node.module.split(".")[0] == "parammap" else ():
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (
                alias.name for alias in node.names if alias.name.split(".")[0] == "parammap"
            )


def room_of(module: str) -> str:
    return (module.split(".") + [""])[1]


def test_every_room_has_a_height():
    assert {room_of(name) for name in MODULES} - {""} == set(HEIGHT)


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name)])
def test_imports_point_downwards(module):
    here = room_of(module)
    upwards = [
        other
        for other in imported(MODULES[module])
        if room_of(other) not in ("", here) and HEIGHT[room_of(other)] >= HEIGHT[here]
    ]
    assert not upwards


@pytest.mark.parametrize("module", MODULES)
def test_no_import_hides_in_a_function(module):
    functions = [
        node
        for node in ast.walk(MODULES[module])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    hidden = [
        ast.unparse(node)
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    assert not [line for line in hidden if line.split()[1].split(".")[0] not in OPTIONAL]


def test_no_circles():
    graph = {name: set(imported(tree)) - {name} for name, tree in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    "module", [name for name in MODULES if room_of(name) == "frameworks" and name.count(".") > 2]
)
def test_a_framework_knows_itself_and_megatron_alone(module):
    """Metaseq, DeepSpeed, Merak, Yuan and MindSpore's models descend from Megatron-LM; else no
    framework knows another."""
    own = module.split(".")[2]
    others = [
        other
        for other in imported(MODULES[module])
        if room_of(other) == "frameworks"
        and (other.split(".") + [""])[2] not in {own, "megatron", *SHARED}
    ]
    assert not others


#: the user's view of a checkpoint has its plain name; a target's options are called by their module
SEVERAL = {"Checkpoint", "Options"}


def test_a_class_name_stands_once():
    found = Counter(
        node.name
        for tree in MODULES.values()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    )
    assert {name for name, times in found.items() if times > 1} == SEVERAL


def test_no_file_is_longer_than_a_reader_wants_it():
    lines = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for folder in ("parammap", "convert")
        for path in (ROOT / folder).rglob("*.py")
    }
    most = {path: 80 if path.parts[0] == "convert" else 400 for path in lines}
    assert not {path: count for path, count in lines.items() if count > most[path]}


#: what is of one framework by its purpose
OF_ONE_FRAMEWORK = {
    "parammap.job.repartition": "megatron",
    "parammap.job.combine_shards": "mindspore",
    "parammap.cli.metaseq_scripts": "metaseq",
}


@pytest.mark.parametrize(
    "module", [name for name in MODULES if HEIGHT.get(room_of(name), 0) > HEIGHT["frameworks"]]
)
def test_the_rooms_above_know_frameworks_by_their_records(module):
    folders = {
        other.split(".")[2]
        for other in imported(MODULES[module])
        if room_of(other) == "frameworks" and other.count(".") > 2
    }
    assert folders <= {OF_ONE_FRAMEWORK.get(module)}
