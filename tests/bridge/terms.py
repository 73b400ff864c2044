"""Random Erlang terms for property tests."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.term import Atom, BitBinary, Export, ImproperList, Pid, Port, Ref, Term

_word = st.integers(0, 2**32 - 1)
_creation = st.integers(1, 2**32 - 1)  # 0 means "any" in old identifiers

atoms = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=255).map(Atom)
plain_atoms = atoms.filter(lambda atom: atom not in ("true", "false"))
nodes = st.sampled_from(["a@b", "n\u00f6de@127.0.0.1", "x" * 120 + "@" + "\u20ac" * 90]).map(Atom)
pids = st.builds(Pid, nodes, _word, _word, _creation)
ports = st.builds(Port, nodes, st.integers(0, 2**64 - 1), _creation)
refs = st.builds(Ref, nodes, _creation, st.lists(_word, min_size=1, max_size=5).map(tuple))
integers = st.one_of(
    st.integers(-(2**33), 2**33), st.integers(0, 300), st.integers(-(2**2100), 2**2100)
)
floats = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def bit_binaries(draw: st.DrawFn) -> BitBinary:
    data = draw(st.binary(min_size=1, max_size=20))
    bits = draw(st.integers(1, 7))
    unused = 8 - bits
    return BitBinary(data[:-1] + bytes((data[-1] >> unused << unused,)), bits)


exports = st.builds(Export, plain_atoms, plain_atoms, st.integers(0, 255))
_scalars: st.SearchStrategy[Term] = st.one_of(
    integers,
    floats,
    st.booleans(),
    plain_atoms,
    st.binary(max_size=40),
    bit_binaries(),
    pids,
    ports,
    refs,
    exports,
)
leaves: st.SearchStrategy[Term] = st.one_of(
    _scalars, st.lists(st.integers(0, 255), max_size=30), st.lists(integers, max_size=9)
)


def _containers(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    items = st.lists(inner, min_size=1, max_size=4).map(tuple)
    improper = st.builds(ImproperList, items, _scalars)
    return st.one_of(st.lists(inner, max_size=6), st.lists(inner, max_size=6).map(tuple), improper)


def _with_maps(inner: st.SearchStrategy[Term]) -> st.SearchStrategy[Term]:
    # Keys of one Python type each, so that no two of them are equal to Python alone.
    keys = st.one_of(plain_atoms, st.binary(max_size=9), pids)
    return st.one_of(_containers(inner), st.dictionaries(keys, inner, max_size=5))


terms_without_maps = st.recursive(leaves, _containers, max_leaves=25)
terms = st.recursive(leaves, _with_maps, max_leaves=25)


def examples(strategy: st.SearchStrategy[Term], num_examples: int) -> list[Term]:
    """The same random terms in every run, for tests that send them all at once."""
    found: list[Term] = []

    @settings(
        max_examples=num_examples,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(term: Term) -> None:
        found.append(term)

    collect()
    return found
