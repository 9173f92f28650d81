"""The one reader of JSON documents, and its schemas: what they say is what the library jsonschema
says, of real documents with any of their values changed."""

import json
from copy import deepcopy

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parammap.errors import RefusedError
from parammap.formats import json_document
from parammap.formats.json_schema import Mismatch, compiled
from parammap.tensors import grid
from tests.support import paths

DATA = paths.TESTS / "data"
REAL = {
    "layout": "megatron/torch_dist_in_order_of_keys/iter_0000003/param_map/layout_tp00_pp000.json",
    "param_map": "megatron/cac60ce4_patched_legacy_tp2pp2/param_map/"
    "param_map_buffer0_dp0tp0pp0vpp0.json",
    "config": "transformers/llama_hf/config.json",
}
#: no number with a fraction of zero: there, `integer` is stricter here
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**70),
    st.just(0.5),
    st.text(max_size=3),
    st.sampled_from([[], [1], {}, {"a": 1}, "parammap.layout", "0", "float32"]),
)


def nodes(value, path=()):
    yield path
    for key in (
        value
        if isinstance(value, dict)
        else range(len(value[:3]))
        if value and isinstance(value, list)
        else ()
    ):
        yield from nodes(value[key], (*path, key))


@settings(max_examples=60)
@pytest.mark.parametrize("name", REAL)
@given(data=st.data())
def test_a_schema_means_what_the_library_says(name, data):
    document = json.loads((DATA / REAL[name]).read_text())
    path = data.draw(st.sampled_from([one for one in nodes(document) if one]))
    changed = deepcopy(document)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    how = data.draw(st.sampled_from(["value", "gone", "more"]))
    if how == "value" or isinstance(inner, list):
        inner[path[-1]] = data.draw(VALUES)
    elif how == "gone":
        del inner[path[-1]]
    else:
        inner["other"] = data.draw(VALUES)
    try:
        json_document.check_of(name)(changed)
        ours = True
    except Mismatch:
        ours = False
    schema = json_document.schema(name)
    assert ours == jsonschema.Draft202012Validator(schema).is_valid(changed)


@pytest.mark.parametrize("file", sorted(json_document.SCHEMAS.glob("*.schema.json")))
def test_the_schemas_are_schemas_that_are_known_here(file):
    jsonschema.Draft202012Validator.check_schema(json.loads(file.read_text()))
    assert json_document.check_of(file.name.removesuffix(".schema.json"))


def test_a_keyword_that_is_not_known_is_no_silence():
    with pytest.raises(KeyError, match="uniqueItems"):
        compiled({"type": "array", "uniqueItems": True})


def test_a_mismatch_says_where():
    check = compiled({"properties": {"a": {"items": {"properties": {"b": {"type": "integer"}}}}}})
    with pytest.raises(Mismatch, match=r"a\[1\]\.b is 1\.0 and not integer"):
        check({"a": [{"b": 1}, {"b": 1.0}]})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[" * 10**6, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "more than 64 levels deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"{}{}", "Extra data"),
    ],
)
def test_documents_that_are_none(tmp_path, content, said):
    path = tmp_path / "document.json"
    path.write_bytes(content)
    with pytest.raises(RefusedError, match=f"{path}: is damaged .*{said}.*; take another"):
        json_document.read(path, compiled({}), "take another")


def test_a_document_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "document.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RefusedError, match="has more than"):
        json_document.read(path, compiled({}), "take another")


def test_grids_are_never_as_large_as_what_is_said_of_them():
    huge = range(10**9)
    assert grid.missing({(0, 0), (0, 1)}, (huge, huge)) == (10**18 - 2, (0, 2))
    assert grid.missing({(0, 0), (0, 1)}, (range(1), range(2))) is None
    assert grid.extra({(0, 0), (3, 1)}, (range(1), huge)) == (3, 1)
    assert grid.extra({(0, 0)}, (huge, huge)) is None
